"""
sample.py: prompt in, picture or clip out.

    python sample.py "a red circle left of a blue square" "a green star"      # -> out.png
    python sample.py "a red circle moving left" --frames 8 --out out.gif      # a video model's clip
    python sample.py --prompts prompts.txt --per-prompt 4 --out samples/      # one file a picture
    python sample.py --bench                                                  # exact answers, a table

The checkpoint is --ckpt, or the newest run's in runs/, or the one that ships (assets/nano.pt); it is
always printed. Same checkpoint, prompt, seed and flags: same picture, whatever else is in the batch.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")         # see train.py

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
    p = D.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    g = p.add_argument_group("what to draw")
    g.add_argument("prompt", nargs="*", help="one or more sentences")
    g.add_argument("--prompts", metavar="FILE", help="a text file, one prompt a line")
    g.add_argument("--per-prompt", type=D.number(int, 1, 10_000), default=1, help="pictures a prompt (1)")
    g.add_argument("--seed", type=D.number(int, 0, 2 ** 31 - 1), default=0)
    g.add_argument("--size", type=D.picture_size, help="H or HxW in pixels (as trained)")
    g.add_argument("--frames", type=D.number(int, 1, 1024), default=1, help="above 1: a clip (video models)")
    g.add_argument("--fps", type=D.number(float, 0, 1000, above=True), help="frames a second (as trained)")
    g.add_argument("--out", help="FILE.png, FILE.gif, or a folder/ for one file a picture (out.png, out.gif)")
    g = p.add_argument_group("how")
    g.add_argument("--ckpt", metavar="FILE", help="last.pt or ema.pt of a run")
    g.add_argument("--raw", dest="weights", action="store_const", const="weights", default="ema",
                   help="the weights themselves (only in last.pt), not their average")
    g.add_argument("--ema", dest="weights", action="store_const", const="ema", help="the average (default)")
    g.add_argument("--cfg", type=D.number(float, 0, 100), default=4.0, metavar="l_T",
                   help="text guidance: uncond + l_T (cond - uncond); 1 = off (4)")
    g.add_argument("--motion", type=D.number(float, 0, 100), default=1.0, metavar="l_M",
                   help="motion-free guidance of clips: 1 = off, the paper uses 1.0 to 1.3 (1)")
    g.add_argument("--steps", type=D.number(int, 1, 1000), default=25)
    g.add_argument("--sampler", choices=G.SAMPLERS, default="dpm++")
    g.add_argument("--batch-size", type=D.number(int, 1, 4096), default=50, help="pictures at a time (50)")
    g.add_argument("--device", help="cpu, cuda, mps ... (the best there is)")
    g = p.add_argument_group("grading, on the shapes world")
    g.add_argument("--bench", action="store_true", help="draw fixed prompts, let the judge read them, print a table")
    g.add_argument("--quick", action="store_true", help="20 prompts a category instead of 100")
    g.add_argument("--split", choices=("seen", "unseen"), default="seen",
                   help="colour-shape pairs of the training, or those held out of it")
    g.add_argument("--category", nargs="+", choices=tuple(D.SCORED_ON), help="some categories only")
    g.add_argument("--json", metavar="FILE", help="write every prompt's verdict with all that led to it")
    return p


# -----------------------------------------------------------------------------
# 2. Prompts in
# -----------------------------------------------------------------------------

def read_prompts(args):
    """The prompts of the command line and of --prompts, in order. Raises ValueError if there are none."""
    prompts = list(args.prompt)
    if args.prompts:
        try:
            lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{args.prompts} is not UTF-8 text") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        where = f"{args.prompts} holds none" if args.prompts else "none given"
        raise ValueError(f"no prompt: {where}; try python sample.py \"a red circle\"")
    return prompts


def check_words(encoder, prompts):
    """Raises ValueError for the first word that the model has never read, with its nearest
    neighbours: an unknown word would silently draw something else."""
    known = encoder.vocabulary
    for prompt in prompts:
        for word in encoder.unknown(prompt):
            near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(repr(w) for w in near)}?" if near else \
                f"it knows {', '.join(known[:12])}{' ...' if len(known) > 12 else ''}"
            raise ValueError(f"'{word}' is not in this model's vocabulary; {hint}")


# -----------------------------------------------------------------------------
# 3. Model
# -----------------------------------------------------------------------------

class Sampler:
    """A checkpoint ready to draw: sampler(prompts, seeds) -> uint8 (n, F, H, W, 3)."""
    def __init__(self, args, path):
        state = G.load_checkpoint(path)
        self.args, self.state, self.path = args, state, path
        self.net, self.vae = G.build_net(state, args.weights), G.build_vae(state)
        self.device = G.pick_device(args.device)
        self.net.to(self.device), self.vae.to(self.device)
        self.size, self.fps = args.size or tuple(state["size"]), args.fps or state["fps"]
        multiple = self.vae.down * self.net.model.cfg.patch_size
        if any(side % multiple for side in self.size):
            raise ValueError(f"--size {self.size[0]}x{self.size[1]} is not divisible by {multiple}, which this "
                             f"model needs")
        if args.frames > 1 and not self.net.model.cfg.temporal:
            raise ValueError(f"--frames {args.frames} needs a video model, and {path} makes pictures; "
                             f"train one: python train.py --stage t2v")

    def __call__(self, prompts, seeds, what="sampling"):
        args, clips = self.args, []
        bar = tqdm(total=len(prompts), desc=what, unit="picture", leave=False)
        for i in range(0, len(prompts), args.batch_size):
            part = slice(i, i + args.batch_size)
            clips.append(G.generate(self.net.model, self.net.text, self.vae, self.net.schedule, prompts[part],
                                    seeds[part], self.size, args.frames, args.cfg, args.motion, args.steps,
                                    args.sampler, self.device))
            bar.update(len(prompts[part]))
        bar.close()
        return np.concatenate(clips)


# -----------------------------------------------------------------------------
# 4. Pictures out
# -----------------------------------------------------------------------------

def output_path(args):
    """Where the pictures go, known to be writable before any work is done."""
    path = Path(args.out or ("out.gif" if args.frames > 1 else "out.png"))
    folder = args.out is not None and (args.out.endswith(("/", os.sep)) or path.is_dir() or not path.suffix)
    if not folder and path.suffix not in (".png", ".gif"):
        raise ValueError(f"--out {path}: '{path.suffix}' is not written here; try .png, .gif or a folder/")
    home = path if folder else path.parent
    home.mkdir(parents=True, exist_ok=True)
    if not os.access(home, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"--out {path} cannot be written; try another folder")
    return path, folder


def write(clips, prompts, path, folder, fps):
    """A labelled grid (one clip a cell; in a PNG a clip is a film strip), or one file each."""
    frames = clips.shape[1]
    if folder:
        for k, clip in enumerate(clips):
            images = [Image.fromarray(frame) for frame in clip]
            if frames > 1:
                D.save_gif(path / f"{k:05d}.gif", images, fps)
            else:
                images[0].save(path / f"{k:05d}.png")
        lines = [json.dumps({"file": f"{k:05d}.{'gif' if frames > 1 else 'png'}", "caption": prompt})
                 for k, prompt in enumerate(prompts)]
        (path / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".gif":
        D.save_gif(path, [D.contact_sheet(clips, prompts, frame=f) for f in range(frames)], fps)
    elif frames > 1:                                        # film strip: a row a clip, a column a moment
        cells = [frame[None] for clip in clips for frame in clip]
        labels = [prompt if f == 0 else "" for prompt in prompts for f in range(frames)]
        D.contact_sheet(cells, labels, columns=frames).save(path)
    else:
        D.contact_sheet(clips, prompts, columns=min(6, math.ceil(math.sqrt(len(clips))))).save(path)


# -----------------------------------------------------------------------------
# 5. The benchmark
# -----------------------------------------------------------------------------

def wilson(right, n):
    """95 % interval of a share (Wilson 1927): right of n -> (low, high), each 0..1."""
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def bench(args, sampler):
    """Draws each category's fixed prompts and lets the judge read them. Returns the record for --json."""
    n = 20 if args.quick else 100
    clips_too = args.frames > 1
    names = args.category or (D.CLIP_CATEGORIES if clips_too else [*D.CATEGORIES, "numeracy"])
    record = dict(checkpoint=str(sampler.path), weights=args.weights, sampler=args.sampler, steps=args.steps,
                  cfg=args.cfg, motion=args.motion, seed=args.seed, split=args.split, frames=args.frames,
                  step=sampler.state["step"], made=sampler.state["made"], torch=str(torch.__version__),
                  numpy=np.__version__, categories={})
    print(f"{'category':>16}  score   95 % interval    n")
    for name in names:
        prompts = D.prompts(name, n, args.split)
        # a prompt's noise depends on its place in its category, not on what else is asked for
        seeds = [args.seed + zlib.crc32(f"{name} {k}".encode()) for k in range(n)]
        clips = sampler(prompts, seeds, name)
        verdicts = [D.judge(clip, prompt) for clip, prompt in zip(clips, prompts)]
        right = sum(D.passed(v, name) for v in verdicts)
        low, high = wilson(right, n)
        print(f"{name:>16}  {100 * right / n:5.1f}   {100 * low:5.1f} .. {100 * high:5.1f}  {n:4d}")
        record["categories"][name] = dict(
            score=right / n, interval=[low, high], prompts_hash=f"{zlib.crc32(chr(10).join(prompts).encode()):08x}",
            verdicts=[dict(prompt=p, right=D.passed(v, name), reasons=v.reasons, parts=v.parts, **v.numbers)
                      for p, v in zip(prompts, verdicts)])
    six = [record["categories"][name]["score"] for name in names if name in D.CATEGORIES]
    if len(six) == len(D.CATEGORIES):
        record["mean"] = sum(six) / len(six)
        print(f"{'mean of the six':>16}  {100 * record['mean']:5.1f}")
    return record


