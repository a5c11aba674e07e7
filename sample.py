"""
sample.py: prompt in, picture or clip out; graded, compared, looked into.

    python sample.py "a red circle left of a blue square" "a green star"     # -> out.png
    python sample.py "a red circle moving left" --frames 8 --out out.gif     # a video model's clip
    python sample.py --prompts prompts.txt --per-prompt 4 --out samples/     # one file a picture
    python sample.py "a red circle and a blue ring" --strip                  # how it came about
    python sample.py "a red circle and a blue ring" --attention              # what each word sees
    python sample.py --bench                                                 # graded, a table
    python sample.py --bench --cfg 1,2,4,8 --category color                  # ... a row a value
    python sample.py --compare runs/a/ema.pt runs/b/ema.pt                   # which draws better?

The checkpoint is --ckpt, or the newest run's in runs/, or the one that ships (assets/nano.pt); it
is always printed. Same checkpoint, prompt, seed and flags: same picture, whatever its neighbours.
"""

# The file in one breath: `main` reads the flags, a `Sampler` (3) turns prompts and seeds into
# clips, and a flag says what becomes of them: `draw` writes them (4), `bench` has the judge read
# them (5), `compare` sets two systems side by side (6), `strip` and `attention_sheet` look at how
# they came about (7).

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")            # before torch is loaded: see train.py

import argparse
import base64
import difflib
import io
import itertools
import json
import math
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data as D
import gentron as G

HERE = Path(__file__).resolve().parent
FAULT = "#c03030"                                           # what the judge found wrong, in red

# -----------------------------------------------------------------------------
# 1. Flags
# -----------------------------------------------------------------------------

def listed(read):
    """An argparse type: values by commas, each as `read` reads it -> a list. Only --bench takes
    more than one: it then prints a row for each."""
    return lambda text: [read(part) for part in text.split(",")]


def motion_scale(text):
    """An argparse type: l_M, or "off" for None: temporal attention off altogether (motion-free)."""
    return None if text == "off" else D.number(float, 0, 100)(text)


def parser():
    """Every flag, in four groups."""
    p = D.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Sizes and frames default to what the checkpoint was trained on, as it draws that best
    g = p.add_argument_group("what to draw")
    g.add_argument("prompt", nargs="*", help="one or more sentences")
    g.add_argument("--prompts", metavar="FILE", help="a text file, one prompt a line")
    g.add_argument("--per-prompt", type=D.number(int, 1, 10_000), default=1, metavar="N",
                   help="pictures a prompt, each from its own seed (1)")
    g.add_argument("--seed", type=D.number(int, 0, 2 ** 31 - 1), default=0)
    g.add_argument("--size", type=D.picture_size, help="H or HxW in pixels (as trained)")
    g.add_argument("--frames", type=D.number(int, 1, 1024), default=1,
                   help="above 1: a clip, of a caption without motion a still one")
    g.add_argument("--fps", type=D.number(float, 0.01, 1000), help="(as trained)")
    g.add_argument("--out", help="FILE.png, FILE.gif, FILE.mp4, or a folder/ for one file a "
                                 "picture (out.png, out.gif); --bench: a PNG of what failed "
                                 "(bench.png); --compare: the study's page (study.html)")
    # --ckpt, --cfg, --motion and --steps are always lists: `only_one` and `settings` make single
    # values of them
    g = p.add_argument_group("how (with --bench, several values by commas: a row for each)")
    g.add_argument("--ckpt", type=listed(str), metavar="FILE", help="ema.pt or last.pt of a run")
    g.add_argument("--ema", dest="weights", action="store_const", const="ema", default="ema",
                   help="the averaged weights (default)")
    g.add_argument("--raw", dest="weights", action="store_const", const="weights",
                   help="the weights themselves, which only last.pt holds")
    # OURS: 4, on the shapes world; the paper draws its clips with l_T = 7.5
    g.add_argument("--cfg", type=listed(D.number(float, 0, 100)), default=[4.0], metavar="l_T",
                   help="text guidance, uncond + l_T (cond - uncond); 1 = off (4)")
    g.add_argument("--motion", type=listed(motion_scale), default=[1.0], metavar="l_M",
                   help="motion-free guidance of clips: 1 = none (1), above: more motion, the "
                        "paper's are 1.0 to 1.3; 'off' = no motion, each frame sees itself alone")
    g.add_argument("--steps", type=listed(D.number(int, 1, 1000)), default=[25],
                   help="of the sampler (25)")
    # OURS: of the paper's nothing is known. The fresh noise of ddpm lets later steps mend what
    # early ones got wrong: of prompts for two shapes 88 in 100 came out right, with dpm++ 76
    g.add_argument("--sampler", choices=tuple(G.SAMPLERS), default="ddpm",
                   help="(ddpm, right most often here; ddim and dpm++ add no noise on the way)")
    # For memory alone: no picture depends on its batch
    g.add_argument("--batch-size", type=D.number(int, 1, 4096), default=50, help="at a time (50)")
    g.add_argument("--device", help="cpu, cuda, mps ... (the best there is)")
    # One of these at most: each decides what becomes of the clips
    g = p.add_argument_group("in place of a picture").add_mutually_exclusive_group()
    g.add_argument("--strip", action="store_true",
                   help="each prompt's picture at twelve moments, the estimate of z0 below")
    g.add_argument("--attention", action="store_true",
                   help="where in the picture each word is attended, a row a word")
    g.add_argument("--bench", action="store_true",
                   help="draw fixed prompts, let the judge read them, print a table")
    g.add_argument("--compare", nargs=2, metavar=("A", "B"),
                   help="two checkpoints, or two folders of pictures named alike: the judge's win, "
                        "draw, lose, and a page on which people can vote blind")
    g = p.add_argument_group("grading, on the shapes world")
    g.add_argument("--n", type=D.number(int, 1, 10_000), help="prompts a category (100)")
    g.add_argument("--quick", action="store_true", help="20 prompts a category")
    g.add_argument("--split", choices=("seen", "unseen"), default="seen",
                   help="colour-shape pairs of the training, or those held out of it")
    g.add_argument("--category", nargs="+", choices=tuple(D.SCORED_ON), help="some of them only")
    g.add_argument("--json", metavar="FILE", help="every verdict, and all that led to it "
                                                  "(bench.json, study.json)")
    return p


