"""
data.py: what the model eats.

    python data.py --preview out.png              # look at the dataset, captions under the pictures
    python data.py --preview out.gif --frames 8    # the same for clips

Three sources. An item is a clip and its caption: (uint8 array (F, H, W, 3), str), and a picture is
a clip with F = 1; the third has latents in place of pixels.

  1. The shapes world: pictures drawn from their captions. Because the truth is known, a *judge*
     can read a picture back and say whether it shows what was asked: text alignment is measured
     here, not guessed. `Shapes` draws, `judge` reads.
  2. `Folder`: your own pictures and clips (captions beside them, class folders, or none).
  3. `Cache`: latents and text features stored by `train.py --stage encode`.

The world's grammar, all of it:

  picture = object | object and object | object RELATION object | object RELATION object and object
  clip    = object MOTION [and object MOTION]
  object  = COUNT [SIZE] [TEXTURE] COLOR SHAPE            "two small striped red circles"

The way of a caption through this file, and back:

  Scene       what is said     things, and how the first two are related          sections 1, 2
  tracks      where it is      (instances, 2, 3): x, y, radius at start and end   `layout`
  clip        what is shown    uint8 (F, H, W, 3)                                 `draw`
  [Seen, ...] what is found    objects in one frame, whatever was asked           `read`
  Verdict     is it what was asked, and if not, why                               `judge`

Shapes: F frames, H W height and width in pixels. Lengths of the world are in units of a picture's
shorter side, x to the right, y *down*: one scene can be drawn at any size. Nothing here is learned.
OURS: all of the world; the paper trains on internal pictures and clips and judges by T2I-CompBench.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# -----------------------------------------------------------------------------
# 1. The shapes world: vocabulary
# -----------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {                      # picked to stay apart from each other, the ground and the ink
    "red":    (222, 38, 38),  "green": (38, 158, 62),   "blue":   (44, 78, 222),
    "yellow": (246, 208, 40), "purple": (134, 52, 178), "orange": (244, 130, 24),
    "pink":   (248, 130, 196), "cyan": (52, 200, 224),
}
GROUND = (247, 245, 240)        # off-white
INK = (38, 38, 48)              # what stripes, dots and checks are drawn with, on every colour
TEXTURES = ("striped", "dotted", "checkered")               # solid is left unsaid
COUNTS = {"a": 1, "two": 2, "three": 3, "four": 4}
# Radius of an object. The gaps between the ranges, 2.5 and 3.5 pixels of 64, are what lets the
# judge tell the sizes apart (7, 10 and 15 pixels of 64). Medium is left unsaid.
SIZES = {"small": (0.105, 0.115), "medium": (0.155, 0.170), "large": (0.225, 0.245)}
# (x, y) to go from the second thing to the first; y is down.
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
TOUCHING = ("inside", "in front of")    # everywhere else, things keep a distance from each other
RELATIONS = (*DIRECTIONS, *TOUCHING)
STEPS = {"moving left": (-1, 0), "moving right": (1, 0),
         "moving up": (0, -1), "moving down": (0, 1)}
MOTIONS = (*STEPS, "growing", "shrinking", "staying still")

# Eight colour-shape pairs never occur in training, though each of their words does: drawing them
# is the test that a model composes words and does not recall pictures. Each colour lacks one shape,
# and each shape a colour or two, so that no word stands out as the rare one.
HELD_OUT = frozenset({("red", "cross"), ("green", "ring"), ("blue", "triangle"),
                      ("yellow", "star"), ("purple", "square"), ("orange", "circle"),
                      ("pink", "cross"), ("cyan", "star")})
PAIRS = tuple((c, s) for c in COLORS for s in SHAPES)                                        # 48
SEEN_PAIRS = tuple(p for p in PAIRS if p not in HELD_OUT)                                    # 40


def plural(shape):
    """'circle' -> 'circles', 'cross' -> 'crosses'."""
    return shape + ("es" if shape.endswith("s") else "s")


def vocabulary():
    """Every word a caption of the world can hold, sorted. Motions too: a text encoder trained on
    pictures then has a place ready for each word that the clips will bring."""
    phrases = [*SHAPES, *map(plural, SHAPES), *COLORS, *TEXTURES, "small", "large", *COUNTS,
               *RELATIONS, *MOTIONS, "and"]
    return sorted({word for phrase in phrases for word in phrase.split()})


@dataclass
class Thing:
    """One noun phrase of a caption: "two small striped red circles [moving left]"."""
    color: str
    shape: str
    texture: str = "solid"
    size: str = "medium"
    count: int = 1                       # so many instances, alike in everything but their place
    motion: str = ""                     # one of MOTIONS in a clip, "" in a picture

    def words(self):
        """As it stands in a caption: "two small striped red circles"; "a", or "an", is one."""
        number = next(word for word, n in COUNTS.items() if n == self.count)
        noun = self.shape if self.count == 1 else plural(self.shape)
        words = (number, self.size, self.texture, self.color, noun, self.motion)
        first, *rest = [word for word in words if word not in ("medium", "solid", "")]
        if first == "a" and rest[0][0] in "aeiou":          # an orange circle
            first = "an"
        return " ".join([first, *rest])


@dataclass
class Scene:
    """A caption's meaning, and (once laid out) where everything is.

    `relation` relates things[0] to things[1]; a third thing is anywhere. `tracks` is
    (instances, 2, 3): for each instance, in the order of the things, its (x, y, radius) at the
    clip's start and at its end, in units of the shorter side; in a picture the two are equal.
    """
    things: list
    relation: str = ""
    tracks: np.ndarray = field(default=None, repr=False)

    def caption(self):
        """The sentence; `parse` reads it back."""
        first, *rest = [thing.words() for thing in self.things]
        if self.relation:
            first += f" {self.relation} {rest.pop(0)}"
        return " and ".join([first, *rest])

    def owners(self):
        """Which thing each instance is: two circles and a square -> [0, 0, 1]."""
        return [k for k, thing in enumerate(self.things) for _ in range(thing.count)]


# Six groups an object, as in Thing; the relation is a group between the first object and the second
_OBJECT = (rf"(an?|two|three|four)(?: (small|large))?(?: ({'|'.join(TEXTURES)}))? "
           rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?:e?s)?(?: ({'|'.join(MOTIONS)}))?")
_CAPTION = re.compile(rf"{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})?(?: and {_OBJECT})?$")


def parse(caption):
    """Caption -> Scene without tracks, the inverse of `Scene.caption`. Capitals, commas, full stops
    and extra spaces are forgiven, as is a plural's ending.

    Raises ValueError for a sentence that is not of the world's grammar."""
    match = _CAPTION.match(" ".join(caption.lower().replace(",", " ").replace(".", " ").split()))
    if not match:
        raise ValueError(f"'{caption}' is not a sentence of the shapes world")
    groups = match.groups()                                 # 6 + 1 + 6 + 6
    things = [Thing(color, shape, texture or "solid", size or "medium",
                    COUNTS.get(count, 1), motion or "")     # "an" is "a"
              for count, size, texture, color, shape, motion
              in (groups[0:6], groups[7:13], groups[13:19]) if count]
    return Scene(things, groups[6] or "")


def is_picture(caption):
    """Is it a sentence of the world that names no motion? Asked for as a clip, it stands still.
    False for any other sentence: of real clips nobody knows."""
    try:
        return not any(thing.motion for thing in parse(caption).things)
    except ValueError:
        return False


# -----------------------------------------------------------------------------
# 2. The shapes world: choosing a scene
# -----------------------------------------------------------------------------
#
# Words first, places after. Every number comes from one generator, in a fixed order: one more draw,
# or two exchanged, changes all pictures of all seeds, and so every figure measured on them.

# How often the full world says each, of a thing that can have it. So often that two textures, or
# two counts, in one sentence are no rarity: what is to be told apart must have been seen together.
SAID = {"count": 0.4, "size": 0.4, "texture": 0.5}


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


def _choose_words(rng, level, frames, pairs):
    """A random Scene without tracks; level, frames and pairs as in `Shapes`."""
    n, relation = 1, ""
    if level != "single":
        n += int(rng.random() < (0.4 if frames > 1 else 0.6))
    if n == 2 and frames == 1 and rng.random() < (0.5 if level == "full" else 0.6):
        # (else "and"; clips have no relations)
        relation = _pick(rng, RELATIONS if level == "full" else tuple(DIRECTIONS))
        n += int(level == "full" and rng.random() < 0.25)   # object relation object and object
    things = []
    while len(things) < n:
        color, shape = _pick(rng, pairs)
        if any((color, shape) == (t.color, t.shape) for t in things):
            continue                                        # "a red circle and a red circle"
        if relation in TOUCHING and len(things) == 1 and color == things[0].color:
            continue                                        # one blob of red: no edge between them
        things.append(Thing(color, shape))
    for k, thing in enumerate(things):
        if frames > 1:
            thing.motion = _pick(rng, MOTIONS)
        if level == "full":
            _adorn(rng, things, k, relation)
    return Scene(things, relation)


def _adorn(rng, things, k, relation):
    """Gives things[k] a count, a size and a texture, or leaves each unsaid."""
    thing, touches = things[k], relation in TOUCHING and k < 2
    # (a clip has no counts: what moves needs the room)
    if not touches and not thing.motion and rng.random() < SAID["count"]:
        more = min(3, 5 - sum(t.count for t in things))     # at most five instances in a picture
        thing.count += int(rng.integers(more + 1))
    if touches:                                             # small inside, large around or behind
        sizes = ("large",) if k == 1 else ("small",) if relation == "inside" else ()
    elif thing.motion in ("growing", "shrinking"):
        sizes = ()                                          # it has more than one
    else:
        sizes = ("small", "large") if thing.count == 1 else ("small",)     # room for all
    if sizes and rng.random() < SAID["size"]:
        thing.size = _pick(rng, sizes)
    # On something small a stripe would be 2.5 pixels of 64: too few to tell the patterns apart
    tiny = thing.size == "small" or (relation == "inside" and k == 0)
    if not tiny and rng.random() < SAID["texture"]:
        thing.texture = _pick(rng, TEXTURES)


# The circle around a shape of radius 1, corners included.
OUTER = {"circle": 1, "square": 1.22, "triangle": 1.25, "star": 1.04, "cross": 1.01, "ring": 1}


