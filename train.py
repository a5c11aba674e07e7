"""
train.py: stages vae -> (encode) -> t2i -> t2v; all but encode share one loop

    python train.py                                   # text to image on the shapes world
    python train.py --data my_pictures --steps 20000  # your own pictures and captions
    python train.py --stage t2v                       # text to video, from the newest t2i run
    python train.py --stage vae                       # an autoencoder, before all else
    python train.py --stage encode --data my_pictures --text clip+t5 --out my_cache
    torchrun --nproc_per_node=8 train.py --preset G/2 --fsdp --checkpoint-activations --compile

To resume, run the same command again. ema.safetensors in the run's folder is the file to share.
"""

import os
import signal

# Idle OpenMP threads sleep early. The default spin-wait stalls a run beside another busy process.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if __name__ == "__main__":              # Ctrl-C during the imports ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data as D
import gentron as G

# ---- 1. Flags and their defaults -----------------------------------------------------------------
# The defaults that depend on what is trained; "paper": any preset but nano. From the paper: eps,
# lr 1e-4, constant, 500,000 steps, 128 clips of 8 frames at 4 a second. OURS: the rest.
# nano learns a small world, so it has a high rate and a short EMA; muon and qk_norm save it steps.
COLUMNS =           ("vae",    "t2i",    "t2v",    "paper t2i", "paper t2v")
DEFAULTS = {
    "steps":         (16_000,   3_000,    3_000,    500_000,     500_000),
    "batch_size":    (16,       64,       16,       256,         128),
    "optimizer":     ("adamw",  "muon",   "muon",   "adamw",     "adamw"),
    "lr":            (2e-3,     2e-3,     2e-3,     1e-4,        1e-4),
    "lr_decay":      (1_000,    1_000,    1_000,    0,           0),
    "ema":           (0.998,    0.998,    0.998,    0.9999,      0.9999),
    "objective":     ("v",      "v",      "v",      "eps",       "eps"),
    "schedule":      ("cosine", "cosine", "cosine", "linear",    "linear"),
    "size":          ((64, 64), (64, 64), (64, 64), (256, 256),  (256, 256)),
    "frames":        (1,        1,        8,        1,           8),
    "world":         ("full",   "basic",  "basic",  "basic",     "basic"),
    "p_first_frame": (0.0,      0.0,      0.1,      0.0,         0.1),
    "qk_norm":       (False,    True,     True,     False,       False),
    "noise_shift":   (0.0,      0.0,      0.0,      0.0,         0.0),
    "fps":           (4.0,      4.0,      4.0,      4.0,         4.0),
}
WARMUP = 100            # OURS: steps over which the learning rate rises
DRAWN = dict(vae=1_000_000, t2i=32_768, t2v=8_192)      # items; the full world: 3 times t2i, t2v
PREVIEW_SEED = 10 ** 6  # the dataset seed of the previews' prompts
as_typed = lambda x: "x".join(map(str, x if isinstance(x, (list, tuple)) else [x]))    # 64x64
# The fields of the model's config that are flags: a new field becomes a flag by itself
CONFIG = {f.name: f for f in dataclasses.fields(G.GenTronConfig) if "help" in f.metadata}

def parser():
    """Every flag, in four groups. None = the value is found later, by `prepare`."""
    p = D.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                 allow_abbrev=False)
    count, step, share = D.number(int, 1, 10 ** 9), D.number(int, 0, 10 ** 9), D.number(float, 0, 1)
    yes = dict(action="store_true", default=False)
    either = dict(action=argparse.BooleanOptionalAction)   # --flag and --no-flag
    group = p.add_argument_group("what to train")
    def add(flag, help, default=None, **options):
        """One flag. Its help ends with the default; what --init or a cache says comes before it."""
        row = DEFAULTS.get(flag[2:].replace("-", "_"), (default,))
        if len(set(row)) > 1:
            help += f" ({', '.join(f'{c}: {as_typed(v)}' for c, v in zip(COLUMNS, row))})"
        elif row[0] is not None and row[0] is not False:
            help += f" ({as_typed(row[0])})"
        group.add_argument(flag, help=help, default=default, **options)

    add("--stage", "what to train or make", "t2i", choices=("vae", "encode", "t2i", "t2v"))
    add("--preset", "depth, width, heads, patch size (nano, or --init's)", choices=G.PRESETS)
    for name, f in CONFIG.items():
        how = either if f.type is bool else dict(type=count if f.type is int else f.type)
        value = "" if name in {*DEFAULTS, *G.PRESETS["nano"]} else f" ({f.default})"
        add(f"--{name.replace('_', '-')}", f.metadata["help"] + value, **how)
    add("--text", "small, small+small, labels, none, clip, t5, clip+t5 or NAME[+NAME] (small)")
    add("--channels", "stage vae: latent channels; more: finer", 16, type=D.number(int, 1, 256))
    add("--vae", "a checkpoint, or a name for diffusers (assets/vae.safetensors)")
    add("--objective", "what the network predicts", choices=("eps", "v", "flow"))
    add("--schedule", "noise schedule; flow goes with straight", choices=tuple(G.OBJECTIVES))
    add("--noise-shift", "lowers log(alpha / sigma) at every t", type=D.number(float, -5, 5))
    group = p.add_argument_group("data")
    add("--data", "shapes, a folder of pictures or clips, or a cache of --stage encode", "shapes")
    add("--image-data", "t2v: pictures for joint training: shapes, a folder or a cache")
    add("--world", "how much the shapes world shows", choices=("basic", "full"))
    add("--size", "H or HxW in pixels", type=D.picture_size)
    add("--frames", "t2v: frames a clip", type=D.number(int, 1, 1024))
    add("--fps", "t2v: frames a second", type=D.number(float, 0.01, 1000))
    # OURS: the three rates. The paper drops text and motion, and does not say how often.
    add("--p-drop-text", "share of captions dropped (of stills at least 0.3)", 0.1, type=share)
    add("--p-motion-free", "t2v: share of stills, with the identity mask", 0.1, type=share)
    add("--p-first-frame", "t2v: share of clips whose first frame is given", type=share)
    group = p.add_argument_group("optimisation")
    add("--steps", "steps in all", type=count)
    add("--minutes", "then stop and save", type=D.number(float, 0.001))
    add("--batch-size", "over all processes", type=D.number(int, 1, 2 ** 16))
    add("--grad-accum", "micro-batches a step", 1, type=count)
    add("--optimizer", "muon: for matrices of blocks but adaLN's", choices=("adamw", "muon"))
    add("--lr", "learning rate", type=share)
    add("--lr-decay", "from this step on the rate falls as 1 / sqrt(step); 0 = never", type=step)
    add("--layout-steps", "this many steps first, at the noisiest 3 tenths of t", 0, type=step)
    add("--ema", "decay of the averaged weights", type=share)
    add("--seed", "of all that is random", 0, type=D.number(int, 0, 2 ** 31 - 1))
    group = p.add_argument_group("the run")
    add("--out", "the run's folder (runs/STAGE)")
    add("--init", "checkpoint to start from (t2v: the newest t2i run's)")
    add("--resume", "go on with the run in the folder, or move it aside", True, **either)
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
CHUNK = 64      # items that are encoded together: the same ones in every run of a seed
@lru_cache(maxsize=4)
def permutation(seed, epoch, n):
    """The order of n items in an epoch, (n,): a function of its arguments."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))

def places_of_step(seed, step, batch, n):
    """The places in the shuffled dataset that a step trains on: `batch` numbers below n."""
    # The first epoch goes in the order in which `Latents` encodes, each later one in its own order
    everything = range(step * batch, (step + 1) * batch)
    return [i if i < n else int(permutation(seed, i // n, n)[i % n]) for i in everything]

class Latents:
    """A shuffled dataset's latents: latents[places] -> fp16 (B, F, C, h, w), captions. A `D.Cache`
    has them on disk. Other data are encoded when first asked for, and kept in memory: training
    starts at once, and only the first epoch is slower."""
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
        chunks = range(len(self.captions), max(places) + 1, CHUNK)     # after a resume: many
        for _ in tqdm(chunks, "encoding", leave=False, disable=len(chunks) < 32 or rank() > 0):
            clips, captions = next(self.chunks)
            self.z += latents_of(self.vae, clips, self.device)         # rows (F, C, h, w)
            self.captions += captions
        return torch.stack([self.z[i] for i in places]), [self.captions[i] for i in places]

@torch.no_grad()
def latents_of(vae, clips, device):
    """Pictures uint8 (B, F, H, W, 3) -> their latents, fp16 (B, F, C, h, w)."""
    return vae.encode(G.to_float(clips).to(device)).half().cpu()

def vae_batches(dataset, shape, first, args):
    """Stage vae: (pictures (b, 1, 3, H, W), noise (b, 1, C, h, w)) of step first, first + 1, ...
    shape: (B, 1, C, h, w); b of the batch's B items belong to this process."""
    B, own, steps = shape[0], own_part(shape[0]), range(first, args.steps)
    order = permutation(args.seed, 0, len(dataset))        # or one class folder follows another
    items = (order[places_of_step(args.seed, k, B, len(dataset))[own]].tolist() for k in steps)
    for step, (clips, _) in zip(steps, loader(dataset, items, args)):
        yield G.to_float(clips), G.randomness(args.seed, step, shape).noise[own]

