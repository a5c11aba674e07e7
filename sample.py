"""
sample.py: prompt in, picture or clip out. It also grades, compares, and looks inside.

    python sample.py "a red circle left of a blue square" "a green star"     # -> out.png
    python sample.py "a red circle moving left" --frames 8 --out out.gif     # a video model's clip
    python sample.py --prompts prompts.txt --per-prompt 4 --out samples/     # one file a picture
    python sample.py "a red ring and a blue star" --negative "a red ring above a blue star"
    python sample.py "a green star" --init-image a.png --mask half.png       # draw a part anew
    python sample.py "a red circle moving left" --first-frame a.png --frames 8 --out out.gif
    python sample.py "a red circle and a blue ring" --strip                  # how it came about
    python sample.py "a red circle and a blue ring" --attention              # where words are seen
    python sample.py --bench --cfg 1,2,4,8 --category color                  # graded, a table
    python sample.py --compare a/ema.safetensors b/ema.safetensors           # which draws better?

The checkpoint is --ckpt, or the newest run's in runs/, or the shipped assets/nano.safetensors. Its
path is always printed. Checkpoint, prompt, seed and flags decide a picture; its neighbours do not.
"""

import os
import signal

# Idle OpenMP threads sleep early. The default spin-wait stalls a run beside another busy process.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")           # read when torch is loaded
if __name__ == "__main__":              # Ctrl-C during the imports ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
import torch.nn.functional as fn
from PIL import Image
from tqdm import tqdm

import data as D
import gentron as G

SWEPT = ("ckpt", "cfg", "motion", "steps")                 # flags of several values with --bench
shown = lambda value: "off" if value is None else f"{value:g}"     # as on the command line

# ---- 1. Flags ------------------------------------------------------------------------------------
def parser():
    """Every flag. The flags of SWEPT are lists; `settings` makes single values of them."""
    # Types: values separated by commas; and l_M, where "off" is None (the identity mask)
    listed = lambda read: lambda text: [read(part) for part in text.split(",")]
    motion = lambda text: None if text == "off" else D.number(float, 0, 100)(text)
    p = D.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                 allow_abbrev=False)                       # as in train.py
    add = p.add_argument_group("what to draw").add_argument
    add("prompt", nargs="*", help="one or more sentences")
    add("--prompts", metavar="FILE", help="a text file, one prompt a line")
    add("--negative", metavar="TEXT", default="", help="what not to draw: replaces the null text")
    add("--per-prompt", type=D.number(int, 1, 10_000), default=1, help="pictures a prompt (1)")
    add("--seed", type=D.number(int, 0, 2 ** 31 - 1), default=0, help="of the first picture (0)")
    add("--size", type=D.picture_size, help="H or HxW in pixels (as trained)")
    add("--frames", type=D.number(int, 1, 1024), default=1, help="above 1: a clip (1)")
    add("--fps", type=D.number(float, 0.01, 1000), help="frames a second (as trained)")
    add("--out", help="FILE.png, .gif, .mp4, or a new folder/; --bench: .png; --compare: .html")
    add = p.add_argument_group("start from a picture, cropped to the model's size").add_argument
    add("--init-image", metavar="FILE", help="change this picture")
    add("--strength", type=D.number(float, 0, 1), help="0: no change, 1: all (0.6; with --mask 1)")
    add("--mask", metavar="FILE", help="white: draw anew, black: keep --init-image")
    add("--first-frame", metavar="FILE", help="the clip begins with this picture")
    add = p.add_argument_group("how (with --bench several values by commas)").add_argument
    add("--ckpt", type=listed(str), help="ema.safetensors or last.safetensors of a run")
    add("--ema", dest="weights", action="store_const", const="ema", default="ema", help="averaged")
    add("--raw", dest="weights", action="store_const", const="weights", help="raw, not averaged")
    add("--download", action="store_true", help="fetch encoders that the checkpoint names")
    add("--cfg", type=listed(D.number(float, 0, 100)), default=[None], metavar="l_T", help="text "
        "guidance, uncond + l_T (cond - uncond); 1 = none (2; models of a paper's preset: 7.5)")
    add("--motion", type=listed(motion), default=[1.0], metavar="l_M",
        help="motion-free guidance of clips: 1 = none (1), more above it; 'off': identity mask")
    add("--steps", type=listed(D.number(int, 1, 1000)), default=[25], help="of the sampler (25)")
    add("--sampler", choices=tuple(G.SAMPLERS), help="(pc; models of a paper's preset: ddpm)")
    add("--precision", choices=("fp32", "bf16"), help="(bf16 on a GPU, else fp32)")
    add("--batch-size", type=D.number(int, 1, 4096), default=50, help="how many at once (50)")
    add("--device", help="cpu, cuda, mps ... (the best there is)")
    add = p.add_argument_group("in place of pictures").add_mutually_exclusive_group().add_argument
    add("--strip", action="store_true", help="each picture at twelve moments of its denoising")
    add("--attention", action="store_true", help="where each word is attended, a row a word")
    add("--bench", action="store_true", help="draw fixed prompts and grade them, a table")
    add("--compare", nargs=2, metavar=("A", "B"), help="two checkpoints, or two folders of "
        "pictures named alike: win, draw, lose, and a page on which people vote blind")
    add = p.add_argument_group("grading, on the shapes world").add_argument
    add("--n", type=D.number(int, 1, 10_000), help="prompts a category (100)")
    add("--quick", action="store_true", help="20 prompts a category")
    add("--split", choices=("seen", "unseen"), default="seen", help="trained or new pairs (seen)")
    add("--category", nargs="+", choices=tuple(D.SCORED_ON), help="only these")
    add("--json", metavar="FILE", help="all verdicts and settings (bench.json, study.json)")
    return p