def layout(rng, scene, aspect=(1.0, 1.0)):
    """Places every instance (fills `scene.tracks`); False if no place was found.

    Nothing is clipped by the border, nothing touches (but under "inside" and "in front of"),
    relations hold by a clear margin, moving things cover at least a quarter of the picture.
    aspect: (height, width) of the picture in units of its shorter side.

    By rejection: one instance after the other takes the first of 40 random places that is free. No
    search, no forces; crowds that lock each other out are thrown away, and tried again 40 times.
    """
    high, wide = aspect
    owners = scene.owners()
    for _ in range(40):                                     # a bad first placement: start over
        placed = []                                         # [(owner, track (2, 3)), ...]
        for owner in owners:
            # 40 candidate tracks at once; the first that fits with what is there is taken
            tracks = _propose(rng, scene, owner, placed, high, wide)       # (40, 2, 3)
            good = _fits(scene, owner, tracks, placed, high, wide)         # (40,)
            if not good.any():
                break
            placed.append((owner, tracks[int(np.argmax(good))]))
        if len(placed) == len(owners):
            scene.tracks = np.stack([track for _, track in placed])        # (instances, 2, 3)
            return True
    return False


def _propose(rng, scene, owner, placed, high, wide, n=40):
    """(n, 2, 3) candidate tracks for one instance of things[owner]: right in size, in motion and,
    where things touch, roughly in place. Whether they are free is the question of `_fits`."""
    thing = scene.things[owner]
    twin = next((track for other, track in placed if other == owner), None)   # of the same thing
    low, top = SIZES[thing.size]
    if scene.relation == "inside" and owner < 2:            # whatever size is said: it must fit in
        low, top = (0.095, 0.102) if owner == 0 else (0.245, 0.260)
    elif thing.size == "medium" and sum(t.count for t in scene.things) > 3:
        low, top = 0.130, 0.140                             # a crowd: make room
    if twin is not None:                                    # three circles: all of one size
        low = top = twin[0, 2]
    r, x, y = (rng.uniform(*limits, n) for limits in ((low, top), (0, wide), (0, high)))
    # Two things that touch would hardly ever meet by chance: the second is put where the first is
    if owner == 1 and scene.relation in TOUCHING:
        x1, y1, r1 = placed[0][1][0]
        if scene.relation == "inside":                      # around it, a pixel off at the most
            x, y = ((x1, y1) + rng.uniform(-0.012, 0.012, (n, 2))).T
        else:                                               # half hidden by it, from any side
            angle = rng.uniform(0, 2 * math.pi, n)
            reach = (r + r1) * rng.uniform(0.58, 0.70, n)
            x, y = x1 + reach * np.cos(angle), y1 + reach * np.sin(angle)
    start = np.stack([x, y, r], 1)                          # (n, 3)
    end = start.copy()
    if thing.motion in STEPS:
        far = rng.uniform(0.28, 0.48, n)                    # the judge calls 0.15 a motion
        if twin is not None:                                # several instances move as one
            far = np.full(n, np.abs(twin[1] - twin[0])[:2].sum())
        end[:, :2] += far[:, None] * np.array(STEPS[thing.motion])
    if thing.motion in ("growing", "shrinking"):            # from small to large: about twofold
        start[:, 2], end[:, 2] = rng.uniform(0.095, 0.115, n), rng.uniform(0.200, 0.235, n)
    if thing.motion == "shrinking":
        start, end = end, start
    return np.stack([start, end], 1)


def _fits(scene, owner, tracks, placed, high, wide):
    """bool (n,): which candidate tracks of things[owner] respect the border and the others."""
    edge, thing = 0.02, scene.things[owner]
    # Seven moments of a clip (two that cross may be apart at both ends), the only one of a picture
    u = np.linspace(0, 1, 7 if scene.things[0].motion else 1)[None, :, None]
    path = tracks[:, :1] * (1 - u) + tracks[:, 1:] * u      # (n, 7, 3)
    x, y, r = path[..., 0], path[..., 1], path[..., 2]      # (n, 7) each
    good = ((x > r + edge) & (x < wide - r - edge) & (y > r + edge) & (y < high - r - edge)).all(1)
    for other, track in placed:
        there = track[:1] * (1 - u[0]) + track[1:] * u[0]   # (7, 3)
        dx, dy = x - there[:, 0], y - there[:, 1]           # (n, 7)
        related = bool(scene.relation) and {owner, other} == {0, 1}
        if not (related and scene.relation in TOUCHING):
            # Shapes are apart if their boxes are, or else the circles drawn around them; by two
            # pixels of 64, so that a little blur does not melt them into one blob
            round_ = OUTER[thing.shape] * r + OUTER[scene.things[other].shape] * there[:, 2]
            boxes = np.maximum(abs(dx), abs(dy)) > r + there[:, 2] + 0.03
            good &= (boxes | (np.hypot(dx, dy) > round_ + 0.03)).all(1)
        if related and scene.relation == "in front of":     # hides a part of it, and no more
            good &= _hides(scene.things[0].shape, track[0], thing.shape, tracks[:, 0])
        if related and scene.relation in DIRECTIONS:
            ax, ay = DIRECTIONS[scene.relation]
            sign = 1 if owner == 0 else -1                  # things[0] is RELATION things[1]
            along, across = sign * (dx * ax + dy * ay), abs(dx * ay) + abs(dy * ax)
            # Nobody should argue about a diagonal: 1.35 is within 36 degrees of the axis. The
            # judge itself asks for less (45), so that a good model is not failed by a pixel.
            good &= ((along > 0.22) & (along > 1.35 * across)).all(1)
    return good


def _hides(front, spot, shape, spots):
    """bool (n,): does `front` at (x, y, radius) hide a clear part of `shape` at each of n spots?

    Counted on 24 x 24 points: only the shapes say how much is hidden (a ring hides little)."""
    grid = np.linspace(-1, 1, 24)                            # points of the shape behind
    gx, gy = grid[None, None, :], grid[None, :, None]        # (1, 1, 24), (1, 24, 1)
    x, y, r = (spots[:, k, None, None] for k in range(3))    # (n, 1, 1)
    body = distance(shape, gx, gy) < 0                       # (1, 24, 24)
    over = distance(front, (x + r * gx - spot[0]) / spot[2], (y + r * gy - spot[1]) / spot[2]) < 0
    share = (over & body).sum((1, 2)) / body.sum()           # (n,)
    # Below, nobody sees that it is in front; above, nobody sees what it is in front of
    return (share > 0.12) & (share < 0.45)


# -----------------------------------------------------------------------------
# 3. The shapes world: drawing
# -----------------------------------------------------------------------------
#
# A shape is a formula, not a bitmap: the sign of `distance` says in or out, and its size, in
# pixels, how much of a pixel at the edge is covered. The judge uses the very same formulas.


def distance(shape, x, y):
    """Signed distance to a shape's outline, negative inside; the shape has radius 1, y is down.

    x and y broadcast: (1, W) and (H, 1) give (H, W). Outside of a corner it is the distance to the
    nearer edge's line, which is less than that to the corner: corners stay sharp."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":                                    # 0.86: its area is nearer the circle's
        return np.maximum(abs(x), abs(y)) - 0.86
    if shape == "triangle":                                  # corners (0, -1), (-+0.95, 0.8)
        return np.maximum(y - 0.8, (1.8 * abs(x) - 0.95 * (y + 1)) / 2.035)
    if shape == "cross":                                     # two bars: in either is in
        a, b = abs(x), abs(y)
        return np.minimum(np.maximum(a - 0.33, b - 0.95), np.maximum(a - 0.95, b - 0.33))
    if shape == "ring":                                      # a band of 0.48 about radius 0.76
        return abs(np.hypot(x, y) - 0.76) - 0.24
    if shape == "star":                                      # the plane folded to a tenth of it
        angle = np.arctan2(x, -y) % (2 * math.pi / 5)
        angle = np.minimum(angle, 2 * math.pi / 5 - angle)   # 0 at a tip, 36 degrees at a notch
        rho = np.hypot(x, y) / 1.04
        u, v = rho * np.cos(angle), rho * np.sin(angle)      # one edge: tip (1, 0) to a notch
        nx, ny = 0.46 * math.sin(math.pi / 5), 1 - 0.46 * math.cos(math.pi / 5)    # its normal
        return ((u - 1) * nx + v * ny) / math.hypot(nx, ny)
    raise ValueError(f"unknown shape '{shape}'")


def ink(texture, x, y):
    """Where a texture is dark, as a soft distance like `distance`: positive in the ink. The pattern
    hangs on the object, not on the page: it moves and grows with it.

    x, y of one shape, in radii. On a medium object at 64 pixels a stripe is 3.7 pixels wide, a dot
    and a check are 5."""
    if texture == "striped":                                 # level bars: 0.36 ink, 0.36 paint
        return abs((y / 0.72 + 0.25) % 1 - 0.5) * 0.72 - 0.18
    if texture == "checkered":
        wave = lambda a: 0.25 - abs((a + 0.25) % 1 - 0.5)    # a corner of four checks at the centre
        a, b = wave(x), wave(y)
        return np.sign(a * b) * np.minimum(abs(a), abs(b))   # dark where the two waves agree
    if texture == "dotted":                                  # one in the centre, others 0.72 apart
        u, v = (x / 0.72 + 0.5) % 1 - 0.5, (y / 0.72 + 0.5) % 1 - 0.5
        return 0.24 - np.hypot(u, v) * 0.72
    raise ValueError(f"unknown texture '{texture}'")


def draw(scene, size=(64, 64), frames=1):
    """Scene -> uint8 (F, H, W, 3), antialiased. Frame f shows moment f / (F - 1)."""
    high, wide = size
    unit = min(high, wide)                                   # pixels in one unit of length
    clip = np.empty((frames, high, wide, 3), np.float32)
    clip[:] = GROUND
    # Behind comes first: what is inside or in front of something is drawn over it.
    order = sorted(zip(scene.owners(), scene.tracks), key=lambda pair: -pair[0])
    for f in range(frames):
        u = f / (frames - 1) if frames > 1 else 0.0
        for owner, (start, end) in order:
            thing = scene.things[owner]
            cx, cy, r = (start * (1 - u) + end * u) * unit   # pixels
            # Only the box around it is touched, two pixels wider than it for the soft edge
            x0, x1 = max(0, int(cx - r - 2)), min(wide, int(cx + r + 3))
            y0, y1 = max(0, int(cy - r - 2)), min(high, int(cy + r + 3))
            # The object's own coordinates; + 0.5: a pixel stands for its middle
            x = (np.arange(x0, x1) + 0.5 - cx)[None, :] / r  # (1, w)
            y = (np.arange(y0, y1) + 0.5 - cy)[:, None] / r  # (h, 1)
            # Times r: in pixels. An outline through a pixel's middle covers half of it
            cover = np.clip(0.5 - distance(thing.shape, x, y) * r, 0, 1)[..., None]    # (h, w, 1)
            paint = np.array(COLORS[thing.color], np.float32)                          # (3,)
            if thing.texture != "solid":
                # + 0 * y: stripes ask for y alone, and (h, w) is wanted
                dark = np.clip(0.5 + ink(thing.texture, x + 0 * y, y + 0 * x) * r, 0, 1)[..., None]
                paint = paint * (1 - dark) + np.array(INK, np.float32) * dark          # (h, w, 3)
            patch = clip[f, y0:y1, x0:x1]                    # a view: += paints into the clip
            patch += cover * (paint - patch)
    return np.rint(clip).astype(np.uint8)


class Shapes:
    """`n` items of the world; item i of seed s is a function of (s, i) alone: no file, no order,
    and any number of workers draws the same.

    level: "single" (one plain object), "basic" (one or two plain objects, "and", four relations)
    or "full" (everything). frames > 1 gives clips, in which every thing moves. pairs: the (color,
    shape) pairs that may be used. shapes[i] -> (uint8 (F, H, W, 3), caption); `scene(i)` is the
    truth behind it. IndexError past the end.
    """
    def __init__(self, level="basic", n=10_000, seed=0, size=(64, 64), frames=1, pairs=SEEN_PAIRS):
        self.level, self.n, self.seed = level, n, seed
        self.size, self.frames, self.pairs = tuple(size), frames, pairs

    def __len__(self):
        return self.n

    @property
    def labels(self):
        """The classes for --text labels: "a red circle", ... for each pair."""
        return [Thing(*pair).words() for pair in self.pairs]

    def scene(self, i):
        """Item i's Scene, laid out."""
        if not 0 <= i < self.n:
            raise IndexError(i)
        aspect = tuple(side / min(self.size) for side in self.size)
        rng = np.random.default_rng((self.seed, i))
        while True:                         # a few crowded choices have no layout: choose again
            scene = _choose_words(rng, self.level, self.frames, self.pairs)
            if layout(rng, scene, aspect):
                return scene

    def __getitem__(self, i):
        scene = self.scene(i)
        return draw(scene, self.size, self.frames), scene.caption()


