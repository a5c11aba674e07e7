"""
data.py: the data that the model trains on, and the judge that grades its pictures.

    python data.py --preview out.png              # look at the dataset, captions under the pictures
    python data.py --preview out.gif --frames 8    # the same for clips

Shapes is an endless world of shapes, drawn from captions: the truth of each picture is known.
Folder holds your own pictures and clips. Item i of both is (uint8 array (F, H, W, 3), caption).
Cache holds latents and text features that `train.py --stage encode` stored. The world's grammar:
  picture = object | object and object | object RELATION object | object RELATION object and object
  clip    = object MOTION [and object MOTION]
  object  = COUNT [SIZE] [TEXTURE] COLOR SHAPE            "two small striped red circles"
From a caption to a picture, and back:
  Scene       the meaning of a caption: things and a relation     `parse`
  tracks      (instances, 2, 3): x, y, radius at start and end    `layout`
  clip        uint8 (F, H, W, 3)                                  `draw`
  [Seen, ...] the objects found in one frame                      `read_frame`
  Verdict     does the clip show the caption, and if not, why     `judge`
Lengths of the world are in units of the picture's shorter side; x points right, y points down.
OURS: the paper uses internal data and T2I-CompBench.
"""

import argparse
import itertools
import json
import math
import os
import re
import signal
import sys
import textwrap
import warnings
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

if __name__ == "__main__":              # Ctrl-C during the imports ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from tqdm import tqdm

# ---- 1. The shapes world: vocabulary
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {"red": (222, 38, 38), "green": (38, 158, 62), "blue": (44, 78, 222),
          "yellow": (246, 208, 40), "purple": (134, 52, 178), "orange": (244, 130, 24),
          "pink": (248, 130, 196), "cyan": (52, 200, 224)}
GROUND, INK = (247, 245, 240), (38, 38, 48)                 # paper; stripes, dots, checks
TEXTURES = ("striped", "dotted", "checkered")               # "solid" is not said in a caption
COUNTS = {"a": 1, "two": 2, "three": 3, "four": 4}
SIZES = {"small": (0.105, 0.115), "medium": (0.155, 0.170), "large": (0.225, 0.245)}      # radii
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
TOUCHING = ("inside", "in front of")
RELATIONS = (*DIRECTIONS, *TOUCHING)
STEPS = dict(zip(("moving left", "moving right", "moving up", "moving down"), DIRECTIONS.values()))
MOTIONS = (*STEPS, "growing", "shrinking", "staying still")
# Training never shows these pairs, but shows each of their words: can a model combine words?
HELD_OUT = frozenset(zip(COLORS, ("cross", "ring", "triangle", "star", "square", "circle", "cross",
                                  "star")))
PAIRS = tuple((c, s) for c in COLORS for s in SHAPES)
SEEN_PAIRS = tuple(p for p in PAIRS if p not in HELD_OUT)
plural = lambda shape: shape + ("es" if shape.endswith("s") else "s")      # 'cross' -> 'crosses'

def vocabulary(level="full"):
    """Every word of captions, sorted ("an" is read as "a"); motions too, for a video model."""
    basic = (*SHAPES, *COLORS, *DIRECTIONS, *MOTIONS, "a", "and")
    more = (*map(plural, SHAPES), *TEXTURES, *COUNTS, *RELATIONS, "small", "large")
    return sorted({*" ".join(basic + more * (level == "full")).split()})

@dataclass
class Thing:
    """One noun phrase of a caption: "two small striped red circles [moving left]"."""
    color: str
    shape: str
    texture: str = "solid"
    size: str = "medium"
    count: int = 1
    motion: str = ""                     # one of MOTIONS in a clip, "" in a picture
    def words(self):                                        # as it stands in a caption
        noun = self.shape if self.count == 1 else plural(self.shape)
        words = (self.size, self.texture, self.color, noun, self.motion)
        phrase = " ".join(word for word in words if word not in ("medium", "solid", ""))
        count = tuple(COUNTS)[self.count - 1]
        return f"{'an' if count == 'a' and phrase[0] in 'aeiou' else count} {phrase}"

@dataclass
class Scene:
    """The meaning of a caption, and after `layout` the place of everything."""
    things: list
    relation: str = ""                                      # of things[0] to things[1]
    tracks: np.ndarray = field(default=None, repr=False)    # (instances, 2, 3): see above
    def caption(self):                                      # the sentence; `parse` is the inverse
        first, *rest = [thing.words() for thing in self.things]
        related = f"{first} {self.relation} {rest.pop(0)}" if self.relation else first
        return " and ".join([related, *rest])
    def owners(self):         # the thing of each instance: two circles and a square -> [0, 0, 1]
        return [k for k, thing in enumerate(self.things) for _ in range(thing.count)]

_OBJECT = (rf"(an?|two|three|four)(?: (small|large))?(?: ({'|'.join(TEXTURES)}))? "
           rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?:e?s)?(?: ({'|'.join(MOTIONS)}))?")
_CAPTION = re.compile(rf"{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})?(?: and {_OBJECT})?$")

def parse(caption):
    """Caption -> Scene without tracks. ValueError if it does not follow the grammar."""
    match = _CAPTION.match(" ".join(re.sub("[,.]", " ", caption.lower()).split()))
    if not match:
        raise ValueError(f"'{caption}' is not a sentence of the shapes world")
    groups = match.groups()                                 # 6 an object, 1 for the relation
    return Scene([Thing(color, shape, texture or "solid", size or "medium",
                        COUNTS.get(count, 1), motion or "")                # "an" counts 1
                  for count, size, texture, color, shape, motion
                  in (groups[0:6], groups[7:13], groups[13:19]) if count], groups[6] or "")

def is_picture(caption):
    """True for a sentence of the world without a motion, False for any other sentence."""
    with suppress(ValueError):
        return not any(thing.motion for thing in parse(caption).things)
    return False

# ---- 2. The shapes world: choosing a scene. A new call of rng here changes every picture.
SAID = {"count": 0.4, "size": 0.4, "texture": 0.5}          # chances; a drawn count is 1 to 4

def _pick(rng, options):
    return options[int(rng.integers(len(options)))]
def _choose_words(rng, level, frames, pairs):               # -> a Scene without tracks
    n, relation = 1, ""
    if level == "touching":
        n, relation = 2, _pick(rng, TOUCHING)
    elif level != "single":
        n += int(rng.random() < (0.4 if frames > 1 else 0.6))
    if n == 2 and not relation and frames == 1 and rng.random() < (0.5 if level == "full" else 0.6):
        relation = _pick(rng, RELATIONS if level == "full" else tuple(DIRECTIONS))
        n += int(level == "full" and rng.random() < 0.25)   # object relation object and object
    things = []
    while len(things) < n:
        color, shape = _pick(rng, pairs)
        touches = relation in TOUCHING and len(things) == 1    # one colour has no edge
        if not any(t.color == color and (touches or t.shape == shape) for t in things):
            things.append(Thing(color, shape))
    for k, thing in enumerate(things):
        if frames > 1:
            thing.motion = _pick(rng, MOTIONS)
        if level == "full":
            _add_attributes(rng, things, k, relation)
    return Scene(things, relation)

def _add_attributes(rng, things, k, relation):              # to things[k]
    thing, touches = things[k], relation in TOUCHING and k < 2
    if not touches and not thing.motion and rng.random() < SAID["count"]:  # at most five in all
        thing.count += int(rng.integers(min(3, 5 - sum(t.count for t in things)) + 1))
    if touches:                                             # the second is around or behind
        sizes = ("large",) if k == 1 else ("small",) if relation == "inside" else ()
    elif thing.motion in ("growing", "shrinking"):
        sizes = ()
    else:
        sizes = ("small", "large") if thing.count == 1 else ("small",)     # room for all
    if sizes and rng.random() < SAID["size"]:
        thing.size = _pick(rng, sizes)
    tiny = thing.size == "small" or (relation == "inside" and k == 0)  # stripes would be too narrow
    if not tiny and rng.random() < SAID["texture"]:
        thing.texture = _pick(rng, TEXTURES)

# The radius of the circle around each shape, corners included
OUTER = {"circle": 1, "square": 1.22, "triangle": 1.25, "star": 1.04, "cross": 1.01, "ring": 1}

def layout(rng, scene, aspect=(1.0, 1.0)):
    """Places every instance: fills `scene.tracks`; False if no place was found. aspect: (H, W)."""
    for _ in range(40):                                     # start over after a bad placement
        placed = []                                         # [(owner, track (2, 3)), ...]
        for owner in scene.owners():
            tracks = _propose(rng, scene, owner, placed, *aspect)          # (40, 2, 3)
            good = _fits(scene, owner, tracks, placed, *aspect)            # (40,)
            if not good.any():
                break
            placed.append((owner, tracks[int(np.argmax(good))]))           # the first that fits
        else:
            scene.tracks = np.stack([track for _, track in placed])        # (instances, 2, 3)
            return True
    return False

