"""
sample.py: prompt in, picture or clip out.

    python sample.py "a red circle left of a blue square" "a green star"     # -> out.png
    python sample.py "a red circle moving left" --frames 8 --out out.gif     # a video model's clip
    python sample.py --prompts prompts.txt --per-prompt 4 --out samples/     # one file a picture
    python sample.py --bench                                                 # graded, a table

The checkpoint is --ckpt, or the newest run's in runs/, or the one that ships (assets/nano.pt); it
is always printed. Same checkpoint, prompt, seed and flags: same picture, whatever its neighbours.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")            # as in train.py

import argparse
import difflib
import json
import math
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data as D
import gentron as G

# -----------------------------------------------------------------------------
# 1. Flags
# -----------------------------------------------------------------------------

def parser():
    """Every flag, in three groups."""
    p = D.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what to draw")
    g.add_argument("prompt", nargs="*", help="one or more sentences")
    g.add_argument("--prompts", metavar="FILE", help="a text file, one prompt a line")
    g.add_argument("--per-prompt", type=D.number(int, 1, 10_000), default=1, metavar="N",
                   help="pictures a prompt, each from its own seed (1)")
    g.add_argument("--seed", type=D.number(int, 0, 2 ** 31 - 1), default=0)
    g.add_argument("--size", type=D.picture_size, help="H or HxW in pixels (as trained)")
    g.add_argument("--frames", type=D.number(int, 1, 1024), default=1, help="above 1: a clip")
    g.add_argument("--fps", type=D.number(float, 0, 1000, above=True), help="(as trained)")
    g.add_argument("--out", help="FILE.png, FILE.gif, or a folder/ for one file a picture; "
                                 "with --bench a PNG of the failures (out.png, out.gif)")
    g = p.add_argument_group("how")
    g.add_argument("--ckpt", metavar="FILE", help="ema.pt or last.pt of a run")
    g.add_argument("--ema", dest="weights", action="store_const", const="ema", default="ema",
                   help="the averaged weights (default)")
    g.add_argument("--raw", dest="weights", action="store_const", const="weights",
                   help="the weights themselves, which only last.pt holds")
    g.add_argument("--cfg", type=D.number(float, 0, 100), default=4.0, metavar="l_T",
                   help="text guidance, uncond + l_T (cond - uncond); 1 = off (4)")
    g.add_argument("--motion", type=D.number(float, 0, 100), default=1.0, metavar="l_M",
                   help="motion-free guidance of clips; 1 = off, the paper: 1.0 to 1.3 (1)")
    g.add_argument("--steps", type=D.number(int, 1, 1000), default=25)
    g.add_argument("--sampler", choices=tuple(G.SAMPLERS), default="dpm++")
    g.add_argument("--batch-size", type=D.number(int, 1, 4096), default=50, help="at a time (50)")
    g.add_argument("--device", help="cpu, cuda, mps ... (the best there is)")
    g = p.add_argument_group("grading, on the shapes world")
    g.add_argument("--bench", action="store_true",
                   help="draw fixed prompts, let the judge read them, print a table")
    g.add_argument("--quick", action="store_true", help="20 prompts a category, not 100")
    g.add_argument("--split", choices=("seen", "unseen"), default="seen",
                   help="colour-shape pairs of the training, or those held out of it")
    g.add_argument("--category", nargs="+", choices=tuple(D.SCORED_ON), help="some of them only")
    g.add_argument("--json", metavar="FILE", help="every verdict, and all that led to it")
    return p


# -----------------------------------------------------------------------------
# 2. Prompts in
# -----------------------------------------------------------------------------

def read_prompts(args):
    """The prompts of the command line, then those of --prompts. ValueError if there are none."""
    prompts = list(args.prompt)
    if args.prompts:
        try:
            lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{args.prompts} is not UTF-8 text") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        where = f"{args.prompts} holds none" if args.prompts else "none given"
        raise ValueError(f"no prompt, {where}; try: python sample.py \"a red circle\"")
    return prompts


def check_words(encoder, prompts):
    """ValueError for the first word that the model has never read, with the nearest ones it has:
    an unknown word would silently draw something else."""
    for prompt in prompts:
        for word in encoder.unknown(prompt):
            near = difflib.get_close_matches(word, encoder.vocabulary, n=3, cutoff=0.5)
            known = ", ".join(encoder.vocabulary[:12]) + " ..." * (len(encoder.vocabulary) > 12)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it knows {known}"
            raise ValueError(f"'{word}' is not in this model's vocabulary; {hint}")


# -----------------------------------------------------------------------------
# 3. The model
# -----------------------------------------------------------------------------

class Sampler:
    """A checkpoint ready to draw: sampler(prompts, seeds) -> uint8 (n, F, H, W, 3)."""
    def __init__(self, args, path):
        self.args, self.path, self.state = args, path, G.load_checkpoint(path)
        self.device = G.pick_device(args.device)
        self.net = G.build_net(self.state, args.weights).to(self.device)
        self.vae = G.build_vae(self.state).to(self.device)
        self.size = args.size or tuple(self.state["size"])
        self.fps = args.fps or self.state["fps"]
        multiple = self.vae.down * self.net.model.cfg.patch_size
        if any(side % multiple for side in self.size):
            raise ValueError(f"--size {self.size[0]}x{self.size[1]} is not divisible by "
                             f"{multiple}, as this model needs")
        if args.frames > 1 and not self.net.model.cfg.temporal:
            raise ValueError(f"--frames {args.frames} needs a video model, and {path} makes "
                             f"pictures; train one: python train.py --stage t2v")

    def __call__(self, prompts, seeds, what="sampling"):
        args, clips = self.args, []
        with tqdm(total=len(prompts), desc=what, leave=False) as bar:
            for i in range(0, len(prompts), args.batch_size):
                part = slice(i, i + args.batch_size)
                clips.append(G.generate(
                    self.net.model, self.net.text, self.vae, self.net.schedule, prompts[part],
                    seeds[part], self.size, args.frames, args.cfg, args.motion, args.steps,
                    args.sampler, self.device))
                bar.update(len(prompts[part]))
        return np.concatenate(clips)


# -----------------------------------------------------------------------------
# 4. Pictures out
# -----------------------------------------------------------------------------

def output_path(args):
    """--out -> (path, is it a folder?), known to be writable before any work is done."""
    path = Path(args.out or ("out.gif" if args.frames > 1 else "out.png"))
    if str(args.out).endswith(("/", os.sep)) or path.is_dir() or not path.suffix:
        D.writable(path / "captions.jsonl")
        return path, True
    if path.suffix.lower() not in (".png", ".gif"):
        raise ValueError(f"--out {path} is no .png, .gif or folder/; try --out out.png")
    return D.writable(path), False


def write(clips, prompts, path, folder, fps):
    """A folder of single files with their captions.jsonl (train.py reads it), or one labelled
    grid; in a PNG a clip is a film strip, a row a clip."""
    frames = clips.shape[1]
    if folder:
        names = [f"{k:05d}.{'gif' if frames > 1 else 'png'}" for k in range(len(clips))]
        for name, clip in zip(names, clips):
            images = [Image.fromarray(frame) for frame in clip]
            D.save_gif(path / name, images, fps) if frames > 1 else images[0].save(path / name)
        rows = [json.dumps({"file": n, "caption": p}) + "\n" for n, p in zip(names, prompts)]
        (path / "captions.jsonl").write_text("".join(rows), encoding="utf-8")
        return
    columns = min(6, math.ceil(math.sqrt(len(clips))))
    if path.suffix.lower() == ".gif":
        sheets = [D.contact_sheet(clips, prompts, columns, frame=f) for f in range(frames)]
        D.save_gif(path, sheets, fps)
    elif frames > 1:
        cells = [frame for clip in clips for frame in clip]
        labels = [prompt if f == 0 else "" for prompt in prompts for f in range(frames)]
        D.contact_sheet(cells, labels, columns=frames).save(path)
    else:
        D.contact_sheet(clips, prompts, columns).save(path)


# -----------------------------------------------------------------------------
# 5. The benchmark
# -----------------------------------------------------------------------------

def wilson(right, n):
    """95 % interval of a share, right of n (Wilson 1927): (low, high), each 0 .. 1."""
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


@torch.no_grad()
def round_trip(sampler, prompts, batch):
    """The prompts' truth, drawn, through the autoencoder and back: uint8 (n, F, H, W, 3). How often
    the judge reads that right is the ceiling of whatever is sampled through this autoencoder."""
    clips = [D.truth(prompt, 0, sampler.size, sampler.args.frames) for prompt in prompts]
    back = []
    for i in range(0, len(clips), batch):
        x = G.to_float(np.stack(clips[i:i + batch])).to(sampler.device)
        back.append(G.to_uint8(sampler.vae.decode(sampler.vae.encode(x))))
    return np.concatenate(back)


def bench(args, sampler):
    """Draws each category's fixed prompts, lets the judge read them, prints a table. Returns the
    record for --json and the failures as (clip, prompt, reason)."""
    n = 20 if args.quick else 100
    names = args.category or (D.CLIP_CATEGORIES if args.frames > 1 else
                              (*D.CATEGORIES, "numeracy"))
    record = {"checkpoint": str(sampler.path), "step": sampler.state["step"],
              "made": sampler.state["made"], "weights": args.weights, "sampler": args.sampler,
              "steps": args.steps, "cfg": args.cfg, "motion": args.motion, "frames": args.frames,
              "size": list(sampler.size), "seed": args.seed, "split": args.split,
              "torch": str(torch.__version__), "numpy": np.__version__, "categories": {}}
    failures = []
    print(f"{'category':>16}  score   95 % interval  ceiling    n  colours there")
    for name in names:
        prompts = D.prompts(name, n, args.split)
        # a prompt's noise depends on its place in its category, not on what else is asked for
        seeds = [args.seed + zlib.crc32(f"{name} {k}".encode()) for k in range(n)]
        clips = sampler(prompts, seeds, name)
        verdicts = [D.judge(clip, prompt) for clip, prompt in zip(clips, prompts)]
        passed = [D.passed(verdict, name) for verdict in verdicts]
        low, high = wilson(sum(passed), n)
        ceiling = np.mean([D.passed(D.judge(clip, prompt), name) for clip, prompt
                           in zip(round_trip(sampler, prompts, args.batch_size), prompts)])
        colors = np.mean([verdict.numbers["colors_present"] for verdict in verdicts])
        print(f"{name:>16}  {100 * sum(passed) / n:5.1f}   {100 * low:5.1f} .. {100 * high:5.1f}"
              f"    {100 * ceiling:5.1f}  {n:4d}  {100 * colors:5.1f}", flush=True)
        record["categories"][name] = {
            "score": sum(passed) / n, "interval": [low, high], "ceiling": float(ceiling),
            "prompts_hash": f"{zlib.crc32(chr(10).join(prompts).encode()):08x}",
            "verdicts": [{"prompt": p, "right": ok, "reasons": v.reasons, **v.parts, **v.numbers}
                         for p, v, ok in zip(prompts, verdicts, passed)]}
        failures += [(clip, p, "; ".join(v.reasons))
                     for clip, p, v, ok in zip(clips, prompts, verdicts, passed) if not ok]
    six = [record["categories"][name]["score"] for name in D.CATEGORIES if name in names]
    if len(six) == 6:
        record["mean"] = sum(six) / 6
        print(f"{'mean of the six':>16}  {100 * record['mean']:5.1f}")
    return record, failures


# -----------------------------------------------------------------------------
# 6. Main
# -----------------------------------------------------------------------------

def run(args):
    """Everything that can be refused is refused before the model draws."""
    started = time.monotonic()
    if args.bench:
        for path in (args.json, args.out):
            if path:
                D.writable(path)
    else:
        prompts = [prompt for prompt in read_prompts(args) for _ in range(args.per_prompt)]
        path, folder = output_path(args)
    sampler = Sampler(args, args.ckpt or G.find_checkpoint())
    print(f"{sampler.path}: {sampler.state['stage']}, step {sampler.state['step']}, "
          f"{'EMA' if args.weights == 'ema' else 'raw'} weights; {args.sampler}, {args.steps} "
          f"steps, cfg {args.cfg:g}, motion {args.motion:g}")
    if args.bench:
        record, failures = bench(args, sampler)
        if args.json:
            Path(args.json).write_text(json.dumps(record, indent=1), encoding="utf-8")
        if args.out and failures:
            clips, prompts, reasons = zip(*failures[:60])
            notes = [(reason, "#c03030") for reason in reasons]
            D.contact_sheet(clips, prompts, columns=10, notes=notes).save(args.out)
        return 0
    check_words(sampler.net.text, prompts)
    clips = sampler(prompts, [args.seed + k for k in range(len(prompts))])
    write(clips, prompts, path, folder, sampler.fps)
    print(f"wrote {path}: {len(clips)} {'clips' if args.frames > 1 else 'pictures'} in "
          f"{time.monotonic() - started:.1f} s")
    return 0


def main(argv=None):
    """Command line -> exit code: 0, or 2 for what the user can mend."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