# -----------------------------------------------------------------------------
# 2. Prompts in
# -----------------------------------------------------------------------------

def read_prompts(args):
    """The prompts of the command line, then those of --prompts -> (prompts, each --per-prompt
    times, and their seeds). ValueError if there are none."""
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
    prompts = [prompt for prompt in prompts for _ in range(args.per_prompt)]
    # A seed a picture: no two begin with the same noise, or they would share a layout
    return prompts, [args.seed + k for k in range(len(prompts))]


def check_words(encoder, prompts):
    """ValueError for the first word that the model has never read, with the nearest ones it has:
    an unknown word would silently draw something else."""
    for prompt in prompts:
        for word in encoder.unknown(prompt):
            near = difflib.get_close_matches(word, encoder.vocabulary, n=3, cutoff=0.5)
            known = ", ".join(encoder.vocabulary[:12]) + " ..." * (len(encoder.vocabulary) > 12)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it knows {known}"
            raise ValueError(f"'{word}' is not in this model's vocabulary; {hint}")


def bench_prompts(args):
    """{category: (prompts, seeds)} of the benchmark: fixed sentences, each with its own noise."""
    n = args.n or (20 if args.quick else 100)
    names = args.category or (D.CLIP_CATEGORIES if args.frames > 1 else
                              (*D.CATEGORIES, "numeracy"))
    # A prompt's noise depends on its place in its category, not on what else is asked for: one
    # category alone has the score that it has in the whole table. crc32, because Python's own
    # hash() of a string is another one in each process.
    return {name: (D.prompts(name, n, args.split),
                   [args.seed + zlib.crc32(f"{name} {k}".encode()) for k in range(n)])
            for name in names}


# -----------------------------------------------------------------------------
# 3. The model
# -----------------------------------------------------------------------------

