"""
train.py: one loop, four stages:   vae -> (encode) -> t2i -> t2v

    python train.py                                      # text to image on the shapes world, a laptop's CPU
    python train.py --data my_pictures --steps 20000     # your own pictures and captions
    python train.py --stage vae                          # how assets/vae.pt was made
    torchrun --nproc_per_node=8 train.py --preset XL/2 --data my_pictures    # the same, on eight GPUs

To resume, run the same command again. A run folder holds last.pt (the whole run), ema.pt (the file to
share: half-precision EMA weights, autoencoder, vocabulary), log.csv, loss.png and samples/.
"""

import os

# OpenMP threads that spin while they wait lose half their time, and more, to any other process (our
# own loader's workers among them). Must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import collections
import contextlib
import copy
import csv
import itertools
import math
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data as D
import gentron as G

HERE = Path(__file__).resolve().parent

# What a flag that is not given means. The paper's constant 1e-4 is for its sizes and a batch of 2048;
# OURS: nano has a quick small world to learn, so a high rate, a short EMA, v + cosine.
QUICK = dict(lr=2e-3, batch_size=64, schedule="cosine", objective="v", ema=0.998, steps=4000)
PAPER = dict(lr=1e-4, batch_size=256, schedule="linear", objective="eps", ema=0.9999, steps=500_000)
VAE = dict(lr=2e-3, batch_size=16, schedule="cosine", objective="v", ema=0.998, steps=10_000)
WARMUP = 100            # OURS: steps over which the rate rises to --lr; then constant, as in the paper
DRAWN = dict(vae=1_000_000, t2i=16_384, t2v=4_096)     # items of the shapes world that a stage draws
PREVIEW_SEED = 10 ** 6  # the previews' prompts come from a dataset seed that no run trains on


# -----------------------------------------------------------------------------
# 1. Flags
# -----------------------------------------------------------------------------

def parser():
    p = D.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    g = p.add_argument_group("what to train")
    g.add_argument("--stage", choices=("vae", "t2i", "t2v"), default="t2i", help="autoencoder, pictures, clips")
    g.add_argument("--preset", choices=G.PRESETS, help="size of the Transformer (nano)")
    g.add_argument("--depth", type=D.number(int, 1, 1000), help="blocks, instead of the preset's")
    g.add_argument("--width", type=D.number(int, 4, 65536), help="channels of a token, instead of the preset's")
    g.add_argument("--heads", type=D.number(int, 1, 1024), help="attention heads, instead of the preset's")
    g.add_argument("--patch-size", type=D.number(int, 1, 64), help="latent positions a token's side covers")
    g.add_argument("--conditioning", choices=("cross", "adaln"), help="how text enters (cross)")
    g.add_argument("--text", help="small, small+small, labels, none, clip, t5, clip+t5, or NAME[+NAME] of "
                                  "the transformers library (small)")
    g.add_argument("--vae", help="autoencoder: a checkpoint, or a name for diffusers (assets/vae.pt)")
    g.add_argument("--objective", choices=("eps", "v"), help="what the network predicts (nano: v, else eps)")
    g.add_argument("--schedule", choices=("linear", "cosine"), help="noise (nano: cosine, else linear)")
    g = p.add_argument_group("data")
    g.add_argument("--data", default="shapes", help="shapes, or a folder of pictures or clips")
    g.add_argument("--image-data", help="t2v: a folder of pictures for joint training (default: as --data)")
    g.add_argument("--world", choices=("basic", "full"), help="how much of the shapes world (t2i: basic)")
    g.add_argument("--size", type=D.picture_size, help="H or HxW in pixels (64)")
    g.add_argument("--frames", type=D.number(int, 2, 1024), help="t2v: frames a clip (8)")
    g.add_argument("--fps", type=D.number(float, 0, 1000, above=True), default=4.0, help="frames a second (4)")
    g.add_argument("--p-drop-text", type=D.number(float, 0, 1), default=0.1, help="share of captions dropped (0.1)")
    g.add_argument("--p-motion-free", type=D.number(float, 0, 1), default=0.25,
                   help="t2v: share of items that are still pictures, without temporal attention (0.25)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=D.number(int, 1), help="steps in all (nano: a 15-minute run)")
    g.add_argument("--minutes", type=D.number(float, 0, above=True), help="stop and save after so many minutes")
    g.add_argument("--batch-size", type=D.number(int, 1, 2 ** 20), help="global, over all processes")
    g.add_argument("--grad-accum", type=D.number(int, 1), default=1, help="micro-batches a step (memory)")
    g.add_argument("--lr", type=D.number(float, 0, 1), help="AdamW's constant learning rate")
    g.add_argument("--ema", type=D.number(float, 0, 1), help="decay of the averaged weights")
    g.add_argument("--seed", type=D.number(int, 0, 2 ** 31 - 1), default=0)
    g = p.add_argument_group("the run")
    g.add_argument("--out", help="the run's folder (runs/STAGE)")
    g.add_argument("--init", help="checkpoint to start from (t2v: the newest t2i run, else assets/nano.pt)")
    g.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                   help="go on if the folder holds a run; --no-resume moves the old folder aside")
    g.add_argument("--save-every", type=D.number(int, 1), default=500, help="steps")
    g.add_argument("--sample-every", type=D.number(int, 1), default=500, help="steps")
    g.add_argument("--workers", type=D.number(int, 0, 256), default=2, help="processes that draw or decode")
    g.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (the best there is)")
    g.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 = autocast (bf16 on a GPU, else fp32)")
    g.add_argument("--benchmark", action="store_true", help="time a training step on random latents, and stop")
    return p