# ---- 2. Prompts in -------------------------------------------------------------------------------
def read_prompts(args):
    """The prompts of the command line, then those of --prompts -> (prompts, each --per-prompt
    times, and their seeds). Raises ValueError if there is none."""
    prompts = list(args.prompt)
    if args.prompts:
        lines = D.read_text(args.prompts, most=2 ** 26).splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not 0 < len(prompts) * args.per_prompt <= 10 ** 6:
        raise ValueError('no prompt, or over a million; try: python sample.py "a red circle"')
    prompts = [prompt for prompt in prompts for _ in range(args.per_prompt)]
    # Each picture has its own seed. Two pictures of one noise would share their layout
    return prompts, [args.seed + k for k in range(len(prompts))]

def check_words(encoder, prompts):
    """Raises ValueError for a prompt of too many characters, or with a word that the encoder does
    not know: the model would silently draw something else."""
    for prompt in prompts:
        if len(prompt) > D.MAX_CAPTION:
            raise ValueError(f"a prompt has more than {D.MAX_CAPTION} characters: {prompt[:40]}...")
        for word in encoder.unknown(prompt):
            near = difflib.get_close_matches(word, encoder.vocabulary, n=3, cutoff=0.5)
            known = " or ".join(near) if near else ", ".join(encoder.vocabulary[:12]) + " ..."
            raise ValueError(f"'{word:.40}' is not in this model's vocabulary; try {known}")

def bench_prompts(args, encoder):
    """{category: (prompts, seeds)} of the benchmark: fixed sentences, each with its own noise.
    Sentences that the encoder cannot read are left out. Raises ValueError if none is left."""
    n, asked = args.n or (20 if args.quick else 100), {}
    clips, pictures = D.CLIP_CATEGORIES, (*D.CATEGORIES, "numeracy")
    for name in args.category or (clips if args.frames > 1 else pictures):
        # The noise depends on --seed, category and place. So a category has the same score with and
        # without the others. (crc32, as Python's hash() differs in every process)
        items = [(prompt, args.seed + zlib.crc32(f"{name} {k}".encode())) for k, prompt in
                 enumerate(D.prompts(name, n, args.split)) if not encoder.unknown(prompt)]
        if items:
            asked[name] = tuple(map(list, zip(*items)))
        if len(items) < n:
            D.say(f"{name}: {n - len(items)} of {n} sentences are left out: unknown words")
    if not asked:
        raise ValueError("no sentence of the benchmark is left; try a model of the shapes world")
    return asked

