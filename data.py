"""
data.py: what the model eats.

    python data.py --preview out.png               # look at the dataset, captions under the pictures
    python data.py --preview out.gif --frames 8    # the same for clips

Three sources, one interface. An item is a clip and its caption: (uint8 array (F, H, W, 3), str),
and a picture is a clip with F = 1.

  1. The shapes world: pictures drawn from their captions. Because the truth is known, a *judge*
     can read a picture back and say whether it shows what was asked: text alignment is measured
     here, not guessed. `Shapes` draws, `judge` reads.
  2. `Folder`: your own pictures and clips (captions beside them, class folders, or none).
  3. `Cache`: latents and text features stored by `train.py --stage encode`.

The world's grammar, all of it:

  picture = object | object and object | object RELATION object | object RELATION object and object
  clip    = object MOTION [and object MOTION]
  object  = COUNT [SIZE] [TEXTURE] COLOR SHAPE            "two small striped red circles"
"""

import math
import re
from dataclasses import dataclass, field

import numpy as np

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
# Radius of an object, in units of the picture's shorter side; the gaps between the ranges are what
# lets the judge tell the sizes apart. Medium is left unsaid.
SIZES = {"small": (0.105, 0.115), "medium": (0.155, 0.170), "large": (0.225, 0.245)}
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # y is down
RELATIONS = (*DIRECTIONS, "inside", "in front of")
STEPS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
MOTIONS = (*STEPS, "growing", "shrinking", "staying still")

# Eight colour-shape pairs never occur in training, though each of their words does: drawing them
# is the test that a model composes words and does not recall pictures.
HELD_OUT = frozenset({("red", "cross"), ("green", "ring"), ("blue", "triangle"), ("yellow", "star"),
                      ("purple", "square"), ("orange", "circle"), ("pink", "cross"), ("cyan", "star")})
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
    count: int = 1
    motion: str = ""

    def words(self):
        number = next(w for w, n in COUNTS.items() if n == self.count)
        parts = [number, self.size if self.size != "medium" else "",
                 self.texture if self.texture != "solid" else "", self.color,
                 self.shape if self.count == 1 else plural(self.shape), self.motion]
        parts = [p for p in parts if p]
        if parts[0] == "a" and parts[1][0] in "aeiou":          # an orange circle
            parts[0] = "an"
        return " ".join(parts)


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
        first, *rest = [thing.words() for thing in self.things]
        if self.relation:
            first += f" {self.relation} {rest.pop(0)}"
        return " and ".join([first, *rest])

    def owners(self):
        """Which thing each instance is: two circles and a square -> [0, 0, 1]."""
        return [k for k, thing in enumerate(self.things) for _ in range(thing.count)]


_OBJECT = (rf"(an?|two|three|four)(?: (small|large))?(?: ({'|'.join(TEXTURES)}))? ({'|'.join(COLORS)}) "
           rf"({'|'.join(SHAPES)})(?:e?s)?(?: ({'|'.join(MOTIONS)}))?")
_CAPTION = re.compile(rf"{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})?(?: and {_OBJECT})?$")


def parse(caption):
    """Caption -> Scene without tracks, the inverse of `Scene.caption`.

    Raises ValueError for a sentence that is not of the world's grammar."""
    match = _CAPTION.match(" ".join(caption.lower().replace(",", " ").replace(".", " ").split()))
    if not match:
        raise ValueError(f"'{caption}' is not a sentence of the shapes world")
    groups = match.groups()
    things = [Thing(color, shape, texture or "solid", size or "medium",
                    COUNTS["a" if count == "an" else count], motion or "")
              for count, size, texture, color, shape, motion in (groups[0:6], groups[7:13], groups[13:19])
              if count]
    return Scene(things, groups[6] or "")


# -----------------------------------------------------------------------------
# 2. The shapes world: choosing a scene
# -----------------------------------------------------------------------------

def choose(rng, level="full", frames=1, pairs=SEEN_PAIRS):
    """A random scene of the world, laid out. `rng` is a numpy Generator.

    level: "single" (one plain object), "basic" (one or two plain objects, and, four relations)
    or "full" (everything). frames > 1 gives a clip: every thing moves. pairs: the (color, shape)
    pairs that may be used.
    """
    while True:                             # a few crowded choices have no layout: choose again
        scene = _choose_words(rng, level, frames, pairs)
        if layout(rng, scene):
            return scene


