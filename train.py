"""
train.py: one loop, four stages:   vae -> (encode) -> t2i -> t2v

    python train.py                                   # text to image on the shapes world
    python train.py --data my_pictures --steps 20000  # your own pictures and captions
    python train.py --stage t2v                       # text to video, from the newest t2i run
    python train.py --stage vae                       # how assets/vae.pt was made
    python train.py --stage encode --data my_pictures --size 256 --text clip+t5 --out my_cache
    torchrun --nproc_per_node=8 train.py --preset XL/2 --data my_cache
    torchrun --nproc_per_node=8 train.py --preset G/2 --fsdp --checkpoint-activations --compile

To resume, run the same command again. A run folder holds last.pt (the whole run), ema.pt (the file
to share: half-precision EMA weights, autoencoder, vocabulary), log.csv, loss.png and samples/.
"""

# The file in one breath: `main` reads the flags and calls `train`, which builds (1, 2), feeds (3),
# steps and looks (5, 6), and leaves a folder from which the same command goes on (4). All that is
# random is a function of the seed and the step, so one process or eight, one go or ten, with a
# cache or without: the same run.

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
import dataclasses
import hashlib
import itertools
import json
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
import torch.distributed.fsdp as fsdp
import torch.distributed.tensor as sharded
from PIL import Image, ImageDraw, ImageFont
from torch._subclasses.fake_tensor import FakeTensorMode
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
# OURS in PAPER: the EMA, on which the paper is silent, and a batch that fewer GPUs can hold.
QUICK = dict(lr=2e-3, lr_decay=1_000, layout_steps=900, batch_size=64, schedule="cosine",
             objective="v", ema=0.998, steps=5_428, size=(64, 64))
PAPER = dict(lr=1e-4, lr_decay=0, layout_steps=0, batch_size=256, schedule="linear",
             objective="eps", ema=0.9999, steps=500_000, size=(256, 256))
# By stage: what differs from the above. OURS: a clip is eight pictures, so fewer clips a batch.
STAGE = dict(vae=dict(batch_size=16, steps=6_000),
             t2v=dict(batch_size=16, steps=4_500))
WARMUP = 100            # OURS: steps over which the rate rises to --lr
# Items of the shapes world a stage draws. The autoencoder never sees one twice in a default run;
# the others encode theirs once and come back to them, and then only the Transformer costs time.
DRAWN = dict(vae=1_000_000, t2i=32_768, t2v=8_192)
WIDER = dict(basic=1, full=3)       # times as many, for the two that come back, where more is said
PREVIEW_SEED = 10 ** 6  # the previews' prompts come from a dataset seed that no run trains on


# -----------------------------------------------------------------------------
# 1. Flags
# -----------------------------------------------------------------------------

def parser():
    """Every flag, in four groups. None = "see QUICK and PAPER above"."""
    # RawDescription: the docstring's lines of commands stay as they are. Values are checked as they
    # are read (D.number), so the code below never meets a step count of 0 or a rate of nan.
    p = D.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole, share = D.number(int, 1), D.number(float, 0, 1)
    # Flags whose default depends on the preset or the stage have none here: `fill_in` gives it
    g = p.add_argument_group("what to train")
    g.add_argument("--stage", choices=("vae", "encode", "t2i", "t2v"), default="t2i",
                   help="autoencoder, a cache of latents, pictures (default), clips")
    g.add_argument("--preset", choices=G.PRESETS, help="size of the Transformer (nano)")
    # A model between the presets, or a tiny one for a test
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
    g.add_argument("--data", default="shapes",
                   help="shapes, or a folder of pictures or clips, or a cache (of --stage encode)")
    g.add_argument("--image-data", help="t2v: pictures for joint training, shapes or a folder")
    g.add_argument("--world", choices=("basic", "full"), help="of the shapes (t2i, t2v: basic)")
    g.add_argument("--size", type=D.picture_size, help="H or HxW in pixels (nano: 64, else 256)")
    g.add_argument("--frames", type=D.number(int, 1, 1024), help="t2v: frames a clip (8)")
    g.add_argument("--fps", type=D.number(float, 0.01, 1000), default=4.0,
                   help="t2v: frames a second (4)")
    # OURS: both rates; the paper drops text and motion, and does not say how often
    g.add_argument("--p-drop-text", type=share, default=0.1, help="share of captions (0.1)")
    g.add_argument("--p-motion-free", type=share, default=0.1,
                   help="t2v: share of items that are stills, temporal attention off (0.1)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=whole, help="steps in all")
    g.add_argument("--minutes", type=D.number(float, 0, above=True), help="then stop and save")
    # The batch is global, so that a command means the same run on one GPU and on eight; what a
    # process holds at a time is batch / processes / grad-accum
    g.add_argument("--batch-size", type=whole,
                   help="over all processes (nano: 64, clips 16; else 256)")
    g.add_argument("--grad-accum", type=whole, default=1, help="micro-batches a step (1)")
    g.add_argument("--lr", type=share, help="AdamW's (nano: 2e-3; else 1e-4)")
    g.add_argument("--lr-decay", type=D.number(int, 0), metavar="STEP",
                   help="from this step on the rate falls as 1 / sqrt(step); 0 = it stays, as in "
                        "the paper (nano: 1000)")
    g.add_argument("--layout-steps", type=D.number(int, 0), metavar="STEP",
                   help="until this step train near pure noise only, where it is decided what goes "
                        "where; 0 = as in the paper (nano: 900)")
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
    # What the paper's G/2 needs: less memory for more time
    g.add_argument("--checkpoint-activations", action="store_true",
                   help="compute blocks again in the backward pass: slower, far less memory")
    g.add_argument("--fsdp", action="store_true",
                   help="under torchrun: each process keeps its share of the weights, gradients, "
                        "moments and averages; slower than copies, and far less memory")
    g.add_argument("--compile", action="store_true",
                   help="torch.compile the blocks: a minute to start, then faster on a GPU")
    # In place of a run: section 7
    g.add_argument("--dry-run", action="store_true",
                   help="print parameters, GFLOPs and memory for these flags; allocates nothing")
    g.add_argument("--benchmark", action="store_true",
                   help="time training steps on random data (t2v: for 1, 4, 8, 16, 32 frames), "
                        "and a cache that --data names; train nothing")
    return p


# Flags that change how a run is carried out, not what comes out of it: free to differ on resume.
# (--precision is not among them: bf16 rounds differently.)
HARMLESS = {"steps", "minutes", "grad_accum", "out", "init", "resume", "save_every", "sample_every",
            "workers", "device", "checkpoint_activations", "fsdp", "compile", "dry_run",
            "benchmark"}


def prepare(args):
    """Flags as they were given -> as they are meant. Returns (last, init): the checkpoint that this
    run left in its folder, and --init's; None where there is none. Adds to args what this process
    alone knows: rank, world_size, main, own, lock. Raises ValueError for flags that do not fit."""
    join_processes(args)
    # What the flags alone can tell is refused here, before a folder is made or anything is read
    for flag in ("fsdp", "compile", "dry_run", "benchmark"):
        if getattr(args, flag) and args.stage in ("vae", "encode"):
            raise ValueError(f"--{flag.replace('_', '-')} is about the Transformer, which --stage "
                             f"{args.stage} has not; leave it out")
    if args.stage not in ("t2v", "encode") and args.frames:
        raise ValueError(f"--frames is for --stage t2v, not {args.stage}")
    cache = D.cache_index(args.data) or {}                  # its latents have the size they have
    if args.stage == "t2v" and not args.benchmark:          # (that may ask for 1, or for all)
        args.frames = args.frames or cache.get("frames") or 8
        if args.frames == 1:
            raise ValueError("--frames 1 is a picture, no clip; for pictures: --stage t2i")
    # Where the run starts: its own last step, or another run's checkpoint, or nothing
    last = init = None
    if args.benchmark or args.dry_run:
        args.steps = args.steps or 10                       # (nothing is written, nothing read)
    else:
        out = claim_folder(args)
        if (out / "last.pt").exists():
            last = G.load_checkpoint(out / "last.pt")       # --init had its say when that began
        elif args.stage == "t2v":
            args.init = args.init or G.find_checkpoint(("t2i",))
        init = G.load_checkpoint(args.init) if args.init and last is None else None
    fill_in(args, last or init or {}, cache)
    share = args.world_size * args.grad_accum
    if args.batch_size % share and args.stage != "encode":
        raise ValueError(f"--batch-size {args.batch_size} is not divisible by {args.world_size} "
                         f"processes x --grad-accum {args.grad_accum}")
    own = args.batch_size // args.world_size                # this process's slice of every batch
    args.own = slice(args.rank * own, (args.rank + 1) * own)
    return last, init


def join_processes(args):
    """Which process is this, of how many (torchrun says so in the environment), and on what?"""
    args.rank = int(os.environ.get("RANK", "0"))
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args.main = args.rank == 0                              # the one that prints and writes
    if args.device is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"    # a GPU each
    args.device = G.pick_device(args.device)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)                  # where NCCL and FSDP look
    if args.world_size > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    elif args.fsdp:
        raise ValueError("--fsdp shares the model among processes, and there is one; "
                         "try torchrun --nproc_per_node=2 train.py ...")


