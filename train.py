"""
train.py: one loop, four stages:   vae -> (encode) -> t2i -> t2v

    python train.py                                   # text to image on the shapes world
    python train.py --data my_pictures --steps 20000  # your own pictures and captions
    python train.py --stage t2v                       # text to video, from the newest t2i run
    python train.py --stage vae                       # how assets/vae.safetensors was made
    python train.py --stage encode --data my_pictures --size 256 --text clip+t5 --out my_cache
    torchrun --nproc_per_node=8 train.py --preset XL/2 --data my_cache
    torchrun --nproc_per_node=8 train.py --preset G/2 --fsdp --checkpoint-activations --compile

To resume, run the same command again. A run folder holds last.safetensors (the whole run),
ema.safetensors (the file to share: half-precision EMA weights, autoencoder, vocabulary),
config.json, log.csv, loss.png and samples/.
"""

import os

# How long an idle OpenMP thread spins before it sleeps; torch reads it when it is loaded. The
# default spin-wait stalls training when another process is busy.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import collections
import copy
import dataclasses
import datetime
import itertools
import json
import math
import multiprocessing
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data as D
import gentron as G

# ---- 1. Flags and their defaults -----------------------------------------------------------------

# The defaults that depend on what is trained. The first three columns are for the nano preset and
# the autoencoder, the last two for the paper's sizes. From the paper: lr 1e-4, constant, and 128
# clips. OURS: the rest. nano learns a small world, so it has a high rate and a short EMA.
COLUMNS =           ("vae",    "t2i",    "t2v",    "paper t2i", "paper t2v")
DEFAULTS = {
    "steps":         (16_000,   5_428,    4_500,    500_000,     500_000),
    "batch_size":    (16,       64,       16,       256,         128),
    "lr":            (2e-3,     2e-3,     2e-3,     1e-4,        1e-4),
    "lr_decay":      (1_000,    1_000,    1_000,    0,           0),
    "layout_steps":  (900,      900,      900,      0,           0),
    "ema":           (0.998,    0.998,    0.998,    0.9999,      0.9999),
    "objective":     ("v",      "v",      "v",      "eps",       "eps"),
    "schedule":      ("cosine", "cosine", "cosine", "linear",    "linear"),
    "size":          ((64, 64), (64, 64), (64, 64), (256, 256),  (256, 256)),
    "frames":        (1,        1,        8,        1,           8),
    "world":         ("full",   "basic",  "basic",  "basic",     "basic"),
    "p_first_frame": (0.0,      0.0,      0.1,      0.0,         0.1),
    "noise_shift":   (0.0,      0.0,      0.0,      0.0,         0.0),
    "fps":           (4.0,      4.0,      4.0,      4.0,         4.0),
}
WARMUP = 100            # OURS: steps over which the learning rate rises
# How many items of the shapes world a stage draws. The autoencoder sees each of them once. The
# other stages encode theirs once, and train on them for many epochs.
DRAWN = dict(vae=1_000_000, t2i=32_768, t2v=8_192)
WIDER = dict(basic=1, full=3)           # the full world says more, so it has more t2i and t2v items
PREVIEW_SEED = 10 ** 6  # the dataset seed of the previews' prompts; no run trains on it
# The fields of the model's config that are flags: a new field becomes a flag by itself
CONFIG = {f.name: f for f in dataclasses.fields(G.GenTronConfig) if "help" in f.metadata}


def parser():
    """Every flag, in four groups. None = the value is found later, by `resolve`."""
    p = D.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                 allow_abbrev=False)
    count, share = D.number(int, 1, 10 ** 9), D.number(float, 0, 1)
    step, yes = D.number(int, 0, 10 ** 9), dict(action="store_true", default=False)
    yes_no = dict(action=argparse.BooleanOptionalAction)
    group = p.add_argument_group("what to train")

    def add(flag, help, default=None, **options):
        """One flag. Its help ends with the default that the code uses."""
        row = DEFAULTS.get(flag[2:].replace("-", "_"), (default,))
        write = lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v)
        if len(set(row)) > 1:
            help += f" ({', '.join(f'{c}: {write(v)}' for c, v in zip(COLUMNS, row))})"
        elif row[0] is not None and row[0] is not False:
            help += f" ({write(row[0])})"
        group.add_argument(flag, help=help, default=default, **options)

    add("--stage", "what to train or make", "t2i", choices=("vae", "encode", "t2i", "t2v"))
    add("--preset", "size of the Transformer (nano, or that of --init)", choices=G.PRESETS)
    for name, f in CONFIG.items():
        how = yes_no if f.type is bool else dict(type=count if f.type is int else f.type)
        value = "the preset's" if name in G.PRESETS["nano"] else f.default
        add(f"--{name.replace('_', '-')}", f"{f.metadata['help']} ({value})", **how)
    add("--text", "small, small+small, labels, none, clip, t5, clip+t5 or NAME[+NAME] (small)")
    add("--channels", "stage vae: channels of the latents; more show finer detail, and take longer "
        "to learn", 4, type=D.number(int, 1, 256))
    add("--vae", "a checkpoint, or a name for diffusers (assets/vae.safetensors)")
    add("--objective", "what the network predicts", choices=("eps", "v", "flow"))
    add("--schedule", "noise schedule; flow goes with straight", choices=tuple(G.OBJECTIVES))
    add("--noise-shift", "lowers log(alpha / sigma) at every t", type=D.number(float, -5, 5))
    group = p.add_argument_group("data")
    add("--data", "shapes, a folder of pictures or clips, or a cache of --stage encode", "shapes")
    add("--image-data", "t2v: pictures for joint training, shapes or a folder")
    add("--world", "how much the shapes world shows", choices=("basic", "full"))
    add("--size", "H or HxW in pixels", type=D.picture_size)
    add("--frames", "t2v: frames a clip", type=D.number(int, 1, 1024))
    add("--fps", "t2v: frames a second", type=D.number(float, 0.01, 1000))
    # OURS: the three rates. The paper drops text and motion, and does not say how often.
    add("--p-drop-text", "share of captions that are dropped", 0.1, type=share)
    add("--p-motion-free", "t2v: share of stills, temporal attention off", 0.1, type=share)
    add("--p-first-frame", "t2v: share of clips whose first frame is given", type=share)
    group = p.add_argument_group("optimisation")
    add("--steps", "steps in all", type=count)
    add("--minutes", "then stop and save", type=D.number(float, 0, above=True))
    add("--batch-size", "over all processes", type=D.number(int, 1, 2 ** 16))
    add("--grad-accum", "micro-batches a step", 1, type=count)
    add("--lr", "AdamW's learning rate", type=share)
    add("--lr-decay", "from this step on the rate falls as 1 / sqrt(step); 0 = never", type=step)
    add("--layout-steps", "so many steps near pure noise only (your own data: 0)", type=step)
    add("--ema", "decay of the averaged weights", type=share)
    add("--seed", "of all that is random", 0, type=D.number(int, 0, 2 ** 31 - 1))
    group = p.add_argument_group("the run")
    add("--out", "the run's folder (runs/STAGE)")
    add("--init", "checkpoint to start from (t2v: the newest t2i run's)")
    add("--resume", "go on with the run in the folder, or move it aside", True, **yes_no)
    add("--save-every", "steps", 500, type=count)
    add("--sample-every", "steps between previews and held-out losses", 500, type=count)
    add("--workers", "processes that draw or decode", 2, type=D.number(int, 0, 256))
    add("--device", "cpu, cuda, cuda:1, mps ... (the best there is)")
    add("--precision", "of the network (bf16 on a GPU, else fp32)", choices=("fp32", "bf16"))
    add("--checkpoint-activations", "compute blocks again in the backward pass: less memory", **yes)
    add("--fsdp", "under torchrun: each process keeps only its share of the model", **yes)
    add("--compile", "torch.compile the blocks: a minute to start, then faster on a GPU", **yes)
    add("--dry-run", "print parameters, GFLOPs and memory, and train nothing", **yes)
    add("--benchmark", "time training steps on random data (t2v: at 1, 4, 8, 16, 32 frames)", **yes)
    return p