def _choose_words(rng, level, frames, pairs):
    pick = lambda options: options[int(rng.integers(len(options)))]
    full = level == "full"
    relation = ""
    if level == "single":
        n = 1
    elif frames > 1:
        n = 1 + int(rng.random() < 0.4)
    else:
        n = 1 + int(rng.random() < 0.6)
        if n == 2 and rng.random() < 0.6:
            relation = pick(RELATIONS if full else tuple(DIRECTIONS))
            n += int(full and rng.random() < 0.25)          # object relation object and object
    things = []
    while len(things) < n:
        color, shape = pick(pairs)
        if any((color, shape) == (t.color, t.shape) for t in things):
            continue                                        # "a red circle and a red circle"
        if relation in ("inside", "in front of") and len(things) == 1 and color == things[0].color:
            continue                                        # they touch: colours must tell them apart
        things.append(Thing(color, shape))
    for k, thing in enumerate(things):
        if frames > 1:
            thing.motion = pick(MOTIONS)
        if not full:
            continue
        related = relation in ("inside", "in front of") and k < 2
        if not related and frames == 1 and rng.random() < 0.3:
            room = 5 - sum(t.count for t in things)         # at most five instances in a picture
            thing.count += int(rng.integers(0, min(3, room) + 1)) if room > 0 else 0
        if related:                                         # what is inside is small, its house large
            sizes = ("small",) if relation == "inside" and k == 0 else ("large",) if k else ()
        elif thing.motion in ("growing", "shrinking"):
            sizes = ()
        else:
            sizes = ("small", "large") if thing.count == 1 else ("small",)
        if sizes and rng.random() < 0.35:
            thing.size = pick(sizes)
        tiny = thing.size == "small" or (relation == "inside" and k == 0)
        if not tiny and rng.random() < 0.35:
            thing.texture = pick(TEXTURES)
    return Scene(things, relation)


def layout(rng, scene, aspect=(1.0, 1.0)):
    """Places every instance (fills `scene.tracks`); False if no place was found.

    Nothing is clipped by the border, nothing touches (but under "inside" and "in front of"),
    relations hold by a clear margin, moving things cover at least a quarter of the picture.
    aspect: (height, width) of the picture in units of its shorter side.
    """
    high, wide = aspect
    owners = scene.owners()
    for _ in range(12):                                     # a bad first placement: start over
        placed = []                                         # [(owner, track (2, 3)), ...]
        for owner in owners:
            # 40 candidate tracks at once; the first that fits with what is there is taken
            tracks = _propose(rng, scene, owner, placed, high, wide)
            good = _fits(scene, owner, tracks, placed, high, wide)
            if not good.any():
                break
            placed.append((owner, tracks[int(np.argmax(good))]))
        if len(placed) == len(owners):
            scene.tracks = np.stack([track for _, track in placed])
            return True
    return False


def _propose(rng, scene, owner, placed, high, wide, n=40):
    """(n, 2, 3) candidate tracks for one instance of things[owner]."""
    thing = scene.things[owner]
    low, top = SIZES[thing.size]
    if scene.relation == "inside" and owner < 2:            # a small thing in the middle of a large
        low, top = (0.095, 0.102) if owner == 0 else (0.245, 0.260)
    elif thing.size == "medium" and sum(t.count for t in scene.things) > 3:
        low, top = 0.130, 0.140                             # a crowd: make room
    if any(o == owner for o, _ in placed):                  # three circles: all of one size
        low = top = next(t[0, 2] for o, t in placed if o == owner)
    start = np.empty((n, 3))
    start[:, 2] = rng.uniform(low, top, n)
    start[:, 0] = rng.uniform(0, wide, n)
    start[:, 1] = rng.uniform(0, high, n)
    if owner == 1 and scene.relation == "inside":           # around what is there already
        start[:, :2] = placed[0][1][0, :2] + rng.uniform(-0.012, 0.012, (n, 2))
    if owner == 1 and scene.relation == "in front of":      # half hidden, from any side
        angle = rng.uniform(0, 2 * math.pi, n)
        reach = (start[:, 2] + placed[0][1][0, 2]) * rng.uniform(0.58, 0.70, n)
        start[:, 0] = placed[0][1][0, 0] + reach * np.cos(angle)
        start[:, 1] = placed[0][1][0, 1] + reach * np.sin(angle)
    end = start.copy()
    if thing.motion in STEPS:
        far = rng.uniform(0.28, 0.48, n)
        if any(o == owner for o, _ in placed):              # several instances move as one
            first = next(t for o, t in placed if o == owner)
            far = np.full(n, np.abs(first[1] - first[0])[:2].sum())
        end[:, :2] += far[:, None] * np.array(STEPS[thing.motion])
    if thing.motion in ("growing", "shrinking"):
        start[:, 2], end[:, 2] = rng.uniform(0.095, 0.115, n), rng.uniform(0.200, 0.235, n)
        if thing.motion == "shrinking":
            start, end = end, start
            start[:, :2] = end[:, :2]
    return np.stack([start, end], 1)


