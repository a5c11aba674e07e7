"""
edits.py: how well do --first-frame, --mask and --negative work? Measured on the shapes world.

    python docs/edits.py assets/nano.safetensors --n 100

first frame: the world draws frame 0 of a `motion` prompt; the model draws the other seven.
mask: the world draws "... left of ..." (only pictures with an empty middle); the right half
is drawn anew, with a green star in it.
negative: "a red circle and a blue square"; then "a red circle left of a blue square" as --negative.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data as D
import gentron as G
import sample


def draw(sampler, prompts, seeds, frames=1, given=None, negative=""):
    """As sample.py does by default -> uint8 (B, F, H, W, 3)."""
    return G.generate(sampler.net.model, sampler.net.text, sampler.vae, sampler.net.schedule,
                      prompts, seeds, sampler.size, frames, given=given, negative=negative,
                      cfg=sampler.cfg, sampler=sampler.method, device=sampler.device)


@torch.no_grad()
def encode(sampler, picture):
    """uint8 (H, W, 3) -> latents (1, 1, C, h, w), and the picture after the round trip."""
    z = sampler.vae.encode(G.to_float(picture[None, None]).to(sampler.device))
    return z, G.to_uint8(sampler.vae.decode(z))[0, 0]


def row(what, right):
    """Prints a share with its interval."""
    low, high = sample.wilson(sum(right), len(right))
    D.say(f"{what:64}{np.mean(right):6.0%}  ({low:.0%} .. {high:.0%}), n = {len(right)}")


def first_frames(sampler, n):
    """Is frame 0 kept, is the motion right, and is every frame as the prompt says?"""
    kept, motion, frames = [], [], []
    for k, prompt in enumerate(tqdm(D.prompts("motion", n), leave=False)):
        z, same = encode(sampler, D.truth(prompt, k, sampler.size, 8)[0])
        clip = draw(sampler, [prompt], [k], 8, G.Given(z, first_frame=True))[0]
        verdict = D.judge(clip, prompt)
        kept.append(int(abs(clip[0].astype(int) - same).max()) <= 1)
        motion.append(verdict.parts["motion"])
        frames.append(verdict.numbers["frames_right"] == 1)
    row("first frame: kept to the pixel, after the round trip", kept)
    row("first frame: right motion", motion)
    row("first frame: colour and shape right in every frame", frames)


def masks(sampler, n):
    """Does the judge read the same in the kept half? Is the whole as the new prompt says?"""
    W = sampler.size[1]
    mask = torch.zeros(sampler.size[0] // sampler.vae.down, W // sampler.vae.down)
    mask[:, mask.shape[1] // 2:] = 1
    def left(picture):                                     # what is seen of the left half alone
        half = picture.copy()
        half[:, W // 2:] = D.GROUND
        return sorted((seen.color, seen.shape) for seen in D.read_frame(half))
    prompts = [p for p in D.prompts("spatial", 20 * n) if " left of " in p]
    truths = {p: D.truth(p, k, sampler.size)[0] for k, p in enumerate(prompts)}
    apart = [p for p, truth in truths.items() if all(
        abs(seen.x - 0.5) > seen.radius + 0.03 for seen in D.read_frame(truth))]
    kept, whole = [], []
    for k, prompt in enumerate(tqdm(apart[:n], leave=False)):
        z, same = encode(sampler, truths[prompt])
        new = f"{prompt.split(' left of ')[0]} left of a green star"
        picture = draw(sampler, [new], [k], 1, G.Given(z, 1.0, mask))[0, 0]
        kept.append(left(picture) == left(same))
        whole.append(bool(D.judge(picture[None], new)))
    row("mask: the judge reads the kept half as before", kept)
    row("mask: the whole is as the new prompt says", whole)


def negatives(sampler, n):
    """Without a relation the circle may be anywhere. Where is it, if one side is the negative?"""
    prompt, names = "a red circle and a blue square", ("left of", "right of")
    sides = [f"a red circle {name} a blue square" for name in names]
    for negative in ("", sides[0]):
        clips = [draw(sampler, [prompt], [k], negative=negative)[0]
                 for k in tqdm(range(n), leave=False)]
        what = f"negative: {negative or 'none'}"
        for name, said in (("as the prompt says", prompt), *zip(names, sides)):
            row(f"{what}: {name}", [bool(D.judge(clip, said)) for clip in clips])


def work(argv):
    """Measures all three, and prints a line a number."""
    p = D.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("ckpt", help="ema.safetensors of a video model")
    p.add_argument("--n", type=D.number(int, 1, 10_000), default=100, help="of each (100)")
    args = p.parse_args(argv)
    options, = sample.settings(sample.parser().parse_args(["--ckpt", args.ckpt, "--frames", "8"]))
    sampler = sample.Sampler(options, args.ckpt)
    for measure in (negatives, masks, first_frames):
        measure(sampler, args.n)


if __name__ == "__main__":
    sys.exit(D.run_main(lambda: work(None)))
