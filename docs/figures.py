"""
figures.py: drawings for the README and the lesson, made from the project's own functions.

    python docs/figures.py         # writes assets/figure-*.png

All lengths are in pixels of the page; files hold SCALE times as many, for sharp screens.
"""

import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data as D
import gentron as G

SCALE = 2
BLUE, RED, GREEN = "#2c4ede", "#d03030", "#269e3e"
GRAY, LIGHT, TEXT = "#8a8a8a", "#e4e4e4", "#222222"


class Canvas:
    """A white picture to draw on, in pixels of the page."""
    def __init__(self, width, height):
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x, y, words, color=TEXT, size=12, anchor="la"):
        """anchor: as in Pillow, "la" = (x, y) is the upper left corner, "mm" = the middle."""
        font = ImageFont.load_default(size=size * SCALE)
        self.pen.text((x * SCALE, y * SCALE), words, color, font, anchor)

    def box(self, x, y, width, height, fill=None, edge=None, thick=1):
        corners = [(x * SCALE, y * SCALE), ((x + width) * SCALE - 1, (y + height) * SCALE - 1)]
        self.pen.rectangle(corners, fill, edge, round(thick * SCALE))

    def line(self, points, color=TEXT, thick=1.0):
        self.pen.line([(x * SCALE, y * SCALE) for x, y in points], color, round(thick * SCALE),
                      joint="curve")


# ---- 1. Parts that the lesson uses, too ----------------------------------------------------------

def plot(canvas, x, y, curves, title, low, high, places=(0, 250, 500, 750, 1000), step=1.0,
         width=250, height=170):
    """Curves over t, with their corner at (x, y). curves: {label: (values (T,), color)}; low and
    high: the range of the values; step: between two ticks."""
    total = max(len(values) for values, _ in curves.values())
    across = lambda t: x + t / total * width
    down = lambda value: y + height - (min(max(value, low), high) - low) / (high - low) * height
    canvas.text(x, y - 22, title, size=13)
    for tick in range(round((high - low) / step) + 1):
        value = low + tick * step
        canvas.line([(x, down(value)), (x + width, down(value))], LIGHT)
        canvas.text(x - 6, down(value), f"{value:g}", GRAY, 11, "rm")
    for t in places:
        canvas.text(across(t), y + height + 6, f"{t}", GRAY, 11, "ma")
    for k, (label, (values, color)) in enumerate(curves.items()):
        inside = [(across(t), down(v)) for t, v in enumerate(values) if low <= v <= high]
        canvas.line(inside, color, 1.5)
        canvas.text(x + width + 10, y + 4 + 17 * k, label, color)


def heat(canvas, x, y, weights, title="", cell=20, color=(44, 78, 222)):
    """A matrix (rows, columns) of numbers 0 .. 1 as squares, the darker the larger."""
    canvas.text(x, y - 20, title)
    for i, row in enumerate(torch.as_tensor(weights).tolist()):
        for j, value in enumerate(row):
            shade = tuple(round(255 + (c - 255) * min(1.0, value)) for c in color)
            canvas.box(x + j * cell, y + i * cell, cell, cell, shade, LIGHT, 0.5)


# ---- 2. The three figures ------------------------------------------------------------------------

def schedules(shift=0.0):
    """alpha and log(alpha / sigma) of the three noise schedules; shift: of another cosine."""
    canvas, curves = Canvas(800, 240), {}
    for kind, color in (("linear", RED), ("cosine", BLUE), ("straight", GREEN)):
        curves[kind] = (G.NoiseSchedule(kind, G.OBJECTIVES[kind][0]), color)
    if shift:
        curves[f"cosine, shift {shift:g}"] = (G.NoiseSchedule("cosine", "v", shift), GRAY)
    part = lambda name: {label: (getattr(schedule, name)[:-1].tolist(), color)
                         for label, (schedule, color) in curves.items()}
    plot(canvas, 40, 35, part("alpha"), "alpha: how much of the picture is left", 0, 1, step=0.25)
    plot(canvas, 440, 35, part("half_log_snr"), "log(alpha / sigma)", -6, 6, step=3)
    canvas.text(165, 225, "timestep t", GRAY, 11, "ma")
    canvas.text(565, 225, "timestep t", GRAY, 11, "ma")
    return canvas.image