def _fits(scene, owner, tracks, placed, high, wide):
    """bool (n,): which candidate tracks of things[owner] respect the border and the others."""
    edge = 0.02
    u = np.linspace(0, 1, 7 if scene.things[0].motion else 1)[None, :, None]
    path = tracks[:, :1] * (1 - u) + tracks[:, 1:] * u      # (n, 7, 3): each track at seven moments
    x, y, r = path[..., 0], path[..., 1], path[..., 2]
    good = ((x > r + edge) & (x < wide - r - edge) & (y > r + edge) & (y < high - r - edge)).all(1)
    for other, track in placed:
        there = track[:1] * (1 - u[0]) + track[1:] * u[0]   # (7, 3)
        dx, dy = x - there[:, 0], y - there[:, 1]
        related = bool(scene.relation) and {owner, other} == {0, 1}
        if not (related and scene.relation in ("inside", "in front of")):
            # shapes touch only if both their boxes' sides and their circles do
            apart = np.maximum(np.hypot(dx, dy), 1.18 * np.maximum(abs(dx), abs(dy)))
            good &= (apart > r + there[:, 2] + 0.03).all(1)
        if related and scene.relation in DIRECTIONS:
            ax, ay = DIRECTIONS[scene.relation]
            sign = 1 if owner == 0 else -1                  # things[0] is RELATION things[1]
            along, across = sign * (dx * ax + dy * ay), abs(dx * ay) + abs(dy * ax)
            good &= ((along > 0.22) & (along > 1.35 * across)).all(1)
    return good


# -----------------------------------------------------------------------------
# 3. The shapes world: drawing
# -----------------------------------------------------------------------------

_COS36, _SIN36 = math.cos(math.pi / 5), math.sin(math.pi / 5)


def distance(shape, x, y):
    """Signed distance to a shape's outline, negative inside; the shape has radius 1, y is down."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.86
    if shape == "triangle":                                  # corners (0, -1), (-0.95, 0.8), (0.95, 0.8)
        return np.maximum(y - 0.8, (1.8 * abs(x) - 0.95 * (y + 1)) / 2.035)
    if shape == "cross":
        a, b = abs(x), abs(y)
        return np.minimum(np.maximum(a - 0.33, b - 0.95), np.maximum(a - 0.95, b - 0.33))
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.76) - 0.24
    if shape == "star":                                      # fold the plane into a tenth of the star
        angle = np.arctan2(x, -y) % (2 * math.pi / 5)
        angle = np.minimum(angle, 2 * math.pi / 5 - angle)
        rho = np.hypot(x, y) / 1.04
        u, v = rho * np.cos(angle), rho * np.sin(angle)      # one edge: tip (1, 0) to a notch
        nx, ny = 0.46 * _SIN36, 1 - 0.46 * _COS36            # that edge's normal
        return ((u - 1) * nx + v * ny) / math.hypot(nx, ny)
    raise ValueError(f"unknown shape '{shape}'")


def ink(texture, x, y):
    """Where a texture is dark, as a soft distance like `distance`: positive in the ink. The pattern
    hangs on the object, not on the page: it moves and grows with it."""
    if texture == "striped":
        return abs((y / 0.72 + 0.25) % 1 - 0.5) * 0.72 - 0.18
    if texture == "checkered":
        wave = lambda a: 0.25 - abs((a + 0.25) % 1 - 0.5)    # a corner of four checks at the centre
        a, b = wave(x), wave(y)
        return np.sign(a * b) * np.minimum(abs(a), abs(b))
    if texture == "dotted":
        u, v = (x / 0.72 + 0.5) % 1 - 0.5, (y / 0.72 + 0.5) % 1 - 0.5
        return 0.24 - np.hypot(u, v) * 0.72
    raise ValueError(f"unknown texture '{texture}'")


def draw(scene, size=(64, 64), frames=1):
    """Scene -> uint8 (F, H, W, 3), antialiased. Frame f shows the moment f / (F - 1) of the clip."""
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
            x0, x1 = max(0, int(cx - r - 2)), min(wide, int(cx + r + 3))
            y0, y1 = max(0, int(cy - r - 2)), min(high, int(cy + r + 3))
            x = (np.arange(x0, x1) + 0.5 - cx)[None, :] / r  # the object's own coordinates
            y = (np.arange(y0, y1) + 0.5 - cy)[:, None] / r
            cover = np.clip(0.5 - distance(thing.shape, x, y) * r, 0, 1)[..., None]
            paint = np.array(COLORS[thing.color], np.float32)
            if thing.texture != "solid":
                dark = np.clip(0.5 + ink(thing.texture, x + 0 * y, y + 0 * x) * r, 0, 1)[..., None]
                paint = paint * (1 - dark) + np.array(INK, np.float32) * dark
            patch = clip[f, y0:y1, x0:x1]
            patch += cover * (paint - patch)
    return np.rint(clip).astype(np.uint8)


class Shapes:
    """`n` items of the world; item i of seed s is a function of (s, i) alone.

    shapes[i] -> (uint8 (F, H, W, 3), caption). `scene(i)` is the truth behind it.
    """
    def __init__(self, level="basic", n=10_000, seed=0, size=(64, 64), frames=1, pairs=SEEN_PAIRS):
        self.level, self.n, self.seed = level, n, seed
        self.size, self.frames, self.pairs = tuple(size), frames, pairs

    def __len__(self):
        return self.n

    def scene(self, i):
        if not 0 <= i < self.n:
            raise IndexError(i)
        return choose(np.random.default_rng((self.seed, i)), self.level, self.frames, self.pairs)

    def __getitem__(self, i):
        scene = self.scene(i)
        return draw(scene, self.size, self.frames), scene.caption()
