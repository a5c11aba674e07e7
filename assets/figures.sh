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
for step in 0500 1500 5000; do cp "runs/t2i/samples/00$step.png" "figures/demo-$step.png"; done
cp runs/t2i/loss.png figures/loss.png
$train --stage t2v

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

# Measured: what was just trained
for split in seen unseen; do
    $sample --bench --category single pair spatial --split $split --ckpt runs/t2i/ema.pt \
        --json figures/t2i-$split.json --out figures/t2i-$split.png
done
$sample --bench --category single pair spatial --ckpt runs/t2v/ema.pt --json figures/t2v-pictures.json \
    --out figures/t2v-pictures.png
$sample --bench --frames 8 --category motion stillness identity motion-binding --ckpt runs/t2v/ema.pt \
    --json figures/t2v.json --out figures/t2v.png
$sample --bench --frames 8 --category motion --motion off,1,1.1,1.3,2 --ckpt runs/t2v/ema.pt \
    --json figures/motion.json --out figures/motion.png

# Measured: speed
time $sample $shipped "a red circle" --out figures/cold.png
time $sample $shipped "a red circle moving left" --frames 8 --motion 1.2 --out figures/cold.gif
$train --benchmark --preset S/2 --conditioning adaln --size 256 --batch-size 16 --steps 9
$train --benchmark --stage t2v