# -----------------------------------------------------------------------------
# 4. The judge: reading a picture back
# -----------------------------------------------------------------------------
#
# A frame is read in four steps, with numpy alone:
#   _unmix    each pixel is explained as ground + one colour + ink: how much of each?
#   _label    pixels -> blobs that touch each other, and inside each blob one region a colour
#   _fit      each region is compared with silhouettes of all six shapes: which, where, how large?
#   _texture  the ink inside the silhouette is compared with the three patterns
# `read` puts them together, and is told nothing about the caption: it cannot see what it wishes to.
# What it cannot read is called "unclear" and agrees with no caption: it abstains into wrong.
#
# OURS: the thresholds below. Strict ones call good pictures wrong, loose ones bad pictures right;
# the tests hold both ends: at least 99 % of freshly drawn truth is right, at most 2 % of swapped
# captions are. Shares of a picture are given in pixels of 64 x 64 beside them.

# How far a shape of radius 1 reaches from its centre: left = right, up, down (y is down).
REACH = {"circle": (1, 1, 1), "square": (0.86, 0.86, 0.86), "triangle": (0.95, 1, 0.8),
         "star": (0.989, 1.04, 0.841), "cross": (0.95, 0.95, 0.95), "ring": (1, 1, 1)}
NAMES = tuple(COLORS)
# The lines between the ranges of SIZES; a "medium" may have any radius, as crowds are drawn smaller
SMALL_BELOW = (SIZES["small"][1] + SIZES["medium"][0]) / 2             # 0.135
LARGE_ABOVE = (SIZES["medium"][1] + SIZES["large"][0]) / 2             # 0.1975
_PAPER = np.array(GROUND, np.float32)
# (8, 2, 3): from paper to each colour, and from paper to ink
_AXES = np.array([(color, INK) for color in COLORS.values()], np.float32) - _PAPER
_SOLVE = np.linalg.pinv(_AXES).astype(np.float32)            # (8, 3, 2): least squares, ready made


@dataclass
class Seen:
    """One object the judge found in a frame; x, y, radius in units of the shorter side."""
    color: str                                               # or "unclear"
    shape: str                                               # or "unclear"
    texture: str                                             # "solid", or "unclear"
    x: float
    y: float
    radius: float
    overlap: float                                           # with the ideal silhouette, 0..1
    mask: np.ndarray = field(repr=False)                     # bool (H, W): its ideal silhouette
    owned: np.ndarray = field(repr=False)                    # bool (H, W): the pixels it shows

    def words(self):
        """For a reason: "red circle", "colorless object"."""
        shape = "object" if self.shape == "unclear" else self.shape
        return f"{'colorless' if self.color == 'unclear' else self.color} {shape}"


def _unmix(frame):
    """(H, W, 3), 0..255 -> color (H, W) int, cover (H, W) 0..1, dark (H, W) 0..1.

    cover: how much of the pixel is not ground; dark: how much of that is ink. An edge pixel of
    red on paper looks pink to a nearest-colour rule; as a mixture it is simply half a red one."""
    p = frame.reshape(1, -1, 3).astype(np.float32) - _PAPER                       # (1, HW, 3)
    # Eight explanations of every pixel, one a colour: how much of it, and of ink
    parts = np.clip(p @ _SOLVE, 0, None)                                          # (8, HW, 2)
    parts /= np.maximum(parts.sum(-1, keepdims=True), 1)     # no more than all of the pixel
    error = parts @ _AXES - p                                                     # (8, HW, 3)
    error = np.einsum("kpc,kpc->kp", error, error)                                # (8, HW)
    color = error.argmin(0)                                                       # (HW,)
    best = parts[color, np.arange(p.shape[1])]                                    # (HW, 2)
    cover = best.sum(-1)
    dark = best[:, 1] / np.maximum(cover, 1e-3)              # blank paper is not dark
    return tuple(v.reshape(frame.shape[:2]) for v in (color, cover, dark))


def _shifted(a, fill):
    """The four neighbours of every pixel: four arrays like `a`, `fill` beyond the border."""
    b = np.pad(a, 1, constant_values=fill)
    return b[:-2, 1:-1], b[2:, 1:-1], b[1:-1, :-2], b[1:-1, 2:]


def _blobs(mask):
    """Connected components: bool (H, W) -> list of bool (H, W). Every pixel takes the smallest
    index among its neighbours; then the index of that index, which halves the way each time."""
    n = mask.size                                            # stands for "not in the mask"
    label = np.where(mask, np.arange(n).reshape(mask.shape), n)
    while True:
        least = np.where(mask, np.minimum(label, np.minimum.reduce(_shifted(label, n))), n)
        hop = np.append(least, n)                            # flat, and n leads to n
        least = hop[hop[least]]
        if (least == label).all():
            return [label == k for k in np.unique(label[mask])]
        label = least


def _grow(label, room):
    """Unlabelled pixels (-1) of `room` take a neighbour's label until none is left to take."""
    while True:
        near = np.where(room & (label < 0), np.maximum.reduce(_shifted(label, -1)), -1)
        if (near < 0).all():
            return label
        label = np.where(near >= 0, near, label)


def _count(mask, k):
    """How many pixels of a mask lie in the (2k+1) x (2k+1) square around each: running sums."""
    total = np.pad(mask, ((k + 1, k), (k + 1, k))).cumsum(0, dtype=np.int32).cumsum(1)
    n = 2 * k + 1
    return total[n:, n:] - total[:-n, n:] - total[n:, :-n] + total[:-n, :-n]


def _thick(mask):
    """Keeps of a mask what lies within 4 pixels of a place where it is (nearly) 3 pixels wide.
    Thin lines, where two colours blend into the look of a third (red over yellow: an orange rim),
    disappear; the tips of a star stay."""
    return mask & (_count(_count(mask, 1) * mask >= 7, 4) > 0)


def _label(color, cover, dark):
    """Yields each blob, bool (H, W), and label, int (H, W): its pixels' colours, -1 = none."""
    unit = min(cover.shape)
    solid = cover > 0.5
    raw = np.where(solid & (dark < 0.5), color, -1)          # under ink, the colour is a guess
    for blob in _blobs(solid):
        # A speck of 6 pixels; the smallest thing of the world, a small star, has more than 50.
        # Were it lower, a blot that the autoencoder leaves would be "an extra object"
        if blob.sum() < max(3, 0.0015 * unit * unit):
            continue
        label = _grow(np.where(blob, raw, -1), blob)         # ink goes to the colour beside it
        core = np.full_like(label, -1)
        for c in np.unique(label[blob & (label >= 0)]):
            own = _thick(label == c)
            if own.sum() >= 0.0025 * unit * unit:            # 10 pixels: a colour of its own
                core[own] = c
        # What was thin goes to its neighbours; a blob that is thin all over stays as it was
        yield blob, _grow(core if (core >= 0).any() else label, blob)


def _overlap(shape, spots, cover, free, corner=(0, 0), stride=1):
    """How well a shape at each of K spots (x, y, radius; pixels) covers what is seen: (K,) 0..1.

    Soft intersection over union, on the pixels that are `free`: behind another object anything
    may hide, at a small charge, so that the simplest explanation wins. cover and free (h, w) are a
    window of the frame that begins at `corner` (x, y), every stride-th pixel of it."""
    h, w = cover.shape
    cx, cy, r = (spots[:, k, None, None] for k in range(3))                       # (K, 1, 1)
    xs, ys = (np.arange(n, dtype=np.float32) * stride + c + 0.5 for n, c in zip((w, h), corner))
    x, y = (xs - cx) / r, (ys[:, None] - cy) / r                     # (K, 1, w), (K, h, 1)
    ideal = np.clip(0.5 - distance(shape, x, y) * r, 0, 1)                        # (K, h, w)
    shown = ideal * free
    charge = 1 - shown.sum((1, 2)) / np.maximum(ideal.sum((1, 2)), 1e-6)          # (K,) hidden part
    either = np.maximum(shown, cover).sum((1, 2))
    return np.minimum(shown, cover).sum((1, 2)) / np.maximum(either, 1e-6) - 0.03 * charge