# ---- 2. The data of a step -----------------------------------------------------------------------

CHUNK = 64      # items that are encoded together: always the same ones, whatever the run


@lru_cache(maxsize=4)
def permutation(seed, epoch, n):
    """The order of n items in an epoch, (n,): a function of its arguments."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def places_of_step(seed, step, batch, n):
    """Which places of the shuffled dataset step `step` trains on: a list of `batch` numbers below
    n, and a function of its arguments."""
    # The first epoch takes the places in order, because `Latents` encodes in that order. Every
    # later epoch has an order of its own. A batch may straddle two epochs.
    everything = range(step * batch, (step + 1) * batch)
    return [i if i < n else int(permutation(seed, i // n, n)[i % n]) for i in everything]


class Latents:
    """A shuffled dataset's latents: latents[places] -> fp16 (B, F, C, h, w), captions.

    A cache holds them. Those of other data are encoded when first asked for and kept in memory:
    training starts at once, and the first epoch pays for it."""
    def __init__(self, dataset, vae, args):
        self.dataset, self.vae, self.device = dataset, vae, args.device
        self.order = permutation(args.seed, 0, len(dataset)).tolist()
        chunks = (self.order[i:i + CHUNK] for i in range(0, len(dataset), CHUNK))
        self.chunks = None if cache_of(dataset) else loader(dataset, chunks, args)
        self.z, self.captions = [], []                     # of the places encoded so far

    def __len__(self):
        return len(self.order)

    def __getitem__(self, places):
        if self.chunks is None:
            z, captions = self.dataset[[self.order[i] for i in places]]
            return torch.as_tensor(z), list(captions)
        missing = max(places) + 1 - len(self.captions)     # after a resume: nearly everything
        with tqdm(total=missing, desc="encoding", leave=False,
                  disable=missing < 32 * CHUNK or rank() > 0) as bar:
            while len(self.captions) <= max(places):
                z, captions = encode_chunk(self.vae, *next(self.chunks), self.device)
                self.z += z                                # rows: a list of (F, C, h, w)
                self.captions += captions
                bar.update(len(captions))
        return torch.stack([self.z[i] for i in places]), [self.captions[i] for i in places]


@torch.no_grad()
def encode_chunk(vae, clips, captions, device):
    """Pictures uint8 (B, F, H, W, 3) and captions -> latents fp16 (B, F, C, h, w) and captions."""
    return vae.encode(G.to_float(clips).to(device)).half().cpu(), captions


def vae_batches(dataset, shape, first, args):
    """Stage vae: (pictures (b, 1, 3, H, W), noise (b, 1, C, h, w)) of step first, first + 1, ...
    shape: (B, 1, C, h, w); b of the batch's B items belong to this process."""
    B, own, steps = shape[0], own_part(shape[0]), range(first, args.steps)
    order = permutation(args.seed, 0, len(dataset))        # class folders must not come in turn
    items = (order[places_of_step(args.seed, step, B, len(dataset))[own]].tolist()
             for step in steps)
    for step, (clips, _) in zip(steps, loader(dataset, items, args)):
        yield G.to_float(clips), G.randomness(args.seed, step, shape).noise[own]


def joint_batches(clips, pictures, schedule, shape, first, args):
    """Stages t2i and t2v: (latents (b, F, C, h, w), b captions, Draws) of step first, first + 1 ...

    Joint image-video training (paper 3.4): an item drawn as `still`, with probability
    --p-motion-free, is a picture repeated F times, with the picture's caption. `training_loss`
    switches its temporal attention off. In t2i there are no stills: all items are pictures.
    clips, pictures: Latents (pictures None: no stills); shape: (B, F, C, h, w)."""
    B, own = shape[0], own_part(shape[0])                  # own: this process's slice of the batch
    for step in itertools.count(first):                    # the loop knows when to stop
        # Drawn for the global batch, then sliced: an item gets the same draws on any process
        draws = G.randomness(args.seed, step, shape, schedule, args.p_drop_text,
                             args.p_motion_free if pictures else 0.0, args.p_first_frame,
                             layout=step < args.layout_steps)[own]
        z0, captions = clips[places_of_step(args.seed, step, B, len(clips))[own]]
        z0 = z0.float()                                    # (b, F, C, h, w), stored in fp16
        still = draws.still.nonzero()[:, 0].tolist()       # which of the b items are pictures: s
        if still:
            # The j-th item is the j-th picture or the j-th clip of this step. Both datasets are
            # walked at one pace, so one item's draw changes no other item.
            places = places_of_step(args.seed, step, B, len(pictures))[own]
            z, words = pictures[[places[j] for j in still]]    # (s, 1, C, h, w)
            z0[still] = z.float()                              # (s, F, C, h, w), by broadcasting
            for j, caption in zip(still, words):
                captions[j] = caption
        yield z0, captions, draws


# ---- 3. The training step ------------------------------------------------------------------------

def learning_rate(step, lr, decay_from):
    """The rate of step 0, 1, ...: it rises in a line over WARMUP steps to lr, stays there, and from
    decay_from on (0: never) is lr sqrt(decay_from / step), as in Karras et al. 2024."""
    # It does not depend on the last step, so a run can be made longer and its steps are the same
    decay = math.sqrt(decay_from / max(step, decay_from)) if decay_from else 1.0
    return lr * min(1.0, (step + 1) / WARMUP) * decay


def autocast(args):
    """bf16 where --precision says so; weights and loss stay in fp32. The range of bf16 is that of
    fp32, so the loss needs no scaling."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def training_step(run, inputs, step, args):
    """Forward, backward, clip, AdamW, EMA. inputs: those of b items, this process's part of the
    batch; run.parallel(*inputs) is the loss of each. Returns the losses (b,) and the norm of the
    gradients before clipping, a number. If it is not finite, nothing has changed."""
    net, optimizer = run.parallel, run.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args.lr, args.lr_decay)

    # forward and backward, micro-batch by micro-batch; the gradients add up
    b, losses = len(inputs[0]), []
    micro = b // args.grad_accum
    for k in range(args.grad_accum):
        part = [x[k * micro:(k + 1) * micro] for x in inputs]
        part = [x.to(args.device) if isinstance(x, torch.Tensor) else x for x in part]
        # The backward pass of the last micro-batch averages the gradients over the processes
        average_gradients(net, k == args.grad_accum - 1)
        with autocast(args):
            loss = net(*part)                              # (micro,)
        (loss.sum() / b).backward()                        # the mean over the b items
        losses.append(loss.detach())

    # clip: OURS, to a norm of 1. The norm is that of all processes, so they all decide alike.
    norm = full_tensors(torch.nn.utils.clip_grad_norm_(run.weights, 1.0)).item()

    if math.isfinite(norm):
        optimizer.step()
        # EMA: an average of the weights over the last steps draws better pictures than the weights.
        # The decay warms up, or a short run's average would still be near its random start.
        decay = min(args.ema, (1 + step) / (10 + step))
        for average, weight in zip(run.averages, run.weights):
            average.lerp_(weight.detach(), 1 - decay)  # exercise 6
    optimizer.zero_grad(set_to_none=True)
    return torch.cat(losses), norm


# ---- 4. Previews and the held-out loss: how well does it go? -------------------------------------

LEVELS = (100, 300, 500, 700, 900)      # timesteps of the held-out loss
MOST = 64                               # items of the held-out loss


def spread(n, most):
    """At most `most` of the numbers 0 .. n - 1, evenly spread: a list."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)).tolist()