def fill_in(args, known, cache):
    """Gives each flag that was not given its value: first what the checkpoint we start from
    (known) or the data's cache says, then the preset's, QUICK or PAPER."""
    args.precision = args.precision or ("bf16" if args.device.type == "cuda" else "fp32")
    parent = known.get("args", {})
    args.world = args.world or parent.get("world") or ("full" if args.stage == "vae" else "basic")
    if args.init and "schedule" in known:
        inherit(args, known)
    preset = args.preset or parent.get("preset")
    quick = args.stage == "vae" or preset in (None, "nano")
    defaults = {**QUICK, **STAGE.get(args.stage, {})} if quick else dict(PAPER)
    for source in (known, cache):                           # the latter wins: it has one size only
        if "size" in source:
            defaults["size"] = tuple(source["size"])
    args.fps = cache.get("fps", args.fps)
    for name, value in defaults.items():
        if getattr(args, name) is None:                     # (not `or`: --lr-decay 0 is a value)
            setattr(args, name, value)


def inherit(args, parent):
    """Refuses (ValueError) what --init cannot change: to weights trained for one objective, text
    or latent space another means nothing, and a flag that did nothing would be a lie."""
    config, schedule = parent["config"], parent["schedule"]
    sizes = {name: config[name] for name in G.PRESETS["nano"]}
    has = {"objective": schedule["objective"], "schedule": schedule["kind"],
           "text": parent["text"]["spec"], "vae": "its own autoencoder",
           "preset": next((name for name, p in G.PRESETS.items() if p == sizes), "other sizes")}
    for flag, value in has.items():
        given = getattr(args, flag)
        if given not in (None, value):
            raise ValueError(f"--{flag} {given} with --init: {args.init} has {value}, and keeps "
                             f"it; leave --{flag} out")
    args.objective, args.schedule = has["objective"], has["schedule"]


def claim_folder(args):
    """Makes the run's folder this run's own, with the old run moved aside if --no-resume. Returns
    its Path."""
    args.out = args.out or str(Path("runs") / args.stage)
    out = Path(args.out)
    args.lock = lock(out, args)
    if args.main and not args.resume and (out / "last.pt").exists():
        aside = next(p for k in itertools.count(1)
                     if not (p := out.with_name(f"{out.name}.{k}")).exists())
        out.rename(aside)                                   # never deleted: it may be weeks of work
        print(f"moved the old run to {aside}")
        args.lock = lock(out, args)                         # (the other one moved, too)
    D.writable(out / "last.pt")                             # better now than after 500 steps
    if args.world_size > 1:
        dist.barrier()                                      # nobody looks before it has moved
    return out


def lock(out, args):
    """Takes the run's folder for this process, or raises ValueError if another run has it. Returns
    the open file that holds the lock: the system drops it with the process, however that ends."""
    # A lock, not a file that says "in use": after a crash that one would lie there for ever
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

def build(args, dataset, pictures, init):
    """Flags, and --init's checkpoint if there is one -> (net, vae, state): what trains, the
    autoencoder, and the part of the checkpoint that never changes. Raises ValueError."""
    torch.manual_seed(args.seed)            # the initial weights, drawn in the same order each time
    if args.stage == "vae":                 # it is what trains, and also what encodes and decodes
        net = G.build_vae(init).requires_grad_(True) if init else G.VAE()
        return net, net, {"vae": {"config": net.config}}
    if init:
        if "config" not in init:
            raise ValueError(f"{args.init} is an autoencoder; to use it: --vae {args.init}")
        if init["config"]["temporal"] and args.stage == "t2i":
            raise ValueError(f"{args.init} is a video model, which --stage t2i cannot train; "
                             f"try --stage t2v")
        if "ema" not in init:
            raise ValueError(f"{args.init} holds no EMA weights, which a run starts from; "
                             f"try its run's ema.pt or last.pt")
        # The parent's sizes, words, schedule and latent space: its weights mean nothing in others
        state = {key: copy.deepcopy(init[key]) for key in ("config", "text", "schedule", "vae")}
        encoder = text_encoder(state["text"], dataset, pictures, args)
    else:
        spec = args.text or default_text(dataset)
        vocabulary = vocabulary_of(dataset, spec)
        encoder = text_encoder({"spec": spec, "vocabulary": vocabulary}, dataset, pictures, args)
        state = {"config": {**G.PRESETS[args.preset or "nano"], "text_dims": list(encoder.dims),
                            "conditioning": "cross"},
                 "text": {"spec": spec, "vocabulary": vocabulary, "dim": encoder.dim},
                 "schedule": {"kind": args.schedule, "objective": args.objective},
                 "vae": find_vae(args.vae)}
    vae, config = G.build_vae(state).to(args.device), state["config"]
    # (a parent's sizes cannot change: its weights would no longer fit, and `load` says which)
    for flag in ("depth", "width", "heads", "patch_size", "conditioning"):
        if getattr(args, flag) is not None:
            config[flag] = getattr(args, flag)
    # A t2i model becomes a t2v one here, by one word of its config: the rest of it is the same
    config.update(temporal=args.stage == "t2v", in_channels=vae.channels)
    multiple = vae.down * config["patch_size"]
    if any(side % multiple for side in args.size):
        raise ValueError(f"--size {args.size[0]}x{args.size[1]} is not divisible by {multiple} "
                         f"(autoencoder {vae.down} x patch {config['patch_size']})")
    # Made of the very dict that is saved: what a checkpoint rebuilds is what was trained
    net = G.Net(G.GenTron(G.GenTronConfig(**config)), encoder,
                G.NoiseSchedule(**state["schedule"]))
    if init:
        # Everything is loaded, averages for weights: they draw better than what they average. Only
        # temporal layers may be missing. They stay as drawn, and answer 0: the first video model is
        # its image parent, frame by frame (paper 3.4). Any other difference is refused by `load`.
        weights = {k: v.float() for k, v in init["ema"].items()}
        new = {k: v for k, v in net.weights().items() if ".temporal." in k and k not in weights}
        net.load({**new, **weights}, args.init)
        print_main(args, f"init: {len(weights)} tensors from {args.init}, {len(new)} are new"
                         f"{' (temporal attention)' if new else ''}")
    return net, vae, state


def default_text(dataset):
    """What --text means where it is not given: what the data offers."""
    if isinstance(dataset, D.Cache) and dataset.encoders:
        return dataset.encoders["spec"]                     # whose features are stored
    if not isinstance(dataset, D.Shapes) and not any(dataset.captions):
        return "none"                                       # pictures without captions
    return "small"


def text_encoder(part, dataset, pictures, args):
    """The "text" part of a checkpoint -> its encoder. A frozen one is not even loaded if all the
    data's features lie in caches: `StoredText` stands in for it. Raises ValueError if the features
    are another encoder's."""
    caches = [d for d in (dataset, pictures) if isinstance(d, D.Cache) and d.encoders]
    if is_frozen(part["spec"]):
        # Features of another encoder can have the same shape: the model would learn one language,
        # and be asked in another
        for cache in caches:
            if cache.encoders["fingerprint"] != text_fingerprint(part["spec"]):
                raise ValueError(f"cache of another text encoder, {cache.root} was made with "
                                 f"--text {cache.encoders['spec']}, this run reads {part['spec']} "
                                 f"(or its files have changed); encode again, or change --text")
        if len(caches) == (1 if pictures is None else 2):
            return StoredText(caches, args.device)
    return G.TextEncoder(**part)


def is_frozen(spec):
    """Are all encoders of a --text pretrained ones, which never change?"""
    return spec != "none" and not {"small", "labels"} & set(spec.split("+"))


def find_vae(name):
    """--vae -> the "vae" part of a checkpoint: a file's own, or a name or folder for diffusers."""
    # (A .pt that is not there is a file's name all the same, and the error says it is missing)
    path = Path(name or HERE / "assets" / "vae.pt")
    if path.suffix == ".pt" or path.is_file():
        return G.load_checkpoint(path)["vae"]
    return {"name": name}


def vocabulary_of(dataset, spec):
    """Words for the small encoder, class names for --text labels, nothing for the others."""
    if spec == "labels":                                    # a table of vectors, a row a class
        if not dataset.labels:
            raise ValueError("--text labels needs class folders (corgi/1.jpg), and this data has "
                             "captions; try --text small")
        return dataset.labels
    if "small" not in spec.split("+"):
        return []
    if isinstance(dataset, D.Shapes):
        return D.vocabulary()                               # motions too: t2v will read on
    if isinstance(dataset, D.Cache):
        return dataset.vocabulary
    # The commonest: a word seen once or twice teaches its vector nothing. Sorted, so that the order
    # of files does not decide which vector is whose.
    counts = collections.Counter(w for caption in dataset.captions for w in G.split_words(caption))
    return sorted(word for word, _ in counts.most_common(8192))