def joint_batches(clips, pictures, schedule, shape, first, args):
    """Stages t2i and t2v: (latents (b, F, C, h, w), b captions, Draws) of step first, first + 1 ...

    Joint image-video training (paper 3.4): an item drawn as `still`, with probability
    --p-motion-free, is a picture repeated F times, with the picture's caption. `training_loss`
    gives it the identity mask. In t2i there are no stills: all items are pictures.
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
            # Item j is the step's j-th picture or clip, so its draw changes no other item
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

def training_step(run, inputs, step, args):
    """Forward, backward, clip, optimizer, EMA. inputs: those of b items, this process's part of the
    batch; run.net(*inputs) is the loss of each. Returns the losses (b,) and the norm of the
    gradients before clipping, a number. If it is not finite, nothing has changed."""
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, args.lr, args.lr_decay)

    # forward and backward, micro-batch by micro-batch; the gradients add up
    b, losses = len(inputs[0]), []
    micro = b // args.grad_accum
    for k in range(args.grad_accum):
        part = [x[k * micro:(k + 1) * micro] for x in inputs]
        part = [x.to(args.device) if isinstance(x, torch.Tensor) else x for x in part]
        # OURS: weights and loss stay in fp32. The range of bf16 is that of fp32: no loss scaling
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = run.net(*part)                          # (micro,)
        (loss.sum() / b).backward()                        # the mean over the b items
        losses.append(loss.detach())
    average_gradients(run.weights)                         # over the processes, if there are more

    # OURS: clipped to a norm of 1. The norm is that of all processes, so they all decide alike.
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(run.weights, 1.0)).item()

    if math.isfinite(norm):
        run.optimizer.step()
        # EMA: an average of the weights over the last steps draws better pictures than the weights.
        # The decay warms up, or a short run's average would still be near its random start.
        decay = min(args.ema, (1 + step) / (10 + step))
        for average, weight in zip(run.averages, run.weights):
            average.lerp_(weight.detach(), 1 - decay)  # exercise 6
    run.optimizer.zero_grad(set_to_none=True)
    return torch.cat(losses), norm

# ---- 4. Previews and the held-out loss: how well does it go? -------------------------------------
LEVELS, MOST = (100, 300, 500, 700, 900), 64       # timesteps and items of the held-out loss
spread = lambda n, most: np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()

@torch.no_grad()
def held_out_loss(ema, held, args):
    """The averaged weights' loss on items that never train, a number. The noise is the same each
    time, so only the weights change it. held: their Latents."""
    (z0, captions), losses = held[range(min(MOST, len(held)))], []
    z0 = z0.float().to(args.device)
    for t in LEVELS:                                       # the same items at each level of noise
        draws = dataclasses.replace(G.randomness(PREVIEW_SEED, t, z0.shape),
                                    t=torch.full((len(z0),), t))
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            losses.append(ema(z0, captions, draws))
    return torch.cat(losses).mean().item()

def preview_vae(path, vae, dataset, args):
    """Eight pictures, held out if some are, above their round trips. Returns their mean PSNR."""
    clips = np.stack([dataset[i][0] for i in spread(len(dataset), 8)])     # (8, 1, H, W, 3)
    with torch.no_grad():
        back = G.to_uint8(vae.decode(vae.encode(G.to_float(clips).to(args.device))))
    error = np.square(clips / 255.0 - back / 255.0).mean((1, 2, 3, 4))     # (8,)
    labels = ["picture"] * len(clips) + ["round trip"] * len(clips)
    save_sheets(path, [D.contact_sheet([*clips, *back], labels, columns=len(clips))], args.fps)
    return f"PSNR {-10 * np.log10(np.maximum(error, 1e-10)).mean():.1f} dB"

def preview_samples(path, net, vae, prompts, args):
    """The same prompts from the same noise each time: a labelled grid, or a GIF of clips. Returns
    the judge's count, to be printed. Every process draws, as a sharded model needs them all."""
    clips = G.generate(net.model, net.text, vae, net.schedule, prompts, range(len(prompts)),
                       args.size, args.frames, device=args.device, bf16=args.precision == "bf16",
                       **G.usual(args.preset))
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
    args, run, stop = setup(args)                          # nothing below changes args
    out, in_a_row, saved, why = Path(args.out), 0, run.first > 0, ""
    if run.first >= args.steps:
        return say(f"done: {out} has its {run.first} steps. To go on: --steps {2 * run.first}")
    log = Log(out / "log.csv", run.first)
    with tqdm(total=args.steps, initial=run.first, disable=rank() > 0, dynamic_ncols=True) as bar:
        tick = time.monotonic()
        for step, inputs in zip(range(run.first, args.steps), run.batches):
            losses, norm = training_step(run, inputs, step, args)
            done, speed = step + 1, args.batch_size / (time.monotonic() - tick)
            # ---- from here on we only watch, and save
            in_a_row = 0 if math.isfinite(norm) else in_a_row + 1          # skipped steps
            look = done % args.sample_every == 0 or done in (100, args.steps)
            held = held_out_loss(run.ema, run.held, args) if look and run.held else math.nan
            t = None if args.stage == "vae" else gather(inputs[2].t.to(args.device))
            loss = log.add(done, gather(losses), t, held, norm, speed)     # of the last 100 steps
            bar.update()
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} items/s", refresh=False)
            why = stop.why()
            # Saved before the first preview, and never in a row of skipped steps
            if not in_a_row and (done % args.save_every == 0 or done == args.steps or why
                                 or look and not saved):
                log.save()
                save(run, done, args)
                saved = True
            if look:
                path = out / "samples" / f"{done:06d}.{'gif' if args.frames > 1 else 'png'}"
                line = f"step {done}: loss {loss:.4f}" + f"  held out {held:.4f}" * bool(run.held)
                line += f"  {run.preview(path)}  {path}"
                plot_log(log)
                with bar.external_write_mode():
                    say(line)
            if why and not in_a_row or in_a_row == 10:     # ten in a row: training has failed
                break
            tick = time.monotonic()                        # a step's time includes its data's
    log.save()
    if in_a_row:
        raise ValueError(f"no finite gradient in {in_a_row} steps, up to step {done}; they are not "
                         f"saved; try a lower --lr, or --precision fp32, in another --out")
    if done < args.steps:
        return say(f"stopped by {why} after step {done} of {args.steps}; the same command goes on")
    file = shlex.quote(f"{out}/ema.safetensors")
    use = f"To use it: python train.py --vae {file}" if args.stage == "vae" else \
        f"To sample: python sample.py {shlex.quote(run.prompts[0])} --ckpt {file}"
    say(f"done: {out}/ema.safetensors. {use}" + f" --frames {args.frames}" * (args.frames > 1))