def _spots(shape, box, cut):
    """(K, 3) first guesses (x, y, radius; pixels): the shape fills the region's bounding box (left,
    right, top, bottom). If the box may be cut, larger ones as well, which lean on its sides."""
    left, right, top, bottom = box
    side, up, down = REACH[shape]
    middle = lambda r: ((left + right) / 2, (top + bottom + (up - down) * r) / 2)
    r = (right - left + bottom - top) / (2 * side + up + down)
    spots = [(*middle(r), r)]
    if cut:                                                  # six sizes x 3 x 3 places
        least = max((right - left) / (2 * side), (bottom - top) / (up + down))
        for r in least * np.array([0.97, 1.05, 1.15, 1.3, 1.5, 1.8]):
            mx, my = middle(r)
            spots += [(x, y, r) for x in (left + side * r, mx, right - side * r)
                      for y in (top + up * r, my, bottom - down * r)]
    return np.array(spots, np.float32)


# A step in x, in y or in radius, or none
_NUDGES = np.array([(0, 0, 0), (-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)])


def _fit(cover, own, hidden=None):
    """The best silhouette for a region -> (overlap, shape, (x, y, radius) in pixels).

    cover (H, W): how much of each pixel is painted; own: the region's pixels; hidden: pixels of
    what may lie in front of it, None = nothing does. Guesses of all shapes first; then the best
    walk to where they fit best."""
    cut = hidden is not None
    ys, xs = np.nonzero(own)
    left, right, top, bottom = box = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    # Only a window is looked at: the box, and beyond it as far as a hidden part may reach
    m = 3 + max(right - left, bottom - top) // 2 if cut else 3
    x0, y0 = corner = max(0, left - m), max(0, top - m)
    part = np.s_[y0:bottom + m, x0:right + m]
    free = 1.0 - hidden[part] if cut else np.ones(cover[part].shape, np.float32)   # (h, w)
    # The region and its soft edge: pixels beside it that are painted by less than a half
    rim = np.logical_or.reduce(_shifted(own[part], False)) & (cover[part] <= 0.5)
    seen = (cover[part] * (own[part] | rim) * free).astype(np.float32)             # (h, w)
    guesses = []                                                       # (overlap, shape, spot)
    n = 2 if cut else 1                  # 55 spots a shape: every second pixel will do for these
    for shape in SHAPES:
        spots = _spots(shape, box, cut)
        scores = _overlap(shape, spots, seen[::n, ::n], free[::n, ::n], corner, n)
        guesses += [(scores[k], shape, spots[k]) for k in np.argsort(-scores)[:2]]
    guesses.sort(key=lambda g: -g[0])
    refined = []
    for score, shape, spot in guesses[:5 if cut else 2]:
        if score < guesses[0][0] - 0.12:                     # too far behind to catch up
            break
        for step in (2, 1, 1, 0.7, 0.5, 0.3) if cut else (1, 0.7, 0.5, 0.3):       # pixels
            spots = (spot + step * _NUDGES).astype(np.float32)                     # (7, 3)
            spots[:, 2] = np.maximum(spots[:, 2], 1)
            scores = _overlap(shape, spots, seen, free, corner)
            spot, score = spots[scores.argmax()], scores.max()
        refined.append((float(score), shape, spot))
    return max(refined, key=lambda g: g[0])


def _texture(shape, spot, dark, inside):
    """Which pattern the ink inside a silhouette follows: "solid" without ink, "unclear" if none.

    dark (H, W): ink, 0..1; inside bool (H, W): the pixels to look at."""
    if inside.sum() < 4:
        return "unclear"
    values = dark[inside]                                    # (n,)
    # Dots cover a third of an object, stripes and checks a half; a dark blot, or a noisy edge, less
    if (values > 0.5).mean() < 0.18:
        return "solid"
    ys, xs = np.nonzero(inside)
    x, y = (xs + 0.5 - spot[0]) / spot[2], (ys + 0.5 - spot[1]) / spot[2]          # (n,) in radii
    match = {}                                               # correlation with each pattern
    for texture in TEXTURES:
        ideal = np.clip(0.5 + ink(texture, x, y) * spot[2], 0, 1)
        common = ((values - values.mean()) * (ideal - ideal.mean())).mean()
        match[texture] = common / max(values.std() * ideal.std(), 1e-6)
    best = max(match, key=match.get)
    return best if match[best] > 0.45 else "unclear"         # drawn as it should be, it is near 1


def _depth(shape, spot, size):
    """(H, W): the signed distance to a silhouette's outline in pixels, negative inside."""
    x, y = (np.arange(n) + 0.5 - centre for n, centre in zip(size[::-1], spot))
    return distance(shape, x[None] / spot[2], y[:, None] / spot[2]) * spot[2]


def _smudge(mask, color="unclear"):
    """A Seen for what is there but has no shape."""
    y, x = (float(v.mean()) / min(mask.shape) for v in np.nonzero(mask))
    return Seen(color, "unclear", "unclear", x, y, math.sqrt(mask.mean()), 0.0, mask, mask)


def _peel(blob, label, cover, dark):
    """[Seen, ...] of one blob, front to back: what looks whole lies in front and owns all of its
    silhouette; then the next, of which a part may be hidden behind those.

    blob bool (H, W); label int (H, W): the colour of each pixel, -1 = none; cover, dark (H, W)."""
    waiting = [int(c) for c in np.unique(label[blob & (label >= 0)])] or [-1]      # colours
    if waiting == [-1]:                                      # nothing but ink
        label = np.where(blob, -1, -2)
    if len(waiting) > 3:                                     # three objects never touch: a mess
        return [_smudge(label == c, NAMES[c]) for c in waiting]
    seen, hidden = [], np.zeros_like(blob)                   # hidden: by the objects seen so far
    while waiting:
        others, tries = blob & (label >= 0), []
        for c in waiting:
            own = label == c
            over = hidden | (others & ~own) if seen else None
            best = _fit(cover, own, over)
            plain = own & (dark < 0.5)                       # or is the ink beside it another's?
            if len(waiting) > 1 and 9 < plain.sum() < 0.9 * own.sum():
                best = max(best, _fit(cover, plain, over), key=lambda fit: fit[0])
            depth = _depth(*best[1:], cover.shape)
            # Whoever lies behind has the front one's pixels well inside its silhouette. They weigh
            # four times as much as overlap, as a large thing loses little by a small one on it.
            deep = depth < -0.5
            theft = (others & ~own & deep).sum() / max(1, deep.sum())
            tries.append((best[0] - 4 * theft, c, best, depth))
        _, c, (overlap, shape, spot), depth = max(tries, key=lambda t: t[0])
        mask = depth < 0
        owned = mask & blob & ~hidden
        texture = _texture(shape, spot, dark, owned & (depth < -0.8))    # edges are neither
        clear = overlap > 0.78 - 1 / spot[2]                 # small ones are all edge
        seen.append(Seen(NAMES[c] if c >= 0 else "unclear", shape if clear else "unclear",
                         texture, *(float(v / min(blob.shape)) for v in spot), overlap, mask,
                         owned))
        waiting.remove(c)
        # What is left of the blob, without the rim where two colours blend, is the others'.
        near = depth < 1.0
        hidden = hidden | near
        label = _grow(np.where(near | (label == c), -1, label), blob & ~hidden)
        waiting = [k for k in waiting if (label == k).sum() > 3]
    return seen


def read(frame):
    """uint8 (H, W, 3) -> [Seen, ...]: everything in the picture, nothing about what was asked."""
    k = min(frame.shape[:2]) // 64
    if k > 1:                                # large pictures: k x k pixels to one, 64 are enough
        h, w = frame.shape[0] // k, frame.shape[1] // k
        frame = frame[:h * k, :w * k].reshape(h, k, w, k, 3).mean((1, 3))
    color, cover, dark = _unmix(frame)                       # (H, W) each
    seen = []
    for blob, label in _label(color, cover, dark):
        seen += _peel(blob, label, cover, dark)
    # Something too pale for an object, away from all of them, is not nothing: without this a faint
    # ghost of a third circle would go unnoticed.
    pale = (cover > 0.25) & (_count(cover > 0.5, 3) == 0)
    if _thick(pale).sum() > 0.004 * min(pale.shape) ** 2:    # 16 pixels
        seen.append(_smudge(pale))
    return seen


@dataclass
class Verdict:
    """What the judge says. Truthy if everything asked for is there and nothing else is.

    reasons: short sentences, one a fault. parts: the partial verdicts by name (see `judge`).
    numbers: measured on the way: the shares of frames that are right ("frames_right") and that
    show all named colours on whatever shape ("colors_present"), and a clip's "flicker" (0..255)."""
    right: bool
    reasons: list
    parts: dict
    numbers: dict = field(default_factory=dict)

    def __bool__(self):
        return self.right


def judge(clip, caption):
    """Does the clip show the caption?

    clip: uint8 (F, H, W, 3) or one picture (H, W, 3). caption: a sentence of the world (ValueError
    if it is not one) or a Scene. Returns a Verdict whose parts are
      color     every named colour is present and no other, and none is on another thing's shape
      shape     so is every named (colour, shape) pair; how many of each is left to `count`
      texture   each thing has the texture said, and none where none is said
      size      each "small" and "large" is
      count     as many of each thing as said, and nothing unnamed
      relation  it holds
    and for clips (or a caption with motions) also
      motion    what should move, grow or shrink does just that
      stillness what should stay still does (without a motion word: all of it)
      identity  every frame shows the same colours and shapes
      smooth    each track is near a straight line at even speed: shuffled frames are not
    A clip's still parts hold if they do in 4 frames of 5: a frame may be misread, but not vanish,
    which would break identity."""
    scene = parse(caption) if isinstance(caption, str) else caption
    clip = np.asarray(clip)
    clip = clip[None] if clip.ndim == 3 else clip
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8:
        raise ValueError(f"judge wants uint8 (F, H, W, 3), not {clip.dtype} {clip.shape}")
    frames = [read(frame) for frame in clip]                 # F lists of Seen
    stills = [_still(seen, scene) for seen in frames]        # (parts, reasons, mine) a frame
    parts = {name: bool(np.mean([still[0][name] for still in stills]) >= 0.8)
             for name in stills[0][0]}
    # The first bad frame speaks for all: its faults, not the same ones F times over
    reasons = next((still[1] for still in stills if still[1]), [])
    named = {thing.color for thing in scene.things}
    there = [named <= {one.color for one in seen} for seen in frames]
    numbers = {"frames_right": float(np.mean([not still[1] for still in stills])),
               "colors_present": float(np.mean(there))}
    if len(clip) > 1:
        if all(parts.values()):                              # the odd misread frame is forgiven
            reasons = []
        moving, faults = _moving(frames, [still[2] for still in stills], scene)
        parts |= moving
        reasons = list(dict.fromkeys(reasons + faults))      # each once, in order
        # How much the empty ground changes from frame to frame, where it is ground in both
        ground = (abs(clip.astype(np.int16) - np.array(GROUND)) < 40).all(-1)     # (F, H, W)
        both = ground[1:] & ground[:-1]
        change = abs(np.diff(clip.astype(np.int16), axis=0)).mean(-1)             # (F-1, H, W)
        numbers["flicker"] = float(change[both].mean()) if both.any() else 0.0
    elif any(thing.motion for thing in scene.things):
        parts["motion"] = False
        reasons = [*reasons, "one frame shows no motion"]
    return Verdict(all(parts.values()), reasons, parts, numbers)