@torch.no_grad()
def held_out_loss(ema, held, args):
    """The averaged weights' loss on items that never train, a number. The noise is the same each
    time, so only the weights change it. held: their Latents; stage vae: a dataset."""
    if args.stage == "vae":
        x = G.to_float(collate([held[i] for i in spread(len(held), MOST)])[0])  # (n, 1, 3, H, W)
        shape = (len(x), 1, ema.channels, *(side // ema.down for side in args.size))
        inputs = [(x, G.randomness(PREVIEW_SEED, 0, shape).noise)]
    else:                                                  # the same items at each of LEVELS
        z0, captions = held[range(min(MOST, len(held)))]
        draws = {t: G.randomness(PREVIEW_SEED, t, z0.shape) for t in LEVELS}
        inputs = [(z0, captions, dataclasses.replace(d, t=torch.full((len(z0),), t)))
                  for t, d in draws.items()]
    losses = []
    for values, k in itertools.product(inputs, range(0, len(inputs[0][0]), 16)):   # 16 at a time
        part = [x[k:k + 16] for x in values]
        part = [x.float().to(args.device) if isinstance(x, torch.Tensor) else x for x in part]
        with autocast(args):
            losses.append(ema(*part))
    reshard(ema)
    return torch.cat(losses).mean().item()


def preview_vae(path, vae, dataset, args):
    """Eight pictures above their round trips. Returns a line for the log: the PSNR in dB, the mean
    over pictures."""
    clips = np.stack([dataset[i][0] for i in spread(len(dataset), 8)])     # (8, 1, H, W, 3)
    with torch.no_grad():
        back = G.to_uint8(vae.decode(vae.encode(G.to_float(clips).to(args.device))))
    error = np.square(clips / 255.0 - back / 255.0).mean((1, 2, 3, 4))     # (8,)
    labels = ["picture"] * len(clips) + ["round trip"] * len(clips)
    save_sheets(path, [D.contact_sheet([*clips, *back], labels, columns=len(clips))], args.fps)
    return f"PSNR {-10 * np.log10(np.maximum(error, 1e-10)).mean():.1f} dB"


def preview_samples(path, net, vae, prompts, args):
    """The same prompts from the same noise each time: a labelled grid, or a GIF of clips. Returns
    the judge's count for the log. Every process draws, as a sharded model needs them all."""
    # "dpm++" adds no fresh noise: two previews differ in the weights alone
    clips = G.generate(net.model, net.text, vae, net.schedule, prompts, range(len(prompts)),
                       args.size, args.frames, sampler="dpm++", device=args.device,
                       bf16=args.precision == "bf16")
    reshard(net)
    notes, verdict = None, ""
    if args.data == "shapes":                              # the judge reads these alone
        verdicts = [D.judge(clip, prompt) for clip, prompt in zip(clips, prompts)]
        notes = [None if v.right else ("; ".join(v.reasons), "#c03030") for v in verdicts]
        verdict = f"{sum(v.right for v in verdicts)} of {len(prompts)} right"
    save_sheets(path, [D.contact_sheet(clips, prompts, notes=notes, frame=f)
                       for f in range(args.frames)], args.fps)
    return verdict


# ---- 5. The loop ---------------------------------------------------------------------------------

def train(args):
    """Sets one stage up, goes on with the run in the folder if there is one, and trains."""
    args, run, stop = setup(args)                          # from here on args only is read
    out, in_a_row, saved, why = Path(args.out), 0, run.first > 0, ""
    if run.first >= args.steps:
        return say(f"done: {out} has its {run.first} steps. To go on: --steps {2 * run.first}; to "
                   f"start afresh: --no-resume")
    log = Log(out / "log.csv", run.first)
    with tqdm(total=args.steps, initial=run.first, disable=rank() > 0, dynamic_ncols=True) as bar:
        for step, inputs in zip(range(run.first, args.steps), run.batches):
            tick = time.monotonic()
            losses, norm = training_step(run, inputs, step, args)
            done, speed = step + 1, args.batch_size / (time.monotonic() - tick)
            # ---- from here on we only watch, and save
            in_a_row = 0 if math.isfinite(norm) else in_a_row + 1          # skipped steps
            look = done % args.sample_every == 0 or done in (100, args.steps)
            held = held_out_loss(run.ema, run.held, args) if look and run.held else math.nan
            t = None if args.stage == "vae" else gather(inputs[2].t.to(args.device))
            log.add(done, gather(losses), t, held, norm, speed)
            bar.update()
            bar.set_postfix_str(f"loss {log.recent():.4f}, {speed:.0f} items/s", refresh=False)
            why = stop.why()
            # Saved before the first preview, and never in a row of skipped steps:
            # last.safetensors must hold weights that work
            if not in_a_row and (done % args.save_every == 0 or done == args.steps or why
                                 or look and not saved):
                log.save()
                save(run, done, args)
                saved = True
            if look:
                path = out / "samples" / f"{done:06d}"
                verdict = run.preview(path)
                plot_log(log)
                verdict = f"held out {held:.4f}  {verdict}" if run.held else verdict
                with bar.external_write_mode():
                    say(f"step {done}: loss {log.recent():.4f}  {verdict}  {path}")
            if why or in_a_row == 10:                      # ten in a row: training has failed
                break
    log.save()
    if in_a_row:
        raise ValueError(f"no finite gradient in {in_a_row} steps, up to step {done}; they are not "
                         f"saved; try a lower --lr, or --precision fp32")
    if done < args.steps:
        return say(f"stopped by {why} after step {done} of {args.steps}, saved. To go on: the same "
                   f"command")
    use = f"To sample: python sample.py {shlex.quote(run.prompts[0])}"
    use += f" --frames {args.frames}" if args.stage == "t2v" else ""
    if args.stage == "vae":
        use = f"To use it: python train.py --vae {shlex.quote(f'{out}/ema.safetensors')}"
    say(f"done: {out}/ema.safetensors. {use}")


# ==== Below: engineering ==========================================================================
# A first reading may stop here. What follows: from flags to a run, several processes, loading and
# encoding data, the run folder, --dry-run and --benchmark.

# ---- 6. From flags to settings -------------------------------------------------------------------

# Flags that change how a run is carried out, not its result. They may differ on resume.
HARMLESS = {"steps", "minutes", "grad_accum", "out", "init", "resume", "save_every", "dry_run",
            "sample_every", "workers", "device", "checkpoint_activations", "fsdp", "compile",
            "benchmark"}
# What weights are trained for. With --init it cannot change: they mean nothing in another model.
OF_MODEL = {*CONFIG, "text", "schedule", "objective", "noise_shift"}

def prepare(args):
    """Flags as given -> (settings, last, init): a Namespace with a value for every flag, the
    checkpoint that this run left in its folder, --init's checkpoint; None where there is none.
    Raises ValueError for flags that do not fit together."""
    stage, idle = args.stage, args.benchmark or args.dry_run   # idle: reads and writes nothing
    if stage in ("vae", "encode") and (idle or args.fsdp or args.compile):
        raise ValueError(f"--fsdp, --compile, --dry-run and --benchmark: not for --stage {stage}")
    if args.frames and (stage in ("vae", "t2i") or (stage, args.frames, idle) == ("t2v", 1, False)):
        raise ValueError(f"--frames {args.frames} with --stage {stage}; one is t2i, more are t2v")
    args.device, last, init = join_processes(args.device, args.fsdp), None, None
    args.out = args.out or f"runs/{stage}"
    if not idle:
        claim_folder(args)
        file = Path(args.out) / "last.safetensors"
        last = G.load_checkpoint(file) if file.exists() and stage != "encode" else None
        if stage == "t2v" and not last:
            args.init = args.init or G.find_checkpoint(("t2i",))
        init = G.load_checkpoint(args.init) if args.init and not last else None
    args = resolve(args, last, init, args.data != "shapes" and D.cache_index(args.data) or {})
    if args.batch_size % (processes() * args.grad_accum) and stage != "encode":
        raise ValueError(f"--batch-size {args.batch_size} is not divisible by {processes()} "
                         f"processes x --grad-accum {args.grad_accum}")
    return args, last, init

def resolve(args, last, init, cache):
    """A Namespace with a value for each flag: the one given, or else the checkpoint's, or the
    cache's, or the default. Raises ValueError for a flag that must be as in the checkpoint. last,
    init: see `prepare`; cache: the index of a cache, or {}."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    known = last or init or {}
    saved = {**known.get("flags", {}), **known.get("config", {})}
    # A file's flags pass the checks of typed ones ([64, 64] as 64x64)
    kept = {"preset", "world", "size", *OF_MODEL} - {*CONFIG}
    kept = [name for name in kept if saved.get(name) is not None]
    write = lambda value: "x".join(map(str, value if type(value) is list else [value]))
    try:
        flags = [f"--{name.replace('_', '-')}={write(saved[name])}" for name in kept]
        saved |= {name: getattr(parser().parse_args(flags), name) for name in kept}
    except ValueError as error:
        raise ValueError(f"damaged {args.out if last else args.init}: {error}") from None
    preset, stage = args.preset or saved.get("preset") or "nano", args.stage
    paper = "paper " if preset != "nano" and stage != "vae" else ""
    column = COLUMNS.index(paper + stage.replace("encode", "t2i"))
    values = {**vars(parser().parse_args([])), **{name: f.default for name, f in CONFIG.items()},
              **G.PRESETS[preset], **{name: row[column] for name, row in DEFAULTS.items()},
              "preset": preset, "precision": "bf16" if args.device.type == "cuda" else "fp32"}
    if args.data != "shapes":
        values["layout_steps"] = 0                         # it was measured on the shapes alone
    if args.objective == "flow" or args.schedule == "straight":
        values.update(objective="flow", schedule="straight")
    inherited = {name: saved[name] for name in (*OF_MODEL, "world", "size")
                 if saved.get(name) is not None}
    # On resume, a flag that is younger than the run had its default then
    fixed = {**values, **saved} if last else {n: v for n, v in inherited.items() if n in OF_MODEL}
    fitting = {name: cache[name] for name in ("size", "fps", "frames") if name in cache}
    settings = argparse.Namespace(**{**values, **inherited, **fitting,
                                     **G.PRESETS.get(args.preset, {}), **given})
    fixed = json.loads(json.dumps({**fixed, "device": ""}))
    for name, now in flags_of(settings).items():
        if name not in HARMLESS and fixed.get(name, now) != now:
            raise ValueError(f"--{name.replace('_', '-')} was {fixed[name]} in "
                             f"{args.out if last else args.init}, now it is {now}; leave the flag "
                             f"out, or start another run: --out")
    parts = {"weights", "optimizer", "vae" if stage == "vae" else "ema"}
    if last and (last["stage"] != stage or not last.keys() >= parts):
        raise ValueError(f"{args.out}/last.safetensors is not all of a run; give another --out")
    settings.size = tuple(settings.size)
    G.NoiseSchedule(settings.schedule, settings.objective, settings.noise_shift)   # may refuse
    return settings

def flags_of(args):
    """The flags as numbers, strings and lists, as a checkpoint and config.json hold them."""
    return json.loads(json.dumps({**vars(args), "device": str(args.device)}))

# ---- 7. From settings to a run that can start ----------------------------------------------------

def setup(args):
    """Flags as given -> (settings, run, stop): all that the loop works with, built once."""
    typed, (args, last, init) = args.text is not None, prepare(args)
    stop = Stop(args.minutes, args.device)                 # --minutes count from here
    data, dataset, held, pictures, prompts = open_data(args)
    net, vae, state = build(args, [data, pictures] if pictures else [data], last, init, typed)
    run = start(net, args, last)
    run.dataset, run.vae, run.state, run.prompts = dataset, vae, state, prompts
    run.first = last["step"] if last else 0
    say(f"{args.stage}: {sum(p.numel() for p in run.weights) / 1e6:.2f} M parameters, steps "
        f"{run.first} to {args.steps} of {args.batch_size} items, {args.device}, {args.precision}"
        + f"; resume: {args.out}/last.safetensors, step {run.first}" * bool(last))
    state["made"] = last["made"] if last else {**provenance(args), "items": len(dataset)}
    if (before := state["made"].get("items", len(dataset))) != len(dataset):
        say(f"note: this run began with {before!s:.20} items, now there are {len(dataset)}")
    if rank() == 0:         # to be read by people; on resume only flags that may differ do differ
        config = {"program": "gentron", "flags": flags_of(args), "made": state["made"]}
        with D.writing(Path(args.out) / "config.json") as file:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # ---- what it trains on, and what shows how it goes
    shape = (args.batch_size, args.frames, vae.channels, *(side // vae.down for side in args.size))
    if args.stage == "vae":
        run.held = held
        run.batches = vae_batches(dataset, shape, run.first, args)
        run.preview = lambda path: preview_vae(path, run.ema, dataset, args)
    else:
        clips, stills, run.held = (x and Latents(x, vae, args) for x in (dataset, pictures, held))
        run.batches = joint_batches(clips, stills, net.schedule, shape, run.first, args)
        run.preview = lambda path: preview_samples(path, run.ema, vae, prompts, args)
    return args, run, stop

def start(net, args, last=None):
    """A net -> what the training step takes: net itself; `parallel`, net as the processes share it,
    to be called in its place; ema, its averages; both parameter lists; the optimizer."""
    text = getattr(net, "text", None)                      # a frozen encoder is shared, not copied
    ema = copy.deepcopy(net, {} if getattr(text, "trained", False) else {id(text): text})
    if last:
        averages = last["vae"].get("weights", {}) if args.stage == "vae" else last["ema"]
        G.load_weights(ema, averages, f"{args.out}/last.safetensors")
    blocks = net.model.blocks if args.stage != "vae" else []
    for block in blocks if args.checkpoint_activations else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for module in (net.train(), ema.eval().requires_grad_(False)):
        if args.fsdp:
            shard(module, args)                            # moves each part as it is sharded
        module.to(args.device)
    for block in blocks if args.compile else ():
        block.compile()                 # block by block and in place: names stay as they are
    copies = processes() > 1 and not args.fsdp
    parallel = DistributedDataParallel(net) if copies else net
    weights, averages = list(net.parameters()), list(ema.parameters())
    return argparse.Namespace(net=net, parallel=parallel, ema=ema, weights=weights,
                              averages=averages, optimizer=build_optimizer(net, args, last))

def open_data(args):
    """-> (data, dataset, held, pictures, prompts): all of --data, the part that trains, the part
    that is held out (None for the shapes and for few items), the pictures for joint training (or
    None), captions for the previews. Completes args: --text is what the data offer."""
    shapes, wider = args.data == "shapes", WIDER[args.world]
    n = DRAWN["vae"] if args.stage == "vae" else DRAWN["t2v" if args.frames > 1 else "t2i"] * wider
    level = "single" if args.text == "labels" else args.world      # a label names one object
    if args.stage == "vae" and args.world == "full":
        level = ("full", "touching")    # every second picture: things that touch blur most easily
    data = D.open_data(args.data, args.size, args.frames, args.fps, level, n, args.seed)
    if cache_of(data) and args.stage in ("vae", "encode"):
        raise ValueError(f"{args.data} holds latents; --stage {args.stage} needs their pictures")
    say(*[] if shapes else data.report())
    split = not shapes and args.stage != "encode"
    dataset, held = D.hold_out(data, args.seed) if split else (data, None)
    if args.stage in ("t2i", "t2v") and args.text is None:
        words = shapes or any(data.captions)
        args.text = cache_of(data) and data.text_spec or ("small" if words else "none")
    # The previews' captions. Of the shapes: twelve that no run trains on. Of other data: twelve
    # different ones, spread over what trains.
    fresh = D.Shapes(level, 12, PREVIEW_SEED, args.size, args.frames)
    captions = [fresh.scene(i).caption() for i in range(12)] if shapes else \
        list(dict.fromkeys(dataset.captions))
    prompts = [captions[i] for i in spread(len(captions), 12)]
    # Joint image-video training (paper 3.4): there are more pictures than clips
    source, pictures = args.image_data or (args.data if shapes else None), None
    if args.stage == "t2v" and args.p_motion_free:
        if source is None:
            raise ValueError("joint training needs pictures, too: --image-data FOLDER; or train on "
                             "clips alone: --p-motion-free 0")
        pictures = D.open_data(source, args.size, 1, args.fps, args.world, DRAWN["t2i"] * wider,
                               args.seed)
    return data, dataset, held or None, pictures, prompts

def build(args, data, last, init, typed):
    """Settings -> (net, vae, state): what trains, the autoencoder (of stage vae: the same), and the
    part of the checkpoint that never changes. data: a list of datasets, for their words and stored
    text features; last, init: see `prepare`; typed: was --text given? Raises ValueError."""
    torch.manual_seed(args.seed)        # the initial weights, drawn in the same order each time
    known, path = last or init, f"{args.out}/last.safetensors" if last else args.init
    if args.stage == "vae":
        net = G.build_vae(known) if known else G.VAE(args.channels)
        net = G.load_weights(net, last["weights"], path) if last else net
        return net.requires_grad_(True), net, {}
    if init and "config" not in init:
        raise ValueError(f"--init {path} is an autoencoder; give it as --vae")
    if init and args.vae not in (None, init["vae"].get("name")):
        raise ValueError(f"--init {path} keeps its own autoencoder; leave --vae out")
    state = {key: known[key] for key in ("config", "text", "schedule", "vae")} if known else {
        "text": {"spec": args.text, "vocabulary": vocabulary_of(data[0], args.text), "dim": 128},
        "schedule": {"kind": args.schedule, "objective": args.objective,
                     "shift": args.noise_shift}, "vae": find_vae(args)}
    # Only what the user typed may be downloaded, never a name that stands in a file
    vae = G.build_vae(state, download=args.vae).to(args.device)
    encoder = read_caches(data, vae, args) or G.TextEncoder(**state["text"], download=typed)
    multiple = vae.down * args.patch_size
    if any(side % multiple for side in args.size):
        raise ValueError(f"--size {args.size[0]}x{args.size[1]} is not divisible by {multiple} "
                         f"(autoencoder {vae.down} x patch {args.patch_size})")
    if last:
        return G.build_net(last, "weights", encoder), vae, state
    config = state.get("config") or {
        **{name: getattr(args, name) for name in CONFIG}, "text_dims": encoder.dims,
        "in_channels": vae.channels, "grid": [side // multiple for side in args.size]}
    # A t2i model becomes a t2v one by one word of its config
    cfg = G.from_file(G.GenTronConfig, {**config, "temporal": args.stage == "t2v"})
    state["config"] = dataclasses.asdict(cfg)
    net = G.Net(G.GenTron(cfg), encoder, G.NoiseSchedule(**state["schedule"]))
    if init:
        # The averages become the weights: they draw better. Only temporal layers may be missing.
        # They answer 0: the first video model is its image parent, frame by frame (paper 3.4).
        old = init.get("ema", {})
        new = {k: v for k, v in net.state_dict().items() if ".temporal." in k and k not in old}
        G.load_weights(net, {**new, **old}, path)
        say(f"init: {len(old)} tensors from {path}, {len(new)} new ones (temporal attention)")
    return net, vae, state

def find_vae(args):
    """--vae -> the "vae" part of a checkpoint: a file's own, or a name or folder for diffusers."""
    path = Path(args.vae or Path(__file__).resolve().parent / "assets" / "vae.safetensors")
    if path.suffix not in (".safetensors", ".pt") and not path.is_file():
        return {"name": args.vae}
    state = G.load_checkpoint(path)
    foreign = args.data != "shapes" and not D.cache_index(args.data)
    if foreign and state["stage"] == "vae" and state["flags"].get("data") == "shapes":
        say(f"note: {path} has only seen the shapes world, and blurs other pictures; for your own: "
            f"train.py --stage vae --data {shlex.quote(args.data)}, --vae runs/vae/ema.safetensors")
    return state["vae"]

def vocabulary_of(dataset, spec):
    """Words for the small encoder, class names for --text labels, nothing for the others: a list of
    strings. The captions of held-out items count, too, so that a run knows all words."""
    if spec == "labels" and not dataset.labels:
        raise ValueError("--text labels needs class folders (corgi/1.jpg); try --text small")
    if spec == "labels" or "small" not in spec.split("+"):
        return list(dataset.labels) if spec == "labels" else []
    if cache_of(dataset) or isinstance(dataset, D.Shapes):     # (with the words for motions)
        return list(dataset.vocabulary) if cache_of(dataset) else D.vocabulary()
    # The commonest 8192, sorted: the order of files must not decide which vector is whose
    counts = collections.Counter(w for caption in dataset.captions for w in G.split_words(caption))
    return sorted(word for word, _ in counts.most_common(8192))

# ---- 8. Several processes ------------------------------------------------------------------------
#
# Without --fsdp each process holds a copy of everything, and DistributedDataParallel averages the
# gradients of their slices of the batch. With --fsdp each holds 1 / n of every tensor (a DTensor),
# and a block's weights are put together only while the block runs.

def rank():
    """The number of this process; 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0

def processes():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1

def own_part(n):
    """This process's slice of n items."""
    share = n // processes()
    return slice(rank() * share, (rank() + 1) * share)

def say(*lines):
    """Prints lines, once, however many processes there are."""
    D.say(*lines) if rank() == 0 and lines else None

def join_processes(name, sharded):
    """Joins the processes that torchrun describes in the environment. name: --device. Returns this
    process's torch.device."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count < 1 or count == 1 and sharded:
        raise ValueError(f"{count} process(es); try torchrun --nproc_per_node=2 train.py ...")
    if name is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"          # a GPU each
    device = G.pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)                      # where NCCL and FSDP look
    if count > 1:       # torchrun ends the others if one process dies; the time limit, if one hangs
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(minutes=10))
    return device

def shard(net, args):
    """FSDP2, block by block: the whole model never has to fit on one device."""
    # A block's weights travel and are used in bf16, where autocast would round them anyway
    half = torch.bfloat16 if args.precision == "bf16" else None
    policy = fsdp.MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(args.device.type, (processes(),))
    for block in net.model.blocks:
        fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
        # A hook on forward puts the weights together; sampling calls this method directly
        fsdp.register_fsdp_forward_method(block, "keys_values")
    fsdp.fully_shard(net.model, mesh=mesh)                 # all that is not in a block
    fsdp.register_fsdp_forward_method(net.model, "prepare")
    if getattr(net.text, "trained", False):
        fsdp.fully_shard(net.text, mesh=mesh)

def average_gradients(net, on):
    """Decides whether the next backward pass averages the gradients over processes, or only adds to
    this process's own."""
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = on
    for module in net.children():
        if isinstance(module, fsdp.FSDPModule):
            module.set_requires_gradient_sync(on)

def reshard(net):
    """After a forward pass without a backward pass, FSDP leaves the outermost weights unsharded."""
    for module in net.children():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()

def full_tensors(x):
    """A DTensor, or a dict with some in it, -> the same with full tensors, on the CPU of process 0.
    Every process has to take part."""
    if isinstance(x, DTensor):
        x = x.full_tensor()
        # One by one to the CPU: together they may not fit on the GPU
        return x if x.ndim == 0 else x.cpu() if rank() == 0 else None
    return {key: full_tensors(value) for key, value in x.items()} if isinstance(x, dict) else x

def gather(x):
    """(b,) on each process -> (B,) on the CPU, in the order of the global batch."""
    parts = [torch.empty_like(x) for _ in range(processes())]
    dist.all_gather(parts, x.contiguous()) if processes() > 1 else parts[0].copy_(x)
    return torch.cat(parts).cpu()

class Stop:
    """When to stop early: --minutes, SIGTERM or Ctrl-C. The loop finishes its step and saves; a
    second Ctrl-C ends the process at once."""
    REASONS = ("", "--minutes", "SIGINT", "SIGTERM")

    def __init__(self, minutes, device):
        self.deadline = time.monotonic() + 60 * minutes if minutes else math.inf
        self.device, self.signal = device, 0
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.on_signal)

    def on_signal(self, number, frame):
        """Only notes the signal: an exception here could separate weights from EMA."""
        self.signal = self.REASONS.index(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def why(self):
        """Why to stop, or "": the same on all processes, whichever was told. All have to ask."""
        reason = torch.tensor([self.signal or int(time.monotonic() > self.deadline)])
        return self.REASONS[gather(reason.to(self.device)).max().item()]

# ---- 9. Loading and encoding data ----------------------------------------------------------------

def collate(items):
    """[(uint8 (F, H, W, 3), caption), ...] -> (uint8 (B, F, H, W, 3), list of B captions)."""
    clips, captions = zip(*items)
    return torch.from_numpy(np.stack(clips)), list(captions)

def loader(dataset, batches, args):
    """Yields the collated items of `batches`, an iterable of lists of their numbers, in that order;
    drawn or decoded ahead of time by --workers processes."""
    return iter(DataLoader(dataset, batch_sampler=batches, collate_fn=collate,
                           num_workers=args.workers, worker_init_fn=ignore_signals,
                           prefetch_factor=4 if args.workers else None))

def ignore_signals(worker):
    """Ctrl-C reaches the whole process group; only the main process decides what it means."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)

def cache_of(dataset):
    """The D.Cache that a dataset is, or is a part of; else None."""
    dataset = getattr(dataset, "dataset", dataset)
    return dataset if isinstance(dataset, D.Cache) else None

def is_frozen(spec):
    """Are all encoders of a --text pretrained ones, which never change?"""
    return spec not in (None, "none") and not {"small", "labels"} & set(spec.split("+"))

def fingerprint(vae, spec=None):
    """A string that changes with any weight of an autoencoder, followed by one for the frozen text
    encoders of `spec`: their names, and of local folders the files' names and sizes."""
    # In half precision, as ema.safetensors holds the weights
    weights = [x.half().cpu().numpy().tobytes() for _, x in sorted(vae.state_dict().items())]
    # (a folder that is not there has no files: then the name counts)
    texts = [[(p.name, p.stat().st_size) for p in sorted(Path(name).glob("*"))] or name
             for name in (spec or "").split("+")]
    sums = [zlib.crc32(x) for x in (b"".join(weights), repr(texts).encode())]
    return " ".join(f"{x:08x}" for x in sums[:2 if spec else 1])

def read_caches(data, vae, args):
    """A `StoredText` if all data are caches with the features of a frozen --text; else None. Raises
    ValueError for a cache of another autoencoder or text encoder. Its latents and features have the
    same shapes, so nothing else would notice, and the model would be useless."""
    frozen, caches = is_frozen(args.text), [cache_of(dataset) for dataset in data]
    for cache in filter(None, caches):
        spec = cache.text_spec if frozen else None
        same = cache.fingerprint.startswith(fingerprint(vae, spec))
        if not same or spec not in (None, args.text):
            raise ValueError(f"{cache.root} was made with another --vae or --text (its --text is "
                             f"{cache.text_spec}); give those, or encode again")
    stored = frozen and all(cache and cache.dims for cache in caches)
    return StoredText(caches, args.device) if stored else None

class StoredText(torch.nn.Module):
    """Stands in for frozen text encoders whose features are stored in caches: B captions -> Text,
    read from disk. The caches' captions and the null text are all that it knows."""
    def __init__(self, caches, device):
        super().__init__()
        self.caches, self.device, self.dims = caches, device, tuple(caches[0].dims)

    def forward(self, captions):
        """List of B strings -> Text of fp32 tokens (B, L, D_k), masks (B, L), pooled (B, P)."""
        rows = [next(c for c in self.caches if caption in c.where).text(caption)
                for caption in captions]                   # B times ([tokens, ...], pooled)
        tensor = lambda x: torch.from_numpy(np.array(x)).to(self.device).float()
        pad = lambda parts: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        tokens = [[tensor(row[k]) for row, _ in rows] for k in range(len(self.dims))]  # (L_i, D_k)
        masks = [pad([x.new_ones(len(x), dtype=torch.bool) for x in parts]) for parts in tokens]
        pooled = tensor(np.stack([pooled for _, pooled in rows]))
        return G.Text(tuple(map(pad, tokens)), tuple(masks), pooled)

def encode(args):
    """Stage encode: the latents of all items of --data, and the features that frozen encoders make
    of their captions, into a cache. Process p of P encodes the items p, p + P, ..."""
    args, _, _ = prepare(args)
    stop, P, (dataset, *_) = Stop(args.minutes, args.device), processes(), open_data(args)
    vae = G.build_vae({"vae": find_vae(args)}, download=args.vae).to(args.device)
    # A trained text encoder has other features at each step: then only captions are stored
    text = G.TextEncoder(args.text, download=True).to(args.device) if is_frozen(args.text) else None
    spec, dims = (args.text, list(text.dims)) if text else (None, [])
    probe, _ = encode_chunk(vae, *collate([dataset[0]]), args.device)      # (1, F, C, h, w)
    source = f"{args.world}, {args.seed}" if args.data == "shapes" else dataset.fingerprint()
    index = {"items": len(dataset), "shape": list(probe.shape[1:]), "size": list(args.size),
             "frames": args.frames, "fps": args.fps, "labels": dataset.labels, "text": spec,
             "vocabulary": vocabulary_of(dataset, "small"), "fingerprint": fingerprint(vae, spec),
             "dims": dims, "parts": P, "data": args.data, "source": source}
    writer = D.CacheWriter(args.out, index, 0) if rank() == 0 else None
    gather(torch.zeros(1, device=args.device))             # process 0 has written the index
    writer = writer or D.CacheWriter(args.out, index, rank())

    @torch.no_grad()
    def features(captions):
        batch = text(captions)
        tokens = [[row[real].cpu().numpy() for row, real in zip(x, mask)]
                  for x, mask in zip(batch.tokens, batch.mask)]
        return tokens, batch.pooled.cpu().numpy()
    items, why = range(rank() + writer.done * P, len(dataset), P), ""
    chunks = [list(items[i:i + CHUNK]) for i in range(0, len(items), CHUNK)]
    turns = gather(torch.tensor([len(chunks)]).to(args.device)).max().item()
    chunks = loader(dataset, chunks, args)
    with tqdm(total=writer.rows, initial=writer.done, unit=" items", disable=rank() > 0) as bar:
        for _ in range(turns):
            why = why or stop.why()                        # asked also by a process that is done
            for clips, captions in itertools.islice(chunks, 0 if why else 1):
                z, _ = encode_chunk(vae, clips, captions, args.device)
                writer.append(z.numpy(), captions, features if text else None)
                bar.update(len(captions))
    gather(torch.zeros(1, device=args.device))             # all parts are written
    say(f"stopped by {why}. To go on: the same command" if why else f"done: {args.out}, "
        f"{len(dataset):,} items. To train: python train.py --data {shlex.quote(args.out)}")

# ---- 10. The run folder --------------------------------------------------------------------------

FILES = ("last.safetensors", "ema.safetensors", "config.json", "log.csv", "loss.png")
PROGRAM = '"program": "gentron"'        # stands in our config.json
LOCKS = []                              # open files; the system drops a lock when its process ends

def claim_folder(args):
    """Makes the run's folder this run's own; --no-resume moves the old run aside. Raises ValueError
    if the folder is in use, or holds somebody else's files."""
    out = Path(args.out)
    lock_folder(out)
    if rank() == 0 and args.stage != "encode":
        if not args.resume and (out / FILES[0]).exists():
            if out.resolve() == Path.cwd():
                raise ValueError("--no-resume cannot move the working directory; give --out a name")
            names = (out.with_name(f"{out.name}.{k}") for k in itertools.count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            say(f"moved the old run to {out.rename(aside)}")       # never deleted
            lock_folder(out)                               # the other lock moved, too
        for name in (*FILES, "samples/000000.png"):
            D.writable(out / name, inside=out)             # better now than after 500 steps
        there = [name for name in FILES if (out / name).exists()]
        if there and FILES[0] not in there and not (
                "config.json" in there and PROGRAM in D.read_text(out / "config.json")):
            raise ValueError(f"{out} holds {there[0]}, but no run; give another folder by --out")
    gather(torch.zeros(1, device=args.device))             # nobody looks before it has moved

def lock_folder(out):
    """Takes the folder for this run, or raises ValueError."""
    path = D.writable(out / ".lock", inside=out)
    if rank() or os.name != "posix":
        return
    import fcntl  # here, because Windows has none
    LOCKS.append(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)))
    try:
        # lockf, not flock: loader workers inherit the latter, and outlive a killed run for a while
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{out} is in use, another run is training there; give another --out, or "
                         f"stop that run") from None