def _propose(rng, scene, owner, placed, high, wide, n=40):  # n candidates for a track, (n, 2, 3)
    thing = scene.things[owner]
    twin = next((track for other, track in placed if other == owner), None)   # of the same thing
    low, top = SIZES[thing.size]
    if scene.relation == "inside" and owner < 2:            # the inner one must fit in
        low, top = (0.095, 0.102) if owner == 0 else (0.245, 0.260)
    elif thing.size == "medium" and len(scene.owners()) > 3:
        low, top = 0.130, 0.140                             # smaller, as there are many
    if twin is not None:                                    # instances of one thing are equal
        low = top = twin[0, 2]
    r, x, y = (rng.uniform(*limits, n) for limits in ((low, top), (0, wide), (0, high)))
    if owner == 1 and scene.relation in TOUCHING:           # placed relative to the first
        x1, y1, r1 = placed[0][1][0]
        if scene.relation == "inside":
            x, y = ((x1, y1) + rng.uniform(-0.012, 0.012, (n, 2))).T
        else:                                               # half hidden, from any side
            angle = rng.uniform(0, 2 * math.pi, n)
            reach = (r + r1) * rng.uniform(0.58, 0.70, n)
            x, y = x1 + reach * np.cos(angle), y1 + reach * np.sin(angle)
    start = np.stack([x, y, r], 1)                          # (n, 3)
    end = start.copy()
    if thing.motion in STEPS:
        far = rng.uniform(0.28, 0.48, n)                    # the judge asks for 0.15
        if twin is not None:                                # instances of one thing move together
            far = np.full(n, np.abs(twin[1] - twin[0])[:2].sum())
        end[:, :2] += far[:, None] * np.array(STEPS[thing.motion])
    if thing.motion in ("growing", "shrinking"):            # about twofold
        start[:, 2], end[:, 2] = rng.uniform(0.095, 0.115, n), rng.uniform(0.200, 0.235, n)
    return np.stack([end, start] if thing.motion == "shrinking" else [start, end], 1)

def _fits(scene, owner, tracks, placed, high, wide):        # bool (n,): which tracks are possible
    edge, thing = 0.02, scene.things[owner]
    u = np.linspace(0, 1, 7 if any(t.motion for t in scene.things) else 1)[None, :, None]
    path = tracks[:, :1] * (1 - u) + tracks[:, 1:] * u      # (n, 7, 3): of a clip, seven moments
    x, y, r = path[..., 0], path[..., 1], path[..., 2]      # (n, 7) each
    good = ((x > r + edge) & (x < wide - r - edge) & (y > r + edge) & (y < high - r - edge)).all(1)
    for other, track in placed:
        there = track[:1] * (1 - u[0]) + track[1:] * u[0]   # (7, 3)
        dx, dy = x - there[:, 0], y - there[:, 1]           # (n, 7)
        relation = scene.relation if {owner, other} == {0, 1} else ""
        if relation not in TOUCHING:
            round_ = OUTER[thing.shape] * r + OUTER[scene.things[other].shape] * there[:, 2]
            boxes = np.maximum(abs(dx), abs(dy)) > r + there[:, 2] + 0.03  # two pixels of 64 apart
            good &= (boxes | (np.hypot(dx, dy) > round_ + 0.03)).all(1)
        if relation == "in front of":
            good &= _hides(scene.things[0].shape, track[0], thing.shape, tracks[:, 0])
        if relation in DIRECTIONS:
            ax, ay = -np.array(DIRECTIONS[relation])        # owner is 1, other is 0
            along, across = dx * ax + dy * ay, abs(dx * ay) + abs(dy * ax)
            good &= ((along > 0.22) & (along > 1.35 * across)).all(1)      # within 36 degrees
    return good

def _hides(front, spot, shape, spots):      # bool (n,): does `front` hide 12 to 45 % of `shape`?
    grid = np.linspace(-1, 1, 24)                            # 24 x 24 points of the shape behind
    gx, gy = grid[None, None, :], grid[None, :, None]        # (1, 1, 24), (1, 24, 1)
    x, y, r = (spots[:, k, None, None] for k in range(3))    # (n, 1, 1)
    body = distance(shape, gx, gy) < 0                       # (1, 24, 24)
    over = distance(front, (x + r * gx - spot[0]) / spot[2], (y + r * gy - spot[1]) / spot[2]) < 0
    share = (over & body).sum((1, 2)) / body.sum()           # (n,)
    return (share > 0.12) & (share < 0.45)

# ---- 3. The shapes world: drawing. The judge uses the same two formulas.
def distance(shape, x, y):
    """Signed distance (H, W) of x (1, W) and y (H, 1) to a shape of radius 1, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":                                    # 0.86: an area like the circle's
        return np.maximum(abs(x), abs(y)) - 0.86
    if shape == "triangle":            # corners (0, -1), (-+0.95, 0.8), which stay sharp outside
        return np.maximum(y - 0.8, (1.8 * abs(x) - 0.95 * (y + 1)) / 2.035)
    if shape == "cross":                                     # the union of two bars
        a, b = abs(x), abs(y)
        return np.minimum(np.maximum(a - 0.33, b - 0.95), np.maximum(a - 0.95, b - 0.33))
    if shape == "ring":                                      # a band of 0.48 about radius 0.76
        return abs(np.hypot(x, y) - 0.76) - 0.24
    assert shape == "star", shape                            # the plane folded to a tenth of it
    angle = np.arctan2(x, -y) % (2 * math.pi / 5)
    angle = np.minimum(angle, 2 * math.pi / 5 - angle)       # 0 at a tip, 36 degrees at a notch
    rho = np.hypot(x, y) / 1.04
    u, v = rho * np.cos(angle), rho * np.sin(angle)          # one edge: tip (1, 0) to a notch
    nx, ny = 0.46 * math.sin(math.pi / 5), 1 - 0.46 * math.cos(math.pi / 5)        # its normal
    return ((u - 1) * nx + v * ny) / math.hypot(nx, ny)

def ink(texture, x, y):
    """Signed distance to the edge of a texture's ink, positive in the ink; x, y in radii."""
    if texture == "striped":                                 # level bars: 0.36 ink, 0.36 paint
        return abs((y / 0.72 + 0.25) % 1 - 0.5) * 0.72 - 0.18
    if texture == "checkered":
        wave = lambda a: 0.25 - abs((a + 0.25) % 1 - 0.5)    # the centre is a corner of four checks
        a, b = wave(x), wave(y)
        return np.sign(a * b) * np.minimum(abs(a), abs(b))   # dark where both waves agree in sign
    assert texture == "dotted", texture                      # one in the centre, others 0.72 apart
    u, v = (x / 0.72 + 0.5) % 1 - 0.5, (y / 0.72 + 0.5) % 1 - 0.5
    return 0.24 - np.hypot(u, v) * 0.72

def draw(scene, size=(64, 64), frames=1):
    """Scene -> uint8 (F, H, W, 3), antialiased. Frame f shows moment f / (F - 1)."""
    clip = np.full((frames, *size, 3), GROUND, np.float32)
    order = sorted(zip(scene.owners(), scene.tracks), key=lambda pair: -pair[0])   # the last first
    for f, (owner, (start, end)) in itertools.product(range(frames), order):
        thing, u = scene.things[owner], f / max(1, frames - 1)
        cx, cy, r = (start * (1 - u) + end * u) * min(size)  # pixels
        x0, x1 = max(0, int(cx - r - 2)), min(size[1], int(cx + r + 3))
        y0, y1 = max(0, int(cy - 1.04 * r - 2)), min(size[0], int(cy + r + 3))     # 1.04: a star
        x = (np.arange(x0, x1) + 0.5 - cx)[None, :] / r      # (1, w); + 0.5: a pixel's middle
        y = (np.arange(y0, y1) + 0.5 - cy)[:, None] / r      # (h, 1)
        # A pixel is half covered if the outline runs through its middle
        cover = np.clip(0.5 - distance(thing.shape, x, y) * r, 0, 1)[..., None]        # (h, w, 1)
        paint = np.array(COLORS[thing.color], np.float32)                              # (3,)
        if thing.texture != "solid":                         # stripes: (h, 1, 1), others (h, w, 1)
            dark = np.clip(0.5 + ink(thing.texture, x, y) * r, 0, 1)[..., None]
            paint = paint * (1 - dark) + np.array(INK, np.float32) * dark              # (h, w, 3)
        patch = clip[f, y0:y1, x0:x1]                        # a view: += paints into the clip
        patch += cover * (paint - patch)
    return np.rint(clip).astype(np.uint8)

class Shapes:
    """`n` items of the world; shapes[i] -> (uint8 (F, H, W, 3), caption), a function of (seed, i)
    alone. level: "single" (one plain object), "basic" (one or two, "and", four relations), "full"
    (everything), "touching" (one plain thing inside or in front of another), or a tuple of levels:
    item i has level[i % len(level)]. pairs: (color, shape) that may be used."""
    def __init__(self, level="basic", n=10_000, seed=0, size=(64, 64), frames=1, pairs=SEEN_PAIRS):
        self.level, self.n, self.seed = level, n, seed
        self.size, self.frames, self.pairs = tuple(size), frames, pairs
        self.labels = [] if frames > 1 else [Thing(*pair).words() for pair in pairs]
    def __len__(self):
        return self.n
    def scene(self, i):       # item i's Scene, laid out
        if not 0 <= i < self.n:
            raise IndexError(i)
        levels = (self.level,) if isinstance(self.level, str) else self.level
        rng = np.random.default_rng((self.seed, i))
        while True:                         # a few crowded choices have no layout: choose again
            scene = _choose_words(rng, levels[i % len(levels)], self.frames, self.pairs)
            if layout(rng, scene, [side / min(self.size) for side in self.size]):
                return scene
    def __getitem__(self, i):
        scene = self.scene(i)
        return draw(scene, self.size, self.frames), scene.caption()