# ==== Below: engineering, where a first reading may stop ==========================================

# ---- 6. From flags to settings -------------------------------------------------------------------
# Flags of how a run is carried out. They may differ on resume: but for rounding, nothing changes.
HARMLESS = {"steps", "minutes", "grad_accum", "out", "init", "resume", "save_every",
            "sample_every", "workers", "device", "checkpoint_activations", "fsdp", "compile"}
# Flags that define the model. With --init they are the checkpoint's.
OF_MODEL = {*CONFIG, "text", "schedule", "objective", "noise_shift"}
flags_of = lambda flags: json.loads(json.dumps(flags, default=str))    # a dict, as files hold it

def prepare(args):
    """Flags as given -> (settings, last, init): a value for each flag, the run's own checkpoint and
    --init's, or None. Raises ValueError for flags that do not fit together or to a checkpoint."""
    stage, idle = args.stage, args.benchmark or args.dry_run   # idle: writes nothing
    if stage in ("vae", "encode") and (idle or args.fsdp or args.compile):
        raise ValueError(f"--fsdp, --compile, --dry-run and --benchmark: not for --stage {stage}")
    if stage == "encode" and (args.init or not args.resume):
        raise ValueError("--init and --no-resume: not for --stage encode; it takes --vae and --out")
    cache = args.data != "shapes" and D.cache_index(args.data) or {}
    frames = args.frames or cache.get("frames", 0)         # 0: the stage's default
    if frames > 1 and stage in ("vae", "t2i") or frames == 1 and stage == "t2v" and not idle:
        raise ValueError(f"{frames} frames with --stage {stage}; one is t2i, more are t2v")
    args.device, args.out = join_processes(args.device, args.fsdp), args.out or f"runs/{stage}"
    last = None if idle else claim_folder(args)
    if stage == "t2v" and not last and not idle:
        args.init = args.init or G.find_checkpoint(("t2i",))
    init = G.load_checkpoint(args.init) if args.init and not last else None
    if init and stage != "vae" and "config" not in init:
        raise ValueError(f"--init {args.init} is an autoencoder; give it as --vae")
    known = last or init or {}
    config = vars(G.from_file(G.GenTronConfig, known["config"])) if "config" in known else {}
    saved = {k: v for k, v in {**known.get("flags", {}), **config}.items() if v is not None}
    # A file's flags pass the checks of typed ones
    kept = {"world", "size", *OF_MODEL, *(["precision"] if last else [])}
    names = sorted({"preset", *kept} & {*saved} - {*CONFIG})
    try:
        flags = [f"--{name.replace('_', '-')}={as_typed(saved[name])}" for name in names]
        checked = parser().parse_args(flags)
        saved |= {name: getattr(checked, name) for name in names}
    except ValueError as error:
        raise ValueError(f"damaged {args.out if last else args.init}: {error}") from None
    preset = args.preset or saved.get("preset") or "nano"
    paper = "paper " if preset != "nano" and stage != "vae" else ""
    column = COLUMNS.index(paper + stage.replace("encode", "t2i"))
    # What was typed comes first, then the cache's, the checkpoint's, the default
    typed = {name: value for name, value in vars(args).items() if value is not None}
    fitting = {name: cache[name] for name in ("size", "fps", "frames") if name in cache}
    inherited = {name: saved[name] for name in kept if name in saved}
    defaults = {**vars(parser().parse_args([])), **{name: f.default for name, f in CONFIG.items()},
                **G.PRESETS[preset], **{name: row[column] for name, row in DEFAULTS.items()},
                "preset": preset, "precision": "bf16" if args.device.type == "cuda" else "fp32"}
    if args.objective == "flow" or args.schedule == "straight":
        defaults.update(objective="flow", schedule="straight")
    settings = argparse.Namespace(**{**defaults, **inherited, **fitting,
                                     **G.PRESETS.get(args.preset, {}), **typed})
    # A file without a flag was trained with that flag's default (without --optimizer: by adamw)
    was, now = flags_of({**defaults, "optimizer": "adamw", **saved}), flags_of(vars(settings))
    file, fixed = (args.out, {*now} - HARMLESS) if last else (args.init, OF_MODEL if init else {})
    for name in now:
        if name in fixed and was[name] != now[name]:
            raise ValueError(f"--{name.replace('_', '-')} was {was[name]} in {file}, now it is "
                             f"{now[name]}; give it as it was, or "
                             + ("another --out" if last else "leave it out"))
    if settings.batch_size % (processes() * settings.grad_accum) and stage != "encode":
        raise ValueError("--batch-size is not divisible by processes x --grad-accum")
    if stage in ("vae", "encode") and any(side % G.VAE.down for side in settings.size):
        raise ValueError(f"--size must be divisible by {G.VAE.down}")
    return settings, last, init