def _claim(seen, things):
    """Who stands for whom: mine (for each thing its list of Seen), extra (whoever is left)."""
    mine, extra = [[] for _ in things], []
    named = [(t.color, t.shape) for t in things]
    exact = lambda s: (s.color, s.shape) in named
    for s in sorted(seen, key=exact, reverse=True):          # a right shape has the first claim
        rooms = [k for k, t in enumerate(things) if t.color == s.color and len(mine[k]) < t.count]
        if exact(s):                                         # even if there are too many of it
            mine[named.index((s.color, s.shape))].append(s)
        elif len(rooms) == 1:                                # the right colour, in a wrong shape
            mine[rooms[0]].append(s)
        else:                                                # no room, or a guess between two
            extra.append(s)
    return mine, extra


def _sized(size, radius):
    return {"small": radius < SMALL_BELOW, "medium": True, "large": radius > LARGE_ABOVE}[size]


def _still(seen, scene):
    """One frame against the caption -> parts, reasons, mine (each thing's own list of Seen)."""
    things = scene.things
    mine, extra = _claim(seen, things)
    named = {(t.color, t.shape) for t in things}
    twins = len(named) < len(things)
    # A blue circle where "a red circle and a blue square" was asked: the blue is on the wrong shape
    bound = all((s.color, s.shape) in named or s.shape not in {t.shape for t in things}
                for s in seen)
    parts = {"color": bound and {s.color for s in seen} == {t.color for t in things},
             "shape": {(s.color, s.shape) for s in seen} == named and not twins,
             "texture": True, "size": True, "count": not extra, "relation": True}
    reasons = ["two things of one name: the judge cannot tell them apart"] if twins else []
    for thing, found in zip(things, mine):
        name = f"{thing.color} {thing.shape}"
        if len(found) != thing.count:
            parts["count"] = False
            many = name if len(found) == 1 else plural(name)
            reasons.append(f"{len(found)} {many}, not {thing.count}" if found else f"no {name}")
        odd = next((s for s in found if s.shape != thing.shape), None)
        if odd:
            looks = "of no clear shape" if odd.shape == "unclear" else f"a {odd.shape}"
            reasons.append(f"the {odd.color} object is {looks}, not a {thing.shape}")
        odd = next((s.texture for s in found if s.texture != thing.texture), None)
        parts["texture"] &= bool(found) and odd is None      # what is absent has no texture either
        if odd:
            reasons.append(f"the {name} is not {thing.texture}" if thing.texture != "solid" else
                           f"the {name} is {'not plain' if odd == 'unclear' else odd}")
        sized = all(_sized(thing.size, s.radius) for s in found)
        parts["size"] &= thing.size == "medium" or bool(found) and sized
        if not sized:
            reasons.append(f"the {name} is not {thing.size}")
    reasons += [f"an extra {s.words()}" for s in extra]
    if scene.relation:
        a, b = mine[:2]
        parts["relation"] = bool(a and b) and _related(scene.relation, a, b)
        if a and b and not parts["relation"]:
            is_now = next((r for r in ("inside", *DIRECTIONS) if _related(r, a, b)), "")
            short = things[0].shape != things[1].shape       # "the circle" says enough
            one, two = (t.shape if short else f"{t.color} {t.shape}" for t in things[:2])
            reasons.append(f"the {one} is {is_now or f'not {scene.relation}'} the {two}")
    return parts, reasons, mine


def _related(relation, first, second):
    """Does the relation hold between two lists of Seen? Between each two of them."""
    if relation in DIRECTIONS:
        ax, ay = DIRECTIONS[relation]
        steps = np.array([(a.x - b.x, a.y - b.y) for a in first for b in second])     # (pairs, 2)
        along, across = steps @ (ax, ay), abs(steps @ (ay, ax))
        # Each on its side by two pixels of 64, and on the whole more beside than above or below
        return bool((along > 0.03).all() and along.mean() > across.mean())

    def inside(a, b):                                        # box in box, give or take a pixel
        box = lambda s: [s.radius * reach for reach in REACH.get(s.shape, (1, 1, 1))]
        (a_side, a_up, a_down), (b_side, b_up, b_down) = box(a), box(b)
        return (a.radius < b.radius and abs(a.x - b.x) < b_side - a_side + 0.02
                and a.y - a_up > b.y - b_up - 0.02 and a.y + a_down < b.y + b_down + 0.02)

    def in_front(a, b):                                      # where both would be, a is seen
        shared = a.mask & b.mask
        return (shared.sum() > 0.05 * min(a.mask.sum(), b.mask.sum())
                and (shared & a.owned).sum() > 0.6 * shared.sum() and not inside(a, b))

    return all((inside if relation == "inside" else in_front)(a, b) for a in first for b in second)


def _moving(frames, mine, scene):
    """A clip's own parts and reasons. frames: F lists of Seen; mine[f][k]: those of things[k]."""
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
            # Against the even walk that fits it best (least squares); radii count as diameters.
            track = track * (1, 1, 2)
            u = np.linspace(0, 1, len(track))
            basis = np.stack([1 - u, u], 1)                  # (F, 2)
            ends = np.linalg.lstsq(basis, track, rcond=None)[0]                       # (2, 3)
            off = abs(track - basis @ ends).max()
            step = abs(ends[1] - ends[0]).max() / max(1, len(track) - 1)
            # Frames out of order are off by a step and more. A thing at rest has no step, and is
            # allowed 1.6 pixels of 64
            if off > max(0.025, 0.6 * step):
                parts["smooth"] = False
                reasons.append(f"{name} does not move evenly")
    return parts, reasons


def _follow(found):
    """Lists of n Seen, one a frame -> (n, F, 3): each instance's track of (x, y, radius)."""
    spots = [[(s.x, s.y, s.radius) for s in seen] for seen in found]
    tracks = spots[:1]                                       # [frame][instance]
    for left in spots[1:]:                                   # each takes the nearest that is left
        row = []
        for x, y, _ in tracks[-1]:
            row.append(min(left, key=lambda s: math.hypot(s[0] - x, s[1] - y)))
            left.remove(row[-1])
        tracks.append(row)
    return np.array(tracks).swapaxes(0, 1)


def _motion(track):
    """(F, 3) -> which of MOTIONS it is, or "moving unclearly".

    Between "still" and the least of a motion (0.15, or 1.4 times the size) lies a gap where nothing
    is said: a thing that trembles does neither."""
    dx, dy = track[-1, :2] - track[0, :2]
    growth = track[-1, 2] / track[0, 2]
    # All frames, not only the first and last: there and back again is not still
    wander = np.hypot(*(track[:, :2] - track[:, :2].mean(0)).T).max()
    if wander < 0.04 and track[:, 2].max() < 1.25 * track[:, 2].min():
        return "staying still"
    if math.hypot(dx, dy) < 0.15 and max(growth, 1 / growth) > 1.4:
        return "growing" if growth > 1 else "shrinking"
    if max(growth, 1 / growth) < 1.4:
        for motion, (ax, ay) in STEPS.items():
            along, across = dx * ax + dy * ay, abs(dx * ay) + abs(dy * ax)
            if along >= 0.15 and along > 1.5 * across:       # within 34 degrees of its axis
                return motion
    return "moving unclearly"


# -----------------------------------------------------------------------------
# 5. The benchmark's prompts
# -----------------------------------------------------------------------------

# The six of T2I-CompBench, whose mean is the benchmark's; beside them counting, and the clips'.
CATEGORIES = ("color", "shape", "texture", "spatial", "non-spatial", "complex")
CLIP_CATEGORIES = ("motion", "motion-binding", "stillness", "identity")
# Two more, for a model of the basic world: "single" is one plain object, "pair" is two ("and" or a
# direction between them), both drawn from that world; in no mean.
_ALL = ("color", "shape", "texture", "size", "count", "relation")
# Which of a verdict's parts must hold for a prompt of the category: what its name asks about, and
# "count" always, for an extra object is wrong. "color" does not ask for the shape, nor "shape" for
# the texture: what a model cannot do should lower one figure, not all of them.
SCORED_ON = {
    "color": ("color", "count"), "shape": ("shape", "count"),
    "texture": ("color", "texture", "count"),
    "single": ("shape", "count"), "pair": ("shape", "count"),
    "spatial": _ALL, "non-spatial": _ALL, "complex": _ALL, "numeracy": _ALL,
    "motion": ("color", "count", "motion", "smooth"),
    "motion-binding": ("color", "count", "motion", "stillness", "smooth"),
    "stillness": ("color", "count", "stillness"), "identity": ("color", "count", "identity"),
}


def passed(verdict, category):
    """Does the verdict count as right for a prompt of this category?"""
    return all(verdict.parts.get(part, False) for part in SCORED_ON[category])


def prompts(category, n=100, split="seen"):
    """The first n prompts of a category: fixed captions, each drawable, none twice; where there are
    fewer than n (40 single objects), they start over. split: "seen" asks for SEEN_PAIRS alone,
    "unseen" for HELD_OUT alone.

    They come as swap pairs wherever both are allowed ("a red circle and a blue square", then "a
    blue circle and a red square"): who draws one picture for both is wrong in one of them.
    Raises ValueError for an unknown category or split."""
    if category not in SCORED_ON:
        raise ValueError(f"unknown category '{category}'; one of {', '.join(SCORED_ON)}")
    if split not in ("seen", "unseen"):
        raise ValueError(f"unknown split '{split}'; seen or unseen")
    pairs = SEEN_PAIRS if split == "seen" else tuple(sorted(HELD_OUT))
    # A seed of its own, fixed: crc32 is the same everywhere, Python's hash() differs in every run
    rng = np.random.default_rng(zlib.crc32(f"{category} {split}".encode()))
    found, misses = [], 0                                    # misses in a row
    while len(found) < n:
        for scene in _ask(rng, category, pairs):
            caption = scene.caption()
            # A swap of colours can make a pair of the other split: that partner is left out
            fine = all((t.color, t.shape) in pairs for t in scene.things)
            misses += 1
            if fine and caption not in found and layout(rng, scene):
                found.append(caption)
                misses = 0
        if misses > 1000:                                    # there are no more: start over
            found += found[:n - len(found)]
    return found[:n]


