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
$train --sample-every 390
for step in 0390 0780 1560 3120 5428; do cp "runs/t2i/samples/00$step.png" "figures/demo-$step.png"; done
cp runs/t2i/loss.png figures/loss.png
$train --stage t2v
for step in 0100 1500 3000 4500; do cp "runs/t2v/samples/00$step.gif" "figures/demo-t2v-$step.gif"; done
cp runs/t2v/loss.png figures/loss-t2v.png

# How the shipped model was made, but for the autoencoder (its ema.pt is assets/nano.pt); two for motion-free guidance
$train --world full --steps 28000 --layout-steps 2000 --ema 0.9995 --out runs/full
video="--stage t2v --init runs/full/ema.pt --lr 1e-3 --ema 0.9995"
$train $video --p-motion-free 0.5 --steps 24000 --out runs/full-t2v
$train $video --p-motion-free 0.5 --steps 4500 --out runs/joint
$train $video --p-motion-free 0 --steps 4500 --out runs/nojoint

# A world whose truth is known; grade it, compare it, look inside; the pictures on top: of the model that ships
shipped="--ckpt $here/assets/nano.pt"
python "$here/data.py" --preview figures/world.png
$sample $shipped "a striped red circle left of a blue star" "three yellow circles" "a large green triangle above a small pink square" "a checkered purple ring" "a blue square and a dotted orange star" "two cyan crosses and a red ring" "an orange cross right of a purple circle" "a dotted pink circle" "a green star below a yellow ring" "a blue circle and a red square" "a large striped yellow square" "four small blue stars" --out figures/hero.png
$sample $shipped "a large red circle moving left" "a green square moving up" "a striped blue ring growing" "a pink star staying still" "a yellow triangle moving right" "a cyan cross shrinking" --frames 8 --out figures/hero.gif
$sample $shipped "a green star and a pink ring" "a striped red circle left of a blue star" --strip --out figures/strip.png
$sample $shipped "a striped red circle left of a blue star" --seed 1 --attention --out figures/attention.png

# Measured: the model that ships, the quarter of an hour, text to video, motion-free guidance
bench() { name=$1; shift; $sample --bench --json "figures/$name.json" --out "figures/$name.png" "$@"; }
for split in seen unseen; do
    time bench all-$split --split $split $shipped
    bench t2i-$split --category single pair spatial --split $split --ckpt runs/t2i/ema.pt
done
time bench quick --quick $shipped
bench shipped-clips --frames 8 --category motion stillness identity motion-binding $shipped
bench t2v --frames 8 --category motion stillness identity motion-binding --ckpt runs/t2v/ema.pt
bench motion --frames 8 --category motion --n 200 --motion off,1,1.1,1.3,2 \
    --ckpt runs/joint/ema.pt,runs/nojoint/ema.pt

# Measured: how text enters, and size
for seed in 0 1; do                                       # all as long as the first, in time
    $train --seed $seed --out runs/cross-$seed
    $train --seed $seed --steps 7100 --conditioning adaln --out runs/adaln-$seed
    $train --seed $seed --steps 11710 --depth 3 --width 96 --heads 3 --out runs/small-$seed
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