def provenance(args):
    """Where a run comes from: commit, versions, device, seed."""
    # The hash alone; "-dirty": these are not quite that commit's files
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(ask, cwd=Path(__file__).resolve().parent, capture_output=True,
                                text=True).stdout.strip()  # "" without a repository
    except OSError:
        commit = ""                                        # no git
    return {"commit": commit, "torch": str(torch.__version__), "numpy": np.__version__,
            "python": sys.version.split()[0], "device": str(args.device), "seed": args.seed}

def build_optimizer(net, args, last=None):
    """AdamW over net's parameters, with the moments of the checkpoint `last`. Raises ValueError if
    these are not the moments of net."""
    # OURS: betas and no decay (the paper says AdamW and its rate). 0.99 forgets an early large
    # gradient in a hundred steps, where the usual 0.999 takes a thousand.
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=True)
    saved, state = last["optimizer"] if last else {}, {}
    for k, (name, p) in enumerate(net.named_parameters() if last else ()):
        for key in ("exp_avg", "exp_avg_sq"):
            try:
                x = saved[key][name].view(p.shape)
                state.setdefault(k, {"step": saved["step"].clone().view(())})[key] = x
            except (LookupError, TypeError, AttributeError, RuntimeError):
                raise ValueError(f"{args.out}/last.safetensors is damaged: its {key} of "
                                 f"{name}") from None
            if isinstance(p, DTensor):      # every process has read the file, and takes its share
                state[k][key] = distribute_tensor(x.to(p.device), p.device_mesh, p.placements,
                                                  src_data_rank=None)
    if last:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return optimizer