def sees(how, frames, tokens):
    """Which tokens decide which, measured: changes one token after the other at the input of a
    Block's attention. how: "within", "across" or "identity" -> bool (F N, F N), row i = what
    output i depends on."""
    torch.manual_seed(0)
    block = G.Block(G.GenTronConfig(depth=1, width=32, heads=2, text_dims=(), temporal=True), None)
    x, pos = torch.randn(1, frames * tokens, 32), torch.arange(frames)
    motion = torch.tensor([how == "across"])
    within = lambda x: block.attn(x.unflatten(1, (frames, -1)).flatten(0, 1)).reshape(x.shape)
    run = lambda x: (within(x) if how == "within" else
                     block.across_frames(x, frames, pos, motion))
    seen = torch.zeros(frames * tokens, frames * tokens, dtype=torch.bool)
    with torch.no_grad():
        for j in range(frames * tokens):
            other = x.clone()
            other[0, j] += 1
            seen[:, j] = ((run(other) - run(x)).abs() > 1e-6).any(-1)[0]
    return seen


def attention(frames=4, side=2):
    """The three patterns of attention over a clip's tokens: what one token sees, and the matrix."""
    canvas, tokens, cell = Canvas(800, 320), side * side, 12
    middle = (frames // 2 - 1) * tokens + 1                # the token that asks
    panels = (("within", "self-attention: within a frame", BLUE),
              ("across", "temporal attention: across frames", RED),
              ("identity", "temporal, motion off: the identity", GREEN))
    for k, (how, title, color) in enumerate(panels):
        x, seen = 20 + 265 * k, sees(how, frames, tokens)
        canvas.text(x, 8, title, color, 13)
        for f in range(frames):                            # above: the frames, as grids of tokens
            for n in range(tokens):
                i = f * tokens + n
                spot = (x + f * 52 + n % side * 20, 36 + n // side * 20, 19, 19)
                canvas.box(*spot, color if seen[middle, i] else LIGHT)
                if i == middle:
                    canvas.box(*spot, edge=TEXT, thick=2)
            canvas.text(x + f * 52 + 20, 80, f"frame {f}", GRAY, 11, "ma")
        rgb = tuple(int(color[j:j + 2], 16) for j in (1, 3, 5))
        heat(canvas, x, 106, seen.float(), cell=cell, color=rgb)
        for f in range(frames + 1):                        # lines between frames
            at = f * tokens * cell
            canvas.line([(x + at, 106), (x + at, 106 + frames * tokens * cell)], GRAY)
            canvas.line([(x, 106 + at), (x + frames * tokens * cell, 106 + at)], GRAY)
        canvas.text(x, 302, f"{frames * tokens} x {frames * tokens} tokens: row = asks, "
                    f"column = answers", GRAY, 11)
    return canvas.image


def guidance(cfg=4.0, motion=1.2):
    """The three branches of guidance and their weights."""
    canvas = Canvas(800, 200)
    branches = (("e(text, on)", "l_T", cfg, BLUE), ("e(null, on)", "l_M - l_T", motion - cfg, RED),
                ("e(null, off)", "1 - l_M", 1 - motion, GRAY))
    for x, head in ((20, "branch"), (130, "caption"), (215, "frames see each other"),
                    (375, "weight"), (560, f"with l_T = {cfg:g}, l_M = {motion:g}")):
        canvas.text(x, 10, head, GRAY)
    unit = 190 / max(abs(weight) for *_, weight, _ in branches) / 2
    for k, (name, formula, weight, color) in enumerate(branches):
        y = 36 + 40 * k
        canvas.text(20, y + 15, name, color, 13, "lm")
        canvas.text(130, y + 15, "yes" if "text" in name else "dropped", anchor="lm")
        for f in range(4):                                 # four frames, joined where they see
            canvas.box(215 + 30 * f, y + 8, 14, 14, color)
            if f and "on" in name:
                canvas.line([(199 + 30 * f, y + 15), (215 + 30 * f, y + 15)], color, 2)
        canvas.text(375, y + 15, formula, color, 13, "lm")
        left, right = sorted((620, 620 + weight * unit))
        canvas.box(left, y + 5, max(1, right - left), 20, color)
        canvas.text(770, y + 15, f"{weight:+.1f}", color, 13, "rm")
    canvas.line([(620, 32), (620, 150)], TEXT)
    canvas.text(20, 168, "prediction = the sum of weight x branch; the weights sum to 1; a branch "
                "of weight 0 is not computed")
    return canvas.image


def write(name, image):
    """A figure -> assets/NAME.png, with a palette: a quarter of the size."""
    path = ROOT / "assets" / f"{name}.png"
    image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    D.say(f"wrote {path}: {math.ceil(path.stat().st_size / 1024)} KB")


if __name__ == "__main__":
    write("figure-schedules", schedules())
    write("figure-attention", attention())
    write("figure-guidance", guidance())