# ---- 7. From settings to a run that can start ----------------------------------------------------
def setup(args):
    """Flags as given -> (settings, run, stop): all that the loop works with, built once."""
    typed, (args, last, init) = args.text is not None, prepare(args)
    dataset, held, pictures, prompts = open_data(args)
    net, vae, state = build(args, [dataset, pictures] if pictures else [dataset], last, init, typed)
    run, first = start(net, args, last), last["step"] if last else 0
    run.dataset, run.vae, run.state, run.prompts, run.first = dataset, vae, state, prompts, first
    say(f"{args.stage}: {sum(p.numel() for p in run.weights) / 1e6:.2f} M parameters, steps "
        f"{first} to {args.steps} of {args.batch_size} items, {args.device}, {args.precision}")
    git = subprocess.run("git describe --always --dirty --abbrev=40 --exclude=*", shell=True,
                         cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    state["made"] = last["made"] if last else {
        "commit": git.stdout.strip(), "torch": str(torch.__version__), "items": len(dataset)}
    if (before := state["made"].get("items", len(dataset))) != len(dataset):
        say(f"note: this run began with {before!s:.20} items, now there are {len(dataset)}")
    config = {"program": "gentron", "flags": flags_of(vars(args)), "made": state["made"]}
    if rank() == 0:                                        # for people, and `claim_folder`
        with D.writing(Path(args.out) / "config.json") as file:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shape = (args.batch_size, args.frames, vae.channels, *(side // vae.down for side in args.size))
    if args.stage == "vae":
        run.held = None                                    # its previews show how it goes
        run.batches = vae_batches(dataset, shape, first, args)
        run.preview = lambda path: preview_vae(path, run.ema, held or dataset, args)
    else:
        clips, stills, run.held = (x and Latents(x, vae, args) for x in (dataset, pictures, held))
        run.batches = joint_batches(clips, stills, net.schedule, shape, first, args)
        run.preview = lambda path: preview_samples(path, run.ema, vae, prompts, args)
    return args, run, Stop(args.minutes, args.device)      # --minutes count from here

def start(net, args, last=None):
    """A net -> what the training step takes: net, its averages, both parameter lists, optimizer."""
    ema, file = copy.deepcopy(net), f"{args.out}/{FILES[0]}"
    if last:
        G.load_weights(ema, last["ema"] if args.stage != "vae" else last["vae"]["weights"], file)
    blocks = net.model.blocks if args.stage != "vae" else []
    for block in blocks:                # in place: the names of the weights stay
        if args.compile:                # first, as torch.compile skips what `checkpoint` wraps
            block.forward = torch.compile(block.forward)
        if args.checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for module in (net.train(), ema.eval().requires_grad_(False)):
        if args.fsdp:
            shard(module, args)                            # moves each part as it is sharded
        module.to(args.device)
    optimizer = G.Muon(net, args.optimizer == "muon")
    for name, p in net.named_parameters() if last else ():
        try:
            keys = ("exp_avg", "exp_avg_sq")[:1 if p in optimizer.matrices else 2]
            old = {key: last["optimizer"][key][name].view(p.shape) for key in keys}
            old["step"] = last["optimizer"]["step"].clone().view(())
        except (LookupError, TypeError, AttributeError, RuntimeError):
            raise ValueError(f"{file} is damaged: its moments of {name}") from None
        for key, x in old.items():
            old[key] = x = x.to(p.device, torch.float32)
            if isinstance(p, DTensor) and x.ndim:          # each process keeps its share
                old[key] = distribute_tensor(x, p.device_mesh, p.placements)
        optimizer.state[p] = old
    return argparse.Namespace(net=net, ema=ema, weights=list(net.parameters()),
                              averages=list(ema.parameters()), optimizer=optimizer)

def open_data(args):
    """-> (dataset, held, pictures, prompts): what trains, what is held out (or None), the pictures
    for joint training (or None), the previews' captions. Sets --text to what the data offer."""
    shapes, stage, more = args.data == "shapes", args.stage, 3 if args.world == "full" else 1
    n = DRAWN["vae"] if stage == "vae" else more * DRAWN["t2v" if args.frames > 1 else "t2i"]
    # Every second picture of the full world shows its hardest: two plain things that touch
    of_pictures = ("full", "touching") if args.world == "full" else args.world
    level = "single" if args.text == "labels" else args.world if args.frames > 1 else of_pictures
    held = pictures = None
    dataset = D.open_data(args.data, args.size, args.frames, args.fps, level, n, args.seed)
    if cache_of(dataset) and stage in ("vae", "encode"):
        raise ValueError(f"{args.data} holds latents; --stage {stage} needs their pictures")
    if stage in ("t2i", "t2v") and args.text is None:
        words = "small" if shapes or any(dataset.captions) else "none"
        args.text = cache_of(dataset) and dataset.text_spec or words
    # The previews' captions: of the shapes twelve of another seed, else twelve that train
    prompts = [D.Shapes(level, 12, PREVIEW_SEED, args.size, args.frames).scene(i).caption()
               for i in range(12)]
    if not shapes:
        say(*dataset.report())
        if stage != "encode":
            dataset, held = D.hold_out(dataset, args.seed)
        captions = list(dict.fromkeys(dataset.captions))
        prompts = [captions[i] for i in spread(len(captions), 12)]
    # Joint image-video training (paper 3.4): there are more pictures than clips
    if stage == "t2v" and args.p_motion_free:
        source = args.image_data or (args.data if shapes else None)
        if source is None:
            raise ValueError("no pictures to train on; give --image-data, or --p-motion-free 0")
        pictures = D.open_data(source, args.size, 1, args.fps, of_pictures, more * DRAWN["t2i"],
                               args.seed)
    return dataset, held or None, pictures, prompts

def build(args, data, last, init, typed):
    """Settings -> (net, vae, state): what trains, the autoencoder (of stage vae: the same) and the
    part of the checkpoint that never changes. data: datasets; typed: was --text given?"""
    torch.manual_seed(args.seed)        # the initial weights, drawn in the same order each time
    known, path = last or init, f"{args.out}/{FILES[0]}" if last else args.init
    if args.stage == "vae":
        net = G.build_vae(known) if known else G.VAE(args.channels)
        if not isinstance(net, G.VAE):
            raise ValueError(f"{path} has a pretrained autoencoder; it cannot be trained here")
        if net.channels != args.channels:
            raise ValueError(f"{path} has {net.channels} latent channels; --channels must say so")
        net = G.load_weights(net, last["weights"], path) if last else net
        return net.requires_grad_(True), net, {}
    if init and args.vae not in (None, init["vae"].get("name")):
        raise ValueError(f"--init {path} keeps its own autoencoder; leave --vae out")
    words = vocabulary_of(data[0], args.text)
    state = {key: known[key] for key in ("config", "text", "schedule", "vae")} if known else {
        "text": dict(spec=args.text, vocabulary=words, dim=128, turned=1.0),
        "schedule": dict(kind=args.schedule, objective=args.objective, shift=args.noise_shift),
        "vae": find_vae(args)}
    if new := sorted({*words} - {*state["text"]["vocabulary"]}):
        say(f"note: {path} does not know {len(new)} words of the data: {', '.join(new)[:150]}")
    # Only what the user typed may be downloaded, never a name that stands in a file
    vae = G.build_vae(state, download=args.vae).to(args.device)
    encoder = read_caches(data, vae, args) or G.from_file(
        G.TextEncoder, {**state["text"], "download": typed})
    multiple = vae.down * args.patch_size
    if any(side % multiple for side in args.size):
        raise ValueError(f"--size must be divisible by {multiple}: autoencoder x patch")
    config = {"text_dims": encoder.dims, "in_channels": vae.channels,
              "grid": [side // multiple for side in args.size],
              **{name: getattr(args, name) for name in CONFIG}, **state.get("config", {})}
    # All that makes a t2i model a t2v one. Stage t2i does not take it away again.
    config["temporal"] = args.stage == "t2v" or config.get("temporal", False)
    cfg = G.from_file(G.GenTronConfig, config)
    state["config"] = dataclasses.asdict(cfg)
    net = G.Net(G.GenTron(cfg), encoder, G.NoiseSchedule(**state["schedule"]))
    if known:
        # From --init the averages become the weights: they draw better. Temporal layers may be
        # missing. They answer 0: the first video model is its image parent, frame by frame (3.4).
        old = known.get("weights" if last else "ema", {})
        new = {k: v for k, v in net.state_dict().items() if ".temporal." in k and k not in old}
        G.load_weights(net, {**new, **old}, path)
        if init:
            say(f"init: {len(old)} tensors from {path}, {len(new)} new ones (temporal attention)")
    return net, vae, state

def find_vae(args):
    """--vae -> the "vae" part of a checkpoint: a file's own, or a name or folder for diffusers."""
    path = Path(args.vae or Path(__file__).resolve().parent / "assets" / "vae.safetensors")
    if path.suffix != ".safetensors" and not path.is_file():
        return {"name": args.vae}
    state = G.load_checkpoint(path)
    if args.data != "shapes" and state["flags"].get("data") == "shapes":
        say(f"note: {path} has only seen the shapes world, other pictures blur; see --stage vae")
    return state["vae"]

def vocabulary_of(dataset, spec):
    """Words for the small encoder, class names for --text labels, nothing for others: a list."""
    dataset = getattr(dataset, "dataset", dataset)         # held-out items' words count, too
    if spec == "labels" and not dataset.labels:
        raise ValueError("--text labels needs class folders (corgi/1.jpg); try --text small")
    if spec == "labels" or "small" not in spec.split("+"):
        return list(dataset.labels) if spec == "labels" else []
    if cache_of(dataset) or isinstance(dataset, D.Shapes):     # (with the words of all worlds)
        return list(dataset.vocabulary) if cache_of(dataset) else D.vocabulary()
    # The commonest 8192, sorted: the order of files must not decide which vector is whose
    counts = collections.Counter(w for caption in dataset.captions for w in G.split_words(caption))
    return sorted(word for word, _ in counts.most_common(8192))

# ---- 8. Several processes ------------------------------------------------------------------------
# Without --fsdp each process holds all, and gradients are averaged. With --fsdp each holds 1 / n of
# every tensor (a DTensor), and a block's weights are put together only while the block runs.
rank = lambda: dist.get_rank() if dist.is_initialized() else 0     # process 0 prints and writes
processes = lambda: dist.get_world_size() if dist.is_initialized() else 1      # how many there are
own_part = lambda n: slice(rank() * n // processes(), (rank() + 1) * n // processes())
barrier = lambda args: gather(torch.zeros(1, device=args.device))      # all wait here for the last
say = lambda *lines: D.say(*lines) if rank() == 0 and lines else None  # once for all processes

def join_processes(name, sharded):
    """Joins the processes of torchrun. name: --device. Returns this process's torch.device."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count < 1 or count == 1 and sharded:
        raise ValueError(f"{count} process(es); try torchrun --nproc_per_node=2 train.py ...")
    if name in (None, "cuda") and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"          # a GPU each
    device = G.pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)                      # where NCCL and FSDP look
    if count > 1:           # if one process dies, torchrun ends the others; the limit ends a hang
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(minutes=10))
    return device

def shard(net, args):
    """FSDP2, block by block: the whole model never has to fit on one device."""
    half = torch.bfloat16 if args.precision == "bf16" else None    # as autocast would round them
    policy = fsdp.MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(args.device.type, (processes(),))
    for block in net.model.blocks:
        fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
        # A hook on forward puts the weights together; sampling calls this method directly
        fsdp.register_fsdp_forward_method(block, "keys_values")
    for module in net.children():                          # all that is not in a block
        if list(module.parameters()):
            fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fsdp.register_fsdp_forward_method(net.model, "prepare")

def average_gradients(weights):
    """The gradients become their means over the processes. FSDP does so in the backward pass."""
    for weight in weights if processes() > 1 else ():
        if weight.grad is not None and not isinstance(weight, DTensor):
            dist.all_reduce(weight.grad)
            weight.grad /= processes()

def full_tensor(x):
    """A DTensor -> the full tensor on process 0, or on all if it is a number. All take part."""
    if not isinstance(x, DTensor):
        return x
    x = x.full_tensor()     # to the CPU one by one: together they may not fit on the GPU
    return x if x.ndim == 0 else x.cpu() if rank() == 0 else None

def gather(x):
    """(b,) on each process -> (B,) on the CPU, in the order of the global batch."""
    parts = [torch.empty_like(x) for _ in range(processes())]
    dist.all_gather(parts, x.contiguous()) if processes() > 1 else parts[0].copy_(x)
    return torch.cat(parts).cpu()

class Stop:
    """--minutes, SIGTERM, Ctrl-C: the loop ends its step and saves. A second Ctrl-C ends it all."""
    def __init__(self, minutes, device):
        self.deadline = time.monotonic() + 60 * minutes if minutes else math.inf
        self.device, self.signal = device, 0
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.on_signal)
    def on_signal(self, number, frame):
        """Only notes the signal: an exception here could separate weights from EMA."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    def why(self):
        """Why to stop, or "": the same on all processes, whichever was told. All have to ask."""
        told = self.signal or int(time.monotonic() > self.deadline)    # 1: --minutes
        told = gather(torch.tensor([told]).to(self.device)).max().item()
        return signal.Signals(told).name if told > 1 else "--minutes" * told

# ---- 9. Loading and encoding data ----------------------------------------------------------------
def loader(dataset, batches, args):
    """Yields (uint8 (B, F, H, W, 3), B captions) for each list of item numbers in `batches`, drawn
    or decoded ahead of time by --workers processes."""
    return iter(DataLoader(dataset, batch_sampler=batches, num_workers=args.workers,
                           worker_init_fn=ignore_signals))

def ignore_signals(worker):
    """Ctrl-C reaches the whole process group; only the main process decides what it means."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)

def cache_of(dataset):
    """The D.Cache that a dataset is, or is a part of; else None."""
    dataset = getattr(dataset, "dataset", dataset)
    return dataset if isinstance(dataset, D.Cache) else None

# Are all encoders of a --text pretrained ones, which never change?
is_frozen = lambda spec: {"none", "small", "labels"}.isdisjoint((spec or "none").split("+"))

def fingerprint(vae, spec=None):
    """A string of an autoencoder's weights in fp16, and of a text encoder's files, if local."""
    weights = [x.half().cpu().numpy().tobytes() for _, x in sorted(vae.state_dict().items())]
    files = [(p.name, p.stat().st_size) for name in (spec or "").split("+") if name
             for p in sorted(Path(name).glob("*"))]
    parts = [b"".join(weights), *([repr(files).encode()] if spec else [])]
    return " ".join(f"{zlib.crc32(part):08x}" for part in parts)

def read_caches(data, vae, args):
    """A `StoredText` if all data are caches with the features of a frozen --text, else None. Raises
    ValueError for a cache of another --vae or --text: no check of shapes would notice it."""
    frozen, caches = is_frozen(args.text), [cache_of(dataset) for dataset in data]
    for cache in filter(None, caches):
        spec = cache.text_spec if frozen else None
        same = cache.fingerprint.startswith(fingerprint(vae, spec))
        if spec not in (None, args.text) or not same:
            raise ValueError(f"{cache.root} was made with another --vae or --text (its --text is "
                             f"{cache.text_spec}); give those, or encode again")
    stored = frozen and all(cache and cache.dims for cache in caches)
    return StoredText(caches, args.device) if stored else None

class StoredText(torch.nn.Module):
    """Stands in for frozen text encoders. It knows the caches' captions and the null text."""
    def __init__(self, caches, device):
        super().__init__()
        self.caches, self.device, self.dims = caches, device, tuple(caches[0].dims)
    def __deepcopy__(self, memo):
        return self                                        # a copy would read the files
    def forward(self, captions):
        """List of B strings -> Text of fp32 tokens (B, L, D_k), masks (B, L), pooled (B, P)."""
        find = lambda caption: next(c.text(caption) for c in self.caches if caption in c.where)
        tokens, pooled = zip(*map(find, captions))
        tensor = lambda x: torch.from_numpy(np.array(x)).to(self.device).float()
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        tokens = [list(map(tensor, rows)) for rows in zip(*tokens)]            # B times (L_i, D_k)
        masks = [pad([x.new_ones(len(x), dtype=torch.bool) for x in rows]) for rows in tokens]
        return G.Text(tuple(map(pad, tokens)), tuple(masks), tensor(pooled))

def encode(args):
    """Stage encode: writes a cache of all items' latents, and of their captions' features if --text
    is frozen. Process p of P encodes the items p, p + P, ..."""
    args, *_ = prepare(args)
    P, (dataset, *_) = processes(), open_data(args)
    vae = G.build_vae({"vae": find_vae(args)}, download=args.vae).to(args.device)
    # A trained text encoder has other features at each step: then only captions are stored
    text = G.TextEncoder(args.text, download=True).to(args.device) if is_frozen(args.text) else None
    spec, dims = (args.text, list(text.dims)) if text else (None, [])
    probe = latents_of(vae, dataset[0][0][None], args.device)              # (1, F, C, h, w)
    source = f"{args.world}, {args.seed}" if args.data == "shapes" else dataset.fingerprint()
    index = {"items": len(dataset), "shape": list(probe.shape[1:]), "size": list(args.size),
             "frames": args.frames, "fps": args.fps, "labels": dataset.labels, "text": spec,
             "vocabulary": vocabulary_of(dataset, "small"), "fingerprint": fingerprint(vae, spec),
             "dims": dims, "parts": P, "data": args.data, "source": source}
    writer = D.CacheWriter(args.out, index, 0) if rank() == 0 else None
    barrier(args)                                          # process 0 has written the index
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
    chunks, stop = loader(dataset, chunks, args), Stop(args.minutes, args.device)
    with tqdm(total=writer.rows, initial=writer.done, unit=" items", disable=rank() > 0) as bar:
        for _ in range(turns):
            why = why or stop.why()                        # asked also by a process that is done
            for clips, captions in itertools.islice(chunks, 0 if why else 1):
                z = latents_of(vae, clips, args.device).numpy()
                writer.append(z, captions, features if text else None)
                bar.update(len(captions))
    barrier(args)                                          # all parts are written
    own = f" --vae {shlex.quote(args.vae)}" if args.vae else ""
    say(f"stopped by {why}. To go on: the same command" if why else f"done: {len(dataset)} items; "
        f"python train.py{' --stage t2v' * (args.frames > 1)} --data {shlex.quote(args.out)}{own}")

# ---- 10. The run folder --------------------------------------------------------------------------
FILES = ("last.safetensors", "ema.safetensors", "config.json", "log.csv", "loss.png")
LOCKS = []                              # open files; the system drops a lock when its process ends

def claim_folder(args):
    """Takes the run's folder; --no-resume moves the old run aside. Returns the checkpoint in it, or
    None. Raises ValueError if it is in use, or holds somebody else's files."""
    out, last = Path(args.out), Path(args.out) / FILES[0]
    lock_folder(out)
    if args.stage == "encode":
        return None
    if rank() == 0:
        if not args.resume and last.exists():
            if out.resolve() == Path.cwd():
                raise ValueError("--no-resume cannot move the working directory; give --out a name")
            aside = next(x for k in itertools.count(1) if not os.path.lexists(x := f"{out}.{k}"))
            say(f"moved the old run to {out.rename(aside)}")
            lock_folder(out)                               # the other lock moved, too
        for name in (*FILES, "samples/000000.png"):
            D.writable(out / name, inside=out)             # better now than after 500 steps
        there = [name for name in FILES if (out / name).exists()]
        ours = last.exists() or "config.json" in there and (
            '"program": "gentron"' in D.read_text(out / "config.json"))
        if there and not ours:
            raise ValueError(f"{out} holds {there[0]}, but no run; give another folder by --out")
    barrier(args)                                          # nobody looks before it has moved
    state = G.load_checkpoint(last) if last.exists() else None
    parts = {"weights", "optimizer", "vae" if args.stage == "vae" else "ema"}
    if state and (state["stage"] != args.stage or not state.keys() >= parts):
        raise ValueError(f"{last} is not all of a run of this stage; give another --out")
    return state

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
        raise ValueError(f"{out} is in use by another run; give another --out") from None

def save(run, step, args):
    """ema.safetensors: what others need to sample from the run. last.safetensors: all of it."""
    if args.stage == "vae":
        measure_latents(run.ema, run.dataset, args)
    # Every process takes part in putting the tensors together; process 0 writes them
    full = lambda tensors: {name: full_tensor(x) for name, x in tensors.items()}
    moments = {name: run.optimizer.state[p] for name, p in run.net.named_parameters()}
    moment = lambda key: full({name: state[key] for name, state in moments.items() if key in state})
    optimizer = {"exp_avg": moment("exp_avg"), "exp_avg_sq": moment("exp_avg_sq"),
                 "step": max(state.get("step", 0) for state in moments.values())}
    ema, weights = full(run.ema.state_dict()), full(run.net.state_dict())
    if rank():
        return
    state = {**run.state, "stage": args.stage, "step": step, "size": list(args.size),
             "frames": args.frames, "fps": args.fps, "flags": flags_of(vars(args))}
    vae = run.ema if args.stage == "vae" else run.vae
    if isinstance(vae, G.VAE):                             # a pretrained one stays a name
        state["vae"] = {"config": vae.config, "weights": vae.state_dict()}
    if args.stage != "vae":
        state["ema"] = ema
    # In this order: a run is done when last.safetensors says so
    G.save_checkpoint(Path(args.out) / "ema.safetensors", state, torch.float16)
    G.save_checkpoint(Path(args.out) / FILES[0], state | dict(weights=weights, optimizer=optimizer))

@torch.no_grad()
def measure_latents(vae, dataset, args, n=512):
    """Measures mean and standard deviation of each latent channel over n items, and keeps them in
    the autoencoder. They are those of drawn latents, noise included, as in Stable Diffusion."""
    numbers, parts = spread(len(dataset), n), []           # evenly: some of every class folder
    for i in range(0, len(numbers), CHUNK):
        clips = np.stack([dataset[k][0] for k in numbers[i:i + CHUNK]])
        parts.append(vae.posterior(G.to_float(clips).to(args.device)))
    # (B, F, C, h, w) -> (C, all the rest)
    mean, logvar = (torch.cat(x).cpu().double().transpose(0, 2).flatten(1) for x in zip(*parts))
    vae.mean.copy_(mean.mean(1).view_as(vae.mean))
    vae.std.copy_((mean.var(1) + logvar.exp().mean(1)).sqrt().view_as(vae.std))

def save_sheets(path, sheets, fps):
    """Writes a list of F PIL images: a .png of one, a .gif of several."""
    if rank() == 0:
        with D.writing(path) as file:
            D.save_gif(file, sheets, fps) if len(sheets) > 1 else sheets[0].save(file)

# column of log.csv: (name, colour). The band of most noise falls while the layout is learned
CURVES = {"loss": ("loss", "#111111"), "loss_t0": ("least noise", "#4477dd"),
          "loss_t1": ("some", "#44aa66"), "loss_t2": ("more", "#dd9933"),
          "loss_t3": ("most noise", "#cc4444"), "held_out": ("held out", "#aa44aa")}
HEADER = ("step", *CURVES, "grad_norm", "skipped", "items_per_s")

class Log:
    """log.csv, a row a step: lists of numbers in memory, NaN for an empty cell. A resumed run goes
    on with the rows up to its checkpoint. ValueError for a file of another form."""
    def __init__(self, path, first):
        self.path, self.rows = path, []
        if first and path.exists():
            try:
                header, *lines = D.read_text(path, 2 ** 30).splitlines()
                rows = [[float(cell or "nan") for cell in line.split(",")] for line in lines]
                self.rows = sorted({row[0]: row for row in rows if row[0] <= first}.values())
                if header != ",".join(HEADER) or not {*map(len, self.rows)} <= {len(HEADER)}:
                    raise ValueError                       # a spreadsheet may have saved it
            except ValueError:
                raise ValueError(f"{path} is not as this run wrote it; move it away") from None
    def add(self, step, losses, t, held, norm, speed):
        """losses (B,), t (B,) or None: the mean loss, and its mean in four bands of noise; held:
        the held-out loss or nan; norm: of the gradients. Returns the mean loss of 100 steps."""
        band = torch.full_like(losses, 9) if t is None else t * 4 // 1000      # (B,) 0 .. 3
        means = [losses.mean(), *(losses[band == k].mean() for k in range(4)), held]
        skipped = (self.rows[-1][-2] if self.rows else 0) + (not math.isfinite(norm))
        self.rows.append([step, *map(float, means), norm, skipped, round(speed, 1)])
        return np.mean([x for _, x, *_ in self.rows[-100:] if math.isfinite(x)] or math.nan)
    def save(self):
        """Writes the file anew."""
        cell = lambda x: "" if math.isnan(x) else f"{x:.9g}"
        lines = [HEADER, *([cell(x) for x in row] for row in self.rows)]
        if rank() == 0:
            with D.writing(self.path) as file:
                file.write_text("".join(",".join(line) + "\n" for line in lines))

def plot_log(log):
    """loss.png: the loss, its parts by noise level, the held-out loss, on a logarithmic axis."""
    # Means over 100 parts of the run, of what is known in each: (100, 1 + curves)
    parts = np.array_split(np.array(log.rows)[:, :1 + len(CURVES)], min(100, len(log.rows)))
    means = np.array([np.ma.masked_invalid(part).mean(0).filled(np.nan) for part in parts])
    steps, values = means[:, 0], np.where(means[:, 1:] > 0, means[:, 1:], np.nan)
    if rank() or len(steps) < 2 or np.isnan(values).all():
        return                                             # one point is no curve
    low, high = np.log(0.9 * np.nanmin(values)), np.log(1.1 * np.nanmax(values))
    to_x, to_y = lambda part: 64 + 676 * part, lambda part: 360 - 330 * part    # 0 .. 1 -> pixels
    xs, ys = to_x((steps - steps[0]) / np.ptp(steps)), to_y((np.log(values) - low) / (high - low))
    image, font = Image.new("RGB", (760, 400), "white"), ImageFont.load_default(size=13)
    pen, legend = ImageDraw.Draw(image), 64                # legend: where its next name begins
    for part in np.linspace(0, 1, 5):                      # five numbers along each axis
        x, y = to_x(part), to_y(part)
        pen.line([(64, y), (740, y)], fill="#e4e4e4")
        pen.text((56, y), f"{math.exp(low + part * (high - low)):.2g}", "#555555", font, "rm")
        pen.text((x, 368), f"{steps[0] + part * np.ptp(steps):.0f}", "#555555", font, "mt")
    for (name, ink), curve in zip(CURVES.values(), ys.T):
        points = [(x, y) for x, y in zip(xs, curve) if y == y]     # (NaN is not equal to itself)
        if points:                                         # stage vae has no noise levels
            pen.line(points, fill=ink, width=3 if name == "loss" else 1)
            pen.text((legend, 6), name, ink, font)
            legend += 24 + pen.textlength(name, font)
    with D.writing(log.path.with_name("loss.png")) as file:
        image.save(file)

# ---- 11. --dry-run: how large? --benchmark: how fast? --------------------------------------------
def measure(args):
    """--dry-run: the size of --init's model, or of the flags' on 4-channel latents. --benchmark:
    seconds, FLOPs and memory of its training steps."""
    steps, all_frames = args.steps or 10, [args.frames] if args.frames else [1, 4, 8, 16, 32]
    args, _, init = prepare(args)
    B, video, cuda = args.batch_size, args.stage == "t2v", args.device.type == "cuda"
    # OURS: the paper's sizes read the paper's encoders unless --text says otherwise
    spec = args.text or ("small" if args.preset == "nano" else "clip+t5")
    widths = dict(small=128, labels=128, clip=768, t5=4096)
    dims = [widths.get(name) for name in spec.split("+") if spec != "none"]    # None is refused
    config = {**{name: getattr(args, name) for name in CONFIG}, "text_dims": dims,
              "in_channels": 4, "temporal": False, **(init["config"] if init else {})}
    dims, temporal = config["text_dims"], video or config["temporal"]
    model = lambda on=temporal: G.GenTron(G.GenTronConfig(**config | {"temporal": on}))
    def text(captions, device=args.device):                # random numbers, as many as CLIP's
        new = partial(torch.randn, len(captions), device=device)
        mask = torch.ones(len(captions), 77, dtype=torch.bool, device=device)
        return G.Text(tuple(new(77, d) for d in dims), (mask,) * len(dims), new(sum(dims)))
    with torch.device("meta"):                             # numbers without contents
        n = [sum(p.numel() for p in model(on).parameters()) for on in (False, True)]
    say(f"{args.preset}: {', '.join(f'{k} {config[k]}' for k in (*CONFIG, 'text_dims'))}",
        f"{n[0] / 1e6:.1f} M parameters, {n[1] / 1e6:.1f} M with temporal layers",
        f"{20 * n[temporal] / 1e9:.2f} GB in fp32: weights 4 bytes a parameter, gradients 4, "
        f"moments 8, EMA 4; --fsdp on N processes: 1 / N of it. Activations: see --benchmark")
    if (unix := os.name == "posix") and not cuda:
        import resource  # Windows has none: it shows 0
    if args.benchmark:
        say(f"batch {B}, {processes()} x {args.device}, {args.precision}; medians of {steps} steps",
            "frames    s/step   items/s   TFLOP/s   peak GB")
    schedule = G.NoiseSchedule(args.schedule, args.objective, args.noise_shift)
    for frames in all_frames if video else [1]:
        shape, times = (B, frames, config["in_channels"], *(side // 8 for side in args.size)), []
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model()(torch.empty(1, *shape[1:]), torch.empty(1), text([""], "meta"))
        flops = 3 * counter.get_total_flops()              # an item's: forward, twice it backward
        if args.dry_run:
            say(f"{flops / 1e9:.1f} GFLOPs to train on an item of latents {shape[1:]}")
            continue
        run = start(G.Net(model(), text, schedule), args)
        inputs = (torch.randn(shape), [""] * B, G.randomness(0, 0, shape, schedule))
        inputs = [x[own_part(B)] for x in inputs]
        for step in tqdm(range(3 + steps), leave=False, disable=rank() > 0):     # 3 to warm up
            begin = time.monotonic()
            training_step(run, inputs, step, args)
            times.append(time.monotonic() - begin)
        seconds = np.median(times[3:])
        peak = torch.cuda.max_memory_allocated() if cuda or not unix else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024, 1)[sys.platform == "darwin"]
        say(f"{frames:6}{seconds:10.3f}{B / seconds:10.1f}"
            f"{flops * B / seconds / processes() / 1e12:10.3g}{peak / 1e9:10.2f}")

# ---- 12. Main ------------------------------------------------------------------------------------
def main(argv=None):
    """Command line -> exit code: 0 done or stopped and saved, 2 for what the user can mend."""
    def work():
        args = parser().parse_args(argv)
        try:
            (measure if args.dry_run or args.benchmark else
             encode if args.stage == "encode" else train)(args)
        except (OSError, ValueError, RuntimeError) as error:
            others = processes() > 1 and isinstance(error, RuntimeError)
            if others and re.search("gloo|nccl|peer", str(error), re.I):
                raise ValueError("another process of this run has ended or hangs") from None
            if "DataLoader worker" in str(error):           # its last line says what happened there
                why = str(error).strip().splitlines()[-1]
                raise ValueError(f"{why}; the same command goes on") from None
            raise
    try:
        return D.run_main(work, "try --grad-accum, --fsdp, --checkpoint-activations, or a smaller "
                                "--batch-size or --preset")
    finally:
        # The loader's processes ignore SIGTERM, so an exit that asks them to end would wait. Its
        # own SIGCHLD handler raises when one of them dies.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        while LOCKS:
            LOCKS.pop().close()         # the folder is free again
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    sys.exit(main())