def save(run, step, args):
    """ema.safetensors: what somebody else needs to sample from the run. last.safetensors: all of
    it."""
    if args.stage == "vae":
        measure_latents(run.ema, run.dataset, args)
    vae = run.ema if args.stage == "vae" else run.vae
    moments = {name: run.optimizer.state[p] for name, p in run.net.named_parameters()}
    state = full_tensors({
        **run.state, "stage": args.stage, "step": step, "size": list(args.size),
        "frames": args.frames, "fps": args.fps, "flags": flags_of(args),
        "ema": run.ema.state_dict(), "weights": run.net.state_dict(), "optimizer": {
            "step": next(iter(moments.values()))["step"],
            "exp_avg": {name: moment["exp_avg"] for name, moment in moments.items()},
            "exp_avg_sq": {name: moment["exp_avg_sq"] for name, moment in moments.items()}}})
    if rank():
        return                                             # it had to take part in gathering
    if isinstance(vae, G.VAE):                             # a pretrained one stays a name
        state["vae"] = {"config": vae.config, "weights": vae.state_dict()}
    if args.stage == "vae":
        del state["ema"]                                   # it is state["vae"]
    halves = lambda x: {key: halves(v) for key, v in x.items()} if isinstance(x, dict) else \
        x.half() if isinstance(x, torch.Tensor) else x
    shared = {key: value for key, value in state.items() if key not in ("weights", "optimizer")}
    # In this order: a run is done when last.safetensors says so
    G.save_checkpoint(Path(args.out) / "ema.safetensors", halves(shared))
    G.save_checkpoint(Path(args.out) / "last.safetensors", state)