def open_data(args):
    """-> (dataset, pictures for joint training or None, the previews' prompts)."""
    frames = args.frames or 1
    if args.data == "shapes":
        # Labels name one class a picture, so there is one object in it
        level = "single" if args.text == "labels" else args.world
        stage = args.stage if args.stage != "encode" else "t2v" if frames > 1 else "t2i"
        n = DRAWN[stage] * (1 if stage == "vae" else WIDER[args.world])
        dataset = D.Shapes(level, n, args.seed, args.size, frames)
        # The same twelve sentences in every run, so that runs can be compared by eye
        fresh = D.Shapes(level, 12, PREVIEW_SEED, args.size, frames)
        prompts = [fresh.scene(i).caption() for i in range(12)]
    else:
        dataset = D.open_data(args.data, args.size, frames, args.fps)
        if isinstance(dataset, D.Cache) and args.stage in ("vae", "encode"):
            raise ValueError(f"{args.data} holds latents, and --stage {args.stage} wants pictures; "
                             f"try the folder that they were made of")
        prompts = list(dict.fromkeys(dataset.captions))[:12]    # the first twelve different ones
        for line in dataset.report():
            print_main(args, line)
    # Joint image-video training (paper 3.4): pictures are many where clips are few
    pictures = None
    if args.stage == "t2v" and args.p_motion_free > 0:
        source = args.image_data or ("shapes" if args.data == "shapes" else None)
        if source is None:
            raise ValueError("joint training needs pictures beside the clips: --image-data FOLDER, "
                             "or --p-motion-free 0 to train on clips alone")
        pictures = D.open_data(source, args.size, level=args.world,
                               n=DRAWN["t2i"] * WIDER[args.world], seed=args.seed)
    return dataset, pictures, prompts


def print_main(args, line):
    """Prints once, however many processes there are."""
    if args.main:
        print(line, flush=True)


# -----------------------------------------------------------------------------
# 3. Data: which items a step sees, and their latents
# -----------------------------------------------------------------------------

CHUNK = 64      # items that are drawn and encoded together: always the same ones, whatever the run


@lru_cache(maxsize=4)       # asked for once an item; clips and pictures, and a batch in two epochs
def permutation(seed, epoch, n):
    """The order of n items in an epoch, (n,): a function of its arguments."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def places_of_step(seed, step, batch, n):
    """Which places of the shuffled dataset step `step` trains on: a function of its arguments. The
    first epoch walks through them in order, every later one in an order of its own."""
    # In order, because `Latents` encodes in the order of places: a first batch of places from all
    # over the dataset would have to wait until nearly all of it is encoded. A batch may straddle
    # two epochs; nothing is dropped at the end of one.
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
        return torch.from_numpy(np.stack(clips)), list(captions)       # (B, F, H, W, 3) uint8


def loader(dataset, chunks, args):
    """Chunks in order, drawn or decoded ahead of time by --workers processes."""
    workers = min(args.workers, len(chunks))
    # batch_size None: a chunk is a batch already. The order of what comes back is that of `chunks`,
    # whichever worker was first, so the number of workers changes nothing.
    return DataLoader(Chunks(dataset, chunks, args.seed), batch_size=None, num_workers=workers,
                      worker_init_fn=ignore_signals, prefetch_factor=4 if workers else None)


def ignore_signals(worker):
    """Ctrl-C reaches the whole process group; only the main process decides what it means."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


class Latents:
    """A dataset's latents, in memory, encoded when first asked for: training starts at once and
    the first epoch pays as it goes. latents[places] -> fp16 (B, F, C, h, w), captions, as a
    D.Cache has them: with a cache and without one, a run is the same."""
    def __init__(self, dataset, vae, args):
        self.vae, self.args, self.n = vae, args, len(dataset)
        chunks = [range(i, min(i + CHUNK, self.n)) for i in range(0, self.n, CHUNK)]
        self.feed = iter(loader(dataset, chunks, args))
        self.z, self.captions = [], []                      # of the places that were encoded so far

    def __len__(self):
        return self.n

    def __getitem__(self, places):
        missing = max(places) + 1 - len(self.captions)
        with tqdm(total=missing, desc="encoding", leave=False,
                  disable=missing < 32 * CHUNK or not self.args.main) as bar:
            while len(self.captions) <= max(places):        # after a resume: all of it
                z, captions = encode_chunk(self.vae, next(self.feed), self.args.device)
                self.z += z                                 # its rows: a list of (F, C, h, w)
                self.captions += captions
                bar.update(len(captions))
        return torch.stack([self.z[i] for i in places]), [self.captions[i] for i in places]


@torch.no_grad()
def encode_chunk(vae, chunk, device):
    """(pictures uint8 (B, F, H, W, 3), captions) -> (latents fp16 (B, F, C, h, w), captions)."""
    # fp16 halves the memory. Always CHUNK items at a time: in batches of other sizes the same
    # picture's latents could differ in their last digit, and with them all that follows.
    clips, captions = chunk
    return vae.encode(G.to_float(clips).to(device)).half().cpu(), captions


def latents_of(dataset, vae, args):
    """A dataset -> something whose [places] are latents and captions. Raises ValueError for a cache
    of another autoencoder's latents."""
    if not isinstance(dataset, D.Cache):
        return Latents(dataset, vae, args)
    if dataset.vae != vae_fingerprint(vae):
        raise ValueError(f"cache of another autoencoder, {dataset.root}; encode again, or give the "
                         f"--vae that it was made with")
    return dataset


class StoredText(torch.nn.Module):
    """Stands in for frozen text encoders whose features are stored in caches: B captions -> Text,
    read from disk. The caches' captions and the null text are all it knows."""
    trained, dim = False, 128                               # dim is the trained encoders' affair

    def __init__(self, caches, device):
        super().__init__()
        self.caches, self.device = caches, device
        self.dims = tuple(caches[0].encoders["dims"])

    def forward(self, captions):
        """List of B strings -> Text of fp32 tokens (B, L, D_k), masks (B, L), pooled (B, P)."""
        rows = [next(c for c in self.caches if caption in c.where).text(caption)
                for caption in captions]                    # B times ([tokens, ...], pooled)
        tokens, masks = [], []
        for k, dim in enumerate(self.dims):
            parts = [row[k] for row, _ in rows]             # B times (L_i, D_k), mapped
            lengths = torch.tensor([len(part) for part in parts])
            padded = np.zeros((len(parts), int(lengths.max()), dim), np.float16)
            for place, part in zip(padded, parts):
                place[:len(part)] = part                    # here the disk is read
            # (half the bytes on the way to a GPU; fp32 from there, as the encoders answer)
            tokens.append(torch.from_numpy(padded).to(self.device).float())
            masks.append((torch.arange(padded.shape[1]) < lengths[:, None]).to(self.device))
        pooled = torch.from_numpy(np.stack([pooled for _, pooled in rows]))
        return G.Text(tuple(tokens), tuple(masks), pooled.to(self.device).float())


# ---- fingerprints: is what a cache holds what this run's own encoders would answer? Latents of
# another autoencoder have the same shape; a model trained on them draws mud, and nothing says why.