# ---- 4. The judge: reading a picture back, with numpy alone
#   _unmix    explains each pixel as ground + one colour + ink
#   _label    finds blobs of touching pixels, and in each blob one region a colour
#   _fit      compares each region with silhouettes of all shapes
#   _texture  compares the ink inside the silhouette with the three patterns
# `read_frame` joins them and does not know the caption. An object that cannot be read is "unclear",
# which is an error. OURS: the thresholds, by which drawn truth passes and swapped captions do not.
# REACH: how far a shape of radius 1 reaches from its centre, left = right, up, down.
REACH = {"circle": (1, 1, 1), "square": (0.86, 0.86, 0.86), "triangle": (0.95, 1, 0.8),
         "star": (0.989, 1.04, 0.841), "cross": (0.95, 0.95, 0.95), "ring": (1, 1, 1)}
SMALL_BELOW = (SIZES["small"][1] + SIZES["medium"][0]) / 2             # 0.135
LARGE_ABOVE = (SIZES["medium"][1] + SIZES["large"][0]) / 2             # 0.1975
_PAPER = np.array(GROUND, np.float32)
_AXES = np.array([(color, INK) for color in COLORS.values()], np.float32) - _PAPER     # (8, 2, 3)
_SOLVE = np.linalg.pinv(_AXES).astype(np.float32)            # (8, 3, 2): least squares

@dataclass
class Seen:
    """One object found in a frame; x, y, radius in units of the shorter side."""
    color: str                                               # or "unclear"
    shape: str                                               # or "unclear"
    texture: str                                             # or "solid", or "unclear"
    x: float
    y: float
    radius: float
    mask: np.ndarray = field(repr=False)                     # bool (H, W): its ideal silhouette
    owned: np.ndarray = field(repr=False)                    # bool (H, W): its visible pixels

def _unmix(frame):            # -> color; cover, 0..1: what is not ground; dark: its share of ink
    p = frame.reshape(1, -1, 3).astype(np.float32) - _PAPER                       # (1, HW, 3)
    parts = np.clip(p @ _SOLVE, 0, None)                     # (8, HW, 2): of the colour, of ink
    parts /= np.maximum(parts.sum(-1, keepdims=True), 1)     # the sum is at most 1
    error = parts @ _AXES - p                                                     # (8, HW, 3)
    color = np.einsum("kpc,kpc->kp", error, error).argmin(0)                      # (HW,)
    best = parts[color, np.arange(p.shape[1])]                                    # (HW, 2)
    dark = best[:, 1] / np.maximum(best.sum(-1), 1e-3)       # 0 on blank paper
    return tuple(v.reshape(frame.shape[:2]) for v in (color, best.sum(-1), dark))

def _shifted(a, fill):                                       # the four neighbours of every pixel
    b = np.pad(a, 1, constant_values=fill)
    return b[:-2, 1:-1], b[2:, 1:-1], b[1:-1, :-2], b[1:-1, 2:]

def _blobs(mask):                      # connected components: a list of bool (H, W)
    n = mask.size                                            # stands for "not in the mask"
    label = np.where(mask, np.arange(n).reshape(mask.shape), n)
    while True:                        # take the smallest label around, then that label's label
        least = np.where(mask, np.minimum(label, np.minimum.reduce(_shifted(label, n))), n)
        least = np.append(least, n)[least]                   # pointer jumping
        if (least == label).all():
            return [label == k for k in np.unique(label[mask])]
        label = least

def _grow(label, room):                # labels spread into the unlabelled (-1) pixels of `room`
    while True:
        near = np.where(room & (label < 0), np.maximum.reduce(_shifted(label, -1)), -1)
        if (near < 0).all():
            return label
        label = np.where(near >= 0, near, label)

def _count(mask, k):                   # (H, W): the mask's pixels in a square of side 2k + 1
    total = np.pad(mask, ((k + 1, k), (k + 1, k))).cumsum(0, dtype=np.int32).cumsum(1)
    n = 2 * k + 1
    return total[n:, n:] - total[:-n, n:] - total[n:, :-n] + total[:-n, :-n]
def _thick(mask):             # without thin lines, where two colours blend into a third
    return mask & (_count(_count(mask, 1) * mask >= 7, 4) > 0)

def _label(color, cover, dark):        # yields each blob, and its pixels' colours (-1 = none)
    area = min(cover.shape) ** 2
    raw = np.where(dark < 0.5, color, -1)                    # under ink the colour is not known
    for blob in _blobs(cover > 0.5):
        if blob.sum() < max(3, 0.0015 * area):               # a speck of up to 6 pixels
            continue
        label = _grow(np.where(blob, raw, -1), blob)         # ink takes the colour beside it
        core = np.full_like(label, -1)
        for c in np.unique(label[blob & (label >= 0)]):
            own = _thick(label == c)
            if own.sum() >= 0.0025 * area:                   # over 10 pixels: a region
                core[own] = c
        yield blob, _grow(core if (core >= 0).any() else label, blob)  # thin parts follow others

def _depth(shape, spots, size, corner=(0, 0), stride=1):    # distance to a shape at K spots, pixels
    cx, cy, r = (spots[:, k, None, None] for k in range(3))                       # (K, 1, 1)
    x, y = (np.arange(n, dtype=np.float32) * stride + c + 0.5 for n, c in zip(size[::-1], corner))
    return distance(shape, (x - cx) / r, (y[:, None] - cy) / r) * r               # (K, h, w)

def _overlap(shape, spots, cover, free, corner, stride=1):  # (K,): IoU - 0.03 x hidden share
    ideal = np.clip(0.5 - _depth(shape, spots, cover.shape, corner, stride), 0, 1)     # (K, h, w)
    shown = ideal * free
    charge = 1 - shown.sum((1, 2)) / np.maximum(ideal.sum((1, 2)), 1e-6)   # hiding costs a little
    either = np.maximum(np.maximum(shown, cover).sum((1, 2)), 1e-6)
    return np.minimum(shown, cover).sum((1, 2)) / either - 0.03 * charge

def _spots(shape, box, cut):           # (K, 3) first guesses (x, y, radius) for a bounding box
    left, right, top, bottom = box
    side, up, down = REACH[shape]
    middle = lambda r: ((left + right) / 2, (top + bottom + (up - down) * r) / 2)
    r = (right - left + bottom - top) / (2 * side + up + down)
    spots = [(*middle(r), r)]
    if cut:                            # parts are hidden: larger ones, six sizes x 3 x 3 places
        least = max((right - left) / (2 * side), (bottom - top) / (up + down))
        for r in least * np.array([0.97, 1.05, 1.15, 1.3, 1.5, 1.8]):
            mx, my = middle(r)
            spots += [(x, y, r) for x in (left + side * r, mx, right - side * r)
                      for y in (top + up * r, my, bottom - down * r)]
    return np.array(spots, np.float32)

def _fit(cover, own, hidden=None):     # the region `own` -> (overlap, shape, (x, y, radius))
    cut = hidden is not None                                 # pixels of what may lie in front of it
    ys, xs = np.nonzero(own)
    left, right, top, bottom = box = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    m = 3 + max(right - left, bottom - top) // 2 if cut else 3         # room for a hidden part
    x0, y0 = corner = max(0, left - m), max(0, top - m)
    part = np.s_[y0:bottom + m, x0:right + m]
    free = 1.0 - hidden[part] if cut else np.ones(cover[part].shape, np.float32)   # (h, w)
    rim = np.logical_or.reduce(_shifted(own[part], False)) & (cover[part] <= 0.5)  # its soft edge
    seen = (cover[part] * (own[part] | rim) * free).astype(np.float32)             # (h, w)
    guesses = []                                                       # (overlap, shape, spot)
    n = 2 if cut else 1                  # 55 spots a shape: use every second pixel for speed
    for shape in SHAPES:
        spots = _spots(shape, box, cut)
        scores = _overlap(shape, spots, seen[::n, ::n], free[::n, ::n], corner, n)
        guesses += [(scores[k], shape, spots[k]) for k in np.argsort(-scores)[:2]]
    guesses.sort(key=lambda g: -g[0])
    steps = np.array([np.zeros(3), *(sign * one for one in np.eye(3) for sign in (-1, 1))])
    refined = []
    for score, shape, spot in guesses[:5 if cut else 2]:
        if score < guesses[0][0] - 0.12:                     # too bad to become the best
            break
        for step in (2, 1, 1, 0.7, 0.5, 0.3) if cut else (1, 0.7, 0.5, 0.3):       # pixels
            spots = (spot + step * steps).astype(np.float32)                       # (7, 3)
            spots[:, 2] = np.maximum(spots[:, 2], 1)
            scores = _overlap(shape, spots, seen, free, corner)
            spot, score = spots[scores.argmax()], scores.max()
        refined.append((float(score), shape, spot))
    return max(refined, key=lambda g: g[0])

def _texture(spot, dark, inside):                            # the pattern of the ink at the pixels
    if inside.sum() < 4:                                     # `inside`, bool (H, W)
        return "unclear"
    values = dark[inside]                                    # (n,)
    if (values > 0.5).mean() < 0.18:                         # dots cover 1/3, the others 1/2
        return "solid"
    y, x = ((v + 0.5 - c) / spot[2] for v, c in zip(np.nonzero(inside), spot[1::-1]))    # in radii
    match = {}                                               # correlation with each pattern
    for name in TEXTURES:
        ideal = np.clip(0.5 + ink(name, x, y) * spot[2], 0, 1)
        match[name] = np.cov(values, ideal, ddof=0)[0, 1] / max(values.std() * ideal.std(), 1e-6)
    best = max(match, key=match.get)
    return best if match[best] > 0.45 else "unclear"         # it is near 1 when drawn right

