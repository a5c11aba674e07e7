"""
train.py: one loop, four stages:   vae -> (encode) -> t2i -> t2v

    python train.py                                   # text to image on the shapes world
    python train.py --data my_pictures --steps 20000  # your own pictures and captions
    python train.py --stage t2v                       # text to video, from the newest t2i run
    python train.py --stage vae                       # how assets/vae.pt was made
    torchrun --nproc_per_node=8 train.py --preset XL/2 --data my_pictures

To resume, run the same command again. A run folder holds last.pt (the whole run), ema.pt (the file
to share: half-precision EMA weights, autoencoder, vocabulary), log.csv, loss.png and samples/.
"""

import os

# How long an idle OpenMP thread spins before it sleeps, read when torch is loaded. By default so
# long that one busy neighbour stops everything (on two cores: 202 items/s alone, under 15 beside
# it); never spinning halves the speed (121 alone); spinning this long: 216 alone, 70 beside it.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import collections
import contextlib
import copy
import csv
import itertools
import math
import multiprocessing
import signal
import subprocess
import sys
import time
from functools import lru_cache, partial
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

try:
    import fcntl
except ImportError:                                         # Windows: two runs are not kept apart
    fcntl = None

HERE = Path(__file__).resolve().parent

# What a flag that is not given means. The paper's constant 1e-4 is for its sizes and a batch of
# 2048; OURS: nano has a quick small world to learn, so a high rate, a short EMA, v + cosine.
QUICK = dict(lr=2e-3, batch_size=64, schedule="cosine", objective="v", ema=0.998, steps=5_428,
             size=(64, 64))
PAPER = dict(lr=1e-4, batch_size=256, schedule="linear", objective="eps", ema=0.9999, steps=500_000,
             size=(256, 256))
# By stage: what differs from the above. OURS: a clip is eight pictures, so fewer clips a batch.
STAGE = dict(vae=dict(batch_size=16, steps=6_000), t2i={},
             t2v=dict(batch_size=16, lr=1e-3, steps=4_500))
WARMUP = 100            # OURS: steps over which the rate rises to --lr; then constant (the paper's)
DRAWN = dict(vae=1_000_000, t2i=16_384, t2v=8_192)     # items of the shapes world a stage draws
PREVIEW_SEED = 10 ** 6  # the previews' prompts come from a dataset seed that no run trains on


# -----------------------------------------------------------------------------
# 1. Flags
# -----------------------------------------------------------------------------

def parser():
    """Every flag, in four groups. None = "see QUICK and PAPER above"."""
    p = D.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole, share = D.number(int, 1), D.number(float, 0, 1)
    g = p.add_argument_group("what to train")
    g.add_argument("--stage", choices=("vae", "t2i", "t2v"), default="t2i",
                   help="autoencoder, pictures (default), clips")
    g.add_argument("--preset", choices=G.PRESETS, help="size of the Transformer (nano)")
    g.add_argument("--depth", type=whole, help="blocks, instead of the preset's")
    g.add_argument("--width", type=whole, help="channels of a token, instead of the preset's")
    g.add_argument("--heads", type=whole, help="attention heads, instead of the preset's")
    g.add_argument("--patch-size", type=whole, help="a token's side, in latent positions")
    g.add_argument("--conditioning", choices=("cross", "adaln"), help="how text enters (cross)")
    g.add_argument("--text", help="small, small+small, labels, none, clip, t5, clip+t5, or "
                                  "NAME[+NAME] of the transformers library (small)")
    g.add_argument("--vae", help="a checkpoint, or a name for diffusers (assets/vae.pt)")
    g.add_argument("--objective", choices=("eps", "v"), help="(nano: v, else eps)")
    g.add_argument("--schedule", choices=("linear", "cosine"), help="(nano: cosine, else linear)")
    g = p.add_argument_group("data")
    g.add_argument("--data", default="shapes", help="shapes, or a folder of pictures or clips")
    g.add_argument("--image-data", help="t2v: pictures for joint training, shapes or a folder")
    g.add_argument("--world", choices=("basic", "full"), help="of the shapes (t2i, t2v: basic)")
    g.add_argument("--size", type=D.picture_size, help="H or HxW in pixels (nano: 64, else 256)")
    g.add_argument("--frames", type=D.number(int, 2, 1024), help="t2v: frames a clip (8)")
    g.add_argument("--fps", type=D.number(float, 0.01, 1000), default=4.0,
                   help="t2v: frames a second (4)")
    g.add_argument("--p-drop-text", type=share, default=0.1, help="share of captions (0.1)")
    g.add_argument("--p-motion-free", type=share, default=0.1,
                   help="t2v: share of items that are stills, temporal attention off (0.1)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=whole, help="steps in all")
    g.add_argument("--minutes", type=D.number(float, 0, above=True), help="then stop and save")
    g.add_argument("--batch-size", type=whole,
                   help="over all processes (nano: 64, clips 16; else 256)")
    g.add_argument("--grad-accum", type=whole, default=1, help="micro-batches a step (1)")
    g.add_argument("--lr", type=share, help="AdamW's (nano: 2e-3, clips 1e-3; else 1e-4)")
    g.add_argument("--ema", type=share, help="decay of the averaged weights (nano: 0.998)")
    g.add_argument("--seed", type=D.number(int, 0, 2 ** 31 - 1), default=0)
    g = p.add_argument_group("the run")
    g.add_argument("--out", help="the run's folder (runs/STAGE)")
    g.add_argument("--init", help="checkpoint to start from (t2v: the newest t2i run's)")
    g.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                   help="go on with the run in the folder; --no-resume moves it aside")
    g.add_argument("--save-every", type=whole, default=500, help="steps (500)")
    g.add_argument("--sample-every", type=whole, default=500, help="steps (500)")
    g.add_argument("--workers", type=D.number(int, 0, 256), default=2,
                   help="processes that draw or decode (2)")
    g.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (the best there is)")
    g.add_argument("--precision", choices=("fp32", "bf16"), help="(bf16 on a GPU, else fp32)")
    g.add_argument("--checkpoint-activations", action="store_true",
                   help="compute blocks again in the backward pass: slower, far less memory")
    g.add_argument("--benchmark", action="store_true", help="time training steps, train nothing")
    return p