@torch.no_grad()
def measure_latents(vae, dataset, args, n=512):
    """Measures mean and standard deviation of each latent channel over n items, and keeps them in
    the autoencoder. The noise schedule expects latents of mean 0 and variance 1."""
    n, z = min(n, len(dataset)), []
    for i in range(0, n, CHUNK):
        clips, _ = collate([dataset[k] for k in range(i, min(i + CHUNK, n))])
        z.append(vae.posterior(G.to_float(clips).to(args.device))[0].cpu().double())
    z = torch.cat(z).transpose(0, 2).flatten(1)            # (B, F, C, h, w) -> (C, all the rest)
    vae.mean.copy_(z.mean(1).view_as(vae.mean))
    vae.std.copy_(z.std(1).clamp(min=1e-4).view_as(vae.std))

def save_sheets(path, sheets, fps):
    """Writes a list of F PIL images: a PNG, or a GIF of several."""
    if rank() == 0:
        with D.writing(f"{path}.{'gif' if len(sheets) > 1 else 'png'}") as file:
            D.save_gif(file, sheets, fps) if len(sheets) > 1 else sheets[0].save(file)

# column of log.csv: (name, colour in the plot). The bands lie far apart, and which of them falls
# says what is being learned: layout at most noise, edges at least.
CURVES = {"loss": ("loss", "#111111"), "loss_t0": ("least noise", "#4477dd"),
          "loss_t1": ("some", "#44aa66"), "loss_t2": ("more", "#dd9933"),
          "loss_t3": ("most noise", "#cc4444"), "held_out": ("held out", "#aa44aa")}