def _shapeless(mask, color="unclear"):                       # a Seen without a recognisable shape
    y, x = (float(v.mean()) / min(mask.shape) for v in np.nonzero(mask))
    return Seen(color, "unclear", "unclear", x, y, math.sqrt(mask.mean()), mask, mask)

def _peel(blob, label, cover, dark):   # -> [Seen, ...], front to back: what looks complete first
    names = dict(enumerate(COLORS))
    waiting = [int(c) for c in np.unique(label[blob & (label >= 0)])]              # colours
    if not waiting:                                          # ink only
        waiting, label = [-1], np.where(blob, -1, -2)
    if len(waiting) > 3:                                     # in the world at most two touch
        return [_shapeless(label == c, names[c]) for c in waiting]
    seen, hidden = [], np.zeros_like(blob)                   # hidden: by the objects seen so far
    while waiting:
        others, tries = blob & (label >= 0), []
        for c in waiting:
            own = label == c
            over = hidden | (others & ~own) if seen else None
            best = _fit(cover, own, over)
            bare = own & (dark < 0.5)                        # the ink may belong to the other
            if len(waiting) > 1 and 9 < bare.sum() < 0.9 * own.sum():
                best = max(best, _fit(cover, bare, over), key=lambda fit: fit[0])
            depth = _depth(best[1], best[2][None].astype(float), cover.shape)[0]   # (H, W)
            deep = depth < -0.5                              # a shape behind covers others' pixels
            theft = (others & ~own & deep).sum() / max(1, deep.sum())
            tries.append((best[0] - 4 * theft, c, best, depth))
        _, c, (overlap, shape, spot), depth = max(tries, key=lambda t: t[0])
        mask, near = depth < 0, depth < 1.0                  # near: with the rim of blended colours
        owned = mask & blob & ~hidden
        texture = _texture(spot, dark, owned & (depth < -0.8))           # without the soft edge
        clear = overlap > 0.78 - 1 / spot[2]                 # small objects have much edge
        seen.append(Seen(names.get(c, "unclear"), shape if clear else "unclear", texture,
                         *(float(v / min(blob.shape)) for v in spot), mask, owned))
        waiting.remove(c)
        hidden = hidden | near
        label = _grow(np.where(near | (label == c), -1, label), blob & ~hidden)
        waiting = [k for k in waiting if (label == k).sum() > 3]
    return seen

def read_frame(frame):
    """uint8 (H, W, 3) -> [Seen, ...]: everything in the picture, whatever the caption says."""
    k = min(frame.shape[:2]) // 64
    if k > 1:                                # average k x k pixels: 64 are enough, and faster
        h, w = frame.shape[0] // k, frame.shape[1] // k
        frame = frame[:h * k, :w * k].reshape(h, k, w, k, 3).mean((1, 3))
    color, cover, dark = _unmix(frame)                       # (H, W) each
    seen = [one for blob, label in _label(color, cover, dark)
            for one in _peel(blob, label, cover, dark)]
    pale = (cover > 0.25) & (_count(cover > 0.5, 3) == 0)    # the ghost of an object
    if _thick(pale).sum() > 0.004 * min(pale.shape) ** 2:
        seen.append(_shapeless(pale))
    return seen

@dataclass
class Verdict:
    """The judge's answer. It is true if the clip shows all that was asked for and nothing else."""
    right: bool
    reasons: list                        # one short sentence a fault
    parts: dict                          # name: bool (see `judge`)
    numbers: dict                        # shares of the frames; of a clip also "flicker", 0..255
    def __bool__(self):
        return self.right

def judge(clip, caption):
    """Does the clip, uint8 (F, H, W, 3) or (H, W, 3), show the caption (or Scene)? -> Verdict of
      color, shape           exactly the named colours, and (color, shape) pairs, are present
      texture, size, count, relation     as named; count: no other object
      motion, stillness      each thing moves, grows, shrinks or stays still, as named
      identity, smooth       the same objects in every frame; even tracks
    The first six hold for a clip if they hold in 4 of 5 frames: a frame may be misread."""
    scene = parse(caption) if isinstance(caption, str) else caption
    clip = np.asarray(clip)[None] if np.ndim(clip) == 3 else np.asarray(clip)
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8:
        raise ValueError(f"judge wants uint8 (F, H, W, 3), not {clip.dtype} {clip.shape}")
    frames = [read_frame(frame) for frame in clip]           # F lists of Seen
    stills, faults, mine = zip(*[_judge_frame(seen, scene) for seen in frames])
    parts = {name: bool(np.mean([still[name] for still in stills]) >= 0.8) for name in stills[0]}
    reasons = next(filter(None, faults), [])                 # of the first bad frame
    there = [{t.color for t in scene.things} <= {s.color for s in seen} for seen in frames]
    numbers = {"frames_right": float(np.mean([not fault for fault in faults])),
               "colors_present": float(np.mean(there))}
    if len(clip) > 1:
        moving, wrong = _judge_motion(frames, mine, scene)
        reasons = list(dict.fromkeys(([] if all(parts.values()) else reasons) + wrong))
        parts |= moving
        ground = (abs(clip.astype(np.int16) - np.array(GROUND)) < 40).all(-1)     # (F, H, W)
        both = ground[1:] & ground[:-1]                      # of two frames, one after the other
        change = abs(np.diff(clip.astype(np.int16), axis=0)).mean(-1)             # (F-1, H, W)
        numbers["flicker"] = float(change[both].mean()) if both.any() else 0.0
    elif any(thing.motion for thing in scene.things):
        parts["motion"] = False
        reasons = [*reasons, "one frame shows no motion"]
    return Verdict(all(parts.values()), reasons, parts, numbers)

def _claim(seen, things):     # -> mine (a list of Seen for each thing), extra (the others)
    mine, extra = [[] for _ in things], []
    named = [(t.color, t.shape) for t in things]
    exact = lambda s: (s.color, s.shape) in named
    for s in sorted(seen, key=exact, reverse=True):          # objects of the right shape first
        rooms = [k for k, t in enumerate(things) if t.color == s.color and len(mine[k]) < t.count]
        place = (mine[named.index((s.color, s.shape))] if exact(s) else    # even if too many
                 mine[rooms[0]] if len(rooms) == 1 else extra)             # or only the colour fits
        place.append(s)
    return mine, extra

def _judge_frame(seen, scene):         # -> parts, reasons, mine (each thing's own list of Seen)
    things = scene.things
    mine, extra = _claim(seen, things)
    named, shapes = {(t.color, t.shape) for t in things}, {t.shape for t in things}
    # No blue circle where "a red circle and a blue square" was asked
    bound = all((s.color, s.shape) in named or s.shape not in shapes for s in seen)
    parts = {"color": bound and {s.color for s in seen} == {t.color for t in things},
             "shape": {(s.color, s.shape) for s in seen} == named and len(named) == len(things),
             "texture": True, "size": True, "count": not extra, "relation": True}
    reasons = [] if len(named) == len(things) else ["two things of one name cannot be told apart"]
    for thing, found in zip(things, mine):
        name = f"{thing.color} {thing.shape}"
        if len(found) != thing.count:
            parts["count"] = False
            many = name if len(found) == 1 else plural(name)
            reasons.append(f"{len(found)} {many}, not {thing.count}" if found else f"no {name}")
        for odd in [s.shape for s in found if s.shape != thing.shape][:1]:
            looks = "of no clear shape" if odd == "unclear" else f"a {odd}"
            reasons.append(f"the {thing.color} object is {looks}, not a {thing.shape}")
        odd = [s.texture for s in found if s.texture != thing.texture][:1]
        parts["texture"] &= bool(found) and not odd
        if odd:
            looks = "not plain" if odd == ["unclear"] else odd[0]
            looks = looks if thing.texture == "solid" else f"not {thing.texture}"
            reasons.append(f"the {name} is {looks}")
        sized = all({"small": s.radius < SMALL_BELOW, "medium": True,
                     "large": s.radius > LARGE_ABOVE}[thing.size] for s in found)
        parts["size"] &= thing.size == "medium" or bool(found) and sized
        reasons += [] if sized else [f"the {name} is not {thing.size}"]
    reasons += [f"an extra {'colorless' if s.color == 'unclear' else s.color} "
                f"{'object' if s.shape == 'unclear' else s.shape}" for s in extra]
    if scene.relation:
        a, b = mine[:2]
        parts["relation"] = bool(a and b) and _related(scene.relation, a, b)
        if a and b and not parts["relation"]:
            is_now = next((r for r in ("inside", *DIRECTIONS) if _related(r, a, b)), "")
            short = things[0].shape != things[1].shape       # "the circle" is unambiguous
            one, two = (t.shape if short else f"{t.color} {t.shape}" for t in things[:2])
            reasons.append(f"the {one} is {is_now or f'not {scene.relation}'} the {two}")
    return parts, reasons, mine