def truth(caption, seed=0, size=(64, 64), frames=1):
    """A clip that shows the caption, drawn from scratch: uint8 (F, H, W, 3). Sent through the
    autoencoder and judged, these are the benchmark's ceiling. ValueError if the caption is not a
    sentence of the world."""
    scene, rng = parse(caption), np.random.default_rng((seed, zlib.crc32(caption.encode())))
    while not layout(rng, scene, tuple(side / min(size) for side in size)):
        pass                                                 # rare: a crowd that found no place
    return draw(scene, size, frames)


def _ask(rng, category, pairs):
    """One or two scenes (a prompt and its swap partner) of a category, not yet laid out."""
    if category in ("single", "pair"):                       # as the basic world has them
        scene = _choose_words(rng, "single" if category == "single" else "basic", 1, pairs)
        return [scene] if category == "single" or len(scene.things) == 2 else []
    while True:                                              # three things of three colours
        (c0, s0), (c1, s1), (c2, s2) = [_pick(rng, pairs) for _ in range(3)]
        if len({c0, c1, c2}) == 3 and (s0 != s1 or category not in ("color", "shape")):
            break                                            # of one shape, a swap changes nothing
    a, b, c = Thing(c0, s0), Thing(c1, s1), Thing(c2, s2)
    if category in ("color", "shape"):                       # colours, or shapes: exchanged
        return [Scene([a, b]), Scene([Thing(c1, s0), Thing(c0, s1)])]
    if category == "texture":                                # on one thing, or exchanged by two
        t0, t1 = rng.permutation((*TEXTURES, "solid"))[:2].tolist()
        if rng.random() < 0.3:
            return [Scene([Thing(c0, s0, t)]) for t in (t0, t1) if t != "solid"]
        return [Scene([Thing(c0, s0, u), Thing(c1, s1, v)]) for u, v in ((t0, t1), (t1, t0))]
    if category in ("spatial", "non-spatial"):               # the things exchange their places
        relation = _pick(rng, tuple(DIRECTIONS) if category == "spatial" else TOUCHING)
        return [Scene([a, b], relation), Scene([b, a], relation)]
    if category == "complex":                                # three things, or two with all words
        if rng.random() < 0.5:
            return [Scene([a, b, c], _pick(rng, RELATIONS))]
        a.size, b.size = rng.permutation(("small", "large")).tolist()
        big = a if a.size == "large" else b                  # no texture on small objects
        big.texture = _pick(rng, TEXTURES)
        return [Scene([a, b], _pick(rng, tuple(DIRECTIONS)))]
    if category == "numeracy":
        a.count = 2 + int(rng.integers(3))                   # two to four
        if rng.random() < 0.5:
            return [Scene([a])]
        b.count = 1 + int(rng.integers(5 - a.count))         # five in all, as in the world
        return [Scene([a, b])]
    if category == "motion":                                 # any but "staying still"
        return [Scene([Thing(c0, s0, motion=_pick(rng, MOTIONS[:-1]))])]
    # motion-binding (which of two does what), stillness, identity (which asks for any motions)
    two = category == "motion-binding" or rng.random() < 0.5
    m0, m1 = (("staying still",) * 2 if category == "stillness" else
              rng.permutation(MOTIONS)[:2].tolist())
    if not two:
        return [Scene([Thing(c0, s0, motion=m0)])]
    return [Scene([Thing(c0, s0, motion=u), Thing(c1, s1, motion=v)])
            for u, v in ((m0, m1), (m1, m0))]


# -----------------------------------------------------------------------------
# 6. Your own pictures and clips
# -----------------------------------------------------------------------------

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".webm")
MAX_PIXELS = 70_000_000         # a file that claims more is skipped before it is decoded
MAX_CAPTION = 1000              # characters
MAX_LINE = 2 ** 20              # bytes of a line of captions.jsonl
# Not all that pillow can open: it would hand a PostScript file, whatever its name, to Ghostscript.
# A folder may come from anywhere, so the limits above hold for each file, and a bad one is skipped.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
ORIENTATION = 0x0112            # the EXIF tag that says how a camera was held, 1 = upright, to 8
SIDEWAYS = (5, 6, 7, 8)         # its values under which height and width change places


def plain(text):
    """Text without control characters (a caption is no place for a terminal's commands) and halves
    of surrogate pairs (names that are not UTF-8): both become "?", and it can be printed."""
    return re.sub("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", text)


class Folder:
    """A folder of pictures or clips; folder[i] -> (uint8 (F, H, W, 3), caption), like `Shapes`.

    Captions come from the first of these that is there:
      captions.jsonl     one {"file": "a.png", "caption": "..."} a line
      name.txt           beside name.png (or beside the folder `name` with a clip's frames)
      class folders      corgi/1.jpg: the folder's name is the caption, `labels` lists them
      none               every caption is "": the model trains unconditionally
    An empty caption is kept: that item trains unconditionally. With frames == 1 an animation gives
    its first frame; with more, F frames at `fps` by the file's own clock, the last one held.
    Every file is decoded once here, so that a broken one is found now and not at step 10,000.

    Raises ValueError if there is no such folder or nothing usable in it; what was skipped, and
    why, is in `skipped` [(file, reason)] and in `report()`.
    """
    def __init__(self, path, size=(64, 64), frames=1, fps=4):
        self.root, self.size, self.frames, self.fps = Path(path), tuple(size), frames, fps
        self.items, self.skipped, self.notes, self.labels = [], [], [], []
        if not self.root.is_dir():
            what = "not a folder" if self.root.exists() else "no such folder"
            raise ValueError(f"{what}, {path}; give a folder of pictures, or 'shapes'")
        found = self._find()                                 # [(path, caption), ...]
        for file, caption in tqdm(found, desc=f"checking {path}", disable=len(found) <= 500):
            try:
                self._load(file)
            except Exception as error:  # noqa: BLE001 - a broken file can raise anything
                # Of a library's message the first line, without the folder's name: that is known
                first = str(error).strip().split("\n")[0].replace(f"{self.root}/", "")
                self.skipped.append((self._name(file), first or type(error).__name__))
                continue
            if len(caption) > MAX_CAPTION:
                self.notes.append(f"caption cut at {MAX_CAPTION:,} characters: {self._name(file)}")
            self.items.append((file, plain(caption[:MAX_CAPTION])))
        if not self.items:
            why = f" ({self.skipped[0][0]}: {self.skipped[0][1]})" if self.skipped else ""
            kind = "clip" if frames > 1 else "picture"
            raise ValueError(f"no usable {kind}, {path}{why}; add some, captions in NAME.txt")
        if self.how == "class folders":
            self.labels = sorted({caption for _, caption in self.items})

    def __len__(self):
        return len(self.items)

    @property
    def captions(self):
        """All captions, in the order of the items."""
        return [caption for _, caption in self.items]

    def __getitem__(self, i):
        file, caption = self.items[i]
        return self._load(file), caption

    def report(self):
        """What was found, as lines to print."""
        kind = "pictures" if self.frames == 1 else f"clips of {self.frames} frames"
        empty = sum(not caption for _, caption in self.items)
        high, wide = self.size
        lines = [f"{self.root}: {len(self):,} {kind}, {high}x{wide}, captions: {self.how}"]
        lines += [f"  '{caption[:70]}'" for _, caption in self.items[:3] if caption]
        if empty:
            lines.append(f"  {empty:,} without words: these train unconditionally")
        lines += [f"  {note}" for note in self.notes[:5]]
        lines += [f"  skipped {file}: {reason}" for file, reason in self.skipped[:10]]
        if len(self.skipped) > 10:
            lines.append(f"  ... and {len(self.skipped) - 10:,} more skipped")
        return [plain(line) for line in lines]

    def stem(self, file):
        """A file's name for finding its namesake in another folder: no suffix, `/` between."""
        return file.relative_to(self.root).with_suffix("").as_posix()

    def _name(self, file):
        return str(file.relative_to(self.root))

    def _find(self):
        """All files with their captions; sets `how`. Nothing is decoded yet."""
        listed = self.root / "captions.jsonl"
        if listed.is_file():
            self.how = "captions.jsonl"
            return list(self._listed(listed))
        # Sorted, as systems list a folder in different orders: item i is the same everywhere
        every = sorted(p for p in self.root.rglob("*")
                       if not any(part.startswith(".") for part in p.relative_to(self.root).parts))
        texts = {p.with_suffix("") for p in every if p.suffix == ".txt" and p.is_file()}
        # A folder is a clip if it has a caption of its own; else it is only a place for files
        clips = [p for p in every if p.is_dir() and p in texts and _pictures_in(p)]
        files = [p for p in every if p.suffix.lower() in PICTURES + VIDEOS and p.is_file()
                 and p.parent not in clips]
        if clips or any(p.with_suffix("") in texts for p in files):
            self.how = "a .txt beside each file"
            return [(p, caption) for p in sorted(files + clips)
                    if (caption := self._beside(p)) is not None]
        # No words anywhere: the name of the topmost folder is the class, however deep the file lies
        deep = {p: p.relative_to(self.root).parts[0] for p in files if p.parent != self.root}
        if deep:
            self.how = "class folders"
            self.skipped += [(p.name, "not in a class folder") for p in files if p not in deep]
            return list(deep.items())
        self.how = "none, trains unconditionally"
        return [(p, "") for p in files]

    def _beside(self, file):
        """The caption in NAME.txt, or None (and the reason is noted)."""
        text = file.with_suffix(".txt") if file.is_file() else file.parent / (file.name + ".txt")
        try:
            with open(text, encoding="utf-8-sig") as f:      # -sig: Windows' editors mark UTF-8
                return " ".join(f.read(4 * MAX_CAPTION).split())           # never all of a huge one
        except UnicodeDecodeError:
            self.skipped.append((self._name(file), f"{text.name} is not UTF-8 text"))
        except OSError:
            self.skipped.append((self._name(file), "no caption"))

    def _listed(self, path):
        """The (file, caption) pairs of a captions.jsonl, read line by line: it may list millions,
        or be one line that never ends."""
        root = self.root.resolve()
        with open(path, "rb") as f:
            for number in itertools.count(1):
                line = f.readline(MAX_LINE)
                if not line:
                    return
                try:
                    if len(line) == MAX_LINE and not line.endswith(b"\n"):
                        while line and not line.endswith(b"\n"):           # the rest of it
                            line = f.readline(MAX_LINE)
                        raise ValueError(f"longer than {MAX_LINE:,} bytes")
                    if line.strip():
                        yield self._row(line, root)
                except ValueError as error:
                    self.skipped.append((f"captions.jsonl line {number}", str(error)))

    def _row(self, line, root):
        """One line of captions.jsonl -> (file, caption); root is the folder, resolved. ValueError
        says what is wrong with it. Nothing outside of the folder is read, not even by a link."""
        try:
            row = json.loads(line.decode("utf-8-sig"))
            name, caption = row["file"], " ".join(row["caption"].split())
            file = self.root / name
            inside = file.resolve().is_relative_to(root)
            if inside and file.is_dir() and file != self.root:     # a clip: of no links out
                inside = all(p.resolve().is_relative_to(root) for p in file.iterdir())
            there = file != self.root and (file.is_file() or file.is_dir())
        except UnicodeDecodeError:
            raise ValueError("not UTF-8 text") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
            raise ValueError('not {"file": "...", "caption": "..."}') from None
        if Path(name).is_absolute() or not inside:
            raise ValueError(f"'{name}' lies outside of the folder")
        if not there:
            raise ValueError(f"no file '{name}'")
        return file, caption

    def _load(self, file):
        """Path -> uint8 (F, H, W, 3)."""
        if file.is_dir():
            files = _pictures_in(file)
            if not files:
                raise ValueError("a folder, but not of pictures alone")
            stream = ((k / self.fps, fit(p, self.size)) for k, p in enumerate(files))
        elif file.suffix.lower() in VIDEOS:
            stream = _video(file, self.size)
        else:
            stream = _animation(file, self.size, self.frames)
        with warnings.catch_warnings():                      # what is odd about a file, and can be
            warnings.simplefilter("ignore")                  # read all the same, is not our topic
            return np.stack(_sample(stream, self.frames, self.fps))


