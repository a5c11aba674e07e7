"""
retrieval.py: does a model draw what a name means? For pictures that the judge cannot read.

    python docs/retrieval.py runs/emoji/ema.safetensors emoji emoji-heldout --row row.png

One picture is drawn for each name (default sampler, seed 0). It is right if, of all pictures
of both folders, the one of that name is nearest to it: the smallest Euclidean distance between the
autoencoder's latents. --row: eight held-out names, the true pictures above the drawn ones.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data as D
import gentron as G
import sample


@torch.no_grad()
def latents(sampler, clips):
    """uint8 (n, 1, H, W, 3) -> latents, flat: (n, C h w)."""
    parts = (G.to_float(clips[i:i + 64]).to(sampler.device) for i in range(0, len(clips), 64))
    return torch.cat([sampler.vae.encode(x).flatten(1).cpu() for x in parts])


def psnr(sampler, clips):
    """Mean PSNR in dB of pictures (n, 1, H, W, 3) after a round trip through the autoencoder."""
    with torch.no_grad():
        back = G.to_uint8(sampler.vae.decode(sampler.vae.encode(
            G.to_float(clips).to(sampler.device))))
    error = np.square(clips / 255.0 - back / 255.0).mean((1, 2, 3, 4))     # (n,)
    return -10 * np.log10(np.maximum(error, 1e-10)).mean()


def work(argv):
    """Draws, compares, prints; see the top of this file."""
    p = D.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("ckpt", help="ema.safetensors of a run")
    p.add_argument("seen", help="the folder that it was trained on")
    p.add_argument("heldout", help="a folder of names that it has not seen")
    p.add_argument("--n", type=D.number(int, 1, 10 ** 6), default=200, help="per folder (200)")
    p.add_argument("--row", metavar="FILE.png", help="draw a row of held-out names")
    args = p.parse_args(argv)
    options, = sample.settings(sample.parser().parse_args(["--ckpt", args.ckpt]))
    sampler = sample.Sampler(options, args.ckpt)
    flags = sampler.state["flags"]
    folders = [D.open_data(path, sampler.size, 1, sampler.fps, "", 0, 0)
               for path in (args.seen, args.heldout)]
    # Of the first folder, train.py has kept a few per cent out of training
    trained = D.hold_out(folders[0], flags["seed"])[0].places
    truth = np.stack([folder[i][0] for folder in folders for i in range(len(folder))])
    places = [trained, len(folders[0]) + np.arange(len(folders[1]))]       # rows of `truth`
    captions, known = [*folders[0].captions, *folders[1].captions], latents(sampler, truth)
    decibels = psnr(sampler, truth[places[1]])
    D.say(f"autoencoder, {len(places[1])} held-out pictures: {decibels:.1f} dB")
    for name, rows in zip(("seen", "held out"), places):
        rows = rows[np.linspace(0, len(rows) - 1, min(args.n, len(rows))).round().astype(int)]
        drawn = sampler([captions[i] for i in rows], [0] * len(rows), name)
        distance = torch.cdist(latents(sampler, drawn), known)             # (n, all pictures)
        own = distance[range(len(rows)), rows][:, None]
        rank = (distance < own).sum(1).numpy()                             # 0 = the nearest
        for what, right in ("first", rank < 1), ("among five", rank < 5):
            low, high = sample.wilson(right.sum(), len(rows))
            D.say(f"{name:>8} {what:>10}: {right.mean():6.1%} ({low:.0%} .. {high:.0%}), n = "
                  f"{len(rows)}")
    if args.row:
        pick = np.linspace(0, len(rows) - 1, 8).round().astype(int)
        labels = [captions[rows[k]] for k in pick]
        sheet = D.contact_sheet([*truth[rows[pick]], *drawn[pick]], ["the true picture"] * 8
                                + labels, columns=8)
        sample.save(Path(args.row), [sheet], 1)


def main(argv=None):
    """Command line -> exit code: 0, 2 for what the user can mend."""
    return D.run_main(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