def _related(relation, first, second):      # does it hold between all of two lists of Seen?
    if relation in DIRECTIONS:
        ax, ay = DIRECTIONS[relation]
        steps = np.array([(a.x - b.x, a.y - b.y) for a in first for b in second])     # (pairs, 2)
        along, across = steps @ (ax, ay), abs(steps @ (ay, ax))
        return bool((along > 0.03).all() and along.mean() > across.mean())         # 45 degrees
    for a, b in itertools.product(first, second):
        (a_side, a_up, a_down), (b_side, b_up, b_down) = (
            [s.radius * reach for reach in REACH.get(s.shape, (1, 1, 1))] for s in (a, b))
        inside = (a.radius < b.radius and abs(a.x - b.x) < b_side - a_side + 0.02
                  and a.y - a_up > b.y - b_up - 0.02 and a.y + a_down < b.y + b_down + 0.02)
        both = a.mask & b.mask
        in_front = (both.sum() > 0.05 * min(a.mask.sum(), b.mask.sum())
                    and (both & a.owned).sum() > 0.6 * both.sum() and not inside)
        if not (inside if relation == "inside" else in_front):
            return False
    return True

def _judge_motion(frames, mine, scene):     # a clip's own parts and reasons
    parts, reasons = dict(motion=True, stillness=True, identity=True, smooth=True), []
    names = [sorted((s.color, s.shape) for s in seen) for seen in frames]
    odd = next((f for f, now in enumerate(names) if now != names[0]), None)
    if odd is not None or not names[0]:
        parts["identity"] = False
        what = ("shows nothing" if odd is None else
                "an object appears or vanishes" if len(names[odd]) != len(names[0]) else
                "changes color" if [c for c, _ in names[odd]] != [c for c, _ in names[0]] else
                "changes shape")
        reasons.append(what + (f" (frame {odd + 1})" if odd else ""))
    for k, thing in enumerate(scene.things):
        wanted, name = thing.motion or "staying still", f"the {thing.color} {thing.shape}"
        part = "stillness" if wanted == "staying still" else "motion"
        if any(len(now[k]) != len(mine[0][k]) or not now[k] for now in mine):
            parts[part] = parts["smooth"] = False
            reasons.append(f"{name} cannot be followed")
            continue
        for track in _follow([now[k] for now in mine]):      # (F, 3)
            found = _motion(track)
            if found != wanted:
                parts[part] = False
                reasons.append(f"{name} is {found}, not {wanted}")
            track = track * (1, 1, 2)                        # radii count twice
            step, start = np.polyfit(range(len(track)), track, 1)      # the best even walk, (3,)
            off = track - start - np.arange(len(track))[:, None] * step
            if abs(off).max() > max(0.025, 0.6 * abs(step).max()):     # shuffled frames lie off it
                parts["smooth"] = False
                reasons.append(f"{name} does not move evenly")
    return parts, reasons

def _follow(found):           # F lists of n Seen -> (n, F, 3): each instance's track
    spots = [[(s.x, s.y, s.radius) for s in seen] for seen in found]
    tracks = spots[:1]                                       # [frame][instance]
    for left in spots[1:]:                                   # each takes the nearest that is free
        row = []
        for x, y, _ in tracks[-1]:
            row.append(min(left, key=lambda s: math.hypot(s[0] - x, s[1] - y)))
            left.remove(row[-1])
        tracks.append(row)
    return np.array(tracks).swapaxes(0, 1)

def _motion(track):           # (F, 3) -> one of MOTIONS; "moving unclearly" lies between them
    dx, dy = track[-1, :2] - track[0, :2]
    growth = track[-1, 2] / track[0, 2]
    wander = np.hypot(*(track[:, :2] - track[:, :2].mean(0)).T).max()
    if wander < 0.04 and track[:, 2].max() < 1.25 * track[:, 2].min():
        return "staying still"
    if math.hypot(dx, dy) < 0.15 and max(growth, 1 / growth) > 1.4:
        return "growing" if growth > 1 else "shrinking"
    for motion, (ax, ay) in STEPS.items():
        along, across = dx * ax + dy * ay, abs(dx * ay) + abs(dy * ax)     # within 34 degrees
        if along >= 0.15 and along > 1.5 * across and max(growth, 1 / growth) < 1.4:
            return motion
    return "moving unclearly"

# ---- 5. The benchmark's prompts
CATEGORIES = ("color", "shape", "texture", "spatial", "non-spatial", "complex")    # T2I-CompBench's
CLIP_CATEGORIES = ("motion", "motion-binding", "stillness", "identity")
_ALL = ("color", "shape", "texture", "size", "count", "relation")
SCORED_ON = {                          # the parts of a verdict that a category asks about
    "color": ("color", "count"), "shape": ("shape", "count"),
    "texture": ("color", "texture", "count"),
    "single": ("shape", "count"), "pair": ("shape", "count"),
    "spatial": _ALL, "non-spatial": _ALL, "complex": _ALL, "numeracy": _ALL,
    "motion": ("color", "count", "motion", "smooth"),
    "motion-binding": ("color", "count", "motion", "stillness", "smooth"),
    "stillness": ("color", "count", "stillness"), "identity": ("color", "count", "identity")}

def passed(verdict, category):
    """Does the verdict count as right for a prompt of this category?"""
    return all(verdict.parts.get(part, False) for part in SCORED_ON[category])

def prompts(category, n=100, split="seen"):
    """The first n prompts of a category; where there are fewer, they start over. split: "seen" uses
    SEEN_PAIRS alone, "unseen" HELD_OUT alone. Many come as swap pairs, "a star above a ring" and "a
    ring above a star": a model that ignores word order fails one. Unseen color, shape: no pairs."""
    if category not in SCORED_ON or split not in ("seen", "unseen"):
        raise ValueError(f"unknown category or split, {category} {split}")
    pairs = SEEN_PAIRS if split == "seen" else tuple(sorted(HELD_OUT))
    rng = np.random.default_rng(zlib.crc32(f"{category} {split}".encode()))    # hash() varies
    found, misses = [], 0                                    # misses in a row
    while len(found) < n:
        for scene in _ask(rng, category, pairs):
            caption, misses = scene.caption(), misses + 1
            ours = all((t.color, t.shape) in pairs for t in scene.things)  # a swap may leave them
            if ours and caption not in found and layout(rng, scene):
                found, misses = [*found, caption], 0
        if misses > 1000:                                    # there are no more: start over
            found += found[:n - len(found)]
    return found[:n]

def truth(caption, seed=0, size=(64, 64), frames=1):
    """A freshly drawn clip of a caption: uint8 (F, H, W, 3). ValueError as `parse`, or no room."""
    scene, rng = parse(caption), np.random.default_rng((seed, zlib.crc32(caption.encode())))
    if not any(layout(rng, scene, [side / min(size) for side in size]) for _ in range(100)):
        raise ValueError(f"'{caption}' does not fit into a picture")
    return draw(scene, size, frames)

def _ask(rng, category, pairs):        # up to two scenes: a prompt and its swap partner
    if category in ("single", "pair"):                       # from the basic world
        scene = _choose_words(rng, "single" if category == "single" else "basic", 1, pairs)
        return [scene] if category == "single" or len(scene.things) == 2 else []
    while True:                                              # three things of three colours
        (c0, s0), (c1, s1), (c2, s2) = [_pick(rng, pairs) for _ in range(3)]
        if len({c0, c1, c2}) == 3 and (s0 != s1 or category not in ("color", "shape")):
            break                                            # the swap must change something
    a, b, c = Thing(c0, s0), Thing(c1, s1), Thing(c2, s2)
    if category in ("color", "shape"):                       # swap the colours
        return [Scene([a, b]), Scene([Thing(c1, s0), Thing(c0, s1)])]
    if category == "texture":                                # on one thing, or swapped
        t0, t1 = rng.permutation((*TEXTURES, "solid"))[:2].tolist()
        if rng.random() < 0.3:
            return [Scene([Thing(c0, s0, t)]) for t in (t0, t1) if t != "solid"]
        return [Scene([Thing(c0, s0, u), Thing(c1, s1, v)]) for u, v in ((t0, t1), (t1, t0))]
    if category in ("spatial", "non-spatial"):               # swap the things
        relation = _pick(rng, tuple(DIRECTIONS) if category == "spatial" else TOUCHING)
        return [Scene([a, b], relation), Scene([b, a], relation)]
    if category == "complex":                                # three things, or two with attributes
        if rng.random() < 0.5:
            return [Scene([a, b, c], _pick(rng, RELATIONS))]
        a.size, b.size = rng.permutation(("small", "large")).tolist()
        (a if a.size == "large" else b).texture = _pick(rng, TEXTURES)
        return [Scene([a, b], _pick(rng, tuple(DIRECTIONS)))]
    if category == "numeracy":                               # at most five instances in all
        a.count, alone = 2 + int(rng.integers(3)), rng.random() < 0.5
        b.count = 1 if alone else 1 + int(rng.integers(5 - a.count))
        return [Scene([a] if alone else [a, b])]
    if category == "motion":                                 # any but "staying still"
        return [Scene([Thing(c0, s0, motion=_pick(rng, MOTIONS[:-1]))])]
    two = category == "motion-binding" or rng.random() < 0.5
    m0, m1 = (("staying still",) * 2 if category == "stillness" else
              rng.permutation(MOTIONS)[:2].tolist())
    return [Scene([Thing(c0, s0, motion=u), Thing(c1, s1, motion=v)])
            for u, v in ((m0, m1), (m1, m0))] if two else [Scene([Thing(c0, s0, motion=m0)])]

# ==== Below: engineering. A first reading may stop here. ============================
# ---- 6. Files that a user names, and the way out of a script
_NO_MEMORY = re.compile("out of memory|allocate memory|enough memory|ALLOC_FAILED|bad_alloc", re.I)

def plain(text):
    """The text with "?" for control characters, direction marks and halves of surrogate pairs."""
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else "?" for c in text)     # joiners