def _pictures_in(folder):
    """A folder's picture files in order, if it holds nothing else."""
    inside = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    return inside if all(p.is_file() and p.suffix.lower() in PICTURES for p in inside) else []


def _sample(stream, frames, fps):
    """From (start in seconds, frame) pairs, `frames` of them: for each k the one on show at
    k / fps, the last held. Decodes no further than it must."""
    taken, shown = [], None                                  # shown: the frame before `start`
    for start, frame in stream:
        # 1e-6: a frame that starts at k / fps but for a rounding error is the one on show
        while shown is not None and len(taken) < frames and start > len(taken) / fps + 1e-6:
            taken.append(shown)
        if len(taken) == frames:
            return taken
        shown = frame
    if shown is None:
        raise ValueError("holds no frame")
    return taken + [shown] * (frames - len(taken))


def _animation(file, size, frames):
    """The (start, frame) pairs of a GIF or WebP; one pair for a still picture."""
    with _opened(file) as image:
        # (not n_frames: of a GIF that means to walk through all of it)
        moving = getattr(image, "is_animated", False)
        # a GIF may be a clip in which nothing moves: equal frames are stored as one
        if frames > 1 and not moving and image.format != "GIF":
            raise ValueError("a still picture; give it by --image-data")
        start = 0.0
        for k in itertools.count():
            yield start, fit(image, size)
            start += (image.info.get("duration") or 100) / 1000        # milliseconds; none = 100
            try:
                image.seek(k + 1)
            except EOFError:
                return


def need_av(doing):
    """The av package (PyAV), imported only when a video is there. ValueError with the remedy."""
    try:
        import av
    except ImportError:
        raise ValueError(f"{doing} videos needs: pip install -e '.[video]'") from None
    return av


def _video(file, size):
    """The (start, frame) pairs of a video, through PyAV."""
    with need_av("reading").open(str(file)) as container:
        first = None                                         # a cut video need not begin at 0
        for frame in container.decode(video=0):
            time = float(frame.time or 0)
            first = time if first is None else first
            yield time - first, fit(frame.to_image(), size)


