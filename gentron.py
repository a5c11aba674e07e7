"""gentron.py: GenTron, text to image and text to video with Diffusion Transformers, in one file.

The paper: Chen et al., "GenTron: Diffusion Transformers for Image and Video Generation",
CVPR 2024, arXiv:2312.04557. If you know DiT (Peebles & Xie 2023), then GenTron = DiT +
  1. text in place of classes: cross-attention to text tokens; adaLN carries time and pooled text
  2. two text encoders, interleaved: block k reads encoder k mod K
  3. video: a temporal self-attention in every block, which starts as "add nothing"
  4. joint image-video training: a picture is a still clip whose frames do not see each other
  5. motion-free guidance: "motion" is a condition like text, and can be guided like text

    x (B, F N, D)                                     c = time + pooled text (B, D)
    +--> LN, scale, shift -> self-attention  -> gate --(+)  N tokens of a frame    <- c
    +--> LN               -> cross-attention ----------(+)  queries: image, keys: text
    +--> LN               -> temporal attention -------(+)  one place, F frames    <- motion
    +--> LN, scale, shift -> MLP             -> gate --(+)  each token by itself   <- c

Shapes: B batch, F frames, C channels, H W height and width (of latents; of pictures in pixels), h
heads, N tokens a frame, L text tokens, D width. A picture has F = 1: latents are (B, F, C, H, W).
Masks: True = may be attended. `# OURS:` marks what is not the paper's, with our reason."""

import inspect
import json
import math
import os
import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as fn

# ---- 1. Configuration (paper, Table 1) -----------------------------------------------------------
# OURS: the heads. Parameters: Transformers that read CLIP-L and T5-XXL, no temporal layers.
PRESETS = {
    "nano": dict(depth=4,  width=160,  heads=5,  patch_size=2),   #    2.4 M (small text encoder)
    "S/2":  dict(depth=12, width=384,  heads=6,  patch_size=2),   #   60.3 M
    "B/2":  dict(depth=12, width=768,  heads=12, patch_size=2),   #  192.3 M
    "L/2":  dict(depth=24, width=1024, heads=16, patch_size=2),   #  631.7 M
    "XL/2": dict(depth=28, width=1152, heads=16, patch_size=2),   #  910.6 M (the paper: 930.0)
    "G/2":  dict(depth=48, width=1664, heads=16, patch_size=2),   # 3065.0 M (the paper: 3083.8)
}

flag = lambda default, help: field(default=default, metadata={"help": help})  # train.py's flags

@dataclass
class GenTronConfig:
    """All that decides the Transformer's weights. ValueError for values that cannot be built."""
    depth: int = flag(12, "blocks")
    width: int = flag(384, "D, channels of a token")
    heads: int = flag(6, "attention heads of D / heads channels each")
    patch_size: int = flag(2, "p: a token is p x p latent positions")
    mlp_ratio: int = flag(4, "MLP width / D")
    conditioning: str = flag("cross", "how text enters: cross, or adaln (the paper's ablation)")
    qk_norm: bool = flag(False, "normalise queries and keys: small logits, learns faster")
    in_channels: int = 4                 # C of the latents
    text_dims: tuple = (768, 4096)       # channels of each text encoder (CLIP-L, T5-XXL); () = none
    temporal: bool = False               # video: a temporal self-attention in every block
    grid: tuple = ()                     # (rows, columns) of tokens in training; () = not known

    def __post_init__(self):
        self.text_dims, self.grid = tuple(self.text_dims), tuple(self.grid)    # lists will do
        for f in fields(self):
            value = getattr(self, f.name)
            numbers = value if f.type is tuple else [value] if f.type is int else []
            if type(value) is not f.type or not all(type(n) is int and 1 <= n <= 65536
                                                    for n in numbers):
                raise ValueError(f"{f.name} cannot be {value!r:.60}")
        if self.width % (4 * self.heads) or self.depth > 512 or len(self.grid) not in (0, 2):
            raise ValueError(f"width {self.width} must be heads {self.heads} x a multiple of 4, "
                             f"depth {self.depth} at most 512, grid {self.grid!s:.40} a pair")
        if self.conditioning not in ("cross", "adaln"):
            raise ValueError(f"--conditioning '{self.conditioning:.60}' must be cross or adaln")