def say(*lines):
    """Prints lines through `plain`."""
    print(*map(plain, "\n".join(lines).split("\n")), sep="\n", flush=True)

class _Forgiving:           # a stream: once its disk is full or its reader gone, its text is lost
    def __init__(self, stream):
        self._stream = stream or open(os.devnull, "w")       # None: closed, `>&-`
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")             # an ASCII terminal has no "é"
    def __getattr__(self, name):
        return getattr(self._stream, name)
    def write(self, text):
        try:
            self._stream.write(text), self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

def _check_inside(path, folder):       # realpath, unlike Path.resolve(), accepts a loop of links
    if folder and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path} lies outside of the folder; remove the link")

def open_input(path, most=2 ** 20, inside=None):
    """Opens a regular file of at most `most` bytes (None: any) in the folder `inside`, if given."""
    _check_inside(path, inside)
    if os.path.getsize(path) > (most or math.inf) or not os.path.isfile(path):     # or FIFO, device
        raise ValueError(f"not a regular file of at most {most or math.inf:,} bytes, {path}")
    return open(path, "rb")

def read_text(path, most=2 ** 20, inside=None):
    """The text of a UTF-8 file, without a byte order mark. Raises as `open_input` does."""
    with open_input(path, most, inside) as file, suppress(UnicodeDecodeError):
        return file.read(most).decode("utf-8-sig")
    raise ValueError(f"not UTF-8 text, {path}")