# Flags that change how a run is carried out, not what comes out of it: free to differ on resume
HARMLESS = {"steps", "minutes", "grad_accum", "out", "init", "resume", "save_every", "sample_every",
            "workers", "device", "checkpoint_activations", "benchmark"}


def prepare(args):
    """Fills in what was not given, joins the process group, makes the run's folder."""
    args.rank = int(os.environ.get("RANK", "0"))
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args.main = args.rank == 0
    if args.device is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    args.device = G.pick_device(args.device)
    if args.world_size > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    args.precision = args.precision or ("bf16" if args.device.type == "cuda" else "fp32")
    args.world = args.world or ("full" if args.stage == "vae" else "basic")
    if args.stage == "t2v":
        args.frames = args.frames or 8
    elif args.frames:
        raise ValueError(f"--frames is for --stage t2v, not {args.stage}")
    if args.benchmark:
        args.steps = args.steps or 10
        out = None
    else:
        args.out = args.out or str(Path("runs") / args.stage)
        out = Path(args.out)
        args.lock = lock(out, args)
        if args.main and not args.resume and (out / "last.pt").exists():
            aside = next(p for k in itertools.count(1)
                         if not (p := out.with_name(f"{out.name}.{k}")).exists())
            out.rename(aside)
            print(f"moved the old run to {aside}")
            args.lock = lock(out, args)                     # (the other one moved, too)
        D.writable(out / "last.pt")
    # Where the run starts: its own last step, or another run's checkpoint, or nothing
    last = G.load_checkpoint(out / "last.pt") if out and (out / "last.pt").exists() else None
    if args.stage == "t2v" and out and last is None:
        args.init = args.init or G.find_checkpoint(("t2i",))
    init = G.load_checkpoint(args.init) if args.init and last is None else None
    preset = args.preset or (last or init or {}).get("args", {}).get("preset")
    quick = args.stage == "vae" or preset in (None, "nano")
    defaults = {**QUICK, **STAGE[args.stage]} if quick else PAPER
    if "size" in (last or init or {}):
        defaults = {**defaults, "size": tuple((last or init)["size"])}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    share = args.world_size * args.grad_accum
    if args.batch_size % share:
        raise ValueError(f"--batch-size {args.batch_size} is not divisible by {args.world_size} "
                         f"processes x --grad-accum {args.grad_accum}")
    own = args.batch_size // args.world_size                # this process's slice of every batch
    args.own = slice(args.rank * own, (args.rank + 1) * own)
    return last, init


def lock(out, args):
    """Takes the run's folder for this process, or raises ValueError if another run has it. Returns
    the open file that holds the lock: the system drops it with the process, however that ends."""
    file = open(D.writable(out / ".lock"), "w") if args.main else None
    try:
        if file and fcntl:
            # lockf, not flock: loader workers inherit the latter, and outlive a killed run a while
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{out} is in use, another run is training there; wait for it or stop it, "
                         f"or choose another folder by --out") from None
    except OSError:
        pass                                                # a file system that knows no locks
    return file