# ---- 2. Embeddings -------------------------------------------------------------------------------
def sincos(position, dim, max_period=10_000):
    """(...,) positions -> (..., dim): sines, then cosines, of dim / 2 geometric frequencies."""
    # From 1 (tells neighbours apart) down to almost 1 / max_period (tells near from far)
    frequencies = max_period ** (-torch.arange(dim // 2, device=position.device) / (dim // 2))
    angles = position[..., None].float() * frequencies     # (..., dim / 2), in radians
    return torch.cat([angles.sin(), angles.cos()], dim=-1)

def turn(x, pos, k):
    """OURS: rotary positions (Su et al. 2021): x (..., T, d), pos (T,). Channels i and i + k form a
    point of a plane, turned by an angle in proportion to pos. Channels from 2 k on stay."""
    speeds = 100 ** (-torch.arange(k, device=x.device) / k)
    angles = pos[:, None] * speeds               # (T, k): 1 to almost 1 / 100 radians a position
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b, rest = x.split([k, k, x.shape[-1] - 2 * k], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)

def grid_positions(high, wide, dim, grid=(), device=None):
    """(high * wide, dim), one vector a token: half its channels encode its column, half its row.
    OURS: positions are scaled to `grid`, training's (rows, columns) (PixArt, Chen et al. 2023)."""
    rows, columns = grid or (high, wide)
    y = torch.arange(high, device=device).repeat_interleave(wide) * (rows / high)      # 0 0 0 1 1 1
    x = torch.arange(wide, device=device).repeat(high) * (columns / wide)              # 0 1 2 0 1 2
    return torch.cat([sincos(x, dim // 2), sincos(y, dim // 2)], dim=-1)

def patchify(z, p):  # exercise 1
    """(B, F, C, H, W) -> (B, F * N, p * p * C), N = (H / p) * (W / p), row by row."""
    B, F, C, H, W = z.shape
    z = z.reshape(B, F, C, H // p, p, W // p, p)
    # Channels last within a patch, as DiT's output layer has them: its weights fit unchanged
    return z.permute(0, 1, 3, 5, 4, 6, 2).reshape(B, F * (H // p) * (W // p), p * p * C)

def unpatchify(x, p, shape):
    """The inverse of `patchify`; shape is z's (B, F, C, H, W)."""
    B, F, C, H, W = shape
    x = x.reshape(B, F, H // p, W // p, p, p, C)
    return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, F, C, H, W)

# ---- 3. The Transformer (paper, 3.2 and 3.4) -----------------------------------------------------
def norm(x):
    """LayerNorm over the channels of (..., D), without weights: adaLN or the next layer scales."""
    return fn.layer_norm(x, x.shape[-1:], eps=1e-6)

def modulate(x, shift, scale):
    """adaLN: x (B, T, D) times 1 + scale, plus shift. Both are (B, 1, D): one for all tokens."""
    return torch.addcmul(shift, x, 1 + scale)              # one pass over x

def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v. q (B, h, T, d), k and v (B, h, L, d), mask bool (B, 1, 1, L)."""
    if q.device.type != "cpu":           # the same in one fused kernel: no (T, L) scores in memory
        return fn.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)               # (B, h, T, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v

class Attention(nn.Module):
    """Multi-head attention, for all its uses:
    self      attention(x)                       tokens of one frame look at each other
    cross     attention(x, kv=..., mask=...)     image tokens look at text tokens
    temporal  attention(x, pos=..., motion=...)  one token's F moments look at each other
    words     attention(x, mask=..., pos=...)    in the small text encoder"""
    def __init__(self, width, heads, kv_dim=None, qk_norm=False, turned=0.5):
        super().__init__()
        # The share of channels that `turn` rotates. Frames: half, so half of v stays as it is.
        # Words: all; with half, their order is learned late.
        self.heads, self.planes = heads, int(turned * (width // heads) / 2)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(kv_dim or width, 2 * width)    # keys and values in one product
        self.out = nn.Linear(width, width)
        normalise = lambda: nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()
        self.q_norm, self.k_norm = normalise(), normalise()

    def split(self, x):
        """(B, T, D) -> (B, h, T, D / h): every head is its own batch item."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, y):
        """(B, L, kv_dim) -> k, v, each (B, h, L, D / h)."""
        k, v = self.kv(y).chunk(2, dim=-1)
        return self.k_norm(self.split(k)), self.split(v)

    def forward(self, x, kv=None, mask=None, pos=None, motion=None):
        """x (B, T, D); kv: None = x itself, tokens (B, L, kv_dim), or the (k, v) of `keys_values`;
        mask bool (B, L); pos (T,), for self-attention; motion bool (B,). Returns (B, T, D)."""
        q = self.q_norm(self.split(self.q(x)))                             # (B, h, T, D/h)
        k, v = kv if isinstance(kv, tuple) else self.keys_values(x if kv is None else kv)
        mask = None if mask is None else mask[:, None, None, :]            # (B, 1, 1, L)
        if pos is None:
            y = attend(q, k, v, mask)                                      # (B, h, T, D/h)
        else:
            # Rotating q and k makes q . k depend on the distance of two frames (or words).
            # OURS: v is rotated, too, and the result is rotated back. Weights sum to 1: where all v
            # are equal, q and k alone could not tell one frame from another.
            q, k, rotated = (turn(y, pos, self.planes) for y in (q, k, v))
            y = turn(attend(q, k, rotated, mask), -pos, self.planes)
        if motion is not None:
            # Motion-free = the identity mask of paper 3.4: each frame sees only itself. A softmax
            # over one key is 1, so the result is v itself. No mask tensor is needed.
            y = torch.where(motion[:, None, None, None], y, v)  # exercise 5
        return self.out(y.transpose(1, 2).flatten(2))                      # (B, T, D)

class Block(nn.Module):
    """DiT's two branches, with text and frames between them. text_dim None: no cross-attention."""
    def __init__(self, cfg, text_dim):
        super().__init__()
        D = cfg.width
        self.modulation = nn.Linear(D, 6 * D)    # c -> shift, scale, gate of DiT's two branches
        self.attn = Attention(D, cfg.heads, None, cfg.qk_norm)
        self.cross = Attention(D, cfg.heads, text_dim, cfg.qk_norm) if text_dim else None
        self.temporal = Attention(D, cfg.heads, None, cfg.qk_norm) if cfg.temporal else None
        self.mlp = nn.Sequential(nn.Linear(D, cfg.mlp_ratio * D), nn.GELU(approximate="tanh"),
                                 nn.Linear(cfg.mlp_ratio * D, D))

    def forward(self, x, c, kv, mask, frames, pos, motion):
        """x (B, F N, D), c (B, D), kv the text's tokens (B, L, text_dim) or their `keys_values`,
        mask the text's, pos (F,), motion bool (B,). Returns (B, F N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = \
            self.modulation(fn.silu(c))[:, None].chunk(6, dim=-1)          # each (B, 1, D)
        y = modulate(norm(x), shift1, scale1).unflatten(1, (frames, -1)).flatten(0, 1)  # (B F) N D
        x = torch.addcmul(x, gate1, self.attn(y).reshape(x.shape))         # x + gate1 * attn(y)
        if self.cross is not None:
            x = x + self.cross(norm(x), kv, mask)                          # (B, F N, D)
        if self.temporal is not None:
            x = x + self.across_frames(norm(x), frames, pos, motion)       # (B, F N, D)
        return torch.addcmul(x, gate2, self.mlp(modulate(norm(x), shift2, scale2)))

    def keys_values(self, tokens):
        """A text (B, L, text_dim) -> the (k, v) that `forward` takes in its place, or None."""
        return None if self.cross is None else self.cross.keys_values(tokens)

    def across_frames(self, x, frames, pos, motion):
        """TempSelfAttn (paper 3.4): attention among the F moments of each token, x (B, F N, D)."""
        y = x.unflatten(1, (frames, -1)).transpose(1, 2)                   # (B, N, F, D)
        N = y.shape[1]
        motion = None if motion is None else motion.repeat_interleave(N)   # (B N,)
        y = self.temporal(y.flatten(0, 1), pos=pos, motion=motion)         # (B N, F, D)
        return y.unflatten(0, (-1, N)).transpose(1, 2).flatten(1, 2)       # (B, F N, D)

@dataclass
class Text:
    """Encoded captions: an entry of tokens and of mask for each encoder k."""
    tokens: tuple                        # of (B, L, D_k)
    mask: tuple                          # of bool (B, L), True = a real token
    pooled: torch.Tensor                 # (B, sum of all D_k)

class GenTron(nn.Module):
    """The Transformer: noisy latents, a timestep, a text -> a prediction (eps, v or flow)."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D, patch = cfg.width, cfg.patch_size ** 2 * cfg.in_channels        # patch: p p C
        # Interleaved text (paper 3.2): block k reads encoder k mod K. With adaLN it reads none.
        cross, K = cfg.conditioning == "cross" and cfg.text_dims, len(cfg.text_dims)
        text_dims = [cfg.text_dims[k % K] if cross else None for k in range(cfg.depth)]
        self.patch = nn.Linear(patch, D)                                   # p p C -> D
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.pooled = nn.Linear(sum(cfg.text_dims), D) if cfg.text_dims else None
        self.blocks = nn.ModuleList(Block(cfg, text_dim) for text_dim in text_dims)
        self.final_modulation = nn.Linear(D, 2 * D)                        # c -> shift, scale
        self.final = nn.Linear(D, patch)                                   # D -> p p C
        self.initialize()

    def initialize(self):
        """All initialisation, in one place, called last. Every block starts as the identity, and
        the network answers 0, the mean of eps, v and flow: the first loss is near 1 (flow: 2)."""
        # As in DiT: matrices Xavier uniform, biases zero, the layers that make c normal(0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in filter(None, (self.time[0], self.time[2], self.pooled)):
            nn.init.normal_(layer.weight, std=0.02)
        # adaLN-Zero: gates, and so both of DiT's branches, start at zero; the output starts at zero
        zero = [self.final_modulation, self.final]
        for block in self.blocks:
            # Temporal attention has no gate. Its output projection starts at zero, so a fresh video
            # model equals its image parent (paper 3.4). OURS: cross-attention starts so, too.
            zero += [block.modulation, *(x.out for x in (block.cross, block.temporal) if x)]
        for parameter in nn.ModuleList(zero).parameters():
            nn.init.zeros_(parameter)

    def route(self, text):
        """Text -> what the blocks read: ([tokens a block], [mask a block], pooled (B, D) or 0).
        ValueError if text's widths are not those of `cfg.text_dims`."""
        if self.pooled is None:                            # a model without text ignores it
            return [None] * self.cfg.depth, [None] * self.cfg.depth, 0
        dims = tuple(x.shape[-1] for x in text.tokens)
        if dims != self.cfg.text_dims:
            raise ValueError(f"text has widths {dims}, this model reads {self.cfg.text_dims}")
        # OURS: tokens and pooled vectors are normalised, so that no encoder dominates by its scale
        tokens = [norm(x) for x in text.tokens]                            # K times (B, L, D_k)
        pooled = torch.cat([norm(x) for x in text.pooled.split(dims, dim=-1)], dim=-1)
        reads = [k % len(dims) for k in range(self.cfg.depth)]             # interleaved
        return [tokens[i] for i in reads], [text.mask[i] for i in reads], self.pooled(pooled)

    def prepare(self, text):
        """As `route`, with keys and values for tokens: sampling needs them only once a prompt."""
        tokens, mask, pooled = self.route(text)
        return [block.keys_values(x) for block, x in zip(self.blocks, tokens)], mask, pooled

    def forward(self, z, t, text=None, motion=None):
        """z (B, F, C, H, W), t (B,) in steps of the schedule, text a Text or what `prepare` made of
        it, motion bool (B,): None = all on, False = motion-free. Returns (B, F, C, H, W)."""
        B, F, C, H, W = z.shape
        p, D = self.cfg.patch_size, self.cfg.width
        if H % p or W % p:
            raise ValueError(f"latents of {H} x {W} are not divisible by patch size {p}")
        kvs, masks, pooled = text if isinstance(text, tuple) else self.route(text)
        where = grid_positions(H // p, W // p, D, self.cfg.grid, z.device)             # (N, D)
        x = self.patch(patchify(z, p)) + where.repeat(F, 1)                # (B, F N, D)
        c = self.time(sincos(t, 256)) + pooled                             # (B, D)
        pos = torch.arange(F, device=z.device)                             # (F,), the frames' order
        for block, kv, mask in zip(self.blocks, kvs, masks):
            x = block(x, c, kv, mask, F, pos, motion)                      # (B, F N, D)
        shift, scale = self.final_modulation(fn.silu(c))[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        x = self.final(modulate(norm(x), shift, scale))                    # (B, F N, p p C)
        return unpatchify(x, p, z.shape)                                   # (B, F, C, H, W)

# ---- 4. Diffusion (paper, 3.1): the schedule, the samplers, the training loss --------------------
# The objectives that fit a schedule. From eps, z0 = (z - sigma eps) / alpha: cosine ends at an
# alpha of 0.00005, which makes an error of eps 20,000 times larger; straight ends at 0.
OBJECTIVES = {"linear": ("eps", "v"), "cosine": ("v",), "straight": ("flow",)}

# name: (eta, order, looks). eta: share of fresh noise; looks: how often a middle level is visited
SAMPLERS = {
    "ddim":  (0.0, 1, 1),                # Song et al. 2021a; with flow it is Euler's method
    "ddpm":  (1.0, 1, 1),                # Ho et al. 2020
    "dpm++": (0.0, 2, 1),                # Lu et al. 2022, DPM-Solver++(2M)
    # OURS: predictor-corrector (Song et al. 2021b). The middle levels decide how many objects there
    # are. There noise is renewed, twice, and the network looks again: doubled objects often vanish.
    "pc":    (1.0, 1, 3),
}

class NoiseSchedule:
    """z_t = alpha_t z_0 + sigma_t noise, for t = 0 .. steps - 1; the noise grows with t.
    kind         alpha, sigma                         objective: what the network predicts
    "linear"     DDPM's betas                         "eps" = noise (the paper), or "v"
    "cosine"     cos, sin of t                        "v" = alpha noise - sigma z_0
    "straight"   1 - sigma, sigma = (t + 1) / steps   "flow" = noise - z_0 (Liu et al. 2022)
    All but straight keep alpha^2 + sigma^2 = 1. shift lowers log(alpha / sigma) at every t
    (Hoogeboom et al. 2023). ValueError for a combination that cannot work."""
    steps = 1000
    def __init__(self, kind="linear", objective="eps", shift=0.0):
        if objective not in OBJECTIVES.get(kind, ()) or not abs(shift) <= 5:
            fits = "; ".join(f"{k} with {' or '.join(v)}" for k, v in OBJECTIVES.items())
            raise ValueError(f"schedule '{kind!s:.20}' with objective '{objective!s:.20}', shift "
                             f"{shift}, cannot work: z0 is lost at high noise; try {fits}")
        self.kind, self.objective, self.shift, steps = kind, objective, shift, self.steps
        # float64 throughout: a thousand factors near 1 would lose digits, and 1 - alpha^2 more
        if kind == "linear":                     # OURS: the paper gives no betas; these are DDPM's
            betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
            alpha = torch.cumprod(1 - betas, 0).sqrt()
        elif kind == "cosine":                             # Nichol & Dhariwal 2021, equation 17
            level = lambda t: math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2     # alpha^2
            betas = [min(1 - level(t + 1) / level(t), 0.999) for t in range(steps)]
            alpha = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0).sqrt()
        else:
            alpha = 1 - torch.arange(1, steps + 1, dtype=torch.float64) / steps
        sigma = 1 - alpha if kind == "straight" else (1 - alpha ** 2).sqrt()
        if shift:
            sigma = sigma * math.exp(shift)
            total = alpha + sigma if kind == "straight" else torch.hypot(alpha, sigma)
            alpha, sigma = alpha / total, sigma / total
        # One more entry at the end, so that t = -1 reads "no noise left": alpha 1, sigma 0
        self.alpha = torch.cat([alpha, torch.ones(1, dtype=torch.float64)])
        self.sigma = torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])
        self.half_log_snr = self.alpha.log() - self.sigma.log()                 # falls with t

    def at(self, t, like):
        """alpha_t and sigma_t of t (B,), shaped to multiply `like` (B, ...)."""
        shape = (-1,) + (1,) * (like.ndim - 1)             # (B, 1, 1, ...)
        return (self.alpha[t.cpu()].to(like).view(shape), self.sigma[t.cpu()].to(like).view(shape))

    def q_sample(self, z0, t, noise):  # exercise 2
        """Clean latents z0 (B, ...) -> latents at step t (B,), in one go; noise (B, ...)."""
        alpha, sigma = self.at(t, z0)
        return alpha * z0 + sigma * noise

    def target(self, z0, t, noise):
        """What the network should predict, (B, ...) like z0 and noise; t (B,)."""
        if self.objective == "eps":
            return noise
        if self.objective == "flow":
            return noise - z0
        alpha, sigma = self.at(t, z0)
        return alpha * noise - sigma * z0

    def z0_and_eps(self, out, z, alpha, sigma):
        """The network's prediction and z, both (B, ...) -> its estimates of z0 and eps."""
        if self.objective == "eps":
            return (z - sigma * out) / alpha, out
        if self.objective == "flow":                       # alpha + sigma = 1
            return z - sigma * out, z + alpha * out
        # (z, v) is (z0, eps) turned by an angle, as alpha^2 + sigma^2 = 1: turn it back
        return alpha * z - sigma * out, sigma * z + alpha * out

    def draw_timesteps(self, n, generator, frames=1, layout=False):
        """n training timesteps, (n,). frames: how many frames of an item see each other, a number
        or (n,). layout: draw from the noisiest three tenths only."""
        if layout:
            # OURS: in much noise only the text tells the layout, so it is learned there first
            return torch.randint(7 * self.steps // 10, self.steps, (n,), generator=generator)
        if self.objective == "eps":                        # uniform, as in DDPM
            return torch.randint(self.steps, (n,), generator=generator)
        # OURS: a logit-normal (Esser et al. 2024) of spread 1.5, not 1: high noise decides places
        t = torch.sigmoid(1.5 * torch.randn(n, generator=generator)) * self.steps
        # OURS: F frames show nearly one scene. Their average has sqrt(F) times less noise, so a
        # clip is easier to read than a picture. So its log(alpha / sigma) is lowered by log(F) / 2.
        frames = torch.as_tensor(frames, dtype=torch.float64)
        wanted = self.half_log_snr[t.long().clamp(max=self.steps - 1)] - frames.log() / 2   # (n,)
        return torch.searchsorted(-self.half_log_snr[:-1], -wanted).clamp(max=self.steps - 1)

    def timesteps(self, n, sampler="ddim"):
        """n <= steps timesteps from pure noise down ("trailing"): 999, 959, ... 39 for n = 25. pc:
        13 levels, the 6 in the middle three times each: 999, 922, 845, 768, 768, 768, 691 ...
        ValueError if there is no such sampler."""
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler is '{sampler}'; it must be one of {', '.join(SAMPLERS)}")
        if not 1 <= n <= self.steps:
            raise ValueError(f"{n} sampling steps; there must be from 1 to {self.steps}")
        looks = SAMPLERS[sampler][2]
        middle = n // (looks + 1)                          # number of levels looked at again
        levels = n - (looks - 1) * middle
        first = max(1, (levels - middle) // 2)             # not pure noise: alpha may be 0
        again = range(first, first + middle)
        return [round(self.steps - k * self.steps / levels) - 1 for k in range(levels)
                for _ in range(looks if k in again else 1)]

    def denoise(self, predict, z, steps=25, sampler="pc", generators=None, skip=0, known=None):
        """Walks from noise z (B, ...) to clean latents; yields (t, z, z0) after a step: timestep,
        latents, estimate of the clean ones. predict(z, t) -> the network's output. generators:
        one an item, for fresh noise. skip: number of first steps left out. known(z, t) -> z
        with its given part replaced, noised to step t (-1: clean). ValueError as in `timesteps`."""
        times = self.timesteps(steps, sampler)[skip:] + [-1]               # -1: no noise left
        eta, order, _ = SAMPLERS[sampler]
        known = known or (lambda z, t: z)
        lam, before = self.half_log_snr, None                   # before: (z0, t) of the last step
        for t, s in zip(times, times[1:]):                 # from t to the less noisy s; or s = t
            alpha_t, alpha_s = self.alpha[[t, s]].tolist()
            sigma_t, sigma_s = self.sigma[[t, s]].tolist()
            z = known(z, t)
            # z stays in fp32, whatever the model runs in: small steps would be lost in bf16
            out = predict(z, torch.full((len(z),), t, device=z.device)).float()
            z0, eps = self.z0_and_eps(out, z, alpha_t, sigma_t)
            towards = z0
            if order == 2 and before is not None and s >= 0:
                # z0 extrapolated to the middle of this step, along lambda = log(alpha / sigma)
                slope = (z0 - before[0]) / (lam[t] - lam[before[1]]).item()
                towards = z0 + slope * (lam[s] - lam[t]).item() / 2
                eps = eps - alpha_t / sigma_t * (towards - z0)  # alpha_t towards + sigma_t eps = z
            # fresh: the new noise's standard deviation, eta times that of q(z_s | z_t, z0). A
            # corrector step (s = t) replaces noise: 0.8 new and 0.6 old, as 0.8^2 + 0.6^2 = 1.
            forward = sigma_t ** 2 - (alpha_t / alpha_s * sigma_s) ** 2    # variance, s to t
            fresh = (0.8 * sigma_t if s == t else
                     eta * sigma_s / sigma_t * math.sqrt(max(0.0, forward)))
            z = alpha_s * towards + math.sqrt(sigma_s ** 2 - fresh ** 2) * eps  # exercise 3
            if fresh:                    # on the CPU, item by item: an item depends on its own seed
                z = z + fresh * torch.stack([torch.randn(z.shape[1:], generator=g)
                                             for g in generators or [None] * len(z)]).to(z)
            before = (z0, t)
            yield t, known(z, s), z0

@dataclass
class Draws:
    """All the randomness of one training step. draws[a:b] is the part of items a .. b - 1."""
    t: torch.Tensor                      # (B,) whole timesteps, 0 .. steps - 1
    noise: torch.Tensor                  # (B, F, C, H, W)
    drop_text: torch.Tensor              # (B,) bool: train on the null text
    still: torch.Tensor                  # (B,) bool: train motion-free, on one picture repeated
    given: torch.Tensor                  # (B,) bool: the first frame is given, without noise

    def __getitem__(self, part):
        return Draws(*(getattr(self, f.name)[part] for f in fields(self)))

def randomness(seed, step, shape, schedule=None, p_drop_text=0.0, p_still=0.0, p_first_frame=0.0,
               layout=False):
    """The Draws of a whole batch, shape (B, F, C, H, W): a function of the arguments alone."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + step)     # unique for a million steps
    drop, still, given = torch.rand(3, shape[0], generator=g)              # (B,) each
    still = still < p_still
    given = (given < p_first_frame) & ~still & (shape[1] > 1)
    # OURS: motion-free guidance needs the network without text *and* without motion. Independent
    # drops would train that on 1 % of the items, so a still's caption is dropped more often.
    drop_text = drop < torch.where(still, max(0.3, p_drop_text) if p_drop_text else 0, p_drop_text)
    frames = torch.where(still, 1, shape[1])               # a still's frames do not see each other
    t = schedule.draw_timesteps(shape[0], g, frames, layout) if schedule else torch.zeros(shape[0])
    return Draws(t, torch.randn(shape, generator=g), drop_text, still, given)

def training_loss(model, encoder, schedule, z0, captions, draws):
    """The loss of each item, (B,): mean squared error of the network's prediction (paper 3.1).
    z0 (B, F, C, H, W) clean latents, captions B strings, draws of B items. Conditions are dropped
    here. Text: the caption becomes "", the null text. Motion (paper 3.4): a `still` is one picture
    F times, whose frames do not see each other. OURS: a `given` first frame has no noise."""
    captions = ["" if drop else caption for drop, caption in zip(draws.drop_text, captions)]
    t, noise, given = (x.to(z0.device) for x in (draws.t, draws.noise, draws.given))
    z = schedule.q_sample(z0, t, noise)
    z[given, 0] = z0[given, 0]
    out = model(z, t, encoder(captions), ~draws.still.to(z0.device))
    error = out.float() - schedule.target(z0, t, noise)     # in fp32, whatever the model runs in
    error[given, 0] = 0
    return error.square().flatten(1).mean(1)                # (B,)

# ---- 5. Guidance (paper, 3.4) --------------------------------------------------------------------
def guided(model, text, cfg=2.0, motion_scale=1.0, bf16=False):  # exercise 4
    """Text guidance and motion-free guidance in one: returns predict(z, t) for the samplers. The
    paper adds two differences to the unconditional prediction (l_T = cfg, l_M = motion_scale):
        e(null, off) + l_T (e(text, on) - e(null, on)) + l_M (e(null, on) - e(null, off))
        = l_T e(text, on) + (l_M - l_T) e(null, on) + (1 - l_M) e(null, off)
    The weights sum to 1, so they apply to eps, v and flow alike. A weight of 0 is not evaluated:
    motion_scale = 1 is plain text guidance, both 1 the conditional model. motion_scale None puts
    the identity mask everywhere. text: a Text of B prompts and, as its last row, the null
    text. bf16: the network runs in bf16, the sum in fp32."""
    B, device = len(text.pooled) - 1, next(model.parameters()).device
    prompts, null = list(range(B)), [B] * B                # rows of `text`
    # A branch is a weight, its texts, and motion on or off
    on, scale = (True, motion_scale) if motion_scale is not None else (False, 1)
    branches = [(cfg, prompts, on), (scale - cfg, null, on), (1 - scale, null, False)]
    weights, rows, motion = zip(*(branch for branch in branches if branch[0] != 0))
    n, weights = len(weights), torch.tensor(weights, dtype=torch.float32, device=device)   # (n,)
    rows = torch.tensor(rows).flatten()                                    # (n B,)
    motion = torch.tensor(motion, device=device).repeat_interleave(B)      # (n B,)
    text = Text(tuple(x[rows] for x in text.tokens), tuple(m[rows] for m in text.mask),
                text.pooled[rows])
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    with autocast():
        prepared = model.prepare(text)                     # keys and values: once, not each step

    def predict(z, t):
        with autocast():                                   # all branches in one batch
            out = model(z.repeat(n, 1, 1, 1, 1), t.repeat(n), prepared, motion)
        return torch.einsum("n,nbfchw->bfchw", weights, out.float().unflatten(0, (n, B)))
    return predict

# ---- 6. Text (paper, 3.2) ------------------------------------------------------------------------
def split_words(caption):
    """'An orange circle!' -> ['a', 'orange', 'circle']. A CJK character is a word of its own."""
    cjk = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"         # kana, Han, Hangul
    found = re.findall(f"[{cjk}]|[^\\W_{cjk}]+", caption.lower())    # else letters and digits
    return ["a" if word == "an" else word for word in found]

class WordEncoder(nn.Module):
    """The small text encoder: a vocabulary and a small Transformer, trained with the model.
    OURS: the paper's encoders are frozen CLIP and T5 (`FrozenEncoder`). This one learns a few dozen
    words in minutes, on a laptop, offline. split: caption -> words. turned: as for `Attention`."""
    PAD, START, UNKNOWN = 0, 1, 2        # START makes sure that "" has one real token
    max_words = 64                       # a longer caption loses its end

    def __init__(self, vocabulary, dim=128, depth=2, heads=4, split=split_words, turned=1.0):
        super().__init__()
        self.vocabulary, self.dim, self.split = vocabulary, dim, split
        self.index = {word: k + 3 for k, word in enumerate(vocabulary)}
        # nn.Embedding, not weight[ids], whose backward pass sums gradients in random order
        self.words = nn.Embedding(len(vocabulary) + 3, dim)
        self.attn = nn.ModuleList(Attention(dim, heads, turned=turned) for _ in range(depth))
        mlp = lambda: nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.mlp = nn.ModuleList(mlp() for _ in range(depth))

    def forward(self, captions):
        """List of B strings -> tokens (B, L, dim), mask (B, L), pooled (B, dim), their mean."""
        rows = [[self.START] + [self.index.get(word, self.UNKNOWN) for word in self.split(caption)]
                for caption in captions]
        L = min(self.max_words, max(map(len, rows)))                       # START counts as a word
        rows = [(row + [self.PAD] * L)[:L] for row in rows]                # each L long
        ids = torch.tensor(rows, device=self.words.weight.device)          # (B, L)
        mask = ids != self.PAD  # exercise 7                               # (B, L)
        # OURS: rotary positions, too. With them the noun before "left of" and the noun behind it
        # differ from the first step; with absolute positions alone this is learned late.
        place, words = torch.arange(L, device=ids.device), self.words(ids)     # (L,), (B, L, dim)
        x = words + sincos(place, self.dim)
        for attn, mlp in zip(self.attn, self.mlp):
            x = x + attn(norm(x), mask=mask, pos=place)                    # (B, L, dim)
            x = x + mlp(norm(x))
        # OURS: the word itself is added: without it, similar words get nearly one vector
        x = norm(x) + norm(words)
        return x, mask, (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def spell(self, caption):
        """What each token of one caption stands for: up to L strings."""
        return ["(start)", *self.split(caption)][:self.max_words]

class TextEncoder(nn.Module):
    """Captions -> Text, through one or several encoders. spec: "small", "small+small", "labels",
    "none", or "clip", "t5", names and folders of the transformers library, joined by +. vocabulary:
    words (small) or class names (labels). dim, turned: of a small encoder. download: pretrained
    encoders may be fetched. ValueError for a spec that cannot be built."""
    def __init__(self, spec="small", vocabulary=(), dim=128, download=False, turned=1.0):
        super().__init__()
        self.spec, self.vocabulary = spec, list(vocabulary)
        parts = [] if spec == "none" else spec.split("+")
        if "none" in parts or "" in parts or ("labels" in parts and len(parts) > 1):
            raise ValueError(f"text '{spec:.60}': none and labels stand alone, others join by +")
        # labels: the whole caption is one word, and with adaLN the model is DiT
        one_word = lambda caption: [caption] if caption else []
        small = {"small": dict(turned=turned), "labels": dict(depth=0, split=one_word)}
        self.encoders = nn.ModuleList(
            WordEncoder(self.vocabulary, dim, **small[part]) if part in small
            else FrozenEncoder(part, download) for part in parts)
        self.dims = tuple(encoder.dim for encoder in self.encoders)        # a config's text_dims

    def forward(self, captions):
        """List of B strings -> Text. The null text is the encoding of ""."""
        if not self.encoders:                              # "none": only the batch size is left
            return Text((), (), torch.zeros(len(captions), 0))
        tokens, mask, pooled = zip(*(encoder(captions) for encoder in self.encoders))
        return Text(tokens, mask, torch.cat(pooled, dim=-1))   # side by side: (B, sum of dims)

    def unknown(self, caption):
        """Words (or the class) that a small encoder does not know: a sorted list of strings."""
        small = [encoder for encoder in self.encoders if isinstance(encoder, WordEncoder)]
        return sorted({word for e in small for word in e.split(caption) or caption.split()
                       if word not in e.index})

# ---- 7. Autoencoder (paper, 3.1: a frozen KL autoencoder, 8x down) -------------------------------
class ResBlock(nn.Module):
    """x + conv(conv(x)) of (B, C, H, W). GroupNorm, as a picture must not depend on its batch."""
    def __init__(self, channels):
        super().__init__()
        layer = lambda: (nn.GroupNorm(8, channels), nn.SiLU(),
                         nn.Conv2d(channels, channels, 3, padding=1))
        self.layers = nn.Sequential(*layer(), *layer())

    def forward(self, x):
        return x + self.layers(x)

class VAE(nn.Module):
    """A small KL autoencoder: pictures (B, F, 3, H, W) in -1 .. 1 <-> latents (B, F, C, H/8, W/8).
    channels: C. kl: weight of the KL term. mean and std are measured at each save (in place of
    SD's 0.18215). Drawn latents have mean 0, deviation 1 per channel; `encode`'s deviate less."""
    down = 8                             # pixels a latent, along each axis

    def __init__(self, channels=16, kl=5e-4):
        super().__init__()
        self.config, self.channels, self.kl = dict(channels=channels, kl=kl), channels, kl
        conv = lambda c, d, stride=1: nn.Conv2d(c, d, 3, stride, padding=1)
        # OURS: pixels become channels first, as convolutions cost the most at full resolution
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), conv(12, 24), ResBlock(24),              # (24, H/2, W/2)
            conv(24, 48, stride=2), ResBlock(48),                          # (48, H/4, W/4)
            conv(48, 96, stride=2), ResBlock(96),                          # (96, H/8, W/8)
            nn.GroupNorm(8, 96), nn.SiLU(), conv(96, 2 * channels))        # mean, log variance
        self.decoder = nn.Sequential(
            conv(channels, 96), ResBlock(96), ResBlock(96),                # (96, H/8, W/8)
            nn.Conv2d(96, 4 * 64, 1), nn.PixelShuffle(2), ResBlock(64), ResBlock(64),
            nn.Conv2d(64, 4 * 32, 1), nn.PixelShuffle(2), ResBlock(32),    # (32, H/2, W/2)
            nn.GroupNorm(8, 32), nn.SiLU(), conv(32, 12), nn.PixelShuffle(2))      # (3, H, W)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, x, noise):
        """The training loss of each item, (B,): x (B, F, 3, H, W), noise (B, F, C, H/8, W/8)."""
        mean, logvar = self.posterior(x)                                   # (B, F, C, H/8, W/8)
        z = mean + noise * (0.5 * logvar).exp()                            # a draw, differentiable
        y = self.decoder(z.flatten(0, 1)).unflatten(0, x.shape[:2])        # (B, F, 3, H, W)
        error = (y.float() - x).flatten(1)
        # KL divergence from a standard normal, in closed form: it keeps the latents near 0
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).float().flatten(1).mean(1)
        # OURS: squared error finds the objects early; a little absolute error keeps flat areas flat
        return error.square().mean(1) + 0.1 * error.abs().mean(1) + self.kl * kl

    def posterior(self, x):
        """x (B, F, 3, H, W) -> mean and log variance of each frame, each (B, F, C, H/8, W/8)."""
        mean, logvar = self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]).chunk(2, dim=2)
        return mean, logvar.clamp(-20, 4)                                  # keeps exp in bounds

    def encode(self, x):
        """x (B, F, 3, H, W) in -1 .. 1 -> normalised latents (B, F, C, H/8, W/8), not drawn."""
        return (self.posterior(x)[0] - self.mean) / self.std

    def decode(self, z):
        """Normalised latents (B, F, C, H/8, W/8) -> pictures (B, F, 3, H, W) in -1 .. 1."""
        y = self.decoder((z * self.std + self.mean).flatten(0, 1))
        return y.clamp(-1, 1).unflatten(0, z.shape[:2])

def to_float(clips):
    """uint8 (B, F, H, W, 3), numpy or torch -> float (B, F, 3, H, W) in -1 .. 1."""
    return torch.as_tensor(clips).movedim(-1, -3).float() / 127.5 - 1

def to_uint8(x):
    """The inverse of `to_float`: (B, F, 3, H, W) -> numpy uint8 (B, F, H, W, 3)."""
    x = ((x.float() + 1) * 127.5).round().clamp(0, 255)    # clamped, or 256 would come out as 0
    return x.to(torch.uint8).movedim(-3, -1).cpu().numpy()

# ---- 8. Generate: everything above, in the order of use ------------------------------------------
@dataclass
class Given:
    """What a new picture or clip starts from, in place of pure noise; one for all B items."""
    image: torch.Tensor                  # clean latents (1, 1, C, H, W) of a picture
    strength: float = 1.0                # 0: the picture as it is .. 1: nothing of it is left
    mask: torch.Tensor = None            # (H, W), 1 = draw anew, 0 = keep the picture; None = all 1
    first_frame: bool = False            # the picture is a clip's first frame, and stays

def usual(preset):
    """{"cfg", "sampler"}: how models of a preset draw by default; None is nano."""
    # OURS: small models' defaults. The paper draws its clips with l_T = 7.5, and names no sampler.
    # At 7.5, pc's repeated steps add the guidance up, so ddpm is used.
    small = preset in (None, "nano")
    return {"cfg": 2.0, "sampler": "pc"} if small else {"cfg": 7.5, "sampler": "ddpm"}

@torch.no_grad()
def generate(model, encoder, vae, schedule, prompts, seeds, size=(64, 64), frames=1, cfg=2.0,
             motion_scale=1.0, steps=25, sampler="pc", device="cpu", bf16=False, negative="",
             given=None, on_step=None):
    """B prompts and B seeds -> uint8 pictures (B, F, H, W, 3), a numpy array. Item i depends on
    prompts[i] and seeds[i] alone. size: H and W in pixels. negative: what not to draw, in place of
    the null text. on_step(t, z, z0) is called after each step. The rest: `guided`, `denoise`."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # CPU: device-independent
    shape = (frames, vae.channels, size[0] // vae.down, size[1] // vae.down)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    z, skip, known = noise, 0, None
    if given is not None:
        image, mask = given.image.to(noise), given.mask
        at = lambda t: schedule.q_sample(image, torch.tensor([t]), noise)
        if given.first_frame:                              # without noise, as in `training_loss`
            known = lambda z, t: torch.cat([image.expand_as(z[:, :1]), z[:, 1:]], dim=1)
        else:        # SDEdit (Meng et al. 2021): begin some steps later, with the noised picture
            times = schedule.timesteps(steps, sampler)
            skip = sum(t >= given.strength * schedule.steps for t in times)
            z = at((times + [-1])[skip]) if skip else noise
            if mask is not None:                           # inpainting: z0 is known where mask is 0
                known = lambda z, t: torch.where(mask.to(z.device) > 0, z, at(t))
    predict = guided(model, encoder([*prompts, negative]), cfg, motion_scale, bf16)
    for t, z, z0 in schedule.denoise(predict, z, steps, sampler, generators, skip, known):
        if on_step:
            on_step(t, z, z0)                              # a progress bar, or a film of the steps
    x = vae.decode(z)                                      # only now: all steps were in latents
    if given is not None and mask is not None:             # the decoder mixes a little at the seam
        anew = fn.interpolate(mask[None, None].to(x), scale_factor=vae.down) > 0     # (1, 1, H, W)
        x = torch.where(anew, x, vae.decode(image))
    return to_uint8(x)

# ==== Below: engineering (pretrained encoders, checkpoints), where a first reading may stop =======
@contextmanager
def loading(what, name):
    """Around calls of a library: whatever it raises becomes one ValueError of one line."""
    try:
        with torch.device("cpu"):                          # also while `build_net` builds on meta
            yield
    except Exception as error:  # noqa: BLE001 - a library raises what it likes
        raise ValueError(f"{what} '{name:.80}' cannot be loaded ({first_line(error)}); try pip "
                         f"install -e '.[pretrained]', or hf download {name:.80}") from None

@lru_cache
def pretrained_text(path, download):
    """(network, tokenizer) of a frozen text encoder. Loaded once: copies of a model share it."""
    with loading("text encoder", path):
        from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, T5EncoderModel
        options = dict(local_files_only=not download)
        kind = AutoConfig.from_pretrained(path, **options).model_type      # a folder has any name
        if not kind.startswith(("clip", "t5", "mt5")):
            raise ValueError(f"it is a {kind} model; CLIP and T5 text encoders are known")
        family = CLIPTextModel if kind.startswith("clip") else T5EncoderModel
        # bf16 on a GPU halves T5-XXL; never fp16, in which T5 overflows
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        net = family.from_pretrained(path, dtype=dtype, **options).requires_grad_(False).eval()
        return net, AutoTokenizer.from_pretrained(path, **options)

class FrozenEncoder(nn.Module):
    """A pretrained text encoder, never trained (paper 3.2: CLIP-L and Flan-T5-XXL). Its weights are
    no part of the module: they are neither copied, nor averaged, nor saved."""
    NAMES = {"clip": "openai/clip-vit-large-patch14", "t5": "google/flan-t5-xxl"}
    def __init__(self, name, download=False, max_tokens=120):
        super().__init__()
        self.load = lambda: pretrained_text(self.NAMES.get(name, name), download)
        config = self.load()[0].config
        self.clip, self.dim = config.model_type.startswith("clip"), config.hidden_size
        # CLIP knows 77 positions; T5's are relative, so any length would do
        self.max_tokens = min(max_tokens, getattr(config, "max_position_embeddings", max_tokens))
        self.register_buffer("here", torch.zeros(1, device="cpu"), persistent=False)   # its device
    @torch.no_grad()
    def forward(self, captions):
        """List of B strings -> tokens (B, L, dim), mask (B, L), pooled (B, dim), in fp32."""
        net, tokenizer = self.load()
        batch = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt",
                          max_length=self.max_tokens).to(self.here.device)
        ids, mask = batch.input_ids, batch.attention_mask                  # (B, L) each
        out = net.to(ids.device)(input_ids=ids, attention_mask=mask)
        x, mask = out.last_hidden_state.float() * mask[..., None], mask.bool()      # padding is 0
        # OURS: T5 has no pooled output. The mean over real tokens (at least an end token) serves.
        return x, mask, out.pooler_output.float() if self.clip else x.sum(1) / mask.sum(1, True)
    def spell(self, caption):
        """What each token of one caption stands for, as the tokenizer writes it: L strings."""
        _, tokenizer = self.load()
        batch = tokenizer(caption, truncation=True, max_length=self.max_tokens)
        return tokenizer.convert_ids_to_tokens(batch.input_ids)

class PretrainedVAE(nn.Module):
    """A frozen KL autoencoder of the diffusers library, used like VAE. name: a hub name
    ("stabilityai/sd-vae-ft-ema") or a local folder. Its own constants normalise the latents."""
    def __init__(self, name, download=False):
        super().__init__()
        with loading("autoencoder", name):
            from diffusers import AutoencoderKL
            net = AutoencoderKL.from_pretrained(name, local_files_only=not download)
        self.net, config = net.requires_grad_(False).eval(), net.config
        self.channels = config.latent_channels
        self.down = 2 ** (len(config.block_out_channels) - 1)    # all levels but the last halve
        column = lambda values: torch.tensor(values, device="cpu").float().view(-1, 1, 1)
        shift, scale = config.get("shift_factor") or 0.0, config.scaling_factor
        self.register_buffer("mean", column(config.get("latents_mean") or [shift]))
        self.register_buffer("std", column(config.get("latents_std") or [1.0]) / scale)
    def encode(self, x):
        z = self.net.encode(x.flatten(0, 1)).latent_dist.mean
        return ((z - self.mean) / self.std).unflatten(0, x.shape[:2])
    def decode(self, z):
        y = self.net.decode((z * self.std + self.mean).flatten(0, 1)).sample
        return y.clamp(-1, 1).unflatten(0, z.shape[:2])

# ---- 9. The optimizer ----------------------------------------------------------------------------
class Muon(torch.optim.AdamW):
    """OURS: AdamW, and if `muon` Muon (Jordan et al. 2024) for the matrices of net's blocks, except
    adaLN's. Their step is the mean gradient with all singular values made 1: no part of a matrix
    learns slowly. It is as large as AdamW's would be (Liu et al. 2025): one rate. AdamW's second
    beta is 0.99: it forgets an early large gradient in 100 steps (with 0.999 in 1,000)."""
    def __init__(self, net, muon):
        super().__init__(net.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.matrices = dict.fromkeys(p for n, p in net.named_parameters() if muon and p.ndim == 2
                                      and n.startswith("model.blocks") and "modulation" not in n)
    @torch.no_grad()
    def step(self):
        for p in self.matrices:
            mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            size = 0.2 * max(p.shape) ** 0.5 * self.param_groups[0]["lr"]
            p.sub_(orthogonal(p.grad.lerp(mean, 0.95)), alpha=size)
            p.grad = None                                  # so AdamW skips it
        super().step()

def orthogonal(x):
    """x (r, c) = U S V^T -> about U V^T: five Newton-Schulz steps bring S to 0.7 .. 1.2."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.mT).mT
    x = x / (x.norm() + 1e-7)                              # now S is at most 1
    for _ in range(5):
        y = x @ x.mT                                       # (r, r)
        x = torch.addmm(x, torch.addmm(y, y, y, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x

# ---- 10. Checkpoints: safetensors files ----------------------------------------------------------
# A safetensors file: the length of a header (8 bytes), the header (JSON: each tensor's dtype, shape
# and place), the raw numbers. Nothing in it can be executed. A checkpoint is one dict: its tensors
# are stored under their path ("ema/model.patch.weight"), the rest as JSON in __metadata__.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TENSORS = re.compile("(ema|weights|optimizer|vae/weights)/.")  # names of tensors
seal = lambda facts, header: zlib.crc32(json.dumps([facts, header], sort_keys=True).encode())

def save_checkpoint(path, state, dtype=None):
    """Writes a dict of numbers, strings, lists, tensors (as dtype) and dicts of these beside `path`
    and renames it: `path` is always complete. OSError: full disk. ValueError: unusable dict."""
    tensors, plain = {}, (str, int, float, list, tuple, dict, torch.Tensor, type(None))
    def pick(tree, name=""):                               # the tree without its tensors
        rest = {}
        for key, value in tree.items():
            if "/" in key or not isinstance(value, plain):
                raise ValueError(f"'{name}{key}' cannot be saved: {value!r:.60}")
            if isinstance(value, torch.Tensor):
                tensors[name + key] = value.detach().to("cpu", dtype).contiguous()
            else:
                rest[key] = pick(value, f"{name}{key}/") if isinstance(value, dict) else value
        return rest
    facts = pick(state)
    check_facts(facts)                                     # a run must not leave an unusable file
    raw = lambda x: x.reshape(-1).view(torch.uint8).numpy()
    names, header, end, crc = {dtype: name for name, dtype in DTYPES.items()}, {}, 0, 0
    for name, x in tensors.items():
        if x.dtype not in names or not (x.numel() and x.isfinite().all() and TENSORS.match(name)):
            raise ValueError(f"'{name}' cannot be saved: its name, {x.dtype}, or not finite")
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape),
                        "data_offsets": [end, end + x.nbytes]}
        end, crc = end + x.nbytes, zlib.crc32(raw(x), crc)
    about = {"facts": facts, "crc32": crc, "header": seal(facts, header)}
    text = json.dumps({**header, "__metadata__": {"gentron": json.dumps(about)}}).encode()
    text += b" " * (-len(text) % 8)                        # the numbers begin at a multiple of 8
    if len(text) > 2 ** 24:
        raise ValueError(f"{path} cannot be saved: a vocabulary and flags of {len(text):,} bytes")
    temporary = Path(f"{path}.tmp")                        # in the same folder, so on the same disk
    try:
        temporary.unlink(missing_ok=True)                  # of a run that was killed; or a link
        with open(temporary, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for x in tensors.values():
                file.write(raw(x))
            file.flush()
            os.fsync(file.fileno())                        # on the disk before it has its name
        temporary.replace(path)                            # atomic
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}; make room there") from None

def load_checkpoint(path):
    """The dict that was saved, on the CPU. ValueError for a missing, damaged or foreign file."""
    if not os.path.isfile(path):                           # opening a pipe could block for ever
        raise ValueError(f"{path} does not exist, or is no regular file")
    try:
        with open(path, "rb") as file:
            return read_safetensors(file)
    except Exception as error:  # noqa: BLE001 - the one place where files become tensors
        raise ValueError(f"{path} is no checkpoint that can be used: {first_line(error)}") from None

def read_safetensors(file):
    """An open file -> the dict that `save_checkpoint` wrote. Other files: any exception."""
    size, head = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(head, "little")
    header = json.loads(file.read(length)) if 0 < length <= min(2 ** 24, size - 8) else {}
    if "gentron" not in (metadata := header.pop("__metadata__", {})):
        raise ValueError("it is no safetensors file of GenTron's")
    about = json.loads(metadata["gentron"])
    state, crc, end, sealed = about["facts"], 0, 0, seal(about["facts"], header)
    check_facts(state)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        # Without gaps: so nothing overlaps, and all lies inside of the file
        if (len(shape) > 8 or not all(type(n) is int and n > 0 for n in shape) or start != end
                or stop - start != math.prod(shape) * dtype.itemsize or stop > size - 8 - length):
            raise ValueError(f"it is damaged (place of {name:.80})")
        numbers, end = bytearray(stop - start), stop
        file.readinto(numbers)
        crc = zlib.crc32(numbers, crc)
        x = torch.frombuffer(numbers, dtype=dtype).view(shape)
        place, (*folders, leaf) = state, name.split("/")
        for folder in folders:
            place = place.setdefault(folder, {})
        if leaf in place or not TENSORS.match(name) or not x.isfinite().all():
            raise ValueError(f"{name:.80} is no name for a tensor, or its numbers are not finite")
        place[leaf] = x
    if end != size - 8 - length or crc != about["crc32"] or about.get("header", sealed) != sealed:
        raise ValueError("it is damaged (checksum)")
    return state

def check_facts(facts):
    """ValueError unless what a checkpoint says of itself can be used. It builds nothing large."""
    whole = lambda x, low, high: type(x) is int and low <= x <= high
    size, fps, vae, stage, made = (facts[x] for x in ("size", "fps", "vae", "stage", "made"))
    channels = None if "name" in vae else vae["config"]["channels"]
    good = dict(stage=stage in ("vae", "t2i", "t2v"), flags=type(facts["flags"]) is dict,
                size=len(size) == 2 and all(whole(n, 8, 4096) for n in size),
                frames=whole(facts["frames"], 1, 1024), step=whole(facts["step"], 0, 2 ** 40),
                fps=type(fps) in (int, float) and 0.01 <= fps <= 1000, made=type(made) is dict,
                **{x: type(facts.get(x, {})) is dict for x in ("ema", "weights", "optimizer")},
                vae=whole(channels, 1, 1024) or type(vae.get("name")) is str,
                config=(stage == "vae") != ("config" in facts))
    if stage != "vae":
        cfg, text = from_file(GenTronConfig, facts["config"]), facts["text"]
        from_file(NoiseSchedule, facts["schedule"])
        good["text"] = (type(text["spec"]) is str and text["spec"].count("+") < 8
                        and whole(text["dim"], 16, 4096) and text["dim"] % 16 == 0
                        and text.get("turned", 1) in (0.5, 1)
                        and all(type(word) is str for word in text["vocabulary"]))
        good["vae"] &= channels is None or channels == cfg.in_channels and not any(
            n % (VAE.down * cfg.patch_size) for n in size)
    for name, fine in good.items():
        if not fine:
            raise ValueError(f"its {name} is {facts.get(name)!r:.60}")

def from_file(kind, values):
    """A file's dict -> kind(**dict). What it lacks has its default; ValueError: unknown name."""
    if unknown := sorted(values.keys() - inspect.signature(kind).parameters.keys()):
        raise ValueError(f"it was made by a newer version: {kind.__name__} '{unknown[0]:.60}'")
    return kind(**values)

def first_line(error):
    """What an exception says, in one line of at most 150 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]

class Net(nn.Module):
    """Model, text encoder and schedule as one module, so one state_dict. forward is the loss."""
    def __init__(self, model, text, schedule):
        super().__init__()
        self.model, self.text, self.schedule = model, text, schedule
    def forward(self, z0, captions, draws):
        return training_loss(self.model, self.text, self.schedule, z0, captions, draws)

def load_weights(module, weights, what):
    """Loads {name: tensor} into module, in fp32. what: their name in the ValueError of a misfit."""
    try:
        copies = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
        module.load_state_dict(copies, assign=True)
    except (RuntimeError, AttributeError) as error:        # torch: a title, then a line a fault
        title, _, faults = str(error).partition("\n")
        raise ValueError(f"{what} does not fit: {first_line(faults or title)}") from None
    return module

def build_vae(state, download=False):
    """A checkpoint's autoencoder, frozen, fp32. download: True, or the one name to download."""
    part = state["vae"]                          # {"name": ...} or {"config": ..., "weights": ...}
    if "name" in part:
        return PretrainedVAE(part["name"], download in (True, part["name"]))
    with torch.device("meta"):                   # no memory before the weights are known to fit
        vae = from_file(VAE, part["config"]).requires_grad_(False).eval()
    return load_weights(vae, part.get("weights", {}), "the autoencoder")

def build_net(state, weights="ema", download=False):
    """The Net of a t2i or t2v checkpoint, in eval mode on the CPU. weights: "ema", or "weights"
    (raw). ValueError if the weights are missing or do not fit."""
    if state["stage"] == "vae" or weights not in state:
        raise ValueError(f"the checkpoint, of stage {state['stage']}, holds no "
                         f"{'EMA' if weights == 'ema' else 'raw'} weights")
    schedule = from_file(NoiseSchedule, state["schedule"])     # not on meta: no file has its tables
    with torch.device("meta"):
        text = from_file(TextEncoder, {**state["text"], "download": download})
        net = Net(GenTron(from_file(GenTronConfig, state["config"])), text, schedule)
    return load_weights(net, state[weights], "the checkpoint").eval()

def find_checkpoint(stages=("t2i", "t2v")):
    """The newest runs/*/ema.safetensors whose stage is in `stages`, else assets/nano.safetensors if
    its stage is. Returns a path. ValueError if there is neither, or a newer file is damaged."""
    runs = sorted(Path("runs").glob("*/ema.safetensors"), key=lambda p: -p.stat().st_mtime)
    shipped = Path(__file__).resolve().parent / "assets" / "nano.safetensors"
    for path in [*runs, shipped]:                # folders have any name; the file says its stage
        if path.exists() and load_checkpoint(path)["stage"] in stages:
            return str(path)
    raise ValueError(f"no {' or '.join(stages)} run in runs/; train one: python train.py")

def pick_device(name=None):
    """A torch.device: the one named, or else cuda, mps or cpu. ValueError if it is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else
                    "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        zero = torch.zeros(1, device=name)       # only a real allocation tells
        zero.item()                              # "meta" makes tensors without numbers
        return zero.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device '{name:.60}' cannot be used ({first_line(error)}); "
                         f"try --device cpu") from None