# ---- 3. The sampler ------------------------------------------------------------------------------
class Sampler:
    """A checkpoint ready to draw: sampler(prompts, seeds) -> uint8 (n, F, H, W, 3). It prints which
    checkpoint it is. args: the flags, with single values for cfg, motion and steps. Raises
    ValueError if the checkpoint cannot draw what they ask for."""
    def __init__(self, args, path):
        # The checkpoint describes the model: no flag repeats how it was trained
        self.args, self.path, self.state = args, path, G.load_checkpoint(path)
        self.device = G.pick_device(args.device)
        self.net = G.build_net(self.state, args.weights, download=args.download).to(self.device)
        self.vae = G.build_vae(self.state, args.download).to(self.device)
        self.size, trained = args.size or tuple(self.state["size"]), tuple(self.state["size"])
        self.fps = args.fps or self.state["fps"]
        self.usual = G.usual(self.state["flags"].get("preset"))
        self.method = args.sampler or self.usual["sampler"]
        self.precision = args.precision or ("bf16" if self.device.type == "cuda" else "fp32")
        multiple = self.vae.down * self.net.model.cfg.patch_size   # pixels of a token's side
        if any(side % multiple for side in self.size):
            raise ValueError(f"--size must be divisible by {multiple} for this model")
        if args.frames > 1 and not self.net.model.cfg.temporal:
            raise ValueError(f"--frames {args.frames} needs a video model, which {path} is not; "
                             f"train one: python train.py --stage t2v")
        check_words(self.net.text, [args.negative])
        self.given = self.read_given() if args.init_image or args.first_frame else None
        D.say(f"{path}: {self.state['stage']}, step {self.state['step']}, "
              f"{'EMA' if args.weights == 'ema' else 'raw'} weights; {self.method}, {args.steps} "
              f"steps, cfg {self.cfg:g}, motion {shown(args.motion)}, {self.precision}")
        if self.size != trained:
            D.say(f"note: size {self.size} is untrained; positions are scaled to {trained}")
        if args.first_frame and not self.state["flags"].get("p_first_frame"):
            D.say("note: this model was not trained with --p-first-frame; expect wrong motion")

    @property
    def cfg(self):
        """--cfg, or the model's usual one."""
        return self.usual["cfg"] if self.args.cfg is None else self.args.cfg

    @torch.no_grad()
    def read_given(self):
        """--init-image and --mask, or --first-frame -> a G.Given."""
        args, mask = self.args, None
        picture = np.array(D.fit(args.init_image or args.first_frame, self.size))      # (H, W, 3)
        x = G.to_float(picture[None, None]).to(self.device)                # (1, 1, 3, H, W)
        if args.mask:
            gray = D.fit(args.mask, self.size).mean(-1)                    # (H, W), 0 .. 255
            # A latent is drawn anew if any of its 8 x 8 pixels is white
            white = torch.as_tensor(gray > 127.5, dtype=torch.float32)[None]
            mask = fn.max_pool2d(white, self.vae.down)[0].to(self.device)  # (h, w)
        strength = (1.0 if args.mask else 0.6) if args.strength is None else args.strength
        schedule = self.net.schedule
        last = schedule.timesteps(args.steps, self.method)[-1]
        if (args.strip or args.attention) and last >= strength * schedule.steps:
            raise ValueError(f"--strip and --attention show the steps; with --strength {strength} "
                             f"and --steps {args.steps} there is none")
        return G.Given(self.vae.encode(x), strength, mask, bool(args.first_frame))

    def __call__(self, prompts, seeds, what="sampling", on_step=None):
        """Draws the prompts, --batch-size at a time. what: the progress bar's label; on_step: see
        `G.generate`."""
        args, clips = self.args, [None] * len(prompts)
        # A caption of the world without a motion is drawn once and repeated. Motion-free frames
        # (3.4) do not see each other: from equal noise they would be F equal pictures
        frames_of = [1 if D.is_picture(prompt) else args.frames for prompt in prompts]
        batches = []                                        # (frames, which prompts)
        for frames in {1, args.frames}:
            places = [k for k, n in enumerate(frames_of) if n == frames]
            batches += [(frames, places[i:i + args.batch_size])
                        for i in range(0, len(places), args.batch_size)]
        times, given = self.net.schedule.timesteps(args.steps, self.method), self.given
        steps = sum(given is None or given.first_frame or           # --strength leaves some out
                    t < given.strength * self.net.schedule.steps for t in times)
        with tqdm(total=len(batches) * steps, desc=what, unit="step", leave=False) as bar:
            def step_done(*state):
                bar.update()
                if on_step:
                    on_step(*state)
            for frames, part in batches:
                drawn = G.generate(
                    self.net.model, self.net.text, self.vae, self.net.schedule,
                    [prompts[k] for k in part], [seeds[k] for k in part], self.size, frames,
                    self.cfg, args.motion, args.steps, self.method, self.device,
                    self.precision == "bf16", args.negative, self.given, step_done)
                for k, clip in zip(part, drawn):
                    clips[k] = np.repeat(clip, args.frames // frames, axis=0)
        return np.stack(clips)                                             # (n, F, H, W, 3)

# ---- 4. Pictures out -----------------------------------------------------------------------------
def draw(args):
    """Prompts in, pictures out. Whatever can be refused is refused before the first step."""
    started = time.monotonic()
    prompts, seeds = read_prompts(args)
    inside = strip if args.strip else attention_sheet if args.attention else None
    path = output_path(args, args.out or ("out.gif" if args.frames > 1 else "out.png"), ".png",
                       *([] if inside else [".gif", ".mp4", "/"]))
    sampler = Sampler(args, args.ckpt)
    check_words(sampler.net.text, prompts)
    if args.first_frame and (still := next(filter(D.is_picture, prompts), None)):
        raise ValueError(f"--first-frame begins a clip; '{still}' names no motion")
    flags, said = sampler.state["flags"], {*G.split_words(" ".join(prompts))}
    if (flags.get("data"), flags.get("world")) == ("shapes", "basic") and (
            new := sorted(said - {*D.vocabulary("basic")})):
        D.say(f"note: this model learned the basic world, which has no {', '.join(new)}; try "
              f"--ckpt assets/nano.safetensors")
    if inside:
        save(path, [inside(sampler, prompts, seeds)], sampler.fps)
    elif path.is_dir():
        write_folder(sampler, prompts, seeds, path)
    else:
        write(sampler(prompts, seeds), prompts, path, sampler.fps)
    D.say(f"wrote {path}: {len(prompts)} drawn in {time.monotonic() - started:.1f} s")

def save(path, images, fps):
    """PIL images -> a .png of the first, or a .gif or .mp4 of all."""
    with D.writing(path) as file:
        if path.suffix.lower() == ".png":
            images[0].save(file)
        else:
            (D.save_gif if path.suffix.lower() == ".gif" else D.save_mp4)(file, images, fps)

def write_folder(sampler, prompts, seeds, folder):
    """A file a prompt, and captions.jsonl, each written as soon as it is drawn. Tools for FID and
    CLIP score read such a folder, and so does train.py."""
    n, suffix = sampler.args.batch_size, "gif" if sampler.args.frames > 1 else "png"
    with open(folder / "captions.jsonl", "w", encoding="utf-8", buffering=1) as lines:
        for i in range(0, len(prompts), n):
            clips = sampler(prompts[i:i + n], seeds[i:i + n], f"{i} of {len(prompts)} drawn")
            for k, clip in enumerate(clips, start=i):
                name = f"{k:05d}.{suffix}"
                save(folder / name, [Image.fromarray(frame) for frame in clip], sampler.fps)
                lines.write(json.dumps({"file": name, "caption": prompts[k]}) + "\n")

def write(clips, prompts, path, fps):
    """uint8 clips (n, F, H, W, 3) -> one labelled file. A .png of clips is a film strip, a row a
    clip."""
    frames = clips.shape[1]
    if path.suffix.lower() == ".png":
        save(path, [film_strip(clips, prompts)], fps)
    else:                                                   # sheet f: moment f of every clip
        columns = min(6, math.ceil(math.sqrt(len(clips))))
        save(path, [D.contact_sheet(clips, prompts, columns, frame=f) for f in range(frames)], fps)

def film_strip(clips, prompts, notes=None):
    """Clips as one image: a row a clip, its caption (and note) under the first frame. Pictures
    (F = 1) come as a grid."""
    frames, notes = len(clips[0]), notes or [None] * len(clips)
    if frames == 1:
        return D.contact_sheet(clips, prompts, min(10, math.ceil(math.sqrt(len(clips)))), notes)
    cells = [frame for clip in clips for frame in clip]     # n F of them, F to a row
    first = lambda items, rest: [x if f == 0 else rest for x in items for f in range(frames)]
    return D.contact_sheet(cells, first(prompts, ""), frames, first(notes, None))

# ---- 5. The benchmark ----------------------------------------------------------------------------
def wilson(right, n):
    """95 % interval of a share, right of n (Wilson 1927): (low, high), each 0 .. 1."""
    # The usual p +- 1.96 sqrt(p (1 - p) / n) has no width where none or all are right
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # max: at right = 0 rounding can give -1e-18, which would print as -0
    return max(0.0, middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

def print_row(cells, titles=False):
    """Prints a table row, [(title, value), ...], right-aligned; with titles, these above it. Shares
    (float) and intervals (tuple) are printed in percent."""
    text = lambda x: (f"{100 * x[0]:.0f}..{100 * x[1]:.0f}" if isinstance(x, tuple) else
                      f"{100 * x:.1f}" if isinstance(x, float) else str(x))
    if titles:
        D.say(" ".join(title.rjust(7) for title, _ in cells))
    D.say(" ".join(text(value).rjust(7) for _, value in cells))

def grade(name, prompts, clips):
    """Lets the judge read the clips of one category -> its entry of the record, a dict."""
    verdicts = [D.judge(clip, prompt) for clip, prompt in zip(clips, prompts)]
    # A category asks for a part of what the judge sees (D.SCORED_ON)
    right, n = [D.passed(verdict, name) for verdict in verdicts], len(prompts)
    entry = {"n": n, "score": float(np.mean(right)), "interval": wilson(sum(right), n)}
    for number in verdicts[0].numbers:                      # frames_right, colors_present, flicker
        values = [verdict.numbers[number] for verdict in verdicts]
        entry[number] = float(np.mean(values))              # a mean: with a normal's 95 % interval
        entry[f"{number}_error"] = float(1.96 * np.std(values) / math.sqrt(n))
    if "motion" in verdicts[0].parts:                       # all motions of a clip
        moves = sum(v.parts["motion"] and v.parts["stillness"] for v in verdicts)
        entry["moves_right"], entry["moves_interval"] = moves / n, wilson(moves, n)
    entry["verdicts"] = [{"prompt": p, "right": ok, "reasons": v.reasons, **v.parts, **v.numbers}
                         for p, v, ok in zip(prompts, verdicts, right)]
    return entry

def ceiling(sampler, name, prompts):
    """The share of true pictures that pass after a round trip through the autoencoder, 0 .. 1. No
    sample can be expected to do better."""
    truth = (D.truth(prompt, 0, sampler.size, sampler.args.frames) for prompt in prompts)
    x = (G.to_float(clip[None]).to(sampler.device) for clip in truth)      # (1, F, 3, H, W) each
    return grade(name, prompts, [G.to_uint8(sampler.vae.decode(sampler.vae.encode(clip)))[0]
                                 for clip in x])["score"]

def bench(args):
    """Draws each category's fixed prompts with each setting, lets the judge read them, and prints a
    table, a row a setting and category. Writes every verdict, and a sheet of the failures.

    The categories are T2I-CompBench's (the paper's Table 2), asked and judged in our own world. The
    scores cannot be compared with the paper's."""
    json_path = output_path(args, args.json or "bench.json", ".json")
    sheet_path = output_path(args, args.out or "bench.png", ".png")
    for path in args.ckpt[1:]:
        G.load_checkpoint(path)                             # finds a damaged file before any work
    records, failures, sampler = [], [], None
    swept = [flag for flag in SWEPT if flag != "ckpt" and len(getattr(args, flag)) > 1]
    for one in settings(args):
        if sampler is None or sampler.path != one.ckpt:     # a table for each checkpoint
            sampler, ceilings = Sampler(one, one.ckpt), {}
            asked = bench_prompts(args, sampler.net.text)
        sampler.args, entries = one, {}
        for name, (prompts, seeds) in asked.items():
            clips = sampler(prompts, seeds, name)
            entry = entries[name] = grade(name, prompts, clips)
            failures += [(clip, v["prompt"], ("; ".join(v["reasons"]), "#c03030"))
                         for clip, v in zip(clips, entry["verdicts"]) if not v["right"]]
            first = not ceilings                            # the table's first row
            if name not in ceilings:                        # of autoencoder and prompts alone
                ceilings[name] = ceiling(sampler, name, prompts)
            entry["ceiling"] = ceilings[name]
            row = [(flag, shown(getattr(one, flag))) for flag in swept]
            row += [(f"{'category':>14}", f"{name:>14}"), ("right", entry["score"]),
                    ("95 %", entry["interval"])]
            if args.frames > 1:
                row += [("moves", entry["moves_right"]), ("95 %", entry["moves_interval"]),
                        ("frames", entry["frames_right"]), ("+-", entry["frames_right_error"]),
                        ("flicker", f"{entry['flicker']:.2f}")]
            print_row([*row, ("colours", entry["colors_present"]), ("ceiling", ceilings[name]),
                       ("n", len(prompts))], titles=first)
        facts = {x: sampler.state[x] for x in ("stage", "step", "made")}
        facts |= {"cfg": sampler.cfg, "sampler": sampler.method}
        records.append({**vars(one), **facts, "checkpoint": one.ckpt, "size": sampler.size,
                        "precision": sampler.precision, "device": str(sampler.device),
                        "torch": torch.__version__, "numpy": np.__version__, "categories": entries})
        if all(name in entries for name in D.CATEGORIES):   # the paper's six, without numeracy
            records[-1]["mean"] = np.mean([entries[name]["score"] for name in D.CATEGORIES])
            D.say(f"mean of the six {100 * records[-1]['mean']:5.1f}")
        with D.writing(json_path) as file:                  # after each table: nothing is lost
            file.write_text(json.dumps(records if len(records) > 1 else records[0], indent=1))
    D.say(f"wrote {json_path}: every verdict")
    if failures:
        save(sheet_path, [film_strip(*zip(*failures[:60]))], 1)
        D.say(f"wrote {sheet_path}: {min(60, len(failures))} of {len(failures)} failures")

# ---- 6. Looking inside, by hooks on the model: the picture is the one of `draw` ------------------
def strip(sampler, prompts, seeds, moments=12):
    """Each prompt's picture at twelve moments of denoising -> an image, three rows a prompt.

    noisy: z_t. unguided: the network's estimate of z_0, the mean of all pictures that fit z_t and
    the prompt. guided: the estimate after guidance, at which the next step aims; the last one is
    the picture. With --cfg 1 guided equals unguided, and is left out: the estimates then show the
    order in which a picture is decided (layout, colour, edges)."""
    cells, labels, schedule = [], [], sampler.net.schedule
    rows = ["noisy", "unguided", f"guided by cfg {sampler.cfg:g}"]
    for prompt, seed in zip(prompts, seeds):
        heard, steps = [], []                               # (z, output); (t, z, unguided, guided)

        def on_step(t, _, guided):
            z, out = heard.pop()
            z0, _ = schedule.z0_and_eps(out, z, *schedule.at(torch.tensor([t]), z))
            steps.append((t, z, z0, guided))                # latents: (1, 1, C, h, w)
        # The batch holds guidance's branches; row 0 reads the prompt (see `G.guided`)
        hook = sampler.net.model.register_forward_hook(
            lambda model, inputs, out: heard.append((inputs[0][:1], out[:1].float())))
        sampler([prompt], [seed], on_step=on_step)
        hook.remove()
        keep = np.unique(np.linspace(0, len(steps) - 1, moments).astype(int))
        for row, name in enumerate(rows[:2] if sampler.cfg == 1 else rows):
            cells += [G.to_uint8(sampler.vae.decode(steps[k][1 + row]))[0] for k in keep]
            labels += [f"{f'{prompt}: {name}, ' if k == 0 else ''}t = {steps[k][0]}" for k in keep]
    return D.contact_sheet(cells, labels, len(keep), cell=96)

def attention_weights(cross, x, k, mask):
    """Attention's weights: x (B, N, width), k (B, heads, L, d), mask bool (B, L) -> (B, N, L), mean
    over heads. They sum to 1 over the L words."""
    # Computed again here: `G.attend` does not return them
    q = cross.q_norm(cross.split(cross.q(x)))                              # (B, heads, N, d)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])              # (B, heads, N, L)
    return scores.masked_fill(~mask[:, None, None, :], -math.inf).softmax(-1).mean(1)

def attention_maps(sampler, prompt, seed):
    """Draws one picture and records its cross-attention. Returns the picture, uint8 (1, H, W, 3),
    the words, and maps (steps, L, h, w): how much each patch looked at each of the L words of the
    first encoder, mean over heads and the blocks that read it."""
    model, encoder = sampler.net.model, sampler.net.text
    if model.cfg.conditioning != "cross" or not encoder.encoders:
        raise ValueError(f"--attention needs a model with cross-attention, {sampler.path} has none")
    heard = []                                              # (N, L), step by step, block by block
    # The inputs are x, (k, v), mask. The batch holds guidance's branches; row 0 reads the prompt
    listen = lambda cross, inputs, _: heard.append(
        attention_weights(cross, inputs[0][:1], inputs[1][0][:1], inputs[2][:1])[0].float())
    reading = model.blocks[::len(encoder.encoders)]         # block k reads encoder k mod K
    hooks = [block.cross.register_forward_hook(listen) for block in reading]
    picture = sampler([prompt], [seed])[0]
    for hook in hooks:
        hook.remove()
    maps = torch.stack(heard).unflatten(0, (-1, len(reading))).mean(1)     # (steps, N, L)
    grid = [side // (sampler.vae.down * model.cfg.patch_size) for side in sampler.size]
    words = encoder.encoders[0].spell(prompt)
    return picture, words, maps.transpose(1, 2)[:, :len(words)].unflatten(2, grid)

def attention_sheet(sampler, prompts, seeds):
    """A row a word: the picture, bright where the word is attended, early, midway, late, and over
    all steps. The label says which share of the attention the word has -> an image."""
    moments, cells, labels = ("early", "midway", "late", "in all"), [], []
    for prompt, seed in zip(prompts, seeds):
        picture, words, maps = attention_maps(sampler, prompt, seed)
        # With fewer than three steps a third can be empty, and shows all steps
        parts = [part if len(part) else maps for part in (*maps.tensor_split(3), maps)]
        for k, word in enumerate(words):
            for when, part in zip(moments, parts):
                light = part[:, k].mean(0)                                 # (h, w)
                # Relative to the word's own maximum: this row shows where, the label how much
                share, light = light.mean().item(), light / light.max().clamp(min=1e-8)
                light = fn.interpolate(light[None, None], sampler.size, mode="bicubic")[0, 0]
                light = light.clamp(0.1, 1)[..., None].cpu().numpy()       # (H, W, 1)
                cells.append((picture * light).astype(np.uint8))
                labels.append(f"{word}, {when}: {100 * share:.0f} %")
    return D.contact_sheet(cells, labels, len(moments))

# ==== Below: engineering ==========================================================================
# A first reading may stop here. What follows: the comparison of two systems, records, path checks.

# ---- 7. Two systems compared by the judge and by people: the paper's study in miniature ----------
STUDY = 100                     # pairs on the page at most, the paper's number of prompts
QUESTIONS = [{"key": "quality", "text": "Which looks better?"},          # the paper's two
             {"key": "alignment", "text": "Which fits the text better?"}]

def draw_sides(args):
    """Two checkpoints -> the sides of --compare, {(prompt, seed): (clip, prompt, category)} each,
    and frames a second. Both draw the same prompts from the same noise."""
    both, own = [Sampler(args, path) for path in args.compare], args.prompt or args.prompts
    asked = [{"": read_prompts(args)} if own else bench_prompts(args, sampler.net.text)
             for sampler in both]                           # "": prompts of no category
    for sampler, questions in zip(both, asked):
        check_words(sampler.net.text, [p for prompts, _ in questions.values() for p in prompts])
    sides = [{}, {}]
    # The two vocabularies may differ: `compare` pairs what both have drawn
    for side, sampler, questions in zip(sides, both, asked):
        for name, (prompts, seeds) in questions.items():
            clips = sampler(prompts, seeds, f"{sampler.path} {name}")
            side |= {(p, seed): (clip, p, name) for p, seed, clip in zip(prompts, seeds, clips)}
    return sides, both[0].fps

def read_sides(args):
    """Two folders of pictures by any systems -> the sides of --compare, {name: (clip, caption, "")}
    each, and frames a second. All have one size: nobody shall vote for the larger picture."""
    first = next((file for file in sorted(Path(args.compare[0]).rglob("*"))
                  if file.suffix.lower() in D.PICTURES), None)
    size, fps = args.size or (D.size_of(first) if first else (64, 64)), args.fps or 4.0
    folders = [D.Folder(path, size, args.frames, fps) for path in args.compare]
    return [{folder.stem(file): (*folder[k], "") for k, (file, _) in enumerate(folder.items)}
            for folder in folders], fps

def study_page(path, items, names, fps):
    """Writes the page on which people vote: the template with one JSON put in, pictures inside.
    items: [(prompt, clip of A, clip of B), ...]."""
    def source(clip):                                       # of an <img>
        file, (first, *rest) = io.BytesIO(), map(Image.fromarray, clip)
        first.save(file, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps),
                   loop=0, quality=92, lossless=max(first.size) <= 256)
        return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    # Evenly over all prompts, so that every category has its share of the page
    few = np.unique(np.linspace(0, len(items) - 1, STUDY).astype(int))
    pairs = [{"key": str(k), "prompt": items[k][0], "a": source(items[k][1]),
              "b": source(items[k][2])} for k in few]
    # The id keeps votes of another study out of this one's table
    study = {"id": f"{zlib.crc32(json.dumps(pairs).encode()):08x}", "title": "Which is better?",
             "questions": QUESTIONS, "names": dict(zip("ab", names)), "pairs": pairs}
    page = D.read_text(Path(__file__).resolve().parent / "assets" / "study.html")
    # Without "<" no caption can close the script element ("</script>"); it is still JSON
    page = page.replace("/*STUDY*/null", json.dumps(study).replace("<", "\\u003c"))
    with D.writing(path) as file:
        file.write_text(page, encoding="utf-8")
    D.say(f"wrote {path} for people: {len(pairs)} pairs, open it in a browser")

def compare(args):
    """--compare A B: the judge's verdict on both, prompt by prompt, and a page for people."""
    json_path = output_path(args, args.json or "study.json", ".json")
    page = output_path(args, args.out or "study.html", ".html")
    (a, b), fps = (read_sides if all(map(os.path.isdir, args.compare)) else draw_sides)(args)
    names, items, verdicts, rows = [name for name in a if name in b], [], [], {}
    if not names:
        raise ValueError(f"nothing in {args.compare[0]} has a namesake in {args.compare[1]}")
    D.say(f"A = {args.compare[0]}, B = {args.compare[1]}: {len(names)} pairs; "
          f"{len(a.keys() ^ b.keys())} pictures without a namesake are left out")
    for name in names:
        (clip_a, prompt, label), (clip_b, other, _) = a[name], b[name]
        prompt = prompt or other
        if other not in ("", prompt):
            raise ValueError(f"the two folders give '{name}' different captions")
        items.append((prompt, clip_a, clip_b))
        try:                                                # without a category, all parts count
            right = [D.passed(v, label) if label else v.right
                     for v in (D.judge(clip_a, prompt), D.judge(clip_b, prompt))]
        except ValueError:                                  # no sentence of the shapes world
            right = [None, None]
        verdicts.append({"prompt": prompt, "category": label, "a": right[0], "b": right[1]})
    for name in [*dict.fromkeys(v["category"] for v in verdicts if v["category"]), "all"]:
        results = [v["a"] - v["b"] for v in verdicts        # 1: A wins, 0: a draw, -1: B wins
                   if v["a"] is not None and name in (v["category"], "all")]
        if n := len(results):
            win, even, lose = (results.count(result) for result in (1, 0, -1))
            print_row([(f"{'category':>14}", f"{name:>14}"), ("A wins", win / n),
                       ("95 %", wilson(win, n)), ("draw", even / n), ("95 %", wilson(even, n)),
                       ("loses", lose / n), ("95 %", wilson(lose, n)), ("n", n)], titles=not rows)
            rows[name] = {"n": n, "win": win, "draw": even, "lose": lose}
    with D.writing(json_path) as file:
        file.write_text(json.dumps({**vars(args), "rows": rows, "verdicts": verdicts}, indent=1))
    D.say(f"wrote {json_path}: every verdict")
    study_page(page, items, args.compare, fps)

# ---- 8. Paths and main ---------------------------------------------------------------------------
def output_path(args, name, *suffixes):
    """A file to be written -> its Path; with "/" among the suffixes, also a folder. ValueError if
    it cannot be written, has another suffix (--json is never --out), or is read by this command."""
    path = Path(name)
    # A folder need not exist yet: a slash at the end or a missing suffix tells
    if "/" in suffixes and (name.endswith(("/", os.sep)) or path.is_dir() or not path.suffix):
        if path.is_dir() and any(path.iterdir()):
            raise ValueError(f"--out {path} holds files; choose a new or empty folder")
        return D.writable(path / "captions.jsonl").parent   # made, if it was not there
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} must end in {' or '.join(suffixes)}")
    if path.suffix.lower() == ".mp4":
        D.need_av("writing")
    inputs = [args.prompts, args.init_image, args.mask, args.first_frame, *(args.compare or ()),
              *(args.ckpt if isinstance(args.ckpt, list) else [args.ckpt])]
    return D.writable(path, inputs=inputs)

def settings(args):
    """Flags that hold lists -> Namespaces of one value each, all combinations, --ckpt outermost."""
    for values in itertools.product(*(getattr(args, flag) for flag in SWEPT)):
        yield argparse.Namespace(**{**vars(args), **dict(zip(SWEPT, values))})

def work(args):
    """Does what the flags ask for. Raises ValueError for flags that do not go together."""
    inside = args.strip or args.attention
    for wrong, message in (
            (args.bench and (args.prompt or args.prompts or args.per_prompt > 1),
             "--bench asks its own prompts, each once"),
            (not args.bench and not args.compare and
             (args.n or args.quick or args.category or args.json or args.split != "seen"),
             "--n, --quick, --split, --category and --json are for --bench and --compare"),
            ((args.bench or args.compare) and (args.init_image or args.first_frame),
             "--init-image and --first-frame need prompts of yours, not --bench or --compare"),
            (args.first_frame and args.frames == 1, "--first-frame begins a clip; add --frames 8"),
            (args.frames == 1 and {*D.CLIP_CATEGORIES} & {*(args.category or ())},
             "--category names one of clips; add --frames 8"),
            ((args.mask or args.strength is not None) and not args.init_image,
             "--mask and --strength need --init-image FILE"),
            ((inside or args.init_image) and args.frames > 1, "pictures only; leave out --frames"),
            (inside and 0 in args.cfg, "--strip and --attention follow the words; try --cfg 4")):
        if wrong:
            raise ValueError(message)
    # The null text has the weights l_M - l_T and, for clips, 1 - l_M (see `G.guided`)
    if args.negative and 1 in args.cfg and (args.frames == 1 or {1, None} & {*args.motion}):
        D.say("note: --negative has no effect at --cfg 1, where its weight is zero")
    stages = ("t2v",) if args.frames > 1 else ("t2i", "t2v")       # clips need a video model
    args.ckpt = args.ckpt or [None if args.compare else G.find_checkpoint(stages)]
    if args.bench:
        return bench(args)
    one, *more = settings(args)
    if more:
        raise ValueError(f"only --bench takes several values of --{', --'.join(SWEPT)}")
    return (compare if args.compare else draw)(one)

def main(argv=None):
    """Command line -> exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    return D.run_main(lambda: work(parser().parse_args(argv)),
                      memory_advice="try a smaller --batch-size, --frames or --size")

if __name__ == "__main__":
    sys.exit(main())