# -----------------------------------------------------------------------------
# 2. Building what is trained
# -----------------------------------------------------------------------------

def build(args, dataset, init):
    """Flags, and --init's checkpoint if there is one -> (net, vae, state): what trains, the
    autoencoder, and the part of the checkpoint that never changes. Raises ValueError."""
    torch.manual_seed(args.seed)
    if args.stage == "vae":
        net = G.build_vae(init).requires_grad_(True) if init else G.VAE()
        return net, net, {"vae": {"config": net.config}}
    if init:
        if "config" not in init:
            raise ValueError(f"{args.init} is an autoencoder; to use it: --vae {args.init}")
        if init["config"]["temporal"] and args.stage == "t2i":
            raise ValueError(f"{args.init} is a video model, which --stage t2i cannot train; "
                             f"try --stage t2v")
        state = {key: copy.deepcopy(init[key]) for key in ("config", "text", "schedule", "vae")}
    else:
        spec = args.text or "small"
        if args.text is None and isinstance(dataset, D.Folder) and not any(dataset.captions):
            spec = "none"                                   # pictures without captions
        vocabulary = vocabulary_of(dataset, spec)
        encoder = G.TextEncoder(spec, vocabulary)
        state = {"config": {**G.PRESETS[args.preset or "nano"], "text_dims": list(encoder.dims),
                            "conditioning": "cross"},
                 "text": {"spec": spec, "vocabulary": vocabulary, "dim": encoder.dim},
                 "schedule": {"kind": args.schedule, "objective": args.objective},
                 "vae": find_vae(args.vae)}
    vae, config = G.build_vae(state).to(args.device), state["config"]
    for flag in ("depth", "width", "heads", "patch_size", "conditioning"):
        if getattr(args, flag) is not None:
            config[flag] = getattr(args, flag)
    config.update(temporal=args.stage == "t2v", in_channels=vae.channels)
    multiple = vae.down * config["patch_size"]
    if any(side % multiple for side in args.size):
        raise ValueError(f"--size {args.size[0]}x{args.size[1]} is not divisible by {multiple} "
                         f"(autoencoder {vae.down} x patch {config['patch_size']})")
    net = G.Net(G.GenTron(G.GenTronConfig(**config)), G.TextEncoder(**state["text"]),
                G.NoiseSchedule(**state["schedule"]))
    if init:                # everything is loaded; only layers that the other lacks start fresh
        weights = {k: v.float() for k, v in init["ema"].items()}
        new = {k: v for k, v in net.weights().items() if ".temporal." in k and k not in weights}
        net.load({**new, **weights}, args.init)
        print_main(args, f"init: {len(weights)} tensors from {args.init}, {len(new)} are new"
                         f"{' (temporal attention)' if new else ''}")
    return net, vae, state


def find_vae(name):
    """--vae -> the "vae" part of a checkpoint: a file's own, or a name or folder for diffusers."""
    path = Path(name or HERE / "assets" / "vae.pt")
    if path.suffix == ".pt" or path.is_file():
        return G.load_checkpoint(path)["vae"]
    return {"name": name}


def vocabulary_of(dataset, spec):
    """Words for the small encoder, class names for --text labels, nothing for the others."""
    if spec == "labels":
        if not dataset.labels:
            raise ValueError("--text labels needs class folders (corgi/1.jpg), and this data has "
                             "captions; try --text small")
        return dataset.labels
    if "small" not in spec.split("+"):
        return []
    if isinstance(dataset, D.Shapes):
        return D.vocabulary()
    counts = collections.Counter(w for caption in dataset.captions for w in G.split_words(caption))
    return sorted(word for word, _ in counts.most_common(8192))


def open_data(args):
    """-> (dataset, pictures for joint training or None, the previews' prompts)."""
    frames = args.frames or 1
    if args.data == "shapes":
        level = "single" if args.text == "labels" else args.world
        dataset = D.Shapes(level, DRAWN[args.stage], args.seed, args.size, frames)
        fresh = D.Shapes(level, 12, PREVIEW_SEED, args.size, frames)
        prompts = [fresh.scene(i).caption() for i in range(12)]
    else:
        dataset = D.open_data(args.data, args.size, frames, args.fps)
        prompts = list(dict.fromkeys(dataset.captions))[:12]
        for line in dataset.report():
            print_main(args, line)
    pictures = None
    if args.stage == "t2v" and args.p_motion_free > 0:
        source = args.image_data or ("shapes" if args.data == "shapes" else None)
        if source is None:
            raise ValueError("joint training needs pictures beside the clips: --image-data FOLDER, "
                             "or --p-motion-free 0 to train on clips alone")
        pictures = D.open_data(source, args.size, level=args.world, n=DRAWN["t2i"], seed=args.seed)
    return dataset, pictures, prompts