HEADER = ",".join(("step", *CURVES, "grad_norm", "skipped", "items_per_s"))
ROW = re.compile(r"\d{1,12}(,(-?\d+\.?\d*(e[-+]?\d+)?|nan|inf)?){7},\d+,\d+\.\d*", re.ASCII)

class Log:
    """log.csv, one row a step. It is kept in memory and written before each checkpoint, so that a
    resumed run goes on with the rows up to its checkpoint. Raises ValueError for a file with other
    columns, as a spreadsheet may have saved it."""
    def __init__(self, path, first):
        self.path, self.rows = path, []                    # rows: lists of strings
        if first and path.exists():
            with D.open_input(path, most=2 ** 30) as file:
                header, *lines = file.read().decode("ascii", "replace").splitlines() or [HEADER]
            if header != HEADER:
                raise ValueError(f"{path} is not as this run wrote it; move it away to go on")
            rows = [line.split(",") for line in lines if ROW.fullmatch(line)]
            self.rows = [row for row in rows if int(row[0]) <= first]

    def add(self, step, losses, t, held, norm, speed):
        """losses (B,), t (B,) or None: the mean loss, and its mean in four bands of noise; held:
        the held-out loss or nan; norm: that of the gradients; skipped steps are counted."""
        band = torch.full_like(losses, 9) if t is None else t * 4 // 1000      # (B,) 0 .. 3
        means = [losses.mean(), *(losses[band == k].mean() for k in range(4)), held]
        skipped = int(self.rows[-1][-2] if self.rows else 0) + (not math.isfinite(norm))
        cells = [f"{x:.7g}" if math.isfinite(x) else "" for x in map(float, means)]
        self.rows.append([f"{step}", *cells, f"{norm:.5g}", f"{skipped}", f"{speed:.1f}"])

    def save(self):
        """Writes the file anew."""
        if rank() == 0:
            with D.writing(self.path) as file:
                file.write_text("".join(f"{row}\n" for row in (HEADER, *map(",".join, self.rows))))

    def recent(self):
        """Mean loss of the last 100 steps."""
        return np.mean([float(row[1] or "nan") for row in self.rows[-100:]])