def _opened(file):
    """Image.open, with the size checked before anything is decoded: a few kilobytes on the disk can
    be gigabytes in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)   # our limit is below
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:                # twice pillow's own limit: 179 million
            raise ValueError(f"it is above {MAX_PIXELS // 10**6} megapixels") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{image.width}x{image.height} is above {MAX_PIXELS // 10**6} megapixels")
    return image


def size_of(file):
    """(height, width) of a picture file as it is shown, turned as EXIF says."""
    with _opened(file) as image:
        wide, high = image.size
        return (wide, high) if image.getexif().get(ORIENTATION) in SIDEWAYS else (high, wide)


def fit(image, size):
    """A picture (PIL image or path) -> uint8 (H, W, 3): turned as EXIF says, centre-cropped to the
    shape of H x W, resized. Raises what pillow raises on a broken file."""
    if not isinstance(image, Image.Image):
        with _opened(image) as opened:
            return fit(opened, size)
    high, wide = size
    if image.format == "JPEG":               # decode a large JPEG at 1/2, 1/4, 1/8: cheap and exact
        image.draft("RGB", (2 * max(size), 2 * max(size)))
    turned = image.getexif().get(ORIENTATION, 1)
    if turned in SIDEWAYS:                   # the crop then lies on its side too
        high, wide = wide, high
    w, h = image.size
    scale = min(w / wide, h / high)          # crop first: what follows sees no more than it needs
    cw, ch = max(1, round(wide * scale)), max(1, round(high * scale))
    x, y = (w - cw) // 2, (h - ch) // 2
    image.load()
    # RGB before resizing: a palette's numbers have no mean. Turned last, when it is small
    image = _rgb(image.crop((x, y, x + cw, y + ch)))
    image = image.resize((wide, high), Image.LANCZOS, reducing_gap=3.0)
    turns = {2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}      # EXIF -> Image.Transpose
    for turn in turns.get(turned, []):
        image = image.transpose(Image.Transpose(turn))
    return np.asarray(image)


def _rgb(image):
    """Any pillow mode -> RGB; what is transparent lies on white."""
    if image.mode.startswith("I") or image.mode == "F":                # 16 or 32 bits a pixel
        a = np.nan_to_num(np.array(image, np.float32), copy=False)     # in place: it may be large
        # What is white? pillow opens 16-bit files as 32-bit too: the brightest pixel tells
        top = 65535 if a.max() > 255 else 255 if a.max() > 1 or image.mode != "F" else 1
        if image.mode.startswith("I;16"):
            top = 65535
        a *= 255 / top
        a += 0.5
        image = Image.fromarray(a.clip(0, 255, out=a).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


# -----------------------------------------------------------------------------
# 7. The cache: latents and text features, stored by `train.py --stage encode`
# -----------------------------------------------------------------------------
#
#   index.json          what all shards share: how many items, their shapes, who encoded them
#   00000.latents.npy   (n, F, C, h, w) fp16: the first n = SHARD items
#   00000.text0.npy     (T, D_0) fp16: the first encoder's tokens of one text after the other, real
#                       ones only, as padding would be most of the file; text1: the second encoder's
#   00000.pooled.npy    (m, P) fp16: the texts' pooled features
#   00000.json          captions: one an item. texts: the m different ones among them, "" (the null
#                       text) first. offsets: for each encoder m + 1 numbers, text j is rows
#                       offsets[j] : offsets[j + 1]. Written last: a shard that has it is whole.
#   00001.latents.npy   the next n items, and so on: no file grows with the dataset

SHARD = 8192            # items a shard: 64 MB of 32x32x4 latents


def cache_index(path):
    """What index.json says, a dict, or None if this folder is no cache."""
    try:
        index = json.loads((Path(path) / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None                                          # somebody's pictures, perhaps
    return index if isinstance(index, dict) and index.get("format") == "gentron cache" else None


def save_json(path, content):
    """Writes a JSON file that is whole, or not there at all."""
    path = Path(path)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)


def save_shard(folder, k, latents, captions, texts, tokens, pooled):
    """Writes shard k: latents (n, F, C, h, w), n captions, the m different texts among them ("" the
    first), and if encoders were asked: tokens, for each encoder m arrays (L, D), pooled (m, P)."""
    name = lambda part: Path(folder) / f"{k:05d}.{part}"
    # fp16: half of fp32's bytes, and finer than bf16 between -1000 and 1000, where all of it lies
    half = lambda x: np.clip(x, -65504, 65504).astype(np.float16)
    np.save(name("latents.npy"), half(latents))
    for e, rows in enumerate(tokens):
        np.save(name(f"text{e}.npy"), half(np.concatenate(rows)))
    if tokens:
        np.save(name("pooled.npy"), half(pooled))
    offsets = [np.cumsum([0, *map(len, rows)]).tolist() for rows in tokens]
    save_json(name("json"), {"captions": captions, "texts": texts, "offsets": offsets})


class Cache:
    """A folder that `train.py --stage encode` wrote; cache[places] -> fp16 latents (B, F, C, h, w)
    and B captions, read from memory-mapped files: nothing is decoded, and what was read before
    comes from the system's memory.

    `size`, `frames`, `fps`, `labels`, `vocabulary` are those of the data that was encoded; `vae`
    and `encoders` say by whom (see `fingerprint` in train.py). Raises ValueError for a cache that
    is not finished, damaged, or of another size or length than asked for."""
    def __init__(self, path, size=None, frames=None):
        self.root, index = Path(path), cache_index(path)
        if index is None:
            raise ValueError(f"no cache, {path}; make one: python train.py --stage encode")
        try:
            self._read(path, index)
        except (LookupError, TypeError, AttributeError, ArithmeticError, json.JSONDecodeError,
                UnicodeDecodeError, OSError) as error:
            raise ValueError(f"damaged cache, {path} ({error!r:.80}); encode again") from None
        if len(self.captions) != self.n:
            raise ValueError(f"damaged cache, {path}: {len(self.captions)} captions for {self.n} "
                             f"items; encode again")
        if size and tuple(size) != self.size:
            raise ValueError(f"cache of another size, {path} holds {self.size[0]}x{self.size[1]}, "
                             f"not {size[0]}x{size[1]}; encode again, or leave out --size")
        if frames and frames != self.frames:
            raise ValueError(f"cache of another length, {path} has {self.frames} frames an item, "
                             f"not {frames}; encode again with --frames {frames}")
        # A cache of millions has more files than a process may hold open: the last used stay
        self.open = lru_cache(maxsize=256)(self._open)

    def _read(self, path, index):
        """Sets all fields, from index.json and the shards' own; arrays are not opened yet."""
        self.n, self.shape = index["items"], tuple(index["shape"])         # shape: (F, C, h, w)
        self.size, self.frames, self.fps = tuple(index["size"]), index["frames"], index["fps"]
        self.labels, self.vocabulary = index["labels"], index["vocabulary"]
        self.vae, self.encoders = index["vae"], index["encoders"]
        self.shard = index["shard"]
        shards = -(-self.n // self.shard)                    # rounded up
        missing = shards - sum((self.root / f"{k:05d}.json").is_file()
                               for k in range(min(shards, 10 ** 6)))       # a wild number: no more
        if missing:
            raise ValueError(f"cache not finished, {path} lacks {missing} shards; run the "
                             f"same train.py --stage encode again, it goes on")
        self.captions, self.where = [], {}                   # where: text -> (shard, row)
        self.offsets = []                                    # [shard][encoder][row]
        for k in range(shards):
            part = json.loads((self.root / f"{k:05d}.json").read_text(encoding="utf-8"))
            self.captions += part["captions"]
            self.offsets.append(part["offsets"])
            if self.encoders:                                # a text may stand in several shards
                for row, text in enumerate(part["texts"]):
                    self.where.setdefault(text, (k, row))

    def __len__(self):
        return self.n

    def _open(self, k, part):
        """The array of one file, mapped into memory: reading touches only the rows asked for."""
        try:
            return np.load(self.root / f"{k:05d}.{part}.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"damaged cache, {self.root} ({error}); encode again") from None

    def __getitem__(self, places):
        places = np.asarray(places)
        latents = np.empty((len(places), *self.shape), np.float16)
        order = np.argsort(places)                           # read forwards, file by file
        shards = places[order] // self.shard                 # (B,)
        for k in np.unique(shards):
            mine = order[shards == k]
            latents[mine] = self.open(int(k), "latents")[places[mine] % self.shard]
        return latents, [self.captions[i] for i in places]

    def text(self, caption):
        """The features of a caption of this cache, or of "": fp16 tokens, for each encoder an array
        (L, D), and pooled (P,). KeyError if the caption is not here."""
        k, row = self.where[caption]
        ends = [offsets[row:row + 2] for offsets in self.offsets[k]]
        tokens = [self.open(k, f"text{e}")[a:b] for e, (a, b) in enumerate(ends)]
        return tokens, self.open(k, "pooled")[row]

    def report(self):
        """What is in it, as lines to print."""
        by = f"text features by {self.encoders['spec']}" if self.encoders else "captions"
        shape = "x".join(map(str, self.shape))
        return [f"{self.root}: cache of {self.n:,} items, latents {shape} of "
                f"{self.size[0]}x{self.size[1]} pixels, {by}"]


# -----------------------------------------------------------------------------
# 8. One door
# -----------------------------------------------------------------------------

def open_data(name, size=(64, 64), frames=1, fps=4, level="basic", n=10_000, seed=0):
    """"shapes" -> Shapes, a cache's folder -> Cache, anything else -> Folder. Raises ValueError as
    these do."""
    if name == "shapes":
        return Shapes(level, n, seed, size, frames)
    if cache_index(name):
        return Cache(name, size, frames)
    return Folder(name, size, frames, fps)


# -----------------------------------------------------------------------------
# 9. Looking at it
# -----------------------------------------------------------------------------

def contact_sheet(clips, captions, columns=6, notes=None, frame=0, cell=128):
    """Pictures in a grid with their captions under them -> PIL.Image.

    clips: uint8 arrays (F, H, W, 3) or (H, W, 3), all of one H x W; captions: as many strings;
    notes: None, or as many (text, color) pairs or Nones, a second line and a frame in that color;
    frame: which frame of each clip (past its end: its last); cell: width of a picture in pixels."""
    font, small, gap = ImageFont.load_default(size=12), ImageFont.load_default(size=11), 12
    clips = [clip[None] if clip.ndim == 3 else clip for clip in clips]
    notes = notes or [None] * len(clips)
    columns = max(1, min(columns, len(clips)))
    h, w = clips[0].shape[1:3]
    tall = round(cell * h / w)
    # For each picture its lines of text: (string, font, color)
    lines = [[(line, font, "#222222") for line in _wrap(caption, font, cell)]
             + [(line, small, note[1]) for line in (_wrap(note[0], small, cell) if note else [])]
             for caption, note in zip(captions, notes)]
    rows = [range(k, min(k + columns, len(clips))) for k in range(0, len(clips), columns)]
    text = [15 * max(len(lines[k]) for k in row) + 6 for row in rows]  # pixels under each row
    height = gap + sum(tall + room + gap for room in text)
    sheet = Image.new("RGB", (gap + columns * (cell + gap), height), "white")
    pen, y = ImageDraw.Draw(sheet), gap
    for row, room in zip(rows, text):                        # y grows by a row, x by a picture
        for x, k in zip(range(gap, sheet.width, cell + gap), row):
            picture = Image.fromarray(clips[k][min(frame, len(clips[k]) - 1)])
            # At a whole multiple every pixel stays a square, to be looked at as it is
            enlarge = Image.NEAREST if cell % w == 0 and cell > w else Image.LANCZOS
            sheet.paste(picture.resize((cell, tall), enlarge), (x, y))
            edge, width = (notes[k][1], 2) if notes[k] else ("#d8d8d8", 1)
            pen.rectangle((x - 1, y - 1, x + cell, y + tall), outline=edge, width=width)
            for n, (line, face, color) in enumerate(lines[k]):
                pen.text((x, y + tall + 4 + 15 * n), line, fill=color, font=face)
        y += tall + room + gap
    return sheet


def _wrap(text, font, width, most=5):
    """Text -> at most `most` lines no wider than `width` pixels; a word too long is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
        while font.getlength(lines[-1]) > width:
            lines[-1] = lines[-1][:-2]
    return lines if len(lines) <= most else [*lines[:most - 1], lines[most - 1][:-1] + "…"]


def save_gif(path, images, fps=4):
    """Writes PIL images as a GIF that loops for ever, `fps` images a second."""
    # One palette, that of all the images together: colours then do not flicker between frames.
    # No dithering, for its dots would.
    strip = Image.new("RGB", (images[0].width, images[0].height * len(images)))
    for k, image in enumerate(images):
        strip.paste(image, (0, k * image.height))
    palette = strip.quantize(255, dither=Image.Dither.NONE)
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    # A GIF counts in hundredths: the ends of frames are rounded, not their lengths, or it drifts.
    ends = [10 * round(100 * k / fps) for k in range(len(images) + 1)]
    lengths = [max(10, b - a) for a, b in zip(ends, ends[1:])]
    first.save(path, "GIF", save_all=True, append_images=rest, loop=0,
               duration=lengths if rest else lengths[0])


def save_mp4(path, images, fps=4):
    """Writes PIL images as an H.264 video, `fps` images a second. ValueError if av is missing."""
    av = need_av("writing")
    # H.264 wants even sides: a last odd row or column is cut
    w, h = (side // 2 * 2 for side in images[0].size)
    with av.open(str(path), "w") as container:
        # 1 / 100 s is fine enough for 12.5 frames a second, and what a GIF has
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100))
        stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
        stream.options = {"crf": "16"}                       # near lossless: small flat pictures
        for image in images:
            frame = av.VideoFrame.from_image(image.crop((0, 0, w, h)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))                   # what the encoder still holds back


# -----------------------------------------------------------------------------
# 10. Command lines (train.py and sample.py use these too)
# -----------------------------------------------------------------------------

def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite number of `kind` from low (with above: more than low) to high.
    float("nan") and float("inf") are numbers to Python, and would only be noticed much later."""
    def read(text):
        try:
            value = kind(text)
            good = math.isfinite(value) and low <= value <= high and not (above and value == low)
        except (ValueError, OverflowError):                  # no number; an int of 400 digits
            good = False
        if not good:
            word = "whole number" if kind is int else "number"
            bounds = f"{'above' if above else 'from'} {low}"
            bounds += f" to {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"'{text}' is not a {word} {bounds}")
        return value
    return read


def picture_size(text):
    """An argparse type: '64' -> (64, 64), '64x96' -> (64, 96), height x width in pixels."""
    parts = text.lower().split("x")
    if not (1 <= len(parts) <= 2 and all(p.isdigit() and 8 <= int(p) <= 4096 for p in parts)):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no size; write H or HxW, in pixels from 8 to 4096")
    return (int(parts[0]), int(parts[-1]))


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""
    def error(self, message):
        """Prints one line where argparse prints its usage too; exit code 2."""
        print(f"error: {message}; try --help", file=sys.stderr)
        raise SystemExit(2)


def writable(path):
    """Path of a file to be written, its folder made; if it cannot be: ValueError, at once and not
    after hours of work."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written; try another folder")
    return path


@contextmanager
def writing(path, *temporary):
    """`with writing(path):` an error while a file is written (a full disk, say) becomes an OSError
    of one line that names it, and what was written beside it goes."""
    try:
        yield
    except OSError as error:
        for file in temporary:
            Path(file).unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}; make room there, or choose "
                      f"another folder") from None


def parser():
    """Every flag."""
    # No abbreviations: a flag that is added later could change what an old command means
    p = Parser(description="Look at the dataset: a sheet of it, captions below.",
               allow_abbrev=False)
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


def main(argv=None):
    """Command line -> exit code: 0, or 2 for what the user can mend."""
    args = parser().parse_args(argv)
    try:
        out = writable(args.preview)
        if out.suffix.lower() not in (".png", ".gif"):
            raise ValueError(f"cannot write '{out.suffix}' files, {out}; "
                             f"try {out.with_suffix('.png')}")
        if cache_index(args.data):
            raise ValueError(f"nothing to look at, {args.data} holds latents; try the folder that "
                             f"they were made of")
        data = open_data(args.data, args.size, args.frames, args.fps, args.world, args.n, args.seed)
        print("\n".join(data.report()) if isinstance(data, Folder) else
              f"the shapes world ({args.world}), seed {args.seed}")
        clips, captions = zip(*[data[i] for i in range(min(args.n, len(data)))])
        sheets = [contact_sheet(clips, captions, frame=f) for f in range(args.frames)]
        with writing(out):
            if out.suffix.lower() == ".gif":
                save_gif(out, sheets, args.fps)
            else:
                sheets[0].save(out)                          # of clips, their first frames
        print(f"wrote {out}")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