def print_main(args, line):
    """Prints once, however many processes there are."""
    if args.main:
        print(line, flush=True)


# -----------------------------------------------------------------------------
# 3. Data: which items a step sees, and their latents
# -----------------------------------------------------------------------------

CHUNK = 64      # items that are drawn and encoded together: always the same ones, whatever the run


@lru_cache(maxsize=4)
def permutation(seed, epoch, n):
    """The order of n items in an epoch, (n,): a function of its arguments."""
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
    """A dataset's latents, in memory, encoded when first asked for: training starts at once and
    the first epoch pays as it goes. latents[places] -> (B, F, C, h, w), captions."""
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
            while len(self.captions) <= max(places):        # after a resume: all of it
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

BANDS = {"loss": ("loss", "#111111"), "loss_t0": ("least noise", "#4477dd"),
         "loss_t1": ("some", "#44aa66"), "loss_t2": ("more", "#dd9933"),
         "loss_t3": ("most noise", "#cc4444")}              # column: (name, colour in the plot)
COLUMNS = ("step", *BANDS, "grad_norm", "skipped", "items_per_s")


class Log:
    """log.csv, one row a step. On resume, rows beyond the checkpoint go: they will come again."""
    def __init__(self, path, first, main):
        self.latest, self.file = collections.deque(maxlen=100), None
        if not main:
            return
        self.path, rows = path, []
        if first and path.exists():
            with open(path, newline="", errors="replace") as file:
                rows = [row for row in csv.reader(line.replace("\0", "") for line in file)
                        if len(row) == len(COLUMNS) and row[0].isdecimal()
                        and int(row[0]) <= first]           # (not the half of a row, either)
        beside = path.with_name("log.csv.tmp")              # as in save_checkpoint: old or new
        with D.writing(path, beside):
            with open(beside, "w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *rows])
            os.replace(beside, path)
            self.file = open(path, "a", newline="")
        self.writer = csv.writer(self.file)

    def write(self, step, losses, t, norm, skipped, speed):
        """losses (B,), t (B,) or None: the mean loss, and its mean in four bands of noise."""
        self.latest.append(losses.mean().item())
        bands = [""] * 4
        if t is not None:
            band = t * 4 // 1000
            bands = [f"{losses[band == k].mean():.7g}" if (band == k).any() else ""
                     for k in range(4)]
        if self.file:
            with D.writing(self.path):
                self.writer.writerow([step, f"{self.latest[-1]:.7g}", *bands, f"{norm:.5g}",
                                      skipped, f"{speed:.1f}"])
                self.file.flush()

    def recent(self):
        """Mean loss of the last 100 steps."""
        return sum(self.latest) / len(self.latest)


def plot_log(log, path):
    """loss.png: the smoothed loss and its parts by noise level, on a logarithmic axis."""
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    steps, curves = np.array([int(row["step"]) for row in rows]), {}
    for name in BANDS:
        values = np.array([float(row[name] or "nan") for row in rows])
        k = max(1, len(values) // 50)                       # running mean over 2 % of the run
        known = np.isfinite(values)
        total = np.convolve(np.where(known, values, 0), np.ones(k))[:len(values)]
        count = np.convolve(known, np.ones(k))[:len(values)]
        if known.any():
            curves[name] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    seen = np.concatenate([c[np.isfinite(c) & (c > 0)] for c in curves.values()])
    if len(rows) < 2 or not len(seen):
        return
    W, H, left, top, right, bottom = 760, 400, 64, 30, 20, 40
    low, high = np.log10(seen.min()) - 0.05, np.log10(seen.max()) + 0.05
    to_x = lambda s: left + (W - left - right) * (s - steps[0]) / (steps[-1] - steps[0])
    to_y = lambda v: top + (H - top - bottom) * (high - math.log10(v)) / (high - low)
    image = Image.new("RGB", (W, H), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    for tick in (m * 10.0 ** k for k in range(math.floor(low), math.ceil(high)) for m in (1, 2, 5)):
        if low <= math.log10(tick) <= high:
            pen.line([(left, to_y(tick)), (W - right, to_y(tick))], fill="#e4e4e4")
            pen.text((left - 8, to_y(tick)), f"{tick:g}", fill="#555555", font=font, anchor="rm")
    for s in np.linspace(steps[0], steps[-1], 5):
        pen.text((to_x(s), H - bottom + 8), f"{s:.0f}", fill="#555555", font=font, anchor="mt")
    pen.text((W - right, H - 4), "step", fill="#555555", font=font, anchor="rb")
    x = left
    for name, curve in curves.items():
        label, ink = BANDS[name]
        points = [(to_x(s), to_y(v)) for s, v in zip(steps, curve) if v > 0]
        pen.line(points, fill=ink, width=3 if name == "loss" else 1)
        pen.text((x, 6), label, fill=ink, font=font)
        x += 24 + pen.textlength(label, font=font)
    with D.writing(path):
        image.save(path)


def provenance(args):
    """Where a checkpoint comes from: commit, versions, device, seed."""
    try:
        commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], timeout=5,
                                capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {"commit": commit, "torch": str(torch.__version__), "numpy": np.__version__,
            "python": sys.version.split()[0], "device": str(args.device), "seed": args.seed}


def flags_of(args):
    """The flags as plain values, for the checkpoint and for comparing on resume."""
    plain = {tuple: list, torch.device: str}
    return {k: plain.get(type(v), lambda same: same)(v) for k, v in vars(args).items()
            if k not in ("main", "rank", "world_size", "own", "lock")}


def check_resumable(args, last):
    """ValueError if last.pt is not all of a run of this stage (ema.pt, say, under its name)."""
    parts = [name for name in ("weights", "ema", "optimizer") if name not in last]
    if parts or last["stage"] != args.stage:
        what = f"lacks {', '.join(parts)}" if parts else f"is of stage {last['stage']}"
        raise ValueError(f"{args.out}/last.pt {what}, so no run can go on from it; use --out for a "
                         f"new run, or --no-resume")


def check_moments(args, moments, weights):
    """ValueError if an optimizer's saved state is not that of these weights."""
    shapes = {k: [(), p.shape, p.shape] for k, p in enumerate(weights)}
    saved = {k: [m[name].shape for name in ("step", "exp_avg", "exp_avg_sq")]
             for k, m in moments.items()}
    if saved != shapes:
        raise ValueError(f"{args.out}/last.pt is damaged: its optimizer does not fit its weights")


def check_same_flags(args, saved):
    """Going on with other flags would be another run: refused by name."""
    for name, value in flags_of(args).items():
        if name not in HARMLESS and name in saved and saved[name] != value:
            raise ValueError(f"--{name.replace('_', '-')} was {saved[name]} in this run, now it is "
                             f"{value}; use --out for a new run, or --no-resume")


@torch.no_grad()
def measure_latents(vae, dataset, args, n=512):
    """Mean and standard deviation of each latent channel over n items, kept in the autoencoder."""
    vae.mean.zero_(), vae.std.fill_(1)
    n, z = min(n, len(dataset)), []
    for i in range(0, n, CHUNK):
        clips = np.stack([dataset[k][0] for k in range(i, min(i + CHUNK, n))])
        z.append(vae.encode(G.to_float(clips).to(args.device)).cpu().double())   # (b, F, C, h, w)
    z = torch.cat(z).transpose(0, 2).flatten(1)                                  # (C, all the rest)
    vae.mean.copy_(z.mean(1))
    vae.std.copy_(z.std(1).clamp(min=1e-4))


def save(out, state, net, ema, optimizer, step, args, dataset, vae):
    """ema.pt: what somebody else needs to sample from the run. last.pt: all of it."""
    if args.stage == "vae":
        measure_latents(ema, dataset, args)
        vae, weights, averaged = ema, net.state_dict(), ema.state_dict()
    else:
        weights, averaged = net.weights(), ema.weights()
    if not args.main:
        return
    state = {**state, "stage": args.stage, "step": step, "size": list(args.size),
             "frames": args.frames or 1, "fps": args.fps, "args": flags_of(args),
             "made": provenance(args)}
    if isinstance(vae, G.VAE):
        state["vae"] = {"config": vae.config, "weights": vae.state_dict()}
    everything = {**state, "weights": weights, "ema": averaged,
                  "optimizer": optimizer.state_dict()}
    half = lambda tensors: {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    if isinstance(vae, G.VAE):
        state["vae"] = {**state["vae"], "weights": half(state["vae"]["weights"])}
    if args.stage != "vae":
        state["ema"] = half(averaged)
    G.save_checkpoint(out / "ema.pt", state)                # first: a run is done when last.pt is,
    G.save_checkpoint(out / "last.pt", everything)          # and then nobody writes ema.pt again


# -----------------------------------------------------------------------------
# 5. The stages: what a step trains on, and what a preview shows
# -----------------------------------------------------------------------------

class Steps:
    """The places of steps first, first + 1, ... for the loader: a list never written out."""
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
    shape = (args.batch_size, 1, vae.channels, *(side // vae.down for side in args.size))
    feed = loader(dataset, Steps(args, len(dataset), first), args)
    for step, (clips, _) in enumerate(feed, first):
        noise = G.randomness(args.seed, step, shape).noise[args.own]
        yield G.to_float(clips), noise


def joint_batches(args, clips, pictures, schedule, shape, first):
    """Stages t2i and t2v: (latents, captions, randomness) of step first, first + 1, ...

    Joint image-video training (paper 3.4): an item drawn as `still`, with probability
    --p-motion-free, is a picture repeated F times, with the picture's caption; its temporal
    attention is then switched off in `training_loss`. In t2i there are no stills: pictures are
    all there is. clips, pictures: Latents (pictures None: no stills); shape: (B, F, C, h, w)."""
    p_still = args.p_motion_free if pictures else 0.0
    for step in itertools.count(first):
        draws = G.randomness(args.seed, step, shape, schedule, args.p_drop_text,
                             p_still)[args.own]
        z0, captions = clips[places_of_step(args.seed, step, shape[0], len(clips))[args.own]]
        still = draws.still.nonzero()[:, 0].tolist()
        if still:
            places = places_of_step(args.seed, step, shape[0], len(pictures))[args.own]
            z0[still], words = pictures[[places[j] for j in still]]    # (s, 1, C, h, w): all frames
            for j, caption in zip(still, words):
                captions[j] = caption
        yield z0, captions, draws


def preview_vae(path, vae, dataset, args):
    """Eight pictures above their round trips. Returns a line for the log."""
    clips = np.stack([dataset[i][0] for i in range(min(8, len(dataset)))])
    with torch.no_grad():
        back = G.to_uint8(vae.decode(vae.encode(G.to_float(clips).to(args.device))))
    error = np.square(clips / 255.0 - back / 255.0).mean((1, 2, 3, 4))
    labels = ["picture"] * len(clips) + ["round trip"] * len(clips)
    if args.main:
        with D.writing(f"{path}.png"):
            D.contact_sheet([*clips, *back], labels, columns=len(clips)).save(f"{path}.png")
    return f"PSNR {-10 * np.log10(np.maximum(error, 1e-10)).mean():.1f} dB"


def preview_samples(path, net, vae, dataset, prompts, args):
    """The same prompts from the same noise each time: a labelled grid, or a GIF of clips. Every
    process draws (a sharded model needs them all), the first one writes."""
    clips = G.generate(net.model, net.text, vae, net.schedule, prompts, range(len(prompts)),
                       args.size, args.frames or 1, device=args.device)
    notes, verdict = None, ""
    if isinstance(dataset, D.Shapes):                       # the judge reads what was drawn
        verdicts = [D.judge(clip, prompt) for clip, prompt in zip(clips, prompts)]
        notes = [None if v.right else ("; ".join(v.reasons), "#c03030") for v in verdicts]
        verdict = f"{sum(v.right for v in verdicts)} of {len(prompts)} right"
    if args.main:
        sheets = [D.contact_sheet(clips, prompts, notes=notes, frame=f)
                  for f in range(clips.shape[1])]
        file = f"{path}.{'gif' if len(sheets) > 1 else 'png'}"
        with D.writing(file):
            D.save_gif(file, sheets, args.fps) if len(sheets) > 1 else sheets[0].save(file)
    return verdict


# -----------------------------------------------------------------------------
# 6. The loop
# -----------------------------------------------------------------------------

class Stop:
    """When to stop early: --minutes, SIGTERM or Ctrl-C. The step is finished and saved first; a
    second Ctrl-C leaves at once."""
    def __init__(self, args):
        self.deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
        self.signal = ""
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.on_signal)

    def on_signal(self, number, frame):
        """Notes the signal; the loop looks after the step. The next Ctrl-C ends the process."""
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def why(self, args):
        """Why to stop, or "". Rank 0 decides for all."""
        answer = [self.signal or ("--minutes" if time.monotonic() > self.deadline else "")]
        if args.world_size > 1:
            dist.broadcast_object_list(answer)
        return answer[0]


def gather(x, args):
    """(own,) on each process -> (B,) on the CPU, in the order of the global batch."""
    if args.world_size > 1:
        parts = [torch.empty_like(x) for _ in range(args.world_size)]
        dist.all_gather(parts, x.contiguous())
        x = torch.cat(parts)
    return x.cpu()


def autocast(args):
    """bf16 where --precision says so; weights and loss stay fp32."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def backward(net, inputs, args):
    """Forward and backward over this process's items, micro-batch by micro-batch; the gradients of
    several processes are averaged behind the last one. Returns the loss of each item, (own,)."""
    own, losses = args.own.stop - args.own.start, []
    micro = own // args.grad_accum
    for k in range(args.grad_accum):
        part = slice(k * micro, (k + 1) * micro)
        on_device = [x[part].to(args.device) if isinstance(x, torch.Tensor) else x[part]
                     for x in inputs]
        hold_back = k < args.grad_accum - 1 and args.world_size > 1
        with net.no_sync() if hold_back else contextlib.nullcontext():
            with autocast(args):
                loss = net(*on_device)                                             # (micro,)
            (loss.sum() / own).backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def train(args):
    """Sets up one stage, resumes if there is something to resume, and trains."""
    last, init = prepare(args)
    out, stop = Path(args.out), Stop(args)
    if last:
        check_resumable(args, last)
        check_same_flags(args, last["args"])
    dataset, pictures, prompts = open_data(args)
    if last is None:
        net, vae, state = build(args, dataset, init)
    elif args.stage == "vae":
        net = vae = G.build_vae(last).requires_grad_(True)
    else:
        net, vae = G.build_net(last, "weights"), G.build_vae(last).to(args.device)
    if last:
        state = {k: last[k] for k in ("config", "text", "schedule", "vae") if k in last}
    net.train().to(args.device)
    frozen = {id(m): m for m in net.modules() if isinstance(m, G.FrozenEncoder)}
    ema = copy.deepcopy(net, frozen).eval().requires_grad_(False)       # frozen ones are shared
    trained = [p for p in net.parameters() if p.requires_grad]
    averaged = [q for p, q in zip(net.parameters(), ema.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=True)
    first = 0
    if last:
        for module, part in ((net, "weights"), (ema, "ema")):
            load = module.load if args.stage != "vae" else partial(G.load_weights, module)
            load(last[part], f"{out}/last.pt")
        moments = last["optimizer"]["state"]
        check_moments(args, moments, trained)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        first = last["step"]
        print_main(args, f"resume: {out}/last.pt, step {first} of {args.steps}")
    if first >= args.steps:
        print_main(args, f"done: {out} has its {first} steps. To go on: --steps {2 * first}; "
                         f"to start afresh: --no-resume")
        return 0
    del last, init                                          # as large as the model: let go
    print_main(args, f"{args.stage}: {sum(p.numel() for p in trained) / 1e6:.2f} M parameters, "
                     f"{args.steps} steps of {args.batch_size}, {args.device}, {args.precision}")
    if args.stage == "vae":
        batches = vae_batches(args, dataset, net, first)
        preview = lambda path: preview_vae(path, ema, dataset, args)
    else:
        net.model.checkpoint_activations = args.checkpoint_activations
        high, wide = (side // vae.down for side in args.size)
        shape = (args.batch_size, args.frames or 1, vae.channels, high, wide)
        stills = Latents(pictures, vae, args) if pictures is not None else None
        batches = joint_batches(args, Latents(dataset, vae, args), stills, net.schedule, shape,
                                first)
        preview = lambda path: preview_samples(path, ema, vae, dataset, prompts, args)
    (out / "samples").mkdir(exist_ok=True)
    log = Log(out / "log.csv", first, args.main)
    parallel = torch.nn.parallel.DistributedDataParallel(net) if args.world_size > 1 else net
    skipped = in_a_row = 0
    bar = tqdm(total=args.steps, initial=first, disable=not args.main, dynamic_ncols=True)

    for step, inputs in zip(range(first, args.steps), batches):
        # ---- the training step
        tick = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / WARMUP)
        losses = backward(parallel, inputs, args)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        if math.isfinite(norm):
            optimizer.step()
            # EMA with a warm-up: or a short run's average would still be near its random start
            decay = min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(averaged, [p.detach() for p in trained], 1 - decay)
            in_a_row = 0
        else:                                               # a bad step is skipped and counted
            skipped, in_a_row = skipped + 1, in_a_row + 1
        optimizer.zero_grad(set_to_none=True)
        # ---- from here on we only watch, and save
        done, speed = step + 1, args.batch_size / (time.monotonic() - tick)
        t = None if args.stage == "vae" else gather(inputs[2].t.to(args.device), args)
        log.write(done, gather(losses, args), t, norm, skipped, speed)
        bar.update()
        bar.set_postfix_str(f"loss {log.recent():.4f}, {speed:.0f} items/s", refresh=False)
        if in_a_row == 10:
            raise ValueError(f"no finite gradient in 10 steps, at step {done}; {out}/last.pt holds "
                             f"the last good one; try a lower --lr, or --precision fp32")
        why = stop.why(args)
        if (done % args.save_every == 0 or done == args.steps or why) and not in_a_row:
            save(out, state, net, ema, optimizer, done, args, dataset, vae)
        if done % args.sample_every == 0 or done in (100, args.steps):
            verdict = preview(out / "samples" / f"{done:06d}")
            if args.main:
                plot_log(out / "log.csv", out / "loss.png")
                bar.write(f"step {done}: loss {log.recent():.4f}  {verdict}  "
                          f"{out}/samples/{done:06d}")
        if why:
            break
    bar.close()
    finish(out, done, why, prompts[0], args)
    return 0


def finish(out, step, why, prompt, args):
    """The last words: how to go on, or what to do with the result."""
    if step < args.steps:
        print_main(args, f"stopped by {why} after step {step} of {args.steps}, saved. "
                         f"To go on: the same command")
    elif args.stage == "vae":
        print_main(args, f"done: {out}/ema.pt. To use it: python train.py --vae {out}/ema.pt")
    else:
        frames = f" --frames {args.frames}" if args.frames else ""
        print_main(args, f"done: {out}/ema.pt. To sample: python sample.py \"{prompt}\"{frames}")


# -----------------------------------------------------------------------------
# 7. --benchmark: how fast is a training step?
# -----------------------------------------------------------------------------

def benchmark(args):
    """Times training steps (forward, backward, AdamW) on random latents and text. With
    --conditioning adaln and diffusers installed, its DiT of the same sizes is timed too, in turn
    with ours: machines drift, and only neighbours in time compare. Writes nothing."""
    prepare(args)
    preset = args.preset or "nano"
    sizes = {k: getattr(args, k) or v for k, v in G.PRESETS[preset].items()}
    dims = (128,) if preset == "nano" else (768, 4096)
    B, frames, p = args.batch_size, args.frames or 1, sizes["patch_size"]
    h, w = args.size[0] // 8, args.size[1] // 8
    with torch.device(args.device):
        model = G.GenTron(G.GenTronConfig(**sizes, text_dims=dims, temporal=args.stage == "t2v",
                                          conditioning=args.conditioning or "cross"))
        z, t = torch.randn(B, frames, 4, h, w), torch.randint(1000, (B,))
        text = G.Text(tuple(torch.randn(B, 77, d) for d in dims),
                      (torch.ones(B, 77, dtype=torch.bool),) * len(dims), torch.randn(B, sum(dims)))
    contenders = {"gentron": (model, lambda: model(z, t, text))}
    if args.conditioning == "adaln" and frames == 1 and h == w:
        try:
            from diffusers import DiTTransformer2DModel
            heads = sizes["heads"]
            dit = DiTTransformer2DModel(
                num_attention_heads=heads, attention_head_dim=sizes["width"] // heads, patch_size=p,
                in_channels=4, out_channels=4, num_layers=sizes["depth"], sample_size=h)
            dit.to(args.device)
            labels = torch.randint(1000, (B,), device=args.device)
            contenders["diffusers"] = (dit, lambda: dit(z[:, 0], t, labels).sample)
        except ImportError:
            print("diffusers is not installed: timed alone")
    times = {name: [] for name in contenders}
    optimizers = {name: torch.optim.AdamW(c[0].parameters()) for name, c in contenders.items()}
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
              f"{frames * h * w // p ** 2} tokens, batch {B}, {args.precision}: {median:.3f} s a "
              f"step, {B / median:.1f} items/s{work}")
    if len(times) > 1:
        ratio = np.array(times["diffusers"]) / np.array(times["gentron"])
        print(f"gentron is {np.median(ratio):.2f} times as fast (median of {len(ratio)} turns)")
    return 0


def main(argv=None):
    """Command line -> exit code: 0 done or stopped and saved, 2 for what the user can mend."""
    args = parser().parse_args(argv)
    try:
        return benchmark(args) if args.benchmark else train(args)
    except (ValueError, OSError) as error:
        # (of a worker's error, which comes with its traceback, the last line)
        print(f"error: {(str(error).strip() or repr(error)).splitlines()[-1]}", file=sys.stderr)
        return 2
    finally:
        for worker in multiprocessing.active_children():    # they ignore SIGTERM: exit would wait
            worker.kill()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