# Flags that change how a run is carried out, not what comes out of it: free to differ when resuming
HARMLESS = {"steps", "minutes", "grad_accum", "out", "resume", "save_every", "sample_every", "workers",
            "device", "benchmark"}


# -----------------------------------------------------------------------------
# 2. Building what is trained
# -----------------------------------------------------------------------------

def find_vae(name):
    """--vae -> the "vae" part of a checkpoint. name None: assets/vae.pt."""
    path = Path(name or HERE / "assets" / "vae.pt")
    if path.is_file() or name is None:
        state = G.load_checkpoint(path)
        if "vae" not in state:
            raise ValueError(f"{path} holds no autoencoder; try --vae assets/vae.pt")
        return state["vae"]
    return {"name": name}


def build(args, dataset):
    """Flags -> (net, vae, state): what trains, the frozen autoencoder, and the checkpoint's fixed part."""
    if args.stage == "vae":
        net = G.VAE()
        return net, net, {"vae": {"config": net.config}}
    state = {}
    init = G.load_checkpoint(args.init) if args.init else None
    if init:
        if "config" not in init:
            raise ValueError(f"{args.init} holds an autoencoder only; to use it: --vae {args.init}")
        if init["config"]["temporal"] and args.stage == "t2i":
            raise ValueError(f"{args.init} is a video model, which --stage t2i cannot train; try --stage t2v")
        state = {key: copy.deepcopy(init[key]) for key in ("config", "text", "schedule", "vae")}
    else:
        sizes = dict(G.PRESETS[args.preset or "nano"])
        spec = args.text or "small"
        if args.text is None and isinstance(dataset, D.Folder) and not any(dataset.captions):
            spec = "none"                                  # pictures without captions
        vocabulary = [] if spec == "none" else vocabulary_of(dataset, spec)
        encoder = G.TextEncoder(spec, vocabulary)
        state["config"] = dict(sizes, text_dims=list(encoder.dims), conditioning="cross", temporal=False)
        state["text"] = dict(spec=spec, vocabulary=vocabulary, dim=encoder.dim)
        state["schedule"] = dict(kind=args.schedule, objective=args.objective)
        state["vae"] = find_vae(args.vae)
    config = state["config"]
    for flag in ("depth", "width", "heads", "patch_size", "conditioning"):
        if getattr(args, flag) is not None:
            config[flag] = getattr(args, flag)
    config["temporal"] = args.stage == "t2v"
    vae = G.build_vae(state).to(args.device)
    config["in_channels"] = vae.channels
    multiple = vae.down * config["patch_size"]
    if any(side % multiple for side in args.size):
        raise ValueError(f"--size {args.size[0]}x{args.size[1]} is not divisible by {multiple} "
                         f"(autoencoder {vae.down} x patch {config['patch_size']}); try multiples of it")
    torch.manual_seed(args.seed)
    net = G.Net(G.GenTron(G.GenTronConfig(**config)), G.TextEncoder(**state["text"]),
                G.NoiseSchedule(**state["schedule"]))
    if init:
        report_init(net, init, args)
    return net, vae, state


def vocabulary_of(dataset, spec):
    """Words for the small encoder, class names for --text labels."""
    if spec == "labels":
        labels = getattr(dataset, "labels", None)
        if not labels:
            raise ValueError("--text labels needs class folders (corgi/1.jpg), and this data has captions; "
                             "try --text small")
        return list(labels)
    if "small" not in spec.split("+"):
        return []
    if isinstance(dataset, D.Shapes):
        return D.vocabulary()
    counts = collections.Counter(word for caption in dataset.captions for word in G.split_words(caption))
    return sorted(word for word, _ in counts.most_common(8192))