def writable(path, inside=None, inputs=()):
    """The Path of a file to be written, never one of `inputs` (ValueError). Makes its folder."""
    path = Path(path)
    _check_inside(path.parent, inside)
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.exists()
    if there and not path.is_file() or not os.access(path if there else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written; try another folder")
    if there and any(p and os.path.exists(p) and path.samefile(p) for p in inputs):
        raise ValueError(f"{path} is read by this command, too; give another file to write")
    return path

@contextmanager
def writing(path):
    """`with writing(path) as beside:` gives a file beside `path`, renamed to it at the end. After
    an error the old file stays; an OSError names the path."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        beside.unlink(missing_ok=True)                       # the leftover of a killed process
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())                          # on the disk before it is renamed
        os.replace(beside, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; make room there") from None
    finally:
        beside.unlink(missing_ok=True)

def run_main(work, memory_advice="try less at once"):
    """Calls work() -> its exit code (None = 0). An error that the user can mend becomes one line on
    stderr and code 2, Ctrl-C 130; other exceptions keep their traceback."""
    sys.stdout, sys.stderr = _Forgiving(sys.stdout), _Forgiving(sys.stderr)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)       # from here on it is caught
        return work() or 0
    except KeyboardInterrupt:
        code, line = 130, "stopped by Ctrl-C"
    except (ValueError, OSError, OverflowError, MemoryError, RuntimeError) as error:
        code, line = 2, f"error: {error}"
        if isinstance(error, OSError) and error.filename:
            line = f"error: {error.strerror}, {error.filename}"
        elif isinstance(error, RecursionError):
            line = "error: the input is nested too deeply"
        elif isinstance(error, MemoryError) or _NO_MEMORY.search(line):
            line = f"error: out of memory; {memory_advice}"
        elif isinstance(error, RuntimeError):
            raise
    print(plain(" ".join(line.split()))[:300], file=sys.stderr)
    return code

# ---- 7. Your own pictures and clips
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".webm")
MAX_PIXELS, MAX_CAPTION, MAX_FILE = 70_000_000, 1000, 2 ** 30          # a frame, letters, bytes
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2                    # pillow refuses more than twice as many
warnings.filterwarnings("ignore", module="PIL")             # about oddities that can be read

class Folder:
    """A folder of pictures or clips; folder[i] -> (uint8 array (F, H, W, 3), caption).
    Captions come from the first of these that exists:
      captions.jsonl     one {"file": "a.png", "caption": "..."} a line
      name.txt           beside name.png (or beside the folder `name` with a clip's frames)
      class folders      corgi/1.jpg: the folder's name is the caption, `labels` lists them
      none               every caption is "": the model trains unconditionally
    An animation gives F frames at `fps`, by its own clock. Every file is decoded once here, so that
    a broken one is found early: `skipped` lists (name, reason). ValueError if nothing is usable."""
    def __init__(self, path, size=(64, 64), frames=1, fps=4):
        self.root, self.size, self.frames, self.fps = Path(path), tuple(size), frames, fps
        if not self.root.is_dir():
            raise ValueError(f"no such folder, {path}; give a folder of pictures, or 'shapes'")
        self.items, self.skipped = [], []                    # (file, caption), (name, reason)
        for file, caption in tqdm(list(self._find()), desc=f"checking {path}", delay=2):
            try:
                if isinstance(caption, Exception):
                    raise caption
                if isinstance(caption, Path):
                    caption = read_text(caption, inside=self.root)
                self._load(file)
                self.items.append((file, plain(" ".join(caption.split())[:MAX_CAPTION])))
            except Exception as error:  # noqa: BLE001 - a broken file can raise anything
                reason = (str(error) or repr(error)).replace(f"{self.root}{os.sep}", "")
                self.skipped.append((os.path.relpath(file, self.root), reason.split("\n")[0][:200]))
        if not self.items:
            why = " ({}: {})".format(*self.skipped[0]) if self.skipped else ""
            raise ValueError(f"no usable {'clip' if frames > 1 else 'picture'}, {path}{why}")
        self.captions = [caption for _, caption in self.items]
        self.labels = sorted(set(self.captions)) if self.how == "class folders" else []
    def __len__(self):
        return len(self.items)
    def __getitem__(self, i):
        return self._load(self.items[i][0]), self.items[i][1]
    def stem(self, file):     # its name without a suffix, to find its namesake in another folder
        return Path(os.path.relpath(file, self.root)).with_suffix("").as_posix()
    def fingerprint(self):    # a checksum of the files' names, sizes and times and of the captions
        facts = [(self.stem(f), c, f.stat().st_size, f.stat().st_mtime_ns) for f, c in self.items]
        return f"{zlib.crc32(repr(facts).encode()):08x}"
    def report(self):         # what was found, as lines to print
        kind = "pictures" if self.frames == 1 else f"clips of {self.frames} frames"
        return [f"{self.root}: {len(self):,} {kind}, {self.size[0]}x{self.size[1]}, captions: "
                f"{self.how}; {self.captions.count('')} without words, {len(self.skipped)} skipped",
                *(f"  '{caption[:70]}'" for caption in self.captions[:3] if caption),
                *(f"  skipped {name[:200]}: {reason}" for name, reason in self.skipped[:10])]
    def _find(self):          # yields (file, caption or the Path of its text or why there is none)
        root, listing = self.root, self.root / "captions.jsonl"
        if listing.is_file():
            self.how = listing.name
            with open_input(listing, MAX_FILE, root) as lines:
                parts = iter(lambda: lines.readline(2 ** 20), b"")     # it may be one endless line
                for number, line in filter(lambda x: x[1].strip(), enumerate(parts, 1)):
                    try:
                        row = json.loads(line.decode("utf-8-sig"))
                        yield root / row["file"], " ".join(row["caption"].split())
                    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                        yield root / f"{listing.name} line {number}", ValueError(
                            'not UTF-8 JSON as {"file": "a.png", "caption": "a dog"}')
            return
        every = [p for p in sorted(root.rglob("*")) if "/." not in f"/{p.relative_to(root)}"]
        texts = {p.with_suffix(""): p for p in every if p.suffix.lower() == ".txt"}
        clips = {p for p in texts if p.is_dir() and _pictures_in(p)}
        files = [p for p in every if p in clips or p.suffix.lower() in PICTURES + VIDEOS
                 and p.parent not in clips and not p.is_dir()]
        texts = {p: texts.get(p if p in clips else p.with_suffix("")) for p in files}
        if any(texts.values()):
            self.how = "a .txt beside each file"
            yield from ((p, text or ValueError("no caption")) for p, text in texts.items())
            return
        deep = any(p.parent != root for p in files)
        self.how = "class folders" if deep else "none, trains unconditionally"
        for p in files:
            folder, *inside = p.relative_to(root).parts
            yield p, folder if inside else ValueError("not in a class folder") if deep else ""
    def _load(self, file):    # -> uint8 (F, H, W, 3), shown at 0, 1 / fps, ...; the last is held
        taken, shown, pixels = [], None, 0                   # shown: the frame before `start`
        for start, image in _frames(file, self.root, self.frames, self.fps):
            # A GIF rounds k / fps to hundredths of a second
            due = min(self.frames, math.ceil(start * self.fps - min(0.4, 0.0051 * self.fps)))
            taken += [shown] * (due - len(taken))
            if len(taken) == self.frames:
                break
            pixels += image.width * image.height
            if pixels > MAX_PIXELS * 16:                     # a small file can unpack to more
                raise ValueError("too many pixels to decode")
            shown = fit(image, self.size)
        if shown is None:
            raise ValueError("holds no frame")
        return np.stack(taken + [shown] * (self.frames - len(taken)))

def _pictures_in(folder):              # its picture files, if it holds nothing else; 2 before 10
    inside = sorted((p for p in folder.iterdir() if not p.name.startswith(".")),
                    key=lambda p: re.sub("[0-9]+", lambda digits: digits[0].zfill(20), p.name))
    return inside if all(p.is_file() and p.suffix.lower() in PICTURES for p in inside) else []

def _frames(file, root, frames, fps):  # yields (start in seconds, PIL image)
    if file.is_dir():
        for k, path in enumerate(_pictures_in(file)):
            with open_picture(path, root) as image:
                yield k / fps, image
    elif file.suffix.lower() in VIDEOS:
        limit = {"max_pixels": str(MAX_PIXELS)}              # the decoder's own check
        only = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"}   # no playlists
        with open_input(file, None, root) as stream, need_av("reading").open(
                stream, container_options=only, stream_options=[limit] * 8) as container:
            video, first = container.streams.video[0], None
            video.codec_context.options = limit
            for frame in container.decode(video):
                first = frame.time or 0 if first is None else first    # a cut video starts late
                yield float((frame.time or 0) - first), frame.to_image()
    else:
        with open_picture(file, root) as image:
            moves = image.format == "GIF" or image.format == "WEBP" and image.is_animated
            if frames > 1 and not moves:                     # a GIF is a clip, even of one frame
                raise ValueError("a still picture; give it by --image-data")
            start = 0.0
            for frame in ImageSequence.Iterator(image) if moves else [image]:
                yield start, frame
                start += (frame.info.get("duration") or 100) / 1000    # milliseconds

def need_av(doing):
    """The av package (PyAV), imported only if there is a video. ValueError with the remedy."""
    with suppress(ImportError):
        import av
        return av
    raise ValueError(f"{doing} videos needs: pip install -e '.[video]'")

@contextmanager
def open_picture(file, inside=None):
    """Image.open of six formats. Others: ValueError or OSError (pillow would run PostScript)."""
    try:
        with open_input(file, MAX_FILE, inside) as opened:
            yield Image.open(opened, formats=("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"))
    except Exception as error:  # noqa: BLE001 - pillow raises many kinds for a broken file
        if isinstance(error, (ValueError, MemoryError)) or getattr(error, "filename", None):
            raise                                            # it is plain, or names the file
        raise ValueError(f"unreadable or over {MAX_PIXELS // 10**6} megapixels, {file}") from error

def size_of(file):
    """(height, width) of a picture file, turned as EXIF says. Raises as `open_picture` does."""
    with open_picture(file) as image:
        return ImageOps.exif_transpose(image).size[::-1]

def fit(image, size):
    """A picture (PIL image or path) -> uint8 (H, W, 3), upright, cropped to its middle, resized."""
    if not isinstance(image, Image.Image):
        with open_picture(image) as opened:
            return fit(opened, size)
    if image.format == "JPEG":               # decode a large JPEG at 1/2, 1/4, 1/8: faster
        image.draft("RGB", (2 * max(size), 2 * max(size)))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":                # 16 or 32 bits a pixel
        a = np.nan_to_num(np.array(image, np.float32))       # its maximum tells what white is
        top = 65535 if a.max() > 255 or image.mode != "F" else 255 if a.max() > 1 else 1
        image = Image.fromarray((a * (255 / top) + 0.5).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")                        # its clear parts lie on white
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(ImageOps.fit(image.convert("RGB"), size[::-1], Image.LANCZOS))

class Subset:
    """Some items of a Folder or a Cache. places (n,): the numbers of these items in it."""
    def __init__(self, dataset, places):
        self.dataset, self.places = dataset, places
    def __len__(self):
        return len(self.places)
    def __getitem__(self, i):
        return self.dataset[self.places[i]]
    def __getattr__(self, name):             # asked only for what a Subset lacks
        value = getattr(vars(self).get("dataset"), name)     # pickle asks before it is set
        return [value[i] for i in self.places] if name == "captions" else value

def hold_out(dataset, seed, share=0.03):
    """Folder or Cache -> two Subsets: for training, a random `share` (none of under 20 items)."""
    count = max(1, round(len(dataset) * share)) if len(dataset) >= 20 else 0
    order = np.random.default_rng((seed, len(dataset))).permutation(len(dataset))
    return Subset(dataset, np.sort(order[count:])), Subset(dataset, np.sort(order[:count]))

# ---- 8. The cache: latents and text features, stored by `train.py --stage encode`
# P processes write P parts. Item i is row i // P of part p = i % P. All arrays are raw rows.
#   index.json           the shared facts: items, shape, size, fingerprint of the encoders, ...
#   latents.p.f16        (rows, F, C, h, w)
#   captions.p.jsonl     one JSON string a row
#   tokens.k.p.f16       (T, D_k): encoder k's real tokens of "" and then of each distinct caption
#   lengths.k.p.u32      how many of these tokens "" and each distinct caption have
#   pooled.p.f16         ("" and the distinct captions, sum of D_k)
CACHE_FORMAT = "gentron cache 2"
_BAD = (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError)

def cache_index(path):
    """The checked index.json of a cache. {} if it is damaged, None if there is no cache."""
    whole = lambda high, *values: all(type(v) is int and 1 <= v <= high for v in values)
    words = lambda *values: all(type(v) is str for v in values)
    with suppress(*_BAD):
        x = json.loads(read_text(Path(path) / "index.json", 2 ** 26, path))
        if (x["format"] == CACHE_FORMAT and len(x["size"]) == 2 and len(x["shape"]) == 4
                and whole(4096, *x["size"], *x["shape"], x["frames"]) and type(x["fps"]) is not bool
                and whole(10 ** 10, x["items"], x["parts"], *x["dims"]) and 0.01 <= x["fps"] <= 1000
                and words(x["fingerprint"], *x["labels"], *x["vocabulary"])
                and x["shape"][0] == x["frames"]
                and (words(x["text"]) if x["dims"] else x["text"] is None)):
            return x
    return {} if (Path(path) / "latents.0.f16").is_file() else None

def _open_part(folder, index, p):      # its complete rows; sizes: the bytes of each file that count
    sizes, dims, rows = {}, index["dims"], len(range(p, index["items"], index["parts"]))
    def array(name, kind, n, width):         # np.memmap raises if the file is shorter
        sizes[name] = n * width * np.dtype(kind).itemsize
        with open_input(folder / name, None, folder) as file:
            return np.memmap(file, kind, "r", 0, (n, width))
    width, latents = math.prod(index["shape"]), f"latents.{p}.f16"
    n = min(rows, os.path.getsize(folder / latents) // (2 * width))
    with open_input(folder / f"captions.{p}.jsonl", 2 ** 14 * (n + 1000), folder) as file:
        lines = file.read().split(b"\n")[:-1]               # a caption: at most 12,002 bytes
    latents = array(latents, "<f2", n := min(n, len(lines)), width)
    sizes[f"captions.{p}.jsonl"] = n + sum(map(len, lines[:n]))
    captions = [json.loads(line) for line in lines[:n]]
    texts = {text: row for row, text in enumerate(dict.fromkeys(["", *captions]))} if dims else {}
    ends, tokens = [], []
    for k, width in enumerate(dims):
        ends.append(array(f"lengths.{k}.{p}.u32", "<u4", len(texts), 1).cumsum(dtype=np.int64))
        tokens.append(array(f"tokens.{k}.{p}.f16", "<f2", int(ends[k][-1]), width))
    pooled = array(f"pooled.{p}.f16", "<f2", len(texts), sum(dims)) if dims else None
    exact = all(os.path.getsize(folder / name) == size for name, size in sizes.items())
    if n == rows and not exact or not all(type(caption) is str for caption in captions):
        raise ValueError(f"the files of part {p} do not belong together")
    return latents, captions, texts, tokens, ends, pooled, sizes

class CacheWriter:
    """Writes one part of a cache (part 0 the index, too), from where an interrupted run stopped:
    `done` of `rows` are there. A damaged part is begun again."""
    def __init__(self, folder, index, part=0):
        index = json.loads(json.dumps({**index, "format": CACHE_FORMAT}))      # tuples -> lists
        self.folder, self.part, self.dims = Path(folder), part, index["dims"]
        self.rows = len(range(part, index["items"], index["parts"]))
        file, there = writable(self.folder / "index.json"), cache_index(folder)
        if not there and part == 0:
            if there is None and any(x.name[0] != "." for x in self.folder.iterdir()):
                raise ValueError(f"{file} is no cache's, in a folder with files; try another --out")
            for old in self.folder.glob("latents.*.f16"):    # their index is damaged: begin again
                old.unlink()
            with writing(file) as beside:
                beside.write_text(json.dumps(index), encoding="utf-8")
        for key in index:
            if there and there.get(key) != index[key]:
                raise ValueError(f"cache {folder} was begun with another {key}; delete it first")
        try:
            _, captions, self.texts, *_, sizes = _open_part(self.folder, index, part)
        except _BAD:                                         # nothing is there, or it is damaged
            captions, self.texts, sizes = [], {}, {}
            for old in self.folder.glob(f"*.{part}.[fju]*"):               # tokens.1.0.f16: part 0
                old.unlink() if old.suffix in (".f16", ".jsonl", ".u32") else None
        self.done = len(captions)
        for name, size in sizes.items():
            os.truncate(self.folder / name, size)
    def append(self, latents, captions, features=None):
        """Adds latents (B, F, C, h, w) and B captions. features: None, or a function that is called
        for new captions: m strings -> (for each encoder m arrays (L, D_k), pooled (m, P))."""
        half = lambda x: np.clip(x, -65504, 65504).astype("<f2").tobytes()
        p, more = self.part, {}                              # more: {file name: bytes}
        new = [text for text in dict.fromkeys(["", *captions]) if text not in self.texts]
        if self.dims and new:
            tokens, pooled = features(new)
            for k, rows in enumerate(tokens):
                more[f"tokens.{k}.{p}.f16"] = half(np.concatenate(rows))
                more[f"lengths.{k}.{p}.u32"] = np.array(list(map(len, rows)), "<u4").tobytes()
            more[f"pooled.{p}.f16"] = half(pooled)
            self.texts |= dict.fromkeys(new)
        more[f"captions.{p}.jsonl"] = "".join(json.dumps(c) + "\n" for c in captions).encode()
        more[f"latents.{p}.f16"] = half(latents)
        for name, content in more.items():
            try:
                with open(self.folder / name, "ab") as file:
                    file.write(content)
            except OSError as error:
                raise OSError(f"cannot write {self.folder / name}: {error.strerror}") from None
        self.done += len(captions)

class Cache:
    """A folder that `CacheWriter` wrote; cache[places] -> (fp16 latents (B, F, C, h, w), captions),
    memory-mapped. ValueError if it is damaged, not finished, or of another size or length."""
    def __init__(self, path, size=None, frames=None):
        self.root, x = Path(path), cache_index(path)
        if not x:
            raise ValueError(f"no cache or a damaged one, {path}; python train.py --stage encode")
        self.shape, self.size, self.dims = tuple(x["shape"]), tuple(x["size"]), tuple(x["dims"])
        self.text_spec, self.n, P = x["text"], x["items"], x["parts"]
        for name in ("frames", "fps", "labels", "vocabulary", "fingerprint"):
            setattr(self, name, x[name])
        if (tuple(size or self.size), frames or self.frames) != (self.size, self.frames):
            raise ValueError(f"cache of another size, {path}: {self.frames} frames of {self.size}")
        try:
            self.parts = [_open_part(self.root, x, p) for p in range(min(P, self.n))]
        except _BAD as error:
            raise ValueError(f"damaged cache, {path} ({error!r:.80}); encode again") from None
        if sum(len(part[1]) for part in self.parts) < self.n:
            raise ValueError(f"cache not finished, {path}; run the same command again")
        self.captions = [self.parts[i % P][1][i // P] for i in range(self.n)]
        self.where = {t: (p, row) for p, x in enumerate(self.parts) for t, row in x[2].items()}
    def __len__(self):
        return self.n
    def __getitem__(self, places):
        latents = [self.parts[i % len(self.parts)][0][i // len(self.parts)] for i in places]
        return (np.array(latents, np.float16).reshape(-1, *self.shape),
                [self.captions[i] for i in places])
    def text(self, caption):
        """A stored caption, or "" -> fp16 tokens, an (L, D_k) for each encoder, and pooled (P,)."""
        p, row = self.where[caption]
        _, _, _, tokens, ends, pooled, _ = self.parts[p]
        return [x[end[row - 1] if row else 0:end[row]] for x, end in zip(tokens, ends)], pooled[row]
    def report(self):         # what is in it, as lines to print
        return [f"{self.root}: cache of {self.n:,} items, {self.size[0]}x{self.size[1]}, text "
                f"features: {self.text_spec or 'none, only captions'}"]

def open_data(name, size=(64, 64), frames=1, fps=4, level="basic", n=10_000, seed=0):
    """"shapes" -> Shapes, a cache's folder -> Cache, anything else -> Folder. Raises as these."""
    return (Shapes(level, n, seed, size, frames) if name == "shapes" else
            Folder(name, size, frames, fps) if cache_index(name) is None else
            Cache(name, size, frames))

# ---- 9. Sheets and films
def contact_sheet(clips, captions, columns=6, notes=None, frame=0, cell=128):
    """Frame `frame` of clips, uint8 (F, H, W, 3) or (H, W, 3), in a grid, captions under them ->
    PIL.Image. notes: for each None or (text, color). cell: a picture's width in pixels."""
    font, gap = ImageFont.load_default(size=12), 12
    clips = [clip[None] if clip.ndim == 3 else clip for clip in clips]
    notes = [note or ("", "#d8d8d8") for note in notes or [None] * len(clips)]
    columns, (h, w) = max(1, min(columns, len(clips))), clips[0].shape[1:3]
    tall = min(8 * cell, max(1, round(cell * h / w)))
    wrap = lambda text: textwrap.wrap(text[:600], cell // 6, max_lines=5, placeholder="…")
    lines = [(wrap(caption), wrap(note)) for caption, (note, _) in zip(captions, notes)]
    room = tall + 15 * max(len(a) + len(b) for a, b in lines) + 6 + gap    # the height of a row
    size = gap + columns * (cell + gap), gap + math.ceil(len(clips) / columns) * room
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for k, (clip, (caption, note), (_, color)) in enumerate(zip(clips, lines, notes)):
        x, y = gap + k % columns * (cell + gap), gap + k // columns * room
        picture = Image.fromarray(clip[min(frame, len(clip) - 1)])
        enlarge = Image.NEAREST if cell % w == 0 and cell > w else Image.LANCZOS   # or keep squares
        sheet.paste(picture.resize((cell, tall), enlarge), (x, y))
        pen.rectangle((x - 1, y - 1, x + cell, y + tall), outline=color, width=2 if note else 1)
        for n, line in enumerate(caption + note):
            pen.text((x, y + tall + 4 + 15 * n), line, font=font,
                     fill="#222222" if n < len(caption) else color)
    return sheet

def save_gif(path, images, fps=4):
    """Writes PIL images as a GIF that loops for ever, `fps` images a second."""
    strip = Image.fromarray(np.concatenate([np.asarray(image) for image in images]))
    palette = strip.quantize(255, dither=Image.Dither.NONE)  # one for all: nothing flickers
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    ends = [10 * round(100 * k / fps) for k in range(len(images) + 1)]     # in whole hundredths
    lengths = [max(10, b - a) for a, b in zip(ends, ends[1:])]
    first.save(path, "GIF", save_all=True, append_images=rest, loop=0,
               duration=lengths if rest else lengths[0])

def save_mp4(path, images, fps=4):
    """Writes PIL images as an H.264 video, `fps` images a second. ValueError if av is missing."""
    av = need_av("writing")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100))
        stream.width, stream.height = (side // 2 * 2 for side in images[0].size)   # even sides
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "16"}          # nearly lossless
        for image in images:
            image = image.crop((0, 0, stream.width, stream.height))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))                   # the frames that are still inside

