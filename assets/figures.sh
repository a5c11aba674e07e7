#!/bin/sh
# Makes again, in the README's order, most numbers and pictures of it that CPU cores can make. In an empty folder:
#
#     sh PATH_TO_THE_REPOSITORY/assets/figures.sh
#
# takes hours. Pictures and JSON come into ./figures, runs into ./runs; tables are printed.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
train="python $here/train.py"
sample="python $here/sample.py"
mkdir -p figures

# What you will see
$train
for step in 1000 2000 5428; do cp "runs/t2i/samples/00$step.png" "figures/demo-$step.png"; done
cp runs/t2i/loss.png figures/loss.png
$train --stage t2v
$train --stage t2v --p-motion-free 0 --init runs/t2i/ema.pt --out runs/t2v-nojoint

# A world whose truth is known; grade it, compare it, look inside; the pictures on top: of the model that ships
shipped="--ckpt $here/assets/nano.pt"
python "$here/data.py" --preview figures/world.png
$sample $shipped "a red circle and a blue square" "a green star" "a yellow ring and a purple triangle" \
    "a pink square" "a cyan circle and an orange cross" "a blue ring" "a green triangle and a pink ring" \
    "an orange star" "a purple cross" "a cyan square and a red triangle" "a blue star and a yellow circle" \
    "a red ring" --out figures/hero.png
$sample $shipped "a red circle moving left" "a green square moving up" "a blue ring growing" \
    "a pink star staying still" "a yellow triangle moving right" "a cyan cross moving down" --frames 8 \
    --out figures/hero.gif
$sample $shipped "a green star and a pink ring" "a red circle and a blue square" --strip --out figures/strip.png
$sample $shipped "a red circle and a blue square" --seed 1 --attention --out figures/attention.png

# Measured: text to image, text to video, motion-free guidance
bench() { name=$1; shift; $sample --bench --json "figures/$name.json" --out "figures/$name.png" "$@"; }
for split in seen unseen; do
    bench "t2i-$split" --category single pair spatial --split $split --ckpt runs/t2i/ema.pt
done
bench t2v --frames 8 --category motion stillness identity motion-binding $shipped
bench t2v-pictures --category single pair spatial $shipped
bench motion --frames 8 --category motion --n 200 --motion off,1,1.1,1.3,2 \
    --ckpt runs/t2v/ema.pt,runs/t2v-nojoint/ema.pt
time bench all $shipped
time bench quick --quick $shipped

# Measured: how text enters, and size
for seed in 0 1; do
    equal="--minutes 15 --steps 100000 --seed $seed"
    $train $equal --out runs/cross-$seed
    $train $equal --conditioning adaln --out runs/adaln-$seed
    $train $equal --depth 3 --width 96 --heads 3 --out runs/small-$seed
done
all=$(for name in cross adaln small; do echo runs/$name-0/ema.pt,runs/$name-1/ema.pt; done | paste -sd,)
bench table2 --category color shape spatial --ckpt "$all"

# Measured: speed
time $sample $shipped "a red circle" --out figures/cold.png
time $sample $shipped "a red circle moving left" --frames 8 --motion 1.2 --out figures/cold.gif
$train --benchmark --preset S/2 --conditioning adaln --size 256 --batch-size 16 --steps 9
for flag in "" "--precision bf16" "--compile" "--checkpoint-activations"; do
    $train --benchmark --preset S/2 --size 256 --batch-size 8 --steps 5 $flag
done
for preset in nano S/2 B/2 L/2; do
    $train --benchmark --preset $preset --size 256 --batch-size 4 --steps 3
done
$train --benchmark --stage t2v

# Measured: a cache, as --stage encode writes it: 4x32x32 latents and features of T5-XXL's width, of random numbers
python - "$here" <<'END'
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import data as D
rng, n = np.random.default_rng(0), D.SHARD
captions = [D.Shapes("full").scene(i % 1000).caption() for i in range(n)]
texts = list(dict.fromkeys(["", *captions]))
tokens = [rng.standard_normal((len(text.split()) + 1, 4096), np.float32) for text in texts]
D.save_json(D.writable("figures/cache/index.json"), {
    "format": "gentron cache", "items": 2 * n, "shard": n, "shape": [1, 4, 32, 32], "frames": 1,
    "size": [256, 256], "fps": 4.0, "data": "random", "seed": 0, "labels": None, "vocabulary": [],
    "vae": "", "encoders": {"spec": "t5", "dims": [4096], "fingerprint": ""}})
for k in range(2):
    D.save_shard("figures/cache", k, rng.standard_normal((n, 1, 4, 32, 32), np.float32), captions,
                 texts, [tokens], rng.standard_normal((len(texts), 4096), np.float32))
END
$train --benchmark --batch-size 64 --data figures/cache