def plot_log(log):
    """loss.png: the loss, its parts by noise level and the held-out loss, on a logarithmic axis. It
    is drawn with pillow, which needs no further package."""
    cells = np.array([[float(cell or "nan") for cell in row[:1 + len(CURVES)]] for row in log.rows])
    # Means over 100 parts of the run, of what is known in each
    means = np.array([np.ma.masked_invalid(part).mean(0).filled(np.nan)
                      for part in np.array_split(cells, min(100, len(cells)))])
    seen = means[:, 1:][means[:, 1:] > 0]                  # (nan is not)
    if rank() or len(means) < 2 or not len(seen):
        return                                             # one point is no curve
    # From what is plotted to pixels; y grows downwards
    W, H, left, top, right, bottom = 760, 400, 64, 30, 20, 40
    steps, low, high = means[:, 0], math.log10(seen.min()) - 0.05, math.log10(seen.max()) + 0.05
    to_x = lambda s: left + (W - left - right) * (s - steps[0]) / (steps[-1] - steps[0])
    to_y = lambda v: top + (H - top - bottom) * (high - math.log10(v)) / (high - low)
    image = Image.new("RGB", (W, H), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    write = lambda x, y, text, anchor: pen.text((x, y), text, "#555555", font, anchor)
    for tick in (m * 10.0 ** k for k in range(math.floor(low), math.ceil(high)) for m in (1, 2, 5)):
        if low <= math.log10(tick) <= high:
            pen.line([(left, to_y(tick)), (W - right, to_y(tick))], fill="#e4e4e4")
            write(left - 8, to_y(tick), f"{tick:g}", "rm")
    for s in np.linspace(steps[0], steps[-1], 5):
        write(to_x(s), H - bottom + 8, f"{s:.0f}", "mt")
    x = left                                               # of the legend, along the top
    for (name, (label, ink)), curve in zip(CURVES.items(), means.T[1:]):
        points = [(to_x(s), to_y(v)) for s, v in zip(steps, curve) if v > 0]
        if points:                                         # stage vae has no noise levels
            pen.line(points, fill=ink, width=3 if name == "loss" else 1)
            pen.text((x, 6), label, fill=ink, font=font)
            x += 24 + pen.textlength(label, font=font)
    with D.writing(log.path.with_name("loss.png")) as file:
        image.save(file)

# ---- 11. --dry-run: how large? --benchmark: how fast? --------------------------------------------

WIDTHS = dict(small=128, labels=128, clip=768, t5=4096)     # channels, known without a download

def imagine(args, frames):
    """The model that the flags describe, with nothing loaded -> (config, shape of its latents
    (B, F, C, h, w), floating-point operations of one item's forward pass, a random text encoder).
    OURS: the paper's sizes read the paper's encoders unless --text says otherwise."""
    spec = args.text or ("small" if args.preset == "nano" else "clip+t5")
    dims = [WIDTHS.get(name) for name in spec.split("+") if spec != "none"]    # None is refused
    cfg = G.GenTronConfig(**{name: getattr(args, name) for name in CONFIG}, text_dims=dims,
                          temporal=args.stage == "t2v")

    def text(captions, device=args.device):
        B, L, new = len(captions), 77, partial(torch.randn, device=device)     # as long as CLIP's
        mask = torch.ones(B, L, dtype=torch.bool, device=device)
        return G.Text(tuple(new(B, L, d) for d in dims), (mask,) * len(dims), new(B, sum(dims)))
    shape = (args.batch_size, frames, cfg.in_channels, args.size[0] // 8, args.size[1] // 8)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:      # no contents
        G.GenTron(cfg)(torch.empty(1, *shape[1:]), torch.empty(1), text([""], "meta"))
    return cfg, shape, counter.get_total_flops(), text

def dry_run(args):
    """Prints what the flags' model would take, and allocates none of it."""
    args, *_ = prepare(args)
    cfg, shape, flops, _ = imagine(args, args.frames)
    with torch.device("meta"):
        models = [G.GenTron(dataclasses.replace(cfg, temporal=on)) for on in (False, True)]
    n = [sum(p.numel() for p in model.parameters()) for model in models]
    say(f"{args.preset}: {', '.join(f'{name} {getattr(cfg, name)}' for name in CONFIG)}, text of "
        f"{cfg.text_dims} channels, latents {shape[1:]}",
        f"{n[0] / 1e6:.1f} M parameters, {n[1] / 1e6:.1f} M with temporal layers",
        f"{flops / 1e9:.1f} GFLOPs an item, {3 * flops / 1e9:.1f} to train on it",
        "GB of a process, fp32; activations come on top: see --benchmark",
        f"{'':16}{'weights':>10}{'gradients':>10}{'AdamW':>10}{'EMA':>10}{'all':>10}")
    for N in (1, max(8, processes())):                     # bytes a parameter; AdamW has 2 moments
        parts = [k * n[cfg.temporal] / N / 1e9 for k in (4, 4, 8, 4, 20)]
        say(f"{f'--fsdp on {N}' if N > 1 else 'without --fsdp':16}"
            + "".join(f"{part:10.2f}" for part in parts))

def benchmark(args):
    """Times training steps on random data, one line a number of frames."""
    import resource  # here, because Windows has none
    steps, all_frames = args.steps or 10, [args.frames] if args.frames else [1, 4, 8, 16, 32]
    args, *_ = prepare(args)
    cuda, B, own = args.device.type == "cuda", args.batch_size, own_part(args.batch_size)
    say(f"{args.preset}, {args.size[0]}x{args.size[1]}, batch {B} on {processes()} x {args.device}"
        f", {args.precision}; medians of {steps} steps",
        "frames    s/step   items/s   TFLOP/s   of matmul   peak GB")
    # A model is mostly matrix products: one of two large matrices is the best it could reach
    n, kind = 8192 if cuda else 512, torch.bfloat16 if args.precision == "bf16" else torch.float32
    a = torch.randn(n, n, device=args.device, dtype=kind)
    for frames in all_frames if args.stage == "t2v" else [1]:
        cfg, shape, flops, text = imagine(args, frames)
        schedule, times = G.NoiseSchedule(args.schedule, args.objective, args.noise_shift), []
        run = start(G.Net(G.GenTron(cfg), text, schedule), args)
        inputs = (torch.randn(shape)[own], [""] * B, G.randomness(0, 0, shape, schedule)[own])
        for step in tqdm(range(3 + steps), leave=False, disable=rank() > 0):     # 3 to warm up
            begin, _, middle = time.monotonic(), (a @ a)[0, 0].item(), time.monotonic()
            training_step(run, inputs, step, args)
            times.append((middle - begin, time.monotonic() - middle))
        matmul, seconds = np.median(times[3:], axis=0)
        rate = 3 * flops * B / seconds / processes()
        peak = torch.cuda.max_memory_allocated() if cuda else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024      # kilobytes on Linux
        say(f"{frames:6}{seconds:10.3f}{B / seconds:10.1f}{rate / 1e12:10.3g}"
            f"{rate / (2 * n ** 3 / matmul):12.0%}{peak / 1e9:10.2f}")

# ---- 12. Main ------------------------------------------------------------------------------------

def end_workers():
    """Kills the loader's processes. They ignore SIGTERM, so an exit that asks would wait."""
    # The loader's SIGCHLD handler raises when a worker dies
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if hasattr(signal, "SIGCHLD") else None
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)

def main(argv=None):
    """Command line -> exit code: 0 done or stopped and saved, 2 for what the user can mend."""
    def work():
        args = parser().parse_args(argv)
        try:
            (dry_run if args.dry_run else benchmark if args.benchmark else
             encode if args.stage == "encode" else train)(args)
        except RuntimeError as error:
            if dist.is_initialized() and re.search("gloo|nccl|connection|peer", str(error), re.I):
                raise ValueError("another process of this run has ended or hangs") from None
            raise
    try:
        return D.run_main(work, "try --grad-accum, --checkpoint-activations, --fsdp on several "
                                "GPUs, or a smaller --batch-size or --preset")
    finally:
        end_workers()
        while LOCKS:
            LOCKS.pop().close()         # the folder is free again
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    sys.exit(main())