# ---- 10. Command lines (train.py and sample.py use these, too)
def number(kind, low, high=10 ** 12):
    """An argparse type: a number of `kind` from low to high."""
    def parsed(text):
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high:                         # false for NaN
                return value
        raise argparse.ArgumentTypeError(f"'{text[:50]}' is not a{' whole' * (kind is int)} number "
                                         f"from {low} to {high}")
    return parsed

def picture_size(text):
    """An argparse type: '64' -> (64, 64), '64x96' -> (64, 96), height x width in pixels."""
    high, _, wide = text.lower().partition("x")
    return tuple(number(int, 8, 4096)(side) for side in (high, wide or high))

class Parser(argparse.ArgumentParser):
    """argparse whose errors are a ValueError, so one line."""
    def error(self, message):
        raise ValueError(f"{message[:250]}; try --help")

def parser():
    """Every flag. No abbreviations: a later flag could change the meaning of an old command."""
    p = Parser(description="Look at the dataset: a sheet with captions.", allow_abbrev=False)
    add = p.add_argument
    add("--preview", required=True, metavar="FILE", help="out.png, or out.gif for clips")
    add("--data", default="shapes", help="'shapes' or a folder of yours")
    add("--world", default="full", choices=("basic", "full"), help="how much of the world")
    add("--frames", type=number(int, 1, 1024), default=1, help="frames a clip; 1 = pictures")
    add("--fps", type=number(float, 0.01, 1000), default=4, help="frames a second")
    add("--size", type=picture_size, default=(64, 64), metavar="H[xW]", help="in pixels (64)")
    add("--seed", type=number(int, 0, 2 ** 31 - 1), default=0)
    add("--n", type=number(int, 1, 1000), default=24, help="how many items to show (24)")
    return p

def preview(args):
    """Writes the sheet that the flags ask for. ValueError or OSError if that is not possible."""
    out, film = writable(args.preview), args.preview.lower().endswith(".gif")
    if not film and out.suffix.lower() != ".png":
        raise ValueError(f"cannot write '{out.suffix}' files, {out}; try .png or .gif")
    if args.n * args.frames * math.prod(args.size) > 2 ** 30:
        raise MemoryError                                    # a billion pixels
    if args.data != "shapes" and cache_index(args.data) is not None:
        raise ValueError(f"nothing to look at, {args.data} holds latents; try the pictures' folder")
    data = open_data(args.data, args.size, args.frames, args.fps, args.world, args.n, args.seed)
    inputs = [file for file, _ in getattr(data, "items", ())]    # of a Folder
    say(*(data.report() if inputs else [f"the shapes world ({args.world}), seed {args.seed}"]))
    clips, captions = zip(*[data[i] for i in range(min(args.n, len(data)))])
    sheets = [contact_sheet(clips, captions, frame=f) for f in range(args.frames if film else 1)]
    with writing(writable(out, inputs=inputs)) as beside:
        save_gif(beside, sheets, args.fps) if film else sheets[0].save(beside)
    say(f"wrote {out}")

def main(argv=None):
    """Command line -> exit code: 0, or 2 for an error that the user can mend."""
    return run_main(lambda: preview(parser().parse_args(argv)), "try a smaller --n or --size")

if __name__ == "__main__":
    sys.exit(main())