def report_init(net, init, args):
    """Loads the weights of --init. Only layers that the other model cannot have stay new."""
    weights = init.get("ema") or init["weights"]
    own = net.state_dict()
    new = [k for k in own if k not in weights and ".temporal." in k]
    G.load_weights(net, {**{k: own[k] for k in new}, **{k: v.float() for k, v in weights.items()}},
                   f"--init {args.init}")
    print(f"init: {len(own) - len(new)} tensors from {args.init}, {len(new)} new (temporal attention)")


# -----------------------------------------------------------------------------
# 3. Data: which items a step sees, and their latents
# -----------------------------------------------------------------------------

CHUNK = 64      # items that are drawn and encoded together: always the same ones, whatever the run


@lru_cache(maxsize=4)
def permutation(seed, epoch, n):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def places_of_step(seed, step, batch, n):
    """Which places of the shuffled dataset step `step` trains on: a function of its arguments. The
    first epoch walks through them in order, every later one in an order of its own."""
    everything = range(step * batch, (step + 1) * batch)
    return [i if i < n else int(permutation(seed, i // n, n)[i % n]) for i in everything]


class Chunks(torch.utils.data.Dataset):
    """A dataset by the chunk: lists of places -> (uint8 (B, F, H, W, 3), captions). The dataset is
    shuffled once, so that class folders do not come one class after the other."""
    def __init__(self, dataset, chunks, seed):
        self.dataset, self.chunks, self.order = dataset, chunks, permutation(seed, 0, len(dataset))

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, k):
        clips, captions = zip(*(self.dataset[int(self.order[place])] for place in self.chunks[k]))
        return torch.from_numpy(np.stack(clips)), list(captions)


def loader(dataset, chunks, args):
    """Chunks in order, drawn or decoded ahead of time by --workers processes."""
    workers = min(args.workers, len(chunks))
    return DataLoader(Chunks(dataset, chunks, args.seed), batch_size=None, num_workers=workers,
                      worker_init_fn=ignore_signals, prefetch_factor=4 if workers else None)


def ignore_signals(worker):
    """Ctrl-C reaches the whole process group; only the main process decides what it means."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


class Latents:
    """A dataset's latents, in memory, encoded when first asked for: training starts at once, and the
    first epoch pays for the encoding as it goes. latents[places] -> (B, F, C, h, w), captions."""
    def __init__(self, dataset, vae, args):
        self.vae, self.device, self.n = vae, args.device, len(dataset)
        chunks = [range(i, min(i + CHUNK, self.n)) for i in range(0, self.n, CHUNK)]
        self.feed = iter(loader(dataset, chunks, args))
        self.z, self.captions, self.args = [], [], args

    def __len__(self):
        return self.n

    def __getitem__(self, places):
        missing = max(places) + 1 - len(self.captions)
        with tqdm(total=missing, desc="encoding", leave=False,
                  disable=missing < 32 * CHUNK or not self.args.main) as bar:
            while len(self.captions) <= max(places):            # after a resume: the whole first epoch
                clips, captions = next(self.feed)
                with torch.no_grad():
                    z = self.vae.encode(G.to_float(clips).to(self.device)).cpu()
                self.z += z
                self.captions += captions
                bar.update(len(captions))
        return torch.stack([self.z[i] for i in places]), [self.captions[i] for i in places]


# -----------------------------------------------------------------------------
# 4. The run folder: log, plot, checkpoints
# -----------------------------------------------------------------------------

COLUMNS = ("step", "loss", "loss_t0", "loss_t1", "loss_t2", "loss_t3", "grad_norm", "skipped", "items_per_s")


def read_log(path):
    """log.csv -> list of dicts of floats ('' = nan)."""
    with open(path, newline="") as file:
        return [{k: float(v) if v else math.nan for k, v in row.items()} for row in csv.DictReader(file)]


def plot_log(log, path, every=1):
    """loss.png: the loss, smoothed, and its four parts by noise level, on a logarithmic axis."""
    rows = read_log(log)
    if len(rows) < 2:
        return
    W, H, left, bottom = 760, 400, 64, 40
    image = Image.new("RGB", (W, H), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    steps = np.array([row["step"] for row in rows])
    curves = {}
    for name in COLUMNS[1:6]:
        values = np.array([row[name] for row in rows])
        if np.isfinite(values).any():                       # running mean over 2 % of the run
            k = max(1, len(values) // 50)
            good = np.isfinite(values)
            total = np.convolve(np.where(good, values, 0), np.ones(k), "full")[:len(values)]
            count = np.convolve(good, np.ones(k), "full")[:len(values)]
            curves[name] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    every_value = np.concatenate([c[np.isfinite(c) & (c > 0)] for c in curves.values()])
    low, high = np.log10(every_value.min()) - 0.05, np.log10(every_value.max()) + 0.05
    to_x = lambda s: left + (W - left - 20) * (s - steps[0]) / max(1, steps[-1] - steps[0])
    to_y = lambda v: 20 + (H - 20 - bottom) * (high - np.log10(v)) / (high - low)
    for k in range(math.floor(low), math.ceil(high) + 1):
        for m in (1, 2, 5):
            v = m * 10.0 ** k
            if low <= math.log10(v) <= high:
                pen.line([(left, to_y(v)), (W - 20, to_y(v))], fill="#e4e4e4")
                pen.text((left - 8, to_y(v)), f"{v:g}", fill="#555", font=font, anchor="rm")
    for k in range(5):
        s = steps[0] + (steps[-1] - steps[0]) * k / 4
        pen.text((to_x(s), H - bottom + 8), f"{s:.0f}", fill="#555", font=font, anchor="mt")
    names = {"loss": "loss", "loss_t0": "least noise", "loss_t1": "some", "loss_t2": "more",
             "loss_t3": "most noise"}
    inks = {"loss": "#111", "loss_t0": "#4477dd", "loss_t1": "#44aa66", "loss_t2": "#dd9933", "loss_t3": "#cc4444"}
    at = left + 10
    for name, curve in reversed(curves.items()):
        points = [(to_x(s), to_y(v)) for s, v in zip(steps, curve) if np.isfinite(v) and v > 0]
        pen.line(points, fill=inks[name], width=3 if name == "loss" else 1)
        pen.text((at, 4), names[name], fill=inks[name], font=font)
        at += 20 + pen.textlength(names[name], font=font)
    pen.text((W - 20, H - bottom + 22), "step", fill="#555", font=font, anchor="rt")
    image.save(path)


def provenance(args):
    """Where a checkpoint comes from: commit, versions, device, seed, flags."""
    try:
        commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True,
                                text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return dict(commit=commit, torch=str(torch.__version__), numpy=np.__version__, python=sys.version.split()[0],
                device=str(args.device), seed=args.seed)


def flags_of(args):
    """The flags as plain values, for the checkpoint and for comparing on resume."""
    skip = {"main", "rank", "world_size", "own"}
    return {k: list(v) if isinstance(v, tuple) else str(v) if isinstance(v, torch.device) else v
            for k, v in vars(args).items() if k not in skip}


def check_same_flags(args, saved):
    """Going on with other flags would be another run: refused by name."""
    for name, value in flags_of(args).items():
        if name not in HARMLESS and name in saved and saved[name] != value:
            raise ValueError(f"--{name.replace('_', '-')} was {saved[name]} in this run, now it is {value}; "
                             f"use --out for a new run, or --no-resume to start this one afresh")


def half(weights):
    return {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}


def vae_part(vae):
    """The "vae" part of a checkpoint: weights of our own, or the name of somebody else's."""
    if isinstance(vae, G.PretrainedVAE):
        return {"name": vae.name}
    return {"config": vae.config, "weights": {k: v.cpu() for k, v in vae.state_dict().items()}}


@torch.no_grad()
def measure_latents(vae, dataset, args, n=512):
    """Mean and standard deviation of each latent channel over n items, stored in the autoencoder."""
    vae.mean.zero_(), vae.std.fill_(1)
    n = min(n, len(dataset))
    z = []
    for i in range(0, n, CHUNK):
        clips = np.stack([dataset[k][0] for k in range(i, min(i + CHUNK, n))])
        z.append(vae.encode(G.to_float(clips).to(args.device)).cpu().double())       # (b, F, C, h, w)
    z = torch.cat(z).transpose(0, 2).flatten(1)                                      # (C, everything)
    vae.mean.copy_(z.mean(1))
    vae.std.copy_(z.std(1).clamp(min=1e-4))


def save(out, state, net, ema, optimizer, step, args, dataset):
    """last.pt: all of the run. ema.pt: what somebody else needs to sample from it."""
    if args.stage == "vae":
        measure_latents(ema, dataset, args)
        state = {**state, "vae": vae_part(ema)}
        weights, averaged = net.state_dict(), ema.state_dict()
    else:
        weights, averaged = net.weights(), ema.weights()
    state = {**state, "stage": args.stage, "step": step, "args": flags_of(args), "made": provenance(args),
             "size": list(args.size), "frames": args.frames or 1, "fps": args.fps}
    G.save_checkpoint(out / "last.pt", {**state, "weights": weights, "ema": averaged,
                                        "optimizer": optimizer.state_dict()})
    part = state["vae"]
    if "weights" in part:
        part = {**part, "weights": half(part["weights"])}
    shared = {} if args.stage == "vae" else {"ema": half(averaged)}
    G.save_checkpoint(out / "ema.pt", {**state, "vae": part, **shared})


# -----------------------------------------------------------------------------
# 5. The stages: what a step trains on, and what a preview shows
# -----------------------------------------------------------------------------

class StepItems:
    """The items of steps first, first + 1, ... for the loader, a list that is never written out."""
    def __init__(self, args, n, first):
        self.args, self.n, self.first = args, n, first

    def __len__(self):
        return self.args.steps - self.first

    def __getitem__(self, k):
        args = self.args
        return places_of_step(args.seed, self.first + k, args.batch_size, self.n)[args.own]


def vae_batches(args, dataset, vae, first):
    """Stage vae: (pictures, posterior noise) of step first, first + 1, ... Pictures are drawn or
    decoded as they are needed."""
    shape = (args.batch_size, 1, vae.channels, args.size[0] // vae.down, args.size[1] // vae.down)
    feed = loader(dataset, StepItems(args, len(dataset), first), args)
    for step, (clips, _) in enumerate(feed, first):
        noise = G.randomness(args.seed, step, shape).noise[args.own]
        yield G.to_float(clips), noise


def joint_batches(args, clips, pictures, shape, first):
    """Stages t2i and t2v: (latents, captions, randomness) of step first, first + 1, ...

    Joint image-video training (paper 3.4): an item drawn as `still`, with probability
    --p-motion-free, is a picture repeated F times, with the picture's caption; its temporal attention
    will be switched off in `training_loss`. In t2i there are no stills: pictures are all there is.
    clips and pictures are Latents (pictures None: no stills); shape is (B, F, C, h, w)."""
    p_still = args.p_motion_free if pictures else 0.0
    for step in itertools.count(first):
        draws = G.randomness(args.seed, step, shape, args.p_drop_text, p_still)[args.own]
        z0, captions = clips[places_of_step(args.seed, step, shape[0], len(clips))[args.own]]
        still = draws.still.nonzero()[:, 0].tolist()
        if still:
            places = places_of_step(args.seed, step, shape[0], len(pictures))[args.own]
            z0[still], words = pictures[[places[j] for j in still]]     # (s, 1, C, h, w) into all frames
            for j, caption in zip(still, words):
                captions[j] = caption
        yield z0, captions, draws


def preview_vae(path, vae, dataset, args):
    """Eight pictures above their round trips."""
    n = min(8, len(dataset))
    clips = np.stack([dataset[i][0] for i in range(n)])
    x = G.to_float(clips).to(args.device)
    with torch.no_grad():
        back = G.to_uint8(vae.decode(vae.encode(x)))
    error = ((clips / 255.0 - back / 255.0) ** 2).mean((1, 2, 3, 4))
    psnr = float(np.mean(-10 * np.log10(np.maximum(error, 1e-10))))
    D.contact_sheet([*clips, *back], ["picture"] * n + ["round trip"] * n, columns=n).save(f"{path}.png")
    return f"PSNR {psnr:.1f} dB"


def preview_samples(path, net, vae, dataset, prompts, args):
    """The same prompts from the same noise each time: a labelled grid, or a GIF of clips."""
    clips = G.generate(net.model, net.text, vae, net.schedule, prompts, range(len(prompts)), args.size,
                       args.frames or 1, device=args.device)
    if args.rank:
        return ""
    notes, verdict = None, ""
    if isinstance(dataset, D.Shapes):                           # the judge reads what was drawn
        verdicts = [D.judge(clip, prompt) for clip, prompt in zip(clips, prompts)]
        notes = [None if v.right else ("; ".join(v.reasons), "#c03030") for v in verdicts]
        verdict = f"{sum(v.right for v in verdicts)} of {len(prompts)} right"
    sheets = [D.contact_sheet(clips, prompts, notes=notes, frame=f) for f in range(clips.shape[1])]
    if len(sheets) == 1:
        sheets[0].save(f"{path}.png")
    else:
        D.save_gif(f"{path}.gif", sheets, args.fps)
    return verdict


# -----------------------------------------------------------------------------
# 6. Small parts of the loop
# -----------------------------------------------------------------------------

class Log:
    """log.csv, one row a step. On resume, rows beyond the checkpoint are dropped: they come again."""
    def __init__(self, path, first, main):
        self.recent_losses = collections.deque(maxlen=100)
        self.file = None
        if not main:
            return
        rows = []
        if first and path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.reader(file)][1:]
            rows = [row for row in rows if row and row[0].isdigit() and int(row[0]) <= first]
        self.file = open(path, "w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerows([COLUMNS, *rows])

    def write(self, step, losses, t, norm, skipped, speed):
        """losses (B,), t (B,) or None: the mean loss, and its mean in four bands of noise."""
        loss = losses.mean().item()
        bands = [""] * 4
        if t is not None:
            band = t * 4 // 1000
            bands = [f"{losses[band == k].mean():.7g}" if (band == k).any() else "" for k in range(4)]
        self.recent_losses.append(loss)
        if self.file:
            self.writer.writerow([step, f"{loss:.7g}", *bands, f"{norm:.5g}", skipped, f"{speed:.1f}"])
            self.file.flush()

    def recent(self):
        return sum(self.recent_losses) / len(self.recent_losses)


class Stop:
    """When to stop early: --minutes, SIGTERM or Ctrl-C. The step is finished and saved first; a second
    Ctrl-C leaves at once."""
    def __init__(self, args, started):
        self.deadline = started + 60 * args.minutes if args.minutes else math.inf
        self.signal = None
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.on_signal)

    def on_signal(self, number, frame):
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def now(self, args):
        """Why to stop, or "". Decided by rank 0 for all."""
        why = self.signal or ("--minutes" if time.monotonic() > self.deadline else "")
        if args.world_size > 1:
            answer = [why]
            dist.broadcast_object_list(answer)
            why = answer[0]
        return why


def to(x, device):
    return x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x


def gather(x, args):
    """(own,) on each process -> (B,) on the CPU, in the order of the global batch."""
    if args.world_size > 1:
        parts = [torch.empty_like(x) for _ in range(args.world_size)]
        dist.all_gather(parts, x.contiguous())
        x = torch.cat(parts)
    return x.cpu()


def autocast(args):
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def last_of(module, last):
    """DistributedDataParallel exchanges gradients only behind the last micro-batch."""
    return contextlib.nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync()


def open_data(args):
    """-> (dataset, pictures for joint training or None, preview prompts)."""
    frames = args.frames or 1
    if args.data == "shapes":
        level = "single" if args.text == "labels" else args.world
        dataset = D.Shapes(level, DRAWN[args.stage], args.seed, args.size, frames)
        prompts = [caption for _, caption in map(D.Shapes(level, 12, PREVIEW_SEED, (8, 8), frames).__getitem__,
                                                 range(12))]
    else:
        dataset = D.open_data(args.data, size=args.size, frames=frames, fps=args.fps)
        prompts = list(dict.fromkeys(dataset.captions))[:12]
        for line in dataset.report():
            print_main(args, line)
    pictures = None
    if args.stage == "t2v" and args.p_motion_free > 0:
        if args.image_data and args.image_data != "shapes":
            pictures = D.open_data(args.image_data, size=args.size)
        elif args.data == "shapes" or args.image_data == "shapes":
            pictures = D.Shapes(args.world, DRAWN["t2i"], args.seed, args.size)
        else:
            raise ValueError(f"--stage t2v on {args.data} needs pictures for joint training: --image-data FOLDER, "
                             f"or --p-motion-free 0 to train on clips alone")
    return dataset, pictures, prompts


def finish(out, step, why, args):
    """The last words: how to go on, or what to do with the result."""
    if not args.main:
        return
    if step < args.steps:
        print(f"stopped by {why} after step {step} of {args.steps}, saved. To go on: the same command")
    elif args.stage == "vae":
        print(f"done: {out}/ema.pt. To use it: python train.py --vae {out}/ema.pt")
    else:
        example = " --frames 8 --out out.gif" if args.stage == "t2v" else ""
        print(f"done: {out}/ema.pt. To sample: python sample.py \"a red circle\" --ckpt {out}/ema.pt{example}")


# -----------------------------------------------------------------------------
# 7. The loop
# -----------------------------------------------------------------------------

def train(args):
    """Sets up one stage, resumes if there is something to resume, and trains. Returns the exit code."""
    started = time.monotonic()
    out = Path(args.out)
    last = G.load_checkpoint(out / "last.pt") if (out / "last.pt").exists() else None
    dataset, pictures, prompts = open_data(args)
    if last is None:
        net, vae, state = build(args, dataset)
    else:
        check_same_flags(args, last["args"])
        state = {k: last[k] for k in ("config", "text", "schedule", "vae") if k in last}
        if args.stage == "vae":
            net = vae = G.VAE(**state["vae"]["config"])
        else:
            net, vae = G.build_net(last, "weights"), G.build_vae(last).to(args.device)
    net.train().to(args.device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    averaged = [p for p, q in zip(ema.parameters(), net.parameters()) if q.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    first = 0
    if last is not None:
        G.load_weights(net, {**net.state_dict(), **last["weights"]}, "last.pt")
        G.load_weights(ema, {**ema.state_dict(), **last["ema"]}, "last.pt")
        optimizer.load_state_dict(last["optimizer"])
        first = last["step"]
        print_main(args, f"resume: step {first} of {args.steps}, from {out / 'last.pt'}")
    del last
    if first >= args.steps:
        print_main(args, f"done: {out} has its {first} steps. To go on: --steps {2 * first}; "
                         f"to start afresh: --no-resume")
        return 0
    parameters = sum(p.numel() for p in trained)
    print_main(args, f"{args.stage}: {parameters / 1e6:.2f} M parameters, {args.steps} steps of "
                     f"{args.batch_size}, on {args.device} in {args.precision}")

    if args.stage == "vae":
        batches = vae_batches(args, dataset, net, first)
        preview = lambda path: preview_vae(path, ema, dataset, args)
    else:
        shape = (args.batch_size, args.frames or 1, vae.channels, *(side // vae.down for side in args.size))
        batches = joint_batches(args, Latents(dataset, vae, args),
                                Latents(pictures, vae, args) if pictures is not None else None, shape, first)
        preview = lambda path: preview_samples(path, ema, vae, dataset, prompts, args)

    (out / "samples").mkdir(exist_ok=True)
    log = Log(out / "log.csv", first, args.main)
    wrapped = torch.nn.parallel.DistributedDataParallel(net) if args.world_size > 1 else net
    stop, bad_in_a_row, skipped = Stop(args, started), 0, 0
    bar = tqdm(total=args.steps, initial=first, disable=not args.main, dynamic_ncols=True)
    own = args.own.stop - args.own.start                        # items of this process
    micro = own // args.grad_accum
    for step, inputs in zip(range(first, args.steps), batches):
        tick = time.monotonic()
        # ---- the training step
        losses = []
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / WARMUP)
        for k in range(args.grad_accum):
            part = slice(k * micro, (k + 1) * micro)
            with last_of(wrapped, k == args.grad_accum - 1), autocast(args):
                loss = wrapped(*(to(x[part], args.device) for x in inputs))              # (micro,)
                (loss.sum() / own).backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        if math.isfinite(norm):
            optimizer.step()
            bad_in_a_row = 0
            # EMA with a warm-up, so that a short run's average is not stuck at its random start
            decay = min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(averaged, trained, 1 - decay)
        else:
            skipped, bad_in_a_row = skipped + 1, bad_in_a_row + 1
        optimizer.zero_grad(set_to_none=True)
        # ---- everything after this line only watches
        losses = gather(torch.cat(losses), args)
        levels = None if args.stage == "vae" else gather(inputs[2].t, args)
        log.write(step + 1, losses, levels, norm, skipped, args.batch_size / (time.monotonic() - tick))
        bar.update()
        bar.set_postfix_str(f"loss {log.recent():.4f}, {args.batch_size / (time.monotonic() - tick):.0f} items/s",
                            refresh=False)
        if bad_in_a_row == 10:
            raise ValueError(f"loss or gradient not finite in 10 steps in a row, at step {step + 1}; {out}/last.pt "
                             f"holds the last good step; try a lower --lr or --precision fp32")
        done = step + 1
        if done % args.sample_every == 0 or done == args.steps or done == min(100, args.sample_every):
            verdict = preview(out / "samples" / f"{done:06d}")
            if args.main:
                plot_log(out / "log.csv", out / "loss.png")
                bar.write(f"step {done}: loss {log.recent():.4f}  {verdict}  -> {out}/samples/{done:06d}")
        stopping = stop.now(args)
        if (done % args.save_every == 0 or done == args.steps or stopping) and not bad_in_a_row:
            save(out, state, net, ema, optimizer, done, args, dataset)
        if stopping:
            break
    bar.close()
    finish(out, done, stopping, args)
    return 0


# -----------------------------------------------------------------------------
# 8. --benchmark: how fast is a training step?
# -----------------------------------------------------------------------------

def benchmark(args):
    """Times training steps (forward, backward, AdamW) on random latents and text. With --conditioning
    adaln and the diffusers package there, its DiT of the same sizes is timed too, in turn with ours:
    machines drift, and only neighbours in time compare."""
    B, p = args.batch_size, args.patch_size or G.PRESETS[args.preset or "nano"]["patch_size"]
    frames, h, w = args.frames or 1, args.size[0] // 8, args.size[1] // 8
    sizes = {**G.PRESETS[args.preset or "nano"], "patch_size": p}
    sizes.update({k: getattr(args, k) for k in ("depth", "width", "heads") if getattr(args, k)})
    dims = (128,) if (args.preset or "nano") == "nano" else (768, 4096)
    with torch.device(args.device):
        model = G.GenTron(G.GenTronConfig(**sizes, text_dims=dims, conditioning=args.conditioning or "cross",
                                          temporal=args.stage == "t2v"))
        z, t = torch.randn(B, frames, 4, h, w), torch.randint(1000, (B,))
        text = G.Text(tuple(torch.randn(B, 77, d) for d in dims),
                      (torch.ones(B, 77, dtype=torch.bool),) * len(dims), torch.randn(B, sum(dims)))
    contenders = {"gentron": (model, lambda: model(z, t, text))}
    if args.conditioning == "adaln" and frames == 1 and h == w:
        try:
            from diffusers import DiTTransformer2DModel
            dit = DiTTransformer2DModel(num_attention_heads=sizes["heads"], in_channels=4, out_channels=4,
                                        attention_head_dim=sizes["width"] // sizes["heads"], patch_size=p,
                                        num_layers=sizes["depth"], sample_size=h).to(args.device)
            labels = torch.randint(1000, (B,), device=args.device)
            contenders["diffusers"] = (dit, lambda: dit(z[:, 0], t, labels).sample)
        except ImportError:
            print("diffusers is not installed: timed alone")
    times = {name: [] for name in contenders}
    optimizers = {name: torch.optim.AdamW(net.parameters(), lr=1e-4) for name, (net, _) in contenders.items()}
    with FlopCounterMode(display=False) as counter:
        model(z, t, text)
    for turn in tqdm(range(2 + args.steps), desc="benchmark"):
        for name, (net, forward) in contenders.items():
            net.train()
            started = time.perf_counter()
            with autocast(args):
                loss = forward().float().square().mean()
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:                                       # two turns to warm up
                times[name].append(time.perf_counter() - started)
    flops = 3 * counter.get_total_flops()                       # backward costs twice the forward
    for name, (net, _) in contenders.items():
        median = float(np.median(times[name]))
        work = f", {flops / median / 1e12:.2f} TFLOP/s" if net is model else ""
        print(f"{name:>10}: {sum(q.numel() for q in net.parameters()) / 1e6:.1f} M parameters, "
              f"{frames * h * w // p ** 2} tokens, batch {B}, {args.precision}: {median:.3f} s a step, "
              f"{B / median:.1f} items/s{work}")
    if len(times) > 1:
        ratio = np.array(times["diffusers"]) / np.array(times["gentron"])
        print(f"     ratio: gentron is {np.median(ratio):.2f} times as fast (turn by turn, median of {len(ratio)})")
    return 0


def main(argv=None):
    """Command line -> exit code: 0 done or stopped and saved, 2 for what the user can mend."""
    args = parser().parse_args(argv)
    try:
        prepare(args)
        return benchmark(args) if args.benchmark else train(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def prepare(args):
    """Fills in what was not given, joins the process group, makes the run's folder."""
    args.rank, args.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.main = args.rank == 0
    if args.device is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    args.device = G.pick_device(args.device)
    if args.world_size > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    args.precision = args.precision or ("bf16" if args.device.type == "cuda" else "fp32")
    args.out = args.out or str(Path("runs") / args.stage)
    out = Path(args.out)
    if args.main and not args.benchmark and not args.resume and (out / "last.pt").exists():
        aside = next(p for k in itertools.count(1) if not (p := out.with_name(f"{out.name}.{k}")).exists())
        out.rename(aside)
        print(f"moved the old run to {aside}")
    if not args.benchmark:
        out.mkdir(parents=True, exist_ok=True)
    if args.stage == "t2v":
        args.frames = args.frames or 8
        if not (out / "last.pt").exists():
            args.init = args.init or G.find_checkpoint(("t2i",))
    elif args.frames:
        raise ValueError(f"--frames is for --stage t2v, not {args.stage}")
    args.world = args.world or ("full" if args.stage == "vae" else "basic")
    args.size = args.size or (64, 64)
    quick = (args.preset or "nano") == "nano"
    for name, value in (VAE if args.stage == "vae" else QUICK if quick else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    share = args.world_size * args.grad_accum
    if args.batch_size % share:
        raise ValueError(f"--batch-size {args.batch_size} is not divisible by {args.world_size} processes x "
                         f"--grad-accum {args.grad_accum}")
    own = args.batch_size // args.world_size
    args.own = slice(args.rank * own, (args.rank + 1) * own)


def print_main(args, line):
    if args.main:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