class Sampler:
    """A checkpoint ready to draw: sampler(prompts, seeds) -> uint8 (n, F, H, W, 3). args: flags of
    one value each. Raises ValueError for a checkpoint that cannot make what they ask for."""
    def __init__(self, args, path):
        # The checkpoint says all about the model: no flag has to repeat how it was trained
        self.args, self.path, self.state = args, path, G.load_checkpoint(path)
        self.device = G.pick_device(args.device)
        self.net = G.build_net(self.state, args.weights).to(self.device)
        self.vae = G.build_vae(self.state).to(self.device)
        self.size = args.size or tuple(self.state["size"])
        self.fps = args.fps or self.state["fps"]
        # A token is p x p latents of 8 x 8 pixels; positions are computed, so any grid of them will
        # do, and any number of frames
        multiple = self.vae.down * self.net.model.cfg.patch_size
        if any(side % multiple for side in self.size):
            raise ValueError(f"--size {self.size[0]}x{self.size[1]} is not divisible by "
                             f"{multiple}, as this model needs")
        if args.frames > 1 and not self.net.model.cfg.temporal:
            raise ValueError(f"--frames {args.frames} needs a video model, and {path} makes "
                             f"pictures; train one: python train.py --stage t2v")

    def __call__(self, prompts, seeds, what="sampling", on_step=None):
        """what: the progress bar's label; on_step: see `generate`."""
        args, clips = self.args, [None] * len(prompts)
        # A picture's caption, asked for as a clip, is a still: the picture F times. That is what F
        # frames of one noise that do not see each other come to (paper 3.4), for an F-th of the
        # work; with temporal attention on, only a third of them stood still
        kinds = {1: [], args.frames: []}                                   # frames: places
        for k, prompt in enumerate(prompts):
            kinds[1 if D.is_picture(prompt) else args.frames].append(k)
        with tqdm(total=len(prompts), desc=what, leave=False) as bar:
            for frames, places in kinds.items():
                # By --batch-size, for memory's sake alone: each item has its own seed, and so the
                # same noise whatever its batch
                for i in range(0, len(places), args.batch_size):
                    part = places[i:i + args.batch_size]
                    drawn = G.generate(
                        self.net.model, self.net.text, self.vae, self.net.schedule,
                        [prompts[k] for k in part], [seeds[k] for k in part], self.size, frames,
                        args.cfg, args.motion, args.steps, args.sampler, self.device, on_step)
                    for k, clip in zip(part, drawn):
                        clips[k] = np.repeat(clip, args.frames // frames, axis=0)
                    bar.update(len(part))
        return np.stack(clips)                                             # (n, F, H, W, 3)

    @torch.no_grad()
    def decode(self, z):
        """Latents (n, F, C, h, w), also half-finished ones -> uint8 (n, F, H, W, 3)."""
        return G.to_uint8(self.vae.decode(z))

    @torch.no_grad()
    def round_trip(self, clips):
        """n uint8 clips through the autoencoder and back: uint8 (n, F, H, W, 3)."""
        back = []
        for i in range(0, len(clips), self.args.batch_size):
            x = G.to_float(np.stack(clips[i:i + self.args.batch_size])).to(self.device)
            back.append(self.decode(self.vae.encode(x)))                   # x (b, F, 3, H, W)
        return np.concatenate(back)


def settings(args):
    """Flags that hold lists -> Namespaces of one value each, all combinations, --ckpt outermost."""
    # (outermost: the table then comes in one piece a checkpoint)
    paths = args.ckpt or [G.find_checkpoint()]
    for path, cfg, motion, steps in itertools.product(paths, args.cfg, args.motion, args.steps):
        yield argparse.Namespace(**{**vars(args), "ckpt": path, "cfg": cfg, "motion": motion,
                                    "steps": steps})


def shown(value):
    """A flag's value as it is written on the command line."""
    return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def introduce(sampler):
    """Prints which checkpoint draws, and how: a picture is worth little if nobody knows whose."""
    args, state = sampler.args, sampler.state
    print(f"{sampler.path}: {state['stage']}, step {state['step']}, "
          f"{'EMA' if args.weights == 'ema' else 'raw'} weights; {args.sampler}, {args.steps} "
          f"steps, cfg {args.cfg:g}, motion {shown(args.motion)}", flush=True)


# -----------------------------------------------------------------------------
# 4. Pictures out
# -----------------------------------------------------------------------------

def output_path(args):
    """--out -> (path, is it a folder?), known to be writable before any work is done."""
    # A folder need not exist yet, so its name must tell: a slash at the end, or no suffix
    path = Path(args.out or ("out.gif" if args.frames > 1 else "out.png"))
    if str(args.out).endswith(("/", os.sep)) or path.is_dir() or not path.suffix:
        D.writable(path / "captions.jsonl")
        return path, True
    if path.suffix.lower() == ".mp4":
        D.need_av("writing")
    elif path.suffix.lower() not in (".png", ".gif"):
        raise ValueError(f"--out {path} is no .png, .gif, .mp4 or folder/; try --out out.png")
    return D.writable(path), False


def write(clips, prompts, path, folder, fps):
    """A folder of single files with their captions.jsonl, or one labelled grid; in a PNG a clip is
    a film strip, a row a clip. clips: uint8 (n, F, H, W, 3)."""
    frames = clips.shape[1]
    if folder:
        # Bare pictures, numbered, each with the sentence it was drawn for: what tools for FID and
        # CLIP score expect, and a data folder that train.py can learn from
        names = [f"{k:05d}.{'gif' if frames > 1 else 'png'}" for k in range(len(clips))]
        for name, clip in zip(names, clips):
            images = [Image.fromarray(frame) for frame in clip]
            D.save_gif(path / name, images, fps) if frames > 1 else images[0].save(path / name)
        rows = [json.dumps({"file": n, "caption": p}) + "\n" for n, p in zip(names, prompts)]
        (path / "captions.jsonl").write_text("".join(rows), encoding="utf-8")
        return
    if path.suffix.lower() == ".png":
        film_strip(clips, prompts).save(path)
        return
    # All clips move together: moment f of each is a cell of sheet f, and the sheets are the frames
    columns = min(6, math.ceil(math.sqrt(len(clips))))
    sheets = [D.contact_sheet(clips, prompts, columns, frame=f) for f in range(frames)]
    save = D.save_gif if path.suffix.lower() == ".gif" else D.save_mp4
    save(path, sheets, fps)


def film_strip(clips, prompts, notes=None):
    """Clips as one picture: a row a clip, its caption (and note) under the first frame; pictures
    (F = 1) as a grid -> an image."""
    frames = len(clips[0])
    notes = notes or [None] * len(clips)
    if frames == 1:
        columns = min(10, math.ceil(math.sqrt(len(clips))))
        return D.contact_sheet(clips, prompts, columns, notes)
    cells = [frame for clip in clips for frame in clip]     # n F of them, F to a row
    first = lambda items, rest: [x if f == 0 else rest for x in items for f in range(frames)]
    return D.contact_sheet(cells, first(prompts, ""), frames, first(notes, None))


# -----------------------------------------------------------------------------
# 5. The benchmark
# -----------------------------------------------------------------------------

# T2I-CompBench's categories (the paper's Table 2), asked and read in our own world: the protocol is
# theirs, the numbers do not compare.

def wilson(right, n):
    """95 % interval of a share, right of n (Wilson 1927): (low, high), each 0 .. 1."""
    # Not p +- 1.96 sqrt(p (1 - p) / n): that one has no width at all where none or all are right,
    # which is where a benchmark of a small model begins and a good one's ends
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # (max: of none right the low end is 0, which rounding can miss by a hair, and print as -0)
    return max(0.0, middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def percent(low, high):
    """An interval of shares as a reader wants it: "38..57"."""
    return f"{100 * low:.0f}..{100 * high:.0f}"


def record_of(sampler):
    """What a reader of the numbers needs to make them again, as a JSON-able dict."""
    # (versions too: another torch may add in another order, and a picture differ in a pixel)
    args, state = sampler.args, sampler.state
    return {"checkpoint": str(sampler.path), "stage": state["stage"], "step": state["step"],
            "made": state["made"], "weights": args.weights, "sampler": args.sampler,
            "steps": args.steps, "cfg": args.cfg, "motion": args.motion, "frames": args.frames,
            "size": list(sampler.size), "seed": args.seed, "split": args.split,
            "device": str(sampler.device), "torch": str(torch.__version__),
            "numpy": np.__version__}


def grade(name, prompts, clips):
    """Lets the judge read one category -> its entry of the record, and what failed as (clip,
    prompt, reasons)."""
    verdicts = [D.judge(clip, prompt) for clip, prompt in zip(clips, prompts)]
    # What a category asks for is less than all that the judge looks at: `passed` knows which part
    right, n = [D.passed(verdict, name) for verdict in verdicts], len(prompts)
    entry = {"n": n, "score": float(np.mean(right)), "interval": wilson(sum(right), n)}
    for number in verdicts[0].numbers:                      # frames_right, colors_present, flicker
        values = [verdict.numbers[number] for verdict in verdicts]
        entry[number] = float(np.mean(values))              # no share of n: a normal's interval
        entry[f"{number}_error"] = float(1.96 * np.std(values) / math.sqrt(n))
    if "motion" in verdicts[0].parts:                       # every thing does what it was told to
        moves = sum(v.parts["motion"] and v.parts["stillness"] for v in verdicts)
        entry["moves_right"], entry["moves_interval"] = moves / n, wilson(moves, n)
    # Two records with the same hash were asked the same sentences, whatever the version of data.py
    entry["prompts_hash"] = f"{zlib.crc32(chr(10).join(prompts).encode()):08x}"
    entry["verdicts"] = [{"prompt": p, "right": ok, "reasons": v.reasons, **v.parts, **v.numbers}
                         for p, v, ok in zip(prompts, verdicts, right)]
    failures = [(clip, prompt, "; ".join(verdict.reasons))
                for clip, prompt, verdict, ok in zip(clips, prompts, verdicts, right) if not ok]
    return entry, failures


def ceiling(sampler, name, prompts):
    """How often the truth passes after a round trip through the autoencoder, 0 .. 1. Nothing that
    is sampled through it can be expected to do better."""
    # Drawn by the world itself, and so right in every category: what fails was lost on the way
    clips = [D.truth(prompt, 0, sampler.size, sampler.args.frames) for prompt in prompts]
    back = sampler.round_trip(clips)
    return float(np.mean([D.passed(D.judge(c, prompt), name) for c, prompt in zip(back, prompts)]))


def table_columns(args, swept):
    """The table's columns: [(title, width, function of a setting, a category and its entry)].
    swept: flags with several values, each a column, or rows could not be told apart."""
    share = lambda key: lambda one, name, entry: f"{100 * entry[key]:.1f}"
    range_ = lambda key: lambda one, name, entry: percent(*entry[key])
    columns = [(flag, 6, lambda one, name, entry, flag=flag: shown(getattr(one, flag)))
               for flag in swept if flag != "ckpt"]         # checkpoints get a line of their own
    columns += [("category", 14, lambda one, name, entry: name),
                ("right", 6, share("score")), ("95 %", 7, range_("interval"))]
    if args.frames > 1:                                     # all of a clip's motions; its frames
        columns += [("moves", 7, share("moves_right")), ("95 %", 7, range_("moves_interval")),
                    ("frames", 7, share("frames_right")),
                    ("+-", 5, share("frames_right_error")),
                    ("flicker", 8, lambda one, name, entry: f"{entry['flicker']:.2f}")]
    return columns + [("colours", 8, share("colors_present")), ("ceiling", 8, share("ceiling")),
                      ("n", 5, lambda one, name, entry: str(entry["n"]))]


def bench(args):
    """Draws each category's fixed prompts with each setting, lets the judge read them, prints a
    table, a row a setting and category. Writes every verdict, and a sheet of what failed."""
    # Both are tried now: a benchmark of an hour must not end with a folder that is not there
    json_path = D.writable(args.json or "bench.json")
    sheet_path = D.writable(args.out or "bench.png")
    if args.prompt or args.prompts:
        raise ValueError("--bench asks its own prompts; leave out yours, or --bench")
    asked, records, failures, ceilings = bench_prompts(args), [], [], {}
    swept = [flag for flag in ("ckpt", "cfg", "motion", "steps")
             if len(getattr(args, flag) or ()) > 1]
    columns = table_columns(args, swept)
    for one in settings(args):
        sampler = Sampler(one, one.ckpt)
        if not records or records[-1]["checkpoint"] != one.ckpt:    # once a checkpoint
            introduce(sampler)
            print("".join(f"{title:>{width}}" for title, width, _ in columns))
        entries = {}
        for name, (prompts, seeds) in asked.items():
            entries[name], failed = grade(name, prompts, sampler(prompts, seeds, name))
            # It depends on the autoencoder and the prompts, not on the other flags
            if (one.ckpt, name) not in ceilings:
                ceilings[one.ckpt, name] = ceiling(sampler, name, prompts)
            entries[name]["ceiling"] = ceilings[one.ckpt, name]
            failures += failed
            # Row by row: a whole table takes minutes, and the first rows already tell
            print("".join(f"{text(one, name, entries[name]):>{width}}"
                          for _, width, text in columns), flush=True)
        records.append({**record_of(sampler), "categories": entries})
        if all(name in entries for name in D.CATEGORIES):   # as in the paper: numeracy is not in it
            mean = sum(entries[name]["score"] for name in D.CATEGORIES) / len(D.CATEGORIES)
            records[-1]["mean"] = mean
            print(f"mean of the six {100 * mean:5.1f}")
    write_bench(json_path, sheet_path, records, failures)
    return 0


def write_bench(json_path, sheet_path, records, failures):
    """The records as JSON, one alone or a list of them; and the first sixty failures as a sheet, as
    a score says how often a model fails, and only a picture how."""
    with D.writing(json_path):
        json_path.write_text(json.dumps(records if len(records) > 1 else records[0], indent=1),
                             encoding="utf-8")
    print(f"wrote {json_path}: every verdict")
    if failures:
        clips, prompts, reasons = zip(*failures[:60])
        with D.writing(sheet_path):
            film_strip(clips, prompts, [(reason, FAULT) for reason in reasons]).save(sheet_path)
        print(f"wrote {sheet_path}: {len(clips)} of {len(failures)} failures, each with its reason")


# -----------------------------------------------------------------------------
# 6. Two systems compared: by the judge, and by people
# -----------------------------------------------------------------------------

# The paper's study in miniature: pairs of pictures of one prompt, side by side and in random order,
# two questions, "as good" allowed. The page does the asking and the counting (assets/study.html).
STUDY = 100                     # pairs on the page at most, the paper's number of prompts
SIDE = 512                      # pixels of a picture on the page at most
QUESTIONS = [{"key": "quality", "text": "Which looks better?"},          # the paper's two
             {"key": "alignment", "text": "Which fits the text better?"}]


def drawn_pairs(args):
    """--compare of two checkpoints: both draw the same prompts from the same noise, so that luck
    is the same on both sides. Returns what `folder_pairs` does."""
    own = args.prompt or args.prompts                       # of no category, else the benchmark's
    asked = {"": read_prompts(args)} if own else bench_prompts(args)
    labels = [name for name, (prompts, _) in asked.items() for _ in prompts]
    prompts, seeds = (list(itertools.chain(*part)) for part in zip(*asked.values()))
    both = [Sampler(args, path) for path in args.compare]   # refused, if at all, before any work
    for sampler in both:
        introduce(sampler)
        check_words(sampler.net.text, prompts)
    if both[0].size != both[1].size:
        raise ValueError(f"the two draw at different sizes, {both[0].size} and {both[1].size}; "
                         f"give one by --size")
    clips = [sampler(prompts, seeds, sampler.path) for sampler in both]
    return *clips, prompts, labels, both[0].fps


def folder_pairs(args):
    """--compare of two folders of pictures named alike, by whatever system. Captions come from
    either (captions.jsonl, or NAME.txt). Returns clips of A and B (n, F, H, W, 3), prompts, the
    category of each, frames a second."""
    size, fps = args.size or size_of_first(args.compare[0]), args.fps or 4.0
    a, b = (D.Folder(path, size, args.frames, fps) for path in args.compare)
    # Paired by name, not by order: one system may have failed to draw some. name: (place, caption)
    by_name = [{folder.stem(file): (k, caption) for k, (file, caption) in enumerate(folder.items)}
               for folder in (a, b)]
    names = sorted(by_name[0].keys() & by_name[1].keys())
    if not names:
        raise ValueError(f"no picture of {args.compare[0]} has a namesake in {args.compare[1]}")
    missing = len(by_name[0].keys() ^ by_name[1].keys())
    if missing:
        print(f"{missing} pictures without a namesake are left out")
    prompts = []
    for name in names:
        said = {by_name[side][name][1] for side in (0, 1)} - {""}
        if len(said) > 1:                                   # two questions have no better answer
            raise ValueError(f"the two folders give '{name}' different captions: {sorted(said)}")
        prompts.append(said.pop() if said else "")
    # Read at one size, so that nobody votes for the larger picture: (n, F, H, W, 3) each
    clips = [np.stack([folder[by_name[side][name][0]][0] for name in names])
             for side, folder in enumerate((a, b))]
    return *clips, prompts, [""] * len(names), fps


def size_of_first(folder):
    """(height, width) of a folder's first picture, made smaller if it is large: the page holds all
    of them, and is sent around in one piece."""
    first = next((f for f in sorted(Path(folder).iterdir())
                  if f.suffix.lower() in D.PICTURES and f.is_file()), None)
    size = (64, 64) if first is None else D.size_of(first)
    return tuple(max(1, round(side * min(1, SIDE / max(size)))) for side in size)


def judged(clips, prompts, labels):
    """True, False, or None where the prompt is no sentence of the shapes world: a list. labels: the
    category of each, "" for a prompt of one's own, which is right if all of it is there."""
    answers = []
    for clip, prompt, name in zip(clips, prompts, labels):
        try:
            verdict = D.judge(clip, prompt)
            answers.append(D.passed(verdict, name) if name else verdict.right)
        except ValueError:
            answers.append(None)
    return answers


def data_url(clip, fps):
    """A clip as the text of an <img> source: a PNG, a JPEG where that would be large, a GIF. So the
    page is one file, which needs no server and can be sent to those who vote."""
    file, images = io.BytesIO(), [Image.fromarray(frame) for frame in clip]
    kind = "gif" if len(clip) > 1 else "png" if max(images[0].size) <= 256 else "jpeg"
    if kind == "gif":
        D.save_gif(file, images, fps)
    else:
        images[0].save(file, kind, quality=92)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def study_page(path, clips_a, clips_b, prompts, names, fps):
    """Writes the page on which people vote, pictures inside: the template with one JSON put in."""
    # Evenly over all prompts, so that every category has its share of the page
    few = np.unique(np.linspace(0, len(prompts) - 1, min(STUDY, len(prompts))).astype(int))
    pairs = [{"key": str(k), "prompt": prompts[k], "a": data_url(clips_a[k], fps),
              "b": data_url(clips_b[k], fps)} for k in few]
    # The fingerprint keeps votes of another study out of this one's table
    study = {"id": f"{zlib.crc32(json.dumps(pairs).encode()):08x}", "title": "Which is better?",
             "questions": QUESTIONS, "names": dict(zip("ab", names)), "pairs": pairs}
    page = (HERE / "assets" / "study.html").read_text(encoding="utf-8")
    # No caption can close the script element ("</script>"), and what it holds is still JSON
    page = page.replace("/*STUDY*/null", json.dumps(study).replace("<", "\\u003c"))
    with D.writing(path):
        path.write_text(page, encoding="utf-8")
    return len(few)


def tally(labels, a, b):
    """The judge's answers on A and B, prompt by prompt -> {category: n, win, draw, lose}, "all" the
    last. A wins where it is right and B is not; prompts that the judge cannot read do not count."""
    rows = {}
    for label in [*dict.fromkeys(labels), "all"]:
        known = [(x, y) for name, x, y in zip(labels, a, b)
                 if x is not None and label in (name, "all")]
        if known and label:                                 # "": prompts of one's own, in all only
            rows[label] = {"n": len(known), "win": sum(x > y for x, y in known),
                           "draw": sum(x == y for x, y in known),
                           "lose": sum(x < y for x, y in known)}
    return rows


def compare(args):
    """--compare A B: per prompt the judge's verdict on both, and a page for people."""
    # (all that can be refused is refused before anything is drawn, as everywhere in this file)
    page, json_path = D.writable(args.out or "study.html"), D.writable(args.json or "study.json")
    folders = [Path(path).is_dir() for path in args.compare]
    if any(folders) != all(folders):
        raise ValueError(f"--compare {' '.join(args.compare)} is one folder and one file; "
                         f"give two checkpoints, or two folders")
    names = [str(path) for path in args.compare]
    clips_a, clips_b, prompts, labels, fps = (folder_pairs if all(folders) else drawn_pairs)(args)
    # For the judge: by category, with intervals, in seconds
    both = [judged(clips, prompts, labels) for clips in (clips_a, clips_b)]
    rows = tally(labels, *both)
    print(f"A = {names[0]}, B = {names[1]}")
    print(f"{'category':>14}     n    A wins  95 %     draw  95 %     loses  95 %")
    for label, row in rows.items():
        n, *counts = row.values()
        print(f"{label:>14} {n:5d}" + "".join(
            f"    {100 * k / n:5.1f} {percent(*wilson(k, n)):>6}" for k in counts))
    if not rows:
        print("no prompt is a sentence of the shapes world: nothing for the judge to read")
    record = {"a": names[0], "b": names[1], "seed": args.seed, "rows": rows, "verdicts": [
        {"prompt": prompt, "category": label, "a": a, "b": b}
        for prompt, label, a, b in zip(prompts, labels, *both)]}
    with D.writing(json_path):
        json_path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    # For people, who also see what no judge of ours can: which looks better
    shown_pairs = study_page(page, clips_a, clips_b, prompts, names, fps)
    print(f"wrote {json_path}, and {page} for people: {shown_pairs} pairs, open it in a browser")
    return 0


# -----------------------------------------------------------------------------
# 7. Looking inside: the steps of a picture, and what its words see
# -----------------------------------------------------------------------------

# Both draw as always and only listen: what they show is the very picture that `draw` would write.

def strip(sampler, prompts, seeds, moments=12):
    """Each prompt's picture at twelve moments of denoising, and under each the clean picture which
    the network expects at that moment -> an image. The expectation settles from the layout to the
    edges: what is decided at which noise level."""
    steps = []                                              # of every batch, (t, z, z0) a step
    sampler(prompts, seeds, on_step=lambda *step: steps.append(step))
    n = sampler.args.steps
    keep = np.unique(np.linspace(0, n - 1, moments).astype(int))             # fewer, if n is small
    times = [steps[k][0] for k in keep]
    cells, labels = [], []
    for j, prompt in enumerate(prompts):
        batch, row = divmod(j, sampler.args.batch_size)
        for what, part in ((prompt, 1), ("expected", 2)):
            # After the step, or before it: z has had its noise lowered, z0 was made of what it was
            z = torch.stack([steps[batch * n + k][part][row] for k in keep])  # (12, 1, C, h, w)
            cells += list(sampler.decode(z))
            note = "after t = " if part == 1 else "at t = "
            labels += [f"{what if k == 0 else ''} {note}{t}" for k, t in enumerate(times)]
    return D.contact_sheet(cells, labels, len(keep), cell=96)


def attend(cross, x, k, mask):
    """The weights behind Attention's answer: x (B, T, D), k (B, h, L, D/h), mask bool (B, L) ->
    (B, T, L), mean over heads; 1 in sum over the L words."""
    # The fused attention never has these weights in memory, which is why it is fast: so they are
    # computed again, by the book
    q = cross.split(cross.q(x))                                              # (B, h, T, D/h)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])                # (B, h, T, L)
    return scores.masked_fill(~mask[:, None, None, :], -math.inf).softmax(-1).mean(1)


def attention_maps(sampler, prompt, seed):
    """Draws one picture and listens in on its cross-attention. Returns the picture, uint8
    (1, H, W, 3), the words, and maps (steps, L, h, w): how much each patch looked at each of the L
    words of the first encoder, mean over heads and the blocks that read it."""
    model, encoder = sampler.net.model, sampler.net.text
    if model.cfg.conditioning != "cross" or not encoder.encoders:
        raise ValueError(f"--attention needs a model with cross-attention, {sampler.path} has none")
    if sampler.args.cfg == 0:
        raise ValueError("--attention follows the words, which --cfg 0 leaves out; try --cfg 4")
    heard = []                                              # (N, L), step by step, block by block

    def listen(cross, inputs, output):
        # The batch is guidance's branches: row 0 reads the text, the others ""
        x, (k, _), mask = inputs                            # (n, N, D), (n, h, L, D/h), (n, L)
        heard.append(attend(cross, x[:1], k[:1], mask[:1])[0])
    # Hooks, so that the model needs no line for it and draws as it always does
    reading = model.blocks[::len(encoder.encoders)]         # block k reads encoder k mod K
    hooks = [block.cross.register_forward_hook(listen) for block in reading]
    picture = sampler([prompt], [seed])[0]
    for hook in hooks:
        hook.remove()
    maps = torch.stack(heard).unflatten(0, (-1, len(reading))).mean(1)       # (steps, N, L)
    p = sampler.vae.down * model.cfg.patch_size             # a token's side in pixels
    grid = [side // p for side in sampler.size]
    words = encoder.encoders[0].spell(prompt)
    return picture, words, maps.transpose(1, 2)[:, :len(words)].unflatten(2, grid)


def attention_sheet(sampler, prompts, seeds):
    """A row a word: the picture lit where the word is attended, early, midway, late, and over all
    of the denoising; under it how much of the attention the word gets -> an image."""
    moments, cells, labels = ("early", "midway", "late", "in all"), [], []
    for prompt, seed in zip(prompts, seeds):
        picture, words, maps = attention_maps(sampler, prompt, seed)
        # fewer than three steps: some thirds are empty, and show the whole
        parts = [part if len(part) else maps for part in (*maps.tensor_split(3), maps)]
        for k, word in enumerate(words):
            for when, part in zip(moments, parts):
                light = part[:, k].mean(0)                                   # (h, w)
                # As light as the lightest of its own: "a" would be dark beside "circle", and
                # where it looks is the question; the number below says how much
                share, light = light.mean().item(), light / light.max().clamp(min=1e-8)
                light = F.interpolate(light[None, None], sampler.size, mode="bicubic")[0, 0]
                light = light.clamp(0.1, 1)[..., None].cpu().numpy()         # (H, W, 1)
                cells.append((picture * light).astype(np.uint8))
                labels.append(f"{word}, {when}: {100 * share:.0f} %")
    return D.contact_sheet(cells, labels, len(moments))


# -----------------------------------------------------------------------------
# 8. Main
# -----------------------------------------------------------------------------

def only_one(args):
    """The flags with one value in place of each list: everything but --bench draws one way."""
    one = {}                        # (--bench has `settings` for it)
    for name in ("ckpt", "cfg", "motion", "steps"):
        values = getattr(args, name) or [None]              # no --ckpt: looked for later
        if len(values) > 1:
            raise ValueError(f"--{name} {','.join(map(shown, values))} is several values, which "
                             f"only --bench takes")
        one[name] = values[0]
    return argparse.Namespace(**{**vars(args), **one})


def draw(args):
    """Prompts in, pictures out. Everything that can be refused is refused before a step is made."""
    started = time.monotonic()
    prompts, seeds = read_prompts(args)
    path, folder = output_path(args)
    inside = strip if args.strip else attention_sheet if args.attention else None
    if inside and (args.frames > 1 or folder or path.suffix.lower() != ".png"):
        raise ValueError("--strip and --attention show how a picture is drawn, in one PNG; "
                         "leave out --frames, try --out out.png")
    sampler = Sampler(args, args.ckpt or G.find_checkpoint())
    introduce(sampler)
    check_words(sampler.net.text, prompts)
    if inside:
        sheet = inside(sampler, prompts, seeds)
        with D.writing(path):
            sheet.save(path)
    else:
        clips = sampler(prompts, seeds)
        with D.writing(path):
            write(clips, prompts, path, folder, sampler.fps)
    what = ("clip" if args.frames > 1 else "picture") + "s" * (len(prompts) > 1)
    print(f"wrote {path}: {len(prompts)} {what} in "
          f"{time.monotonic() - started:.1f} s")
    return 0


def main(argv=None):
    """Command line -> exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        if args.bench:                                      # for it alone the lists stay lists
            return bench(args)
        return (compare if args.compare else draw)(only_one(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C: nothing more was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