# -----------------------------------------------------------------------------
# 6. Main
# -----------------------------------------------------------------------------

def run(args):
    started = time.monotonic()
    if args.bench:
        if args.json and not os.access(Path(args.json).resolve().parent, os.W_OK):
            raise ValueError(f"--json {args.json} cannot be written; try another folder")
    else:
        prompts = [prompt for prompt in read_prompts(args) for _ in range(args.per_prompt)]
        path, folder = output_path(args)
    sampler = Sampler(args, args.ckpt or G.find_checkpoint())
    state = sampler.state
    print(f"{sampler.path}: {state['stage']}, step {state['step']}, "
          f"{'EMA' if args.weights == 'ema' else 'raw'} weights, {args.sampler} {args.steps} steps, cfg {args.cfg:g}")
    if args.bench:
        record = bench(args, sampler)
        if args.json:
            Path(args.json).write_text(json.dumps(record, indent=1), encoding="utf-8")
        return 0
    check_words(sampler.net.text, prompts)
    seeds = [args.seed + k for k in range(len(prompts))]
    clips = sampler(prompts, seeds)
    write(clips, prompts, path, folder, sampler.fps)
    print(f"wrote {path} ({len(clips)} {'clips' if args.frames > 1 else 'pictures'}, "
          f"{time.monotonic() - started:.1f} s)")
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