def vae_fingerprint(vae):
    """16 letters that change with any weight of an autoencoder."""
    digest = hashlib.sha256(repr((getattr(vae, "scale", 1), getattr(vae, "shift", 0))).encode())
    for name, x in sorted(vae.state_dict().items()):
        # half(): an ema.pt holds the same autoencoder in half precision, and latents are no finer
        digest.update(name.encode() + x.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def text_fingerprint(spec):
    """16 letters for frozen encoders, without loading them: their names, and of local folders each
    file's size and first megabyte."""
    # (all of T5-XXL's files, tens of GB, would have to be read again at every start)
    digest = hashlib.sha256()
    for part in spec.split("+"):
        name = G.FrozenEncoder.NAMES.get(part, part)
        files = sorted(p for p in Path(name).rglob("*") if p.is_file()) if Path(name).is_dir() \
            else []
        if not files:
            digest.update(name.encode())                    # (a folder may move, a name may not)
        for file in files:
            with open(file, "rb") as f:
                digest.update(f"{file.name} {file.stat().st_size}".encode() + f.read(2 ** 20))
    return digest.hexdigest()[:16]


def begin_cache(args, dataset, vae, text):
    """Writes the cache's index.json, or compares it with the one of an interrupted run: going on
    with other flags or data would mix two caches. Raises ValueError."""
    with torch.no_grad():
        probe = vae.encode(G.to_float(dataset[0][0][None]).to(args.device))    # (1, F, C, h, w)
    index = {"format": "gentron cache", "items": len(dataset), "shard": D.SHARD,
             "shape": list(probe.shape[1:]), "size": list(args.size), "frames": args.frames or 1,
             "fps": args.fps, "data": args.data, "seed": args.seed, "labels": dataset.labels,
             "vocabulary": vocabulary_of(dataset, "small"), "vae": vae_fingerprint(vae),
             "encoders": text and {"spec": text.spec, "dims": list(text.dims),
                                   "fingerprint": text_fingerprint(text.spec)}}
    there = D.cache_index(args.out) or index                # nothing there: nothing to differ
    for key in index:
        if there.get(key) != index[key]:
            raise ValueError(f"cache {args.out} was begun with another {key}; give another --out, "
                             f"or delete it")
    if args.world_size > 1:
        dist.barrier()                                      # all have looked before one writes
    if args.main:
        D.save_json(Path(args.out) / "index.json", index)


def encode(args):
    """Stage encode: the latents of all items of --data, and the features that frozen encoders make
    of their captions, into a cache. The processes take its shards in turn; shards that are there
    already stay, so an interrupted run goes on."""
    prepare(args)
    dataset, _, _ = open_data(args)
    vae = G.build_vae({"vae": find_vae(args.vae)}).to(args.device)
    # A trained text encoder has other features at each step: then only captions are stored
    frozen = args.text is not None and is_frozen(args.text)
    text = G.TextEncoder(args.text).to(args.device) if frozen else None
    begin_cache(args, dataset, vae, text)
    out, n = Path(args.out), len(dataset)
    shards = range(-(-n // D.SHARD))                        # rounded up
    # A shard's .json is written last, so a shard that has one is whole
    missing = [k for k in shards if not (out / f"{k:05d}.json").exists()]
    todo = {k: range(k * D.SHARD, min((k + 1) * D.SHARD, n)) for k in missing
            if k % args.world_size == args.rank}            # shard: its places
    # No chunk reaches into the next shard: what is stopped and gone on with has the same chunks
    chunks = [p[i:i + CHUNK] for p in todo.values() for i in range(0, len(p), CHUNK)]
    feed, stop = iter(loader(dataset, chunks, args)), Stop(args)
    with tqdm(total=sum(map(len, todo.values())), desc="encode", unit=" items",
              disable=not args.main) as bar:
        for k, places in todo.items():
            parts = []
            for _ in range(0, len(places), CHUNK):
                if not stop.asked():
                    parts.append(encode_chunk(vae, next(feed), args.device))
                    bar.update(len(parts[-1][1]))
            if stop.asked():
                break                                       # what is not a whole shard is lost
            captions = [caption for _, words in parts for caption in words]
            # Each different caption once; "" is the null text, which every step's drops will read
            texts = list(dict.fromkeys(["", *captions]))
            D.save_shard(out, k, np.concatenate([z.numpy() for z, _ in parts]), captions, texts,
                         *encode_texts(text, texts))
    if args.world_size > 1:
        dist.barrier()                                      # the last shard is there
    left = sum(not (out / f"{k:05d}.json").exists() for k in shards)
    print_main(args, f"stopped by {stop.asked()}, {left} of {len(shards)} shards to go. To go on: "
                     f"the same command" if left else
                     f"done: {out}, {n:,} items. To train from it: python train.py --data {out}")
    return 0


@torch.no_grad()
def encode_texts(text, captions):
    """m captions -> (for each encoder m arrays (L_i, D_k) of real tokens, pooled (m, P)); without
    an encoder (text None) nothing."""
    if text is None:
        return [], None
    tokens, pooled = [[] for _ in text.dims], []
    for i in range(0, len(captions), CHUNK):
        batch = text(captions[i:i + CHUNK])
        for rows, x, mask in zip(tokens, batch.tokens, batch.mask):    # x (B, L, D_k), mask (B, L)
            # Real tokens only: how long the padding is depends on a text's neighbours in its batch
            rows += [row[real].cpu().numpy() for row, real in zip(x, mask)]
        pooled += batch.pooled.cpu().numpy().tolist()
    return tokens, np.array(pooled)


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
        self.latest, self.file, self.skipped = collections.deque(maxlen=100), None, 0
        if not main:
            return                                          # one writer; all know the loss
        # A run that was killed may leave rows of steps that were never saved, half a row, or (after
        # a power cut) zeros. What is kept: whole rows of steps up to the checkpoint's.
        self.path, rows = path, []
        if first and path.exists():
            with open(path, newline="", errors="replace") as file:
                rows = [row for row in csv.reader(line.replace("\0", "") for line in file)
                        if len(row) == len(COLUMNS) and row[0].isdecimal()
                        and row[-2].isdecimal() and int(row[0]) <= first]
        if rows:
            self.skipped = int(rows[-1][-2])                # steps skipped so far: counted on
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
        # The bands lie far apart, and which of them fall says what is being learned: layout at most
        # noise, edges at least. The mean of a small batch mostly says which t were drawn.
        bands = [""] * 4
        if t is not None:
            band = t * 4 // 1000                            # (B,) 0 .. 3, as t is 0 .. 999
            bands = [f"{losses[band == k].mean():.7g}" if (band == k).any() else ""
                     for k in range(4)]
        if self.file:
            with D.writing(self.path):
                self.writer.writerow([step, f"{self.latest[-1]:.7g}", *bands, f"{norm:.5g}",
                                      skipped, f"{speed:.1f}"])
                self.file.flush()                           # whoever watches sees every step

    def recent(self):
        """Mean loss of the last 100 steps."""
        return sum(self.latest) / len(self.latest)


def running_mean(values):
    """(n,) -> (n,): at each place the mean of the last 2 % of n values; nan counts as not there."""
    k, known = max(1, len(values) // 50), np.isfinite(values)
    total = np.convolve(np.where(known, values, 0), np.ones(k))[:len(values)]
    count = np.convolve(known, np.ones(k))[:len(values)]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def plot_log(log, path):
    """loss.png: the smoothed loss and its parts by noise level, on a logarithmic axis. Drawn with
    pillow, which is here already: a plotting library for one plot would be the largest package."""
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    curves = {name: running_mean(np.array([float(row[name] or "nan") for row in rows]))
              for name in BANDS}
    seen = [v for curve in curves.values() for v in curve if v > 0]     # (nan is not)
    if len(rows) < 2 or not seen:
        return                                              # one point is no curve
    # From what is plotted to pixels; y grows downwards
    W, H, left, top, right, bottom = 760, 400, 64, 30, 20, 40
    low, high = math.log10(min(seen)) - 0.05, math.log10(max(seen)) + 0.05
    to_x = lambda s: left + (W - left - right) * (s - steps[0]) / (steps[-1] - steps[0])
    to_y = lambda v: top + (H - top - bottom) * (high - math.log10(v)) / (high - low)
    image = Image.new("RGB", (W, H), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    # Lines at 1, 2 and 5 times the powers of ten, which lie evenly on a logarithmic axis
    for tick in (m * 10.0 ** k for k in range(math.floor(low), math.ceil(high)) for m in (1, 2, 5)):
        if low <= math.log10(tick) <= high:
            pen.line([(left, to_y(tick)), (W - right, to_y(tick))], fill="#e4e4e4")
            pen.text((left - 8, to_y(tick)), f"{tick:g}", fill="#555555", font=font, anchor="rm")
    for s in np.linspace(steps[0], steps[-1], 5):
        pen.text((to_x(s), H - bottom + 8), f"{s:.0f}", fill="#555555", font=font, anchor="mt")
    pen.text((W - right, H - 4), "step", fill="#555555", font=font, anchor="rb")
    x = left                                                # of the legend, along the top
    for name, curve in curves.items():
        if not np.isfinite(curve).any():
            continue                                        # stage vae has no noise levels
        label, ink = BANDS[name]
        points = [(to_x(s), to_y(v)) for s, v in zip(steps, curve) if v > 0]
        pen.line(points, fill=ink, width=3 if name == "loss" else 1)
        pen.text((x, 6), label, fill=ink, font=font)
        x += 24 + pen.textlength(label, font=font)
    with D.writing(path):
        image.save(path)


def provenance(args):
    """Where a checkpoint comes from: commit, versions, device, seed. Numbers that nobody can make
    again are no numbers, and in a year nobody remembers."""
    # The hash alone (no tag's name); "-dirty": these are not quite that commit's files
    ask = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(ask, timeout=5, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""                                         # no git, or no repository
    return {"commit": commit, "torch": str(torch.__version__), "numpy": np.__version__,
            "python": sys.version.split()[0], "device": str(args.device), "seed": args.seed}


def flags_of(args):
    """The flags as plain values, for the checkpoint and for comparing on resume."""
    # Lists and strings: load_checkpoint reads nothing that is not plain data. Left out: what
    # belongs to one process.
    plain = {tuple: list, torch.device: str}
    return {k: plain.get(type(v), lambda same: same)(v) for k, v in vars(args).items()
            if k not in ("main", "rank", "world_size", "own", "lock")}


def check_resumable(args, last):
    """ValueError if last.pt is not all of a run of this stage (ema.pt, say, under its name), or was
    made with other flags: going on with those would be another run, so they are refused by name."""
    parts = [name for name in ("weights", "ema", "optimizer") if name not in last]
    if parts or last["stage"] != args.stage:
        what = f"lacks {', '.join(parts)}" if parts else f"is of stage {last['stage']}"
        raise ValueError(f"{args.out}/last.pt {what}, so no run can go on from it; use --out for a "
                         f"new run, or --no-resume")
    saved = last["args"]
    for name, value in flags_of(args).items():
        # (name in saved: a flag that is younger than the run had no other value then)
        if name not in HARMLESS and name in saved and saved[name] != value:
            raise ValueError(f"--{name.replace('_', '-')} was {saved[name]} in this run, now it is "
                             f"{value}; use --out for a new run, or --no-resume")


def check_moments(args, moments, weights):
    """ValueError if an optimizer's saved state is not that of these weights."""
    # (torch would load it, and fail at the first step, or not at all)
    shapes = {k: [(), p.shape, p.shape] for k, p in enumerate(weights)}
    saved = {k: [m[name].shape for name in ("step", "exp_avg", "exp_avg_sq")]
             for k, m in moments.items()}
    if saved != shapes:
        raise ValueError(f"{args.out}/last.pt is damaged: its optimizer does not fit its weights")


@torch.no_grad()
def measure_latents(vae, dataset, args, n=512):
    """Mean and standard deviation of each latent channel over n items, kept in the autoencoder."""
    # The noise schedule mixes latents with noise of variance 1, and means them to be as large.
    # `encode` divides by what was measured the last time, so that is undone first.
    vae.mean.zero_()
    vae.std.fill_(1)
    n, z = min(n, len(dataset)), []
    for i in range(0, n, CHUNK):
        clips = np.stack([dataset[k][0] for k in range(i, min(i + CHUNK, n))])
        z.append(vae.encode(G.to_float(clips).to(args.device)).cpu().double())   # (b, F, C, h, w)
    z = torch.cat(z).transpose(0, 2).flatten(1)                                  # (C, all the rest)
    vae.mean.copy_(z.mean(1))
    vae.std.copy_(z.std(1).clamp(min=1e-4))


def save(out, state, net, ema, optimizer, step, args, dataset, vae):
    """ema.pt: what somebody else needs to sample from the run. last.pt: all of it."""
    if args.stage == "vae":                                 # its averages are the autoencoder
        measure_latents(ema, dataset, args)
        vae, weights, averaged = ema, net.state_dict(), ema.state_dict()
    else:
        weights, averaged = net.weights(), ema.weights()
    weights, averaged, moments = whole(weights), whole(averaged), whole(optimizer.state_dict())
    if not args.main:
        return                                              # had to take part: shards are gathered
    state = {**state, "stage": args.stage, "step": step, "size": list(args.size),
             "frames": args.frames or 1, "fps": args.fps, "args": flags_of(args),
             "made": provenance(args)}
    half = lambda tensors: {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    shared = {} if args.stage == "vae" else {"ema": half(averaged)}
    if isinstance(vae, G.VAE):                              # (a pretrained one stays a name)
        state["vae"] = {"config": vae.config, "weights": vae.state_dict()}
        shared["vae"] = {"config": vae.config, "weights": half(vae.state_dict())}
    # ema.pt first: a run is done when last.pt says so, and then nobody would write ema.pt again
    G.save_checkpoint(out / "ema.pt", {**state, **shared})
    G.save_checkpoint(out / "last.pt", {**state, "weights": weights, "ema": averaged,
                                        "optimizer": moments})


# -----------------------------------------------------------------------------
# 5. The stages: what a step trains on, and what a preview shows
# -----------------------------------------------------------------------------

class Steps:
    """The places of steps first, first + 1, ... for the loader: a list never written out."""
    # (of 500,000 steps it would be 128 million numbers, copied into every worker)
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
    # The posterior's noise has the shape of latents, (B, 1, C, h, w), and is drawn for the global
    # batch; the loader brings this process's slice already
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
    all there is. clips, pictures: Latents or caches (pictures None: no stills); shape:
    (B, F, C, h, w)."""
    p_still = args.p_motion_free if pictures else 0.0
    for step in itertools.count(first):                     # the loop knows when to stop
        # For the global batch, then this process's slice: item j gets the same on any of them
        draws = G.randomness(args.seed, step, shape, schedule, args.p_drop_text, p_still,
                             layout=step < args.layout_steps)[args.own]
        z0, captions = clips[places_of_step(args.seed, step, shape[0], len(clips))[args.own]]
        z0 = torch.as_tensor(z0).float()                    # stored in fp16, noised in fp32
        still = draws.still.nonzero()[:, 0].tolist()        # which of own are pictures: s of them
        if still:
            # The j-th item is the j-th picture or the j-th clip of this step: both datasets are
            # walked at one pace, and what one drop decides moves nothing else
            places = places_of_step(args.seed, step, shape[0], len(pictures))[args.own]
            z, words = pictures[[places[j] for j in still]]    # (s, 1, C, h, w): for all frames
            z0[still] = torch.as_tensor(z).float()             # (s, F, C, h, w), by broadcasting
            for j, caption in zip(still, words):
                captions[j] = caption
        yield z0, captions, draws


def preview_vae(path, vae, dataset, args):
    """Eight pictures above their round trips. Returns a line for the log: the PSNR, a mean over
    pictures in dB, since a mean of errors would mostly be that of the worst picture."""
    clips = np.stack([dataset[i][0] for i in range(min(8, len(dataset)))])
    with torch.no_grad():
        back = G.to_uint8(vae.decode(vae.encode(G.to_float(clips).to(args.device))))
    error = np.square(clips / 255.0 - back / 255.0).mean((1, 2, 3, 4))     # (8,)
    labels = ["picture"] * len(clips) + ["round trip"] * len(clips)
    if args.main:
        with D.writing(f"{path}.png"):
            D.contact_sheet([*clips, *back], labels, columns=len(clips)).save(f"{path}.png")
    return f"PSNR {-10 * np.log10(np.maximum(error, 1e-10)).mean():.1f} dB"


def preview_samples(path, net, vae, dataset, prompts, args):
    """The same prompts from the same noise each time: a labelled grid, or a GIF of clips. Every
    process draws (a sharded model needs them all), the first one writes."""
    # Seeds 0, 1, 2 ... and a sampler without fresh noise: what differs from one preview to the next
    # are the weights
    clips = G.generate(net.model, net.text, vae, net.schedule, prompts, range(len(prompts)),
                       args.size, args.frames or 1, sampler="dpm++", device=args.device)
    for piece in pieces(net):                               # --fsdp: a forward leaves its weights
        piece.reshard()                                     # whole, but the shares are what trains
    notes, verdict = None, ""                               # of real data nobody knows the truth
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
    # The handler only takes a note. An exception could come between weights and averages, and what
    # is saved then is no step of any run.
    def __init__(self, args):
        self.deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
        self.signal = ""
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.on_signal)

    def on_signal(self, number, frame):
        """Notes the signal; the loop looks after the step. The next Ctrl-C ends the process."""
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def asked(self):
        """Why this process should stop, or ""."""
        return self.signal or ("--minutes" if time.monotonic() > self.deadline else "")

    def why(self, args):
        """Why to stop, or "". Rank 0 decides for all: if one process left by its own clock, the
        others would wait for its gradients for ever."""
        answer = [self.asked()]
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
    # (bf16 has the range of fp32, so the loss needs no scaling, as with fp16 it would)
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def backward(net, inputs, args):
    """Forward and backward over this process's items, micro-batch by micro-batch; the gradients of
    several processes are averaged behind the last one. Returns the loss of each item, (own,)."""
    own, losses = args.own.stop - args.own.start, []
    micro = own // args.grad_accum
    for k in range(args.grad_accum):
        part = slice(k * micro, (k + 1) * micro)            # of tensors, a list and Draws alike
        on_device = [x[part].to(args.device) if isinstance(x, torch.Tensor) else x[part]
                     for x in inputs]
        with averaging(net, k == args.grad_accum - 1):
            with autocast(args):
                loss = net(*on_device)                                             # (micro,)
            # Over own, not micro: the micro-batches' gradients add up to those of the mean over
            # this process's items, and their average over processes is the global batch's
            (loss.sum() / own).backward()
        losses.append(loss.detach())                        # (the graph goes with the gradients)
    return torch.cat(losses)


def learning_rate(step, args):
    """The rate of step 0, 1, ...: up in a line over WARMUP steps, then --lr, and from --lr-decay on
    --lr sqrt(decay / step) (as in Karras et al. 2024). It does not ask how many steps are still to
    come, so a run may be stopped anywhere, or made longer, and its steps are the same."""
    # Rising first: AdamW divides by an average of squared gradients, which at first is of very few
    decay = math.sqrt(args.lr_decay / max(step, args.lr_decay)) if args.lr_decay else 1.0
    return args.lr * min(1.0, (step + 1) / WARMUP) * decay


def update(trained, averaged, optimizer, step, args):
    """Clips the gradients, one step of AdamW, one of the EMA. trained, averaged: the weights and
    their averages, in one order. Returns the gradients' norm before clipping, a number; if it is
    not finite, nothing was changed."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    # OURS: to a norm of 1. Under --fsdp the norm is over all processes' shares, so all of them see
    # the same number, and either all make the step or none does.
    norm = whole(torch.nn.utils.clip_grad_norm_(trained, 1.0)).item()
    if math.isfinite(norm):
        optimizer.step()
        # EMA with a warm-up: or a short run's average would still be near its random start
        decay = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, [p.detach() for p in trained], 1 - decay)
    optimizer.zero_grad(set_to_none=True)                   # None: no memory between the steps
    return norm


# ---- several processes. Without --fsdp each holds a copy of everything and computes the gradients
# of its slice of the batch; DistributedDataParallel averages them. With --fsdp each holds 1 / n of
# every tensor (a DTensor), and a block's weights are put together only while the block runs.

def shard(net, args):
    """Cuts a Net up in place, block by block: the whole never has to fit on one device. Frozen
    encoders stay whole on each: they have no gradients, moments or averages to save."""
    # A block's weights travel, and are used, in bf16 where autocast would have rounded them anyway
    half = torch.bfloat16 if args.precision == "bf16" else None
    policy = fsdp.MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(args.device.type, (args.world_size,))
    for block in net.model.blocks:
        fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
        # Weights are put together by a hook on forward; sampling calls this method by itself, too
        fsdp.register_fsdp_forward_method(block, "keys_values")
    fsdp.fully_shard(net.model, mesh=mesh)                          # what is not in a block
    fsdp.register_fsdp_forward_method(net.model, "read")            # sampling calls it by itself
    if net.text.trained:
        frozen = [p for m in net.text.encoders if isinstance(m, G.FrozenEncoder)
                  for p in m.parameters()]
        fsdp.fully_shard(net.text, mesh=mesh, ignored_params=set(frozen))


def pieces(net):
    """The parts of a net that are cut up separately; none unless `shard` was there."""
    return [m for m in net.children() if isinstance(m, fsdp.FSDPModule)]


@contextlib.contextmanager
def averaging(net, on):
    """Inside, a backward pass ends with the gradients' average over processes, or (on=False, all
    micro-batches but the last) only adds to this process's own."""
    if isinstance(net, torch.nn.parallel.DistributedDataParallel) and not on:
        with net.no_sync():                                 # the copies' way to say it
            yield
    else:
        for piece in pieces(net):                           # the shares' way; one process: none
            piece.set_requires_gradient_sync(on)
        yield


def whole(x):
    """A DTensor, or a tree with some in it, -> the same with whole tensors. Every process has to
    take part."""
    if isinstance(x, sharded.DTensor):
        x = x.full_tensor()
        # A checkpoint's tensors wait on the CPU of the process that writes it, one by one: whole
        # on a GPU all at once, they are what --fsdp was asked for to avoid
        return x if x.ndim == 0 else x.cpu() if dist.get_rank() == 0 else None
    if isinstance(x, dict):
        return {key: whole(value) for key, value in x.items()}
    return x


def cut_like(x, p):
    """The inverse: a whole tensor -> this process's share of it, if p is cut up."""
    if not isinstance(p, sharded.DTensor) or x.shape != p.shape:    # (AdamW's step count is not)
        return x
    # Each process read the same file: it takes its share, and nothing is sent
    return sharded.distribute_tensor(x.to(p.device), p.device_mesh, p.placements,
                                     src_data_rank=None)


# ---- setting up

def start(args, dataset, pictures, last, init):
    """-> (net, vae, state) as `build` has them, or as `last`, this run's last checkpoint, left
    them."""
    if last is None:
        return build(args, dataset, pictures, init)
    # (the raw weights, which the optimizer's moments belong to; averages are `equip`'s affair)
    state = {k: last[k] for k in ("config", "text", "schedule", "vae") if k in last}
    if args.stage == "vae":
        net = vae = G.build_vae(last).requires_grad_(True)
        G.load_weights(net, last["weights"], f"{args.out}/last.pt")     # (last["vae"]: averages)
    else:
        text = text_encoder(last["text"], dataset, pictures, args)
        net, vae = G.build_net(last, "weights", text), G.build_vae(last).to(args.device)
    return net, vae, state


def equip(net, args, last=None):
    """-> (ema, optimizer, parallel): a net's averages, its AdamW, and what to call in its place; on
    the device, cut up if --fsdp. last: a checkpoint to take averages and moments from."""
    frozen = {id(m): m for m in net.modules() if isinstance(m, (G.FrozenEncoder, StoredText))}
    ema = copy.deepcopy(net, frozen).eval().requires_grad_(False)       # frozen ones are shared
    if last:                # while tensors are whole: a checkpoint knows nothing of processes
        load = partial(G.load_weights, ema) if args.stage == "vae" else ema.load
        load(last["ema"], f"{args.out}/last.pt")
    for module in (net.train(), ema):
        if args.fsdp:
            shard(module, args)                             # it moves what it cuts, block by block
        module.to(args.device)
    # From here on the weights stay where they are: the optimizer, built next, holds on to them
    if args.stage != "vae":
        net.model.checkpoint_activations = args.checkpoint_activations
        for block in net.model.blocks if args.compile else ():
            # Block by block: all are compiled once, as one, in seconds and not in minutes; and in
            # place, so names in checkpoints stay as they are
            block.compile()
    # OURS: betas and no decay (the paper says AdamW and its rate); 0.99 forgets an early large
    # gradient in a hundred steps, where the usual 0.999 takes a thousand
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=args.lr,
                                  betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    if last:
        saved, trained = last["optimizer"]["state"], optimizer.param_groups[0]["params"]
        check_moments(args, saved, trained)
        # Only the moments are taken over: rates and betas are this code's, not the file's
        moments = {k: {name: cut_like(x, trained[k]) for name, x in saved[k].items()}
                   for k in saved}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    copies = args.world_size > 1 and not args.fsdp
    return ema, optimizer, torch.nn.parallel.DistributedDataParallel(net) if copies else net


def pairs(net, ema):
    """The trained weights, and their averages in the same order."""
    # (an average has requires_grad off, so it is the other one that tells which are trained)
    both = [(p, q) for p, q in zip(net.parameters(), ema.parameters()) if p.requires_grad]
    return [p for p, _ in both], [q for _, q in both]


def feed(args, net, ema, vae, dataset, pictures, prompts, first):
    """-> the batches of step first, first + 1, ... and preview(path), of the stage at hand: all in
    which the stages differ, once the loop runs."""
    if args.stage == "vae":
        return (vae_batches(args, dataset, net, first),
                lambda path: preview_vae(path, ema, dataset, args))
    shape = (args.batch_size, args.frames or 1, vae.channels,
             *(side // vae.down for side in args.size))     # (B, F, C, h, w)
    stills = latents_of(pictures, vae, args) if pictures is not None else None
    clips = latents_of(dataset, vae, args)
    return (joint_batches(args, clips, stills, net.schedule, shape, first),
            lambda path: preview_samples(path, ema, vae, dataset, prompts, args))


def train(args):
    """Sets up one stage, resumes if there is something to resume, and trains."""
    last, init = prepare(args)
    out, stop = Path(args.out), Stop(args)                  # --minutes count from here
    # ---- what trains, and where it stands
    if last:
        check_resumable(args, last)
    dataset, pictures, prompts = open_data(args)
    net, vae, state = start(args, dataset, pictures, last, init)
    ema, optimizer, parallel = equip(net, args, last)
    first = last["step"] if last else 0
    if last:
        print_main(args, f"resume: {out}/last.pt, step {first} of {args.steps}")
    if first >= args.steps:
        print_main(args, f"done: {out} has its {first} steps. To go on: --steps {2 * first}; "
                         f"to start afresh: --no-resume")
        return 0
    del last, init                                          # as large as the model: let go
    # ---- what it trains on, and what shows how it goes
    trained, averaged = pairs(net, ema)
    print_main(args, f"{args.stage}: {sum(p.numel() for p in trained) / 1e6:.2f} M parameters, "
                     f"{args.steps} steps of {args.batch_size}, {args.device}, {args.precision}")
    batches, preview = feed(args, net, ema, vae, dataset, pictures, prompts, first)
    (out / "samples").mkdir(exist_ok=True)
    log = Log(out / "log.csv", first, args.main)
    skipped, in_a_row = log.skipped, 0
    # `net` is built and saved, `parallel` is net as the processes share it, `ema` is what previews
    # draw with. (The bar is closed also by an error, whose one line then stands alone.)
    with tqdm(total=args.steps, initial=first, disable=not args.main, dynamic_ncols=True) as bar:
        # (range first, or zip would have one batch too many encoded before it stops)
        for step, inputs in zip(range(first, args.steps), batches):
            # ---- the training step
            tick = time.monotonic()
            losses = backward(parallel, inputs, args)
            norm = update(trained, averaged, optimizer, step, args)
            bad = not math.isfinite(norm)                       # was skipped: counted here
            skipped, in_a_row = skipped + bad, in_a_row + 1 if bad else 0
            # ---- from here on we only watch, and save
            done, speed = step + 1, args.batch_size / (time.monotonic() - tick)
            # (the vae's inputs end with noise, all other stages' with Draws)
            t = None if args.stage == "vae" else gather(inputs[2].t.to(args.device), args)
            log.write(done, gather(losses, args), t, norm, skipped, speed)
            bar.update()
            bar.set_postfix_str(f"loss {log.recent():.4f}, {speed:.0f} items/s", refresh=False)
            if in_a_row == 10:                              # one is bad luck, ten are a dead model
                raise ValueError(f"no finite gradient in 10 steps, at step {done}; {out}/last.pt "
                                 f"holds the last good one; try a lower --lr, or --precision fp32")
            why = stop.why(args)
            # Never in a row of bad steps: last.pt is to hold weights that were seen to work
            if (done % args.save_every == 0 or done == args.steps or why) and not in_a_row:
                save(out, state, net, ema, optimizer, done, args, dataset, vae)
            if done % args.sample_every == 0 or done in (100, args.steps):     # 100: a first look
                verdict = preview(out / "samples" / f"{done:06d}")
                if args.main:
                    plot_log(out / "log.csv", out / "loss.png")
                    bar.write(f"step {done}: loss {log.recent():.4f}  {verdict}  "
                              f"{out}/samples/{done:06d}")
            if why:
                break
    if in_a_row:
        raise ValueError(f"the last {in_a_row} steps, up to {done}, had no finite gradient and "
                         f"were not saved; try a lower --lr, or --precision fp32")
    finish(out, done, why, prompts[0], args)
    return 0


def finish(out, step, why, prompt, args):
    """The last words: how to go on, or what to do with the result, as a command to be copied."""
    if step < args.steps:
        print_main(args, f"stopped by {why} after step {step} of {args.steps}, saved. "
                         f"To go on: the same command")
    elif args.stage == "vae":
        print_main(args, f"done: {out}/ema.pt. To use it: python train.py --vae {out}/ema.pt")
    else:
        frames = f" --frames {args.frames}" if args.frames else ""
        print_main(args, f"done: {out}/ema.pt. To sample: python sample.py \"{prompt}\"{frames}")


# -----------------------------------------------------------------------------
# 7. --dry-run: how large? --benchmark: how fast?
# -----------------------------------------------------------------------------

# Both look at the Transformer alone, the part that grows: text and latents are random numbers of
# the right shapes, so nothing has to be downloaded, encoded or read.

WIDTHS = dict(small=128, labels=128, clip=768, t5=4096)     # channels, known without a download
WORDS = 77                      # tokens a text, as many as CLIP reads, wherever a text is made up


def imagine(args, temporal):
    """The GenTronConfig that the flags describe, with nothing loaded. OURS: the paper's sizes read
    the paper's encoders unless --text says otherwise. Raises ValueError."""
    nano, dims = args.preset in (None, "nano"), []
    spec = args.text or ("small" if nano else "clip+t5")
    for name in spec.split("+") if spec != "none" else []:
        config = Path(name) / "config.json"                 # a folder of the transformers library
        if name not in WIDTHS and not config.is_file():
            raise ValueError(f"the width of text encoder '{name}' is not known here; "
                             f"try one of {', '.join(WIDTHS)}, or its folder")
        known = WIDTHS if name in WIDTHS else json.loads(config.read_text())
        # T5 calls it d_model, CLIP hidden_size
        dims.append(known.get(name) or known.get("d_model") or known["hidden_size"])
    sizes = {k: getattr(args, k) or v for k, v in G.PRESETS[args.preset or "nano"].items()}
    return G.GenTronConfig(**sizes, text_dims=dims, conditioning=args.conditioning or "cross",
                           temporal=temporal)


def shape_of(args, cfg, items, frames):
    """(B, F, C, H, W) of latents: 8 times smaller than pictures, ours and Stable Diffusion's."""
    return items, frames, cfg.in_channels, args.size[0] // 8, args.size[1] // 8


def tokens_of(cfg, shape):
    """F N, the number of tokens of one item of this shape."""
    return shape[1] * shape[3] * shape[4] // cfg.patch_size ** 2


def random_text(dims, B):
    """A Text of B rows of WORDS random tokens, on the default device."""
    mask = torch.ones(B, WORDS, dtype=torch.bool)
    return G.Text(tuple(torch.randn(B, WORDS, d) for d in dims), (mask,) * len(dims),
                  torch.randn(B, sum(dims)))


# ---- how large: counted, not estimated by formulas, which would have to follow every edit of the
# model. PyTorch runs the real forward pass on tensors that have shapes and no contents.

def count_flops(cfg, shape):
    """Floating-point operations of one forward pass, shape (B, F, C, H, W); a training step takes
    three times as many: backward are two products, for the inputs and for the weights."""
    # (On the CPU torch's counter overlooks its fused attention; on meta that is two products.)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        text = random_text(cfg.text_dims, shape[0])
        G.GenTron(cfg)(torch.empty(shape), torch.empty(shape[0]), text)
    return counter.get_total_flops()


def count_weights(cfg):
    """How many numbers a Transformer trains: all of its weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in G.GenTron(cfg).parameters())


def count_saved(cfg, shape, bf16=False, again=False):
    """Bytes that one forward pass keeps for the backward pass, shape (B, F, C, H, W): each tensor
    that autograd saves, once, but for the weights. again: with --checkpoint-activations."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x                # views of one storage count once
        return x
    # Fake tensors, not meta: they take the way through torch that real ones on a CPU would, and
    # which tensors are saved depends on it (fused attention saves no scores)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model = G.GenTron(cfg).train()
        model.checkpoint_activations = again
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            text = random_text(cfg.text_dims, shape[0])
            model(torch.empty(shape), torch.empty(shape[0]), text)
        return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in weights)


def count_activations(cfg, shape, bf16=False, again=False):
    """`count_saved` of any depth and batch, with what checkpointing computes again -> (bytes
    whatever the batch, bytes an item). It is a straight line in depth and in items, so a few blocks
    and one or two items tell: G/2 is never run, not even without contents."""
    few = max(1, len(cfg.text_dims))                        # so many blocks read each encoder once

    def of(items, again):
        at = (items, *shape[1:])
        small, large = (count_saved(dataclasses.replace(cfg, depth=depth), at, bf16, again)
                        for depth in (few, 2 * few))
        return small + (cfg.depth / few - 1) * (large - small)
    one, two = of(1, again), of(2, again)
    if again:               # the blocks' inputs are kept, and one block's inside at a time
        one, two = one + of(1, False) / cfg.depth, two + of(2, False) / cfg.depth
    return 2 * one - two, two - one                         # at no item, and of one more


def dry_run(args):
    """Prints what the flags' model would take, and allocates none of it."""
    prepare(args)
    frames, (high, wide) = args.frames or 1, args.size
    cfg = imagine(args, temporal=args.stage == "t2v")
    shape = shape_of(args, cfg, 1, frames)
    still, moving = (count_weights(dataclasses.replace(cfg, temporal=t)) for t in (False, True))
    flops = count_flops(cfg, shape)
    print(f"{args.preset or 'nano'}: {cfg.depth} blocks of {cfg.width} channels, {high}x{wide}, "
          f"{tokens_of(cfg, shape)} tokens, text of {' + '.join(map(str, cfg.text_dims)) or 'no'} "
          f"channels")
    print(f"{still / 1e6:.1f} M parameters, {moving / 1e6:.1f} M with temporal layers")
    print(f"{flops / 1e9:.1f} GFLOPs {'an image' if frames == 1 else 'a clip'}, "
          f"{3 * flops / 1e9:.1f} to train on it")
    print_memory(args, cfg, shape, 4 * (moving if cfg.temporal else still))     # all in fp32
    return 0


def print_memory(args, cfg, shape, weights):
    """A table: what a process needs, without and with each flag that saves memory. weights: their
    bytes; shape: one item's."""
    print(f"memory of a process in GB, batch {args.batch_size}, {args.precision}; estimated from "
          f"shapes, without workspace and the frozen encoders")
    columns = ("weights", "gradients", "AdamW", "EMA", "activations", "all")
    print(f"{'':<54}" + "".join(f"{column:>12}" for column in columns))
    for again in (False, True):
        fixed, an_item = count_activations(cfg, shape, args.precision == "bf16", again)
        for accum, processes in itertools.product((1, 16), (1, max(8, args.world_size))):
            items = args.batch_size / accum / max(processes, args.world_size)
            if items < 1:
                continue                                    # there is less than one item to a turn
            part = weights / processes
            # Two blocks are whole at a time, the one at work and the next one on its way; and
            # `fixed` is the weights in bf16, which are then let go with the block
            travelling = 2 * weights / cfg.depth if processes > 1 else 0
            saved = items * an_item + (fixed if processes == 1 else 0)
            row = [part + travelling, part, 2 * part, part, saved]     # AdamW: two moments each
            flags = [f"--fsdp on {processes}"] * (processes > 1)
            flags += [f"--grad-accum {accum}"] * (accum > 1) + ["--checkpoint-activations"] * again
            print(f"{' '.join(flags) or 'no flag':<54}"
                  + "".join(f"{cell / 1e9:12.2f}" for cell in (*row, sum(row))))


# ---- how fast

class RandomText(torch.nn.Module):
    """Stands in for the text encoders where only the time matters: B captions -> a random Text."""
    trained = False

    def __init__(self, dims, device):
        super().__init__()
        self.dims, self.device = dims, device

    def forward(self, captions):
        """List of B strings, whatever they say -> a Text of B rows."""
        with torch.device(self.device):
            return random_text(self.dims, len(captions))


def clock(args):
    """Seconds, once the device has done all that it was asked to."""
    if args.device.type == "cuda":
        torch.cuda.synchronize()        # (a GPU takes orders, and answers before they are done)
    return time.perf_counter()


def time_in_turn(ways, turns, args):
    """{name: function of the turn's number} -> {name: seconds (turns,)}. Each turn runs them all:
    machines drift, and only neighbours in time compare. Three more turns go first, to warm up."""
    seconds = {name: [] for name in ways}
    for turn in tqdm(range(3 + turns), desc="benchmark", leave=False, disable=not args.main):
        for name, run in ways.items():
            started = clock(args)
            run(turn)
            seconds[name].append(clock(args) - started)
    return {name: np.array(all_of_it[3:]) for name, all_of_it in seconds.items()}


def peak_memory(args):
    """The most bytes in use so far: of the GPU's memory, or of this process's."""
    if args.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # here, because Windows has none
    unit = 1 if sys.platform == "darwin" else 1024          # Linux counts in kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def benchmark(args):
    """Times training steps on random latents and text, one line a setting. With --conditioning
    adaln and diffusers installed, its DiT of the same sizes is timed too. A cache of --data is read
    for the clock. Writes nothing."""
    prepare(args)
    flags = [f"--{name.replace('_', '-')}" for name in ("fsdp", "compile", "checkpoint_activations")
             if getattr(args, name)]
    print_main(args, f"{args.preset or 'nano'}, {args.size[0]}x{args.size[1]}, batch "
                     f"{args.batch_size} on {args.world_size} x {args.device}, "
                     f"{' '.join([args.precision, *flags])}; % of the rate of matrix products")
    # In rising order: of a process's memory only the highest peak is known
    counts = [args.frames or 1] if args.frames or args.stage != "t2v" else [1, 4, 8, 16, 32]
    for frames in counts:
        time_training(args, frames)
    if args.stage == "t2v":
        time_guidance(args, args.frames or 8)
    if D.cache_index(args.data):
        time_cache(args, D.Cache(args.data))
    return 0


def time_training(args, frames):
    """One line for clips of so many frames: median time, rates, memory."""
    cfg = imagine(args, temporal=args.stage == "t2v")
    shape = shape_of(args, cfg, args.batch_size, frames)
    with torch.device("cpu" if args.fsdp else args.device):
        net = G.Net(G.GenTron(cfg), RandomText(cfg.text_dims, args.device),
                    G.NoiseSchedule(args.schedule, args.objective))
    ema, optimizer, parallel = equip(net, args)
    inputs = (torch.randn(shape)[args.own], [""] * args.batch_size,
              G.randomness(args.seed, 0, shape, net.schedule)[args.own])
    # What a model, which is mostly products, could reach at best: one of two large matrices
    n = 8192 if args.device.type == "cuda" else 512
    a = torch.randn(n, n, device=args.device,
                    dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32)

    def ours(turn):                                         # all of a step, as `train` makes it
        backward(parallel, inputs, args)
        update(*pairs(net, ema), optimizer, turn, args)
    ways = {"product": lambda turn: a @ a, "gentron": ours}
    if args.conditioning == "adaln" and frames == 1 and shape[3] == shape[4]:
        theirs = diffusers_step(args, cfg, inputs[0])
        ways |= {"diffusers": theirs} if theirs else {}
    seconds = time_in_turn(ways, args.steps, args)
    # The median: one turn in which the machine did something else moves a mean, not the middle
    best, median = (float(np.median(seconds[name])) for name in ("product", "gentron"))
    rate = 3 * count_flops(cfg, (1, *shape[1:])) * args.batch_size / median
    share = rate / (2 * n ** 3 / best * args.world_size)
    size = f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M"
    unit = "clips" if frames > 1 else "images"
    print_main(args, f"{frames:3} frames, {tokens_of(cfg, shape):5} tokens, {size}: "
                     f"{median:.3f} s a step, {args.batch_size / median:.1f} {unit}/s, "
                     f"{rate / 1e12:.3g} TFLOP/s ({share:.0%}), "
                     f"peak {(peak_memory(args) - a.nbytes) / 1e9:.2f} GB")
    if "diffusers" in seconds:
        ratio = seconds["diffusers"] / seconds["gentron"]   # turn by turn
        print_main(args, f"diffusers' DiT: {np.median(seconds['diffusers']):.3f} s a step; gentron "
                         f"is {np.median(ratio):.2f} times as fast (median of {len(ratio)} turns)")


def diffusers_step(args, cfg, z):
    """A function that takes one training step with diffusers' DiT of cfg's sizes on z, or None."""
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError:
        print("diffusers is not installed: timed alone")
        return None
    dit = DiTTransformer2DModel(
        num_attention_heads=cfg.heads, attention_head_dim=cfg.width // cfg.heads,
        patch_size=cfg.patch_size, in_channels=cfg.in_channels, out_channels=cfg.in_channels,
        num_layers=cfg.depth, sample_size=z.shape[-1]).to(args.device)
    z = z[:, 0].to(args.device)                                            # (B, C, H, W)
    t, labels = (torch.randint(1000, (len(z),), device=args.device) for _ in range(2))
    ema, optimizer = copy.deepcopy(dit), torch.optim.AdamW(dit.parameters(), fused=True)

    def step(turn):                                         # the same work around the model as ours
        with autocast(args):
            loss = dit(z, t, labels).sample.float().square().mean()
        loss.backward()
        update(*pairs(dit, ema.requires_grad_(False)), optimizer, turn, args)
    return step


@torch.no_grad()
def time_guidance(args, frames):
    """One line: a sampling step guided by text and motion, of one clip, as `guided` does it (three
    branches in a batch, the text read once) and as three forwards that each read the text."""
    cfg = imagine(args, temporal=True)
    with torch.device(args.device):
        model = G.GenTron(cfg).eval()
        z, t = torch.randn(shape_of(args, cfg, 1, frames)), torch.full((1,), 500)
        text, null = random_text(cfg.text_dims, 1), random_text(cfg.text_dims, 1)
        off = torch.zeros(1, dtype=torch.bool)
    predict = G.guided(model, text, null, cfg=4.0, motion_scale=1.2)

    @autocast(args)
    def in_a_batch(turn):
        predict(z, t)

    @autocast(args)
    def one_by_one(turn):
        model(z, t, text)
        model(z, t, null)
        model(z, t, null, off)
    seconds = time_in_turn({"batch": in_a_batch, "three": one_by_one}, 2 * args.steps, args)
    batch, three = (float(np.median(seconds[name])) for name in ("batch", "three"))
    print_main(args, f"guided sampling step, {frames} frames: {1000 * batch:.1f} ms in one batch "
                     f"with the text read once, {1000 * three:.1f} ms in three forwards: "
                     f"{three / batch:.2f} times as fast")


def time_cache(args, cache):
    """One or two lines: how fast a cache feeds a run, latents alone, and the text's features."""
    # From the second epoch on: the first walks straight through the files, which is easier
    step = -(-len(cache) // args.batch_size)
    batch = lambda turn: cache[places_of_step(args.seed, step + turn, args.batch_size, len(cache))]
    ways = {"latents": batch}
    if cache.encoders:
        text = StoredText([cache], args.device)
        ways["latents with text features"] = lambda turn: text(batch(turn)[1])
    seconds = time_in_turn(ways, 10 * args.steps, args)
    for name, times in seconds.items():
        print_main(args, f"{cache.root}: {args.batch_size / float(np.median(times)):,.0f} {name} "
                         f"a second, of {'x'.join(map(str, cache.shape))}")


# -----------------------------------------------------------------------------
# 8. Main
# -----------------------------------------------------------------------------

def out_of_memory(error):
    """Does an exception say that there was not enough memory, on a GPU or on the CPU?"""
    # (on the CPU torch raises a plain RuntimeError, and only its words differ from a bug's)
    says = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in says for words in ("out of memory", "can't allocate memory", "not enough memory"))


def advice(args):
    """What to do about too little memory: flags not yet in use, the cheapest first."""
    flags = ["--precision bf16"] * ("cuda" in str(args.device) and args.precision == "fp32")
    # Accumulation costs no time, so it goes before computing twice; but it must divide the batch
    share = (args.batch_size or 2) // args.world_size
    flags += [f"--grad-accum {2 * args.grad_accum}"] * (share % (2 * args.grad_accum) == 0)
    flags += ["--checkpoint-activations"] * (not args.checkpoint_activations)
    flags += ["--fsdp on several GPUs"] * (not args.fsdp) + ["a smaller --batch-size or --preset"]
    return (f"out of memory, {args.stage} in batches of {args.batch_size} on {args.device}; "
            f"try {', '.join(flags)}")


def end_workers():
    """Kills what the loader has started; they ignore SIGTERM, so an exit that asks would wait."""
    # A DataLoader's SIGCHLD handler raises when a worker dies, wherever the main process is just
    # then: in the printing of a traceback, say, which ends in "lost sys.stderr". Not of these.
    died = getattr(signal, "SIGCHLD", None)                 # Windows has none
    handler = died and signal.signal(died, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    if died:
        signal.signal(died, handler)


def main(argv=None):
    """Command line -> exit code: 0 done or stopped and saved, 2 for what the user can mend."""
    args = parser().parse_args(argv)
    try:
        return (dry_run if args.dry_run else benchmark if args.benchmark else
                encode if args.stage == "encode" else train)(args)
    except (ValueError, OSError) as error:
        # (of a worker's error, which comes with its traceback, the last line)
        print(f"error: {(str(error).strip() or repr(error)).splitlines()[-1]}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise                                           # a bug: its traceback is wanted
        print(f"error: {advice(args)}", file=sys.stderr)
        return 2
    finally:
        end_workers()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
