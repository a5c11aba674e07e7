"""
gentron.py: GenTron, text to image and text to video with Diffusion Transformers, in one file.

The paper: Chen et al., "GenTron: Diffusion Transformers for Image and Video Generation",
CVPR 2024, arXiv:2312.04557. If you know DiT (Peebles & Xie 2023), then GenTron = DiT +
  1. text for classes: cross-attention to text tokens, adaLN keeps the time and a pooled text
  2. two text encoders, interleaved: block k reads encoder k mod K
  3. video: a temporal self-attention in every block, which starts as "add nothing"
  4. joint image-video training: a picture is a still clip whose frames do not see each other
  5. motion-free guidance: "motion" is a condition like text, and can be guided like text

    x (B, F N, D)                                     c = time + pooled text (B, D)
    |
    +--> LN, scale, shift -> self-attention  -> gate --(+)  N tokens of a frame  <- c
    +--> LN               -> cross-attention ----------(+)  image asks, text answers
    +--> LN               -> temporal attention -------(+)  F moments of a token <- motion
    +--> LN, scale, shift -> MLP             -> gate --(+)  each token by itself <- c
    |
    x (B, F N, D)

    from gentron import GenTronConfig, PRESETS, GenTron, Text
    cfg = GenTronConfig(**PRESETS["XL/2"], text_dims=(768, 4096), temporal=True)
    out = GenTron(cfg)(z, t, text, motion)         # (B, F, C, H, W) in, the same out

Shapes: B batch, F frames, C channels, H W latent height and width, N tokens a frame, L text tokens,
D width, h heads. A picture is a clip with F = 1: latents are always (B, F, C, H, W).
Masks: True = may be attended. `# OURS:` marks what the paper leaves open, with our reason.

  paper                                   here
  3.1 latent diffusion, noise schedule    NoiseSchedule, VAE
  3.2 text through adaLN or cross         Block, GenTron, TextEncoder
  3.3 scaling up (Table 1)                PRESETS
  3.4 temporal attention                  Attention(pos=, motion=), Block
      joint training, motion-free         training_loss
      motion-free guidance                guided
"""

import math
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

# -----------------------------------------------------------------------------
# 1. Configuration (paper, Table 1)
# -----------------------------------------------------------------------------

# Sizes only. Parameters are counted with cross-attention to CLIP-L and T5-XXL (768 and 4096
# channels), without temporal layers and without the text encoders themselves.
PRESETS = {
    "nano": dict(depth=4,  width=160,  heads=5,  patch_size=2),   #    2.4 M (small text encoder)
    "S/2":  dict(depth=12, width=384,  heads=6,  patch_size=2),   #   60.3 M
    "B/2":  dict(depth=12, width=768,  heads=12, patch_size=2),   #  192.3 M
    "L/2":  dict(depth=24, width=1024, heads=16, patch_size=2),   #  631.7 M
    "XL/2": dict(depth=28, width=1152, heads=16, patch_size=2),   #  910.6 M (the paper: 930.0)
    "G/2":  dict(depth=48, width=1664, heads=16, patch_size=2),   # 3065.0 M (the paper: 3083.8)
}


@dataclass
class GenTronConfig:
    """Everything that decides the shapes of the Transformer's weights.

    Raises ValueError for values that cannot be built."""
    depth: int = 12                      # blocks
    width: int = 384                     # D, channels of a token
    heads: int = 6                       # D / heads channels each
    patch_size: int = 2                  # p: a token is p x p latent positions
    in_channels: int = 4                 # C of the latents
    mlp_ratio: int = 4                   # MLP width / D
    text_dims: tuple = (768, 4096)       # channels of each text encoder (CLIP-L, T5-XXL); () = none
    conditioning: str = "cross"          # "cross" (the paper's choice) or "adaln" (its ablation)
    temporal: bool = False               # video: a temporal self-attention in every block

    def __post_init__(self):
        self.text_dims = tuple(self.text_dims)             # a list, when read from a file
        # The upper limits keep a damaged or hostile checkpoint from asking for hours of building
        for name, most in dict(depth=512, width=65536, heads=4096, patch_size=64, in_channels=1024,
                               mlp_ratio=64).items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 to {most}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.temporal and self.width // self.heads % 2:
            raise ValueError(f"width {self.width} / heads {self.heads} is odd; frame positions "
                             f"turn pairs of channels")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not divisible by 4 (sin and cos of two axes)")
        if self.conditioning not in ("cross", "adaln"):
            raise ValueError(f"conditioning is '{self.conditioning}', not 'cross' or 'adaln'")
        if not all(isinstance(d, int) and 1 <= d <= 65536 for d in self.text_dims):
            raise ValueError(f"text_dims {self.text_dims} must hold whole numbers from 1 to 65536")

    @property
    def pooled_dim(self):
        """Channels of the pooled text that enters adaLN: all encoders' side by side."""
        return sum(self.text_dims)


# -----------------------------------------------------------------------------
# 2. Embeddings
# -----------------------------------------------------------------------------

def sincos(position, dim, max_period=10_000):
    """(...,) positions -> (..., dim): sines, then cosines, of dim / 2 geometric frequencies.

    One function for timesteps, rows, columns, frames and words. Nothing is learned, so any grid and
    any number of frames load into any checkpoint."""
    # From 1 down to almost 1 / max_period: the first tell neighbours apart, the last near from far
    frequencies = max_period ** (-torch.arange(dim // 2, device=position.device) / (dim // 2))
    angles = position[..., None].float() * frequencies     # (..., dim / 2), in radians
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def turn(x, pos):
    """Rotary positions (Su et al. 2021): each pair of channels (k, k + d / 2) of x (..., T, d) is a
    point of a plane, turned about its origin by an angle in proportion to pos (T,)."""
    half = x.shape[-1] // 2
    # From 1 down to almost 1 / 100 radians a frame: clips have tens of frames
    angles = pos[:, None] * 100 ** (-torch.arange(half, device=x.device) / half)       # (T, d / 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def grid_positions(high, wide, dim, device=None):
    """(high * wide, dim): where each token of a frame lies; half of the channels say the column,
    half the row (as in DiT)."""
    rows = torch.arange(high, device=device).repeat_interleave(wide)    # 0 0 0 1 1 1 ...
    columns = torch.arange(wide, device=device).repeat(high)            # 0 1 2 0 1 2 ...
    return torch.cat([sincos(columns, dim // 2), sincos(rows, dim // 2)], dim=-1)


def patchify(z, p):
    """(B, F, C, H, W) -> (B, F * N, p * p * C), N = (H / p) * (W / p), row by row."""
    B, T, C, H, W = z.shape                                # T is F: here F is torch's functional
    z = z.reshape(B, T, C, H // p, p, W // p, p)
    # Channels last within a patch, as DiT's output layer has them: its weights can be copied over
    return z.permute(0, 1, 3, 5, 4, 6, 2).reshape(B, T * (H // p) * (W // p), p * p * C)


def unpatchify(x, p, shape):
    """The inverse of `patchify`; shape is z's (B, F, C, H, W)."""
    B, T, C, H, W = shape
    x = x.reshape(B, T, H // p, W // p, p, p, C)
    return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, T, C, H, W)


# -----------------------------------------------------------------------------
# 3. The Transformer (paper, 3.2 and 3.4)
# -----------------------------------------------------------------------------

def norm(x):
    """LayerNorm over the channels of (..., D), without weights: adaLN's shift and scale take their
    place."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x, shift, scale):
    """adaLN: x (B, T, D) by shift and scale (B, 1, D), the same for all of an item's tokens."""
    # x (1 + scale) + shift, in one pass; 1 +, so that a scale of 0 changes nothing
    return torch.addcmul(shift, x, 1 + scale)


class Attention(nn.Module):
    """Multi-head attention, written out: softmax(q k^T / sqrt(D / h)) v, for all its uses.

    self:      attention(x)                       tokens of one frame look at each other
    cross:     attention(x, kv=..., mask=...)     image tokens look at text tokens
    temporal:  attention(x, pos=..., motion=...)  one token's F moments look at each other
    words:     attention(x, mask=..., pos=...)    in the small text encoder
    """
    def __init__(self, width, heads, kv_dim=None):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(kv_dim or width, 2 * width)     # keys and values in one product
        self.out = nn.Linear(width, width)

    def split(self, x):
        """(B, T, D) -> (B, h, T, D / h): every head is its own batch item."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, y):
        """(B, L, kv_dim) -> k, v, each (B, h, L, D / h). Text's are computed once a prompt."""
        k, v = self.kv(y).chunk(2, dim=-1)
        return self.split(k), self.split(v)

    def forward(self, x, kv=None, mask=None, pos=None, motion=None):
        """x (B, T, D); kv: what is looked at, None = x itself, or tokens (B, L, kv_dim), or the k
        and v that `keys_values` made of them; mask bool (B, L); pos (T,), for self-attention;
        motion bool (B,). Returns (B, T, D)."""
        q = self.split(self.q(x))                                          # (B, h, T, D/h)
        if not isinstance(kv, tuple):
            kv = self.keys_values(x if kv is None else kv)
        k, v = kv                                                          # (B, h, L, D/h)
        mask = None if mask is None else mask[:, None, None, :]            # (B, 1, 1, L)
        if pos is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)    # (B, h, T, D/h)
        else:
            # q and k are turned by their time (a word: by its place), so q . k sees how far apart
            # two frames are. OURS: v is turned too, and the answer turned back: what frame i hears
            # from frame j is turned by j - i, "this, so much later". Frames of pure noise differ in
            # nothing else; without it they could not tell first from last, and so not left from
            # right. A frame that sees only itself gets v as it is: a still stays a still.
            q, k, turned = turn(q, pos), turn(k, pos), turn(v, pos)
            y = turn(F.scaled_dot_product_attention(q, k, turned, attn_mask=mask), -pos)
        if motion is not None:
            # Motion-free = the identity mask of paper 3.4: each frame sees only itself. A softmax
            # over one key is 1, so what comes out is v itself: exact, and no mask tensor is needed.
            y = torch.where(motion[:, None, None, None], y, v)
        return self.out(y.transpose(1, 2).flatten(2))                      # (B, T, D)


class Block(nn.Module):
    """One GenTron block: DiT's two branches (self-attention, MLP), with text and time between them.

    text_dim: channels of the text encoder that this block reads; None = no cross-attention."""
    def __init__(self, cfg, text_dim):
        super().__init__()
        D = cfg.width
        # adaLN-Zero: c -> shift, scale and gate, once for each of DiT's two branches
        self.modulation = nn.Linear(D, 6 * D)
        self.attn = Attention(D, cfg.heads)
        self.cross = Attention(D, cfg.heads, text_dim) if text_dim else None
        self.temporal = Attention(D, cfg.heads) if cfg.temporal else None
        self.mlp = nn.Sequential(nn.Linear(D, cfg.mlp_ratio * D), nn.GELU(approximate="tanh"),
                                 nn.Linear(cfg.mlp_ratio * D, D))

    def forward(self, x, c, kv, mask, frames, pos, motion):
        """x (B, F N, D), c (B, D), kv the text's tokens (B, L, text_dim) or their `keys_values`,
        mask the text's, pos (F,), motion bool (B,). Returns (B, F N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = \
            self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)           # each (B, 1, D)
        # addcmul(x, gate, y) is x + gate y, without the product in between
        x = torch.addcmul(x, gate1, self.within_frames(modulate(norm(x), shift1, scale1), frames))
        if self.cross is not None:
            x = x + self.cross(norm(x), kv, mask)                          # (B, F N, D)
        if self.temporal is not None:
            # no shift, scale or gate, as in cross-attention: c acts on DiT's own two branches
            x = x + self.across_frames(norm(x), frames, pos, motion)
        return torch.addcmul(x, gate2, self.mlp(modulate(norm(x), shift2, scale2)))

    def keys_values(self, tokens):
        """A text (B, L, text_dim) -> the k and v that `forward` takes in its place, or None."""
        return None if self.cross is None else self.cross.keys_values(tokens)

    def within_frames(self, x, frames):
        """Self-attention among the N tokens of each frame: (B, F N, D) -> (B, F N, D)."""
        return self.attn(x.unflatten(1, (frames, -1)).flatten(0, 1)).reshape(x.shape)  # (B F) N D

    def across_frames(self, x, frames, pos, motion):
        """TempSelfAttn, paper 3.4: among the F moments of each token, `(b t) n d -> (b n) t d`.
        x (B, F N, D), pos (F,), motion bool (B,) or None. Returns (B, F N, D)."""
        B, FN, D = x.shape
        y = x.view(B, frames, FN // frames, D).transpose(1, 2).flatten(0, 1)           # (B N) F D
        motion = None if motion is None else motion.repeat_interleave(FN // frames)    # (B N,)
        y = self.temporal(y, pos=pos, motion=motion)                                   # (B N) F D
        return y.view(B, FN // frames, frames, D).transpose(1, 2).reshape(B, FN, D)


@dataclass
class Text:
    """Encoded captions. One entry an encoder: tokens (B, L, D_k) and bool mask (B, L), True = a
    real token; pooled (B, pooled_dim)."""
    tokens: tuple
    mask: tuple
    pooled: torch.Tensor

    def to(self, device):
        """The same Text, of the same shapes, on another device."""
        tokens = tuple(x.to(device) for x in self.tokens)
        mask = tuple(m.to(device) for m in self.mask)
        return Text(tokens, mask, self.pooled.to(device))

    @staticmethod
    def cat(texts):
        """Several Texts of B1, B2, ... rows as one of B1 + B2 + ..., padded to the longest L."""
        def join(parts):                                   # (B_i, L_i, ...) -> (sum B_i, L, ...)
            longest = max(p.shape[1] for p in parts)
            # F.pad counts from the last axis: [0, 0] leaves the channels alone, then L grows.
            # A mask is padded with 0, which is False: no one looks at the new tokens.
            pads = [[0, 0] * (p.ndim - 2) + [0, longest - p.shape[1]] for p in parts]
            return torch.cat([F.pad(p, pad) for p, pad in zip(parts, pads)])
        return Text(tuple(join(x) for x in zip(*(t.tokens for t in texts))),
                    tuple(join(m) for m in zip(*(t.mask for t in texts))),
                    torch.cat([t.pooled for t in texts]))


@dataclass
class ReadText:
    """What the Transformer makes of a Text: keys and values for each block, its mask, and pooled
    text as channels of D. It depends on neither z nor t, so sampling computes it once a prompt."""
    kv: list                             # a block: (k, v), each (B, h, L, D / h); tokens; or None
    mask: list                           # a block: bool (B, L), of the encoder which it reads
    pooled: torch.Tensor                 # (B, D), or 0 if the model reads no text


class GenTron(nn.Module):
    """The Transformer: noisy latents, a timestep, a text -> the network's raw output (eps or v)."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D, patch = cfg.width, cfg.patch_size ** 2 * cfg.in_channels        # patch: p p C
        # Interleaved text (paper 3.2): block k reads encoder k mod K, which costs no more than one
        # encoder would. With adaLN the blocks read no tokens, and only the pooled text enters.
        cross, K = cfg.conditioning == "cross" and cfg.text_dims, len(cfg.text_dims)
        text_dims = [cfg.text_dims[k % K] if cross else None for k in range(cfg.depth)]
        self.patch = nn.Linear(patch, D)                                   # p p C -> D
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.pooled = nn.Linear(cfg.pooled_dim, D) if cfg.text_dims else None
        self.blocks = nn.ModuleList(Block(cfg, text_dim) for text_dim in text_dims)
        self.final_modulation = nn.Linear(D, 2 * D)                        # c -> shift, scale
        self.final = nn.Linear(D, patch)                                   # D -> p p C
        self.checkpoint_activations = False      # True: recompute blocks in backward, less memory
        self.initialize()

    def initialize(self):
        """All initialisation, in one place, called last. Every block starts as the identity, and
        the network answers 0 (the mean of eps, and of v): training starts at a loss near 1."""
        # every matrix: Xavier uniform, as in DiT; every bias: zero
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # timestep MLP: normal(0.02), as in DiT
        nn.init.normal_(self.time[0].weight, std=0.02)
        nn.init.normal_(self.time[2].weight, std=0.02)
        # adaLN-Zero: gates, and so both of DiT's branches, start at zero; the output starts at zero
        zero = [self.final_modulation, self.final]
        for block in self.blocks:
            zero.append(block.modulation)
            # cross and temporal attention have no gate: their output projection starts at zero, so
            # a fresh video model is its image parent (paper 3.4). Not kv as well: with zeros in
            # both, no gradient would ever reach either matrix.
            ungated = (block.cross, block.temporal)
            zero += [attention.out for attention in ungated if attention is not None]
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def read(self, text, keep=True):
        """Text -> ReadText. keep: make all blocks' keys and values now, for the many steps of
        sampling; training needs them once, and leaves them to each block's forward: FSDP has a
        block's weights at hand only there, and what is recomputed there is not stored. Raises
        ValueError if text's widths are not those of `cfg.text_dims`."""
        if self.pooled is None:                            # a model without text ignores it
            return ReadText([None] * self.cfg.depth, [None] * self.cfg.depth, 0)
        dims = tuple(x.shape[-1] for x in text.tokens)
        if dims != self.cfg.text_dims:
            raise ValueError(f"text has widths {dims}, this model reads {self.cfg.text_dims}")
        # OURS: tokens are layer-normalised here: T5's are many times the size of CLIP's
        tokens = [norm(x) for x in text.tokens]            # K times (B, L, D_k)
        kv, mask = [], []
        for k, block in enumerate(self.blocks):
            i = k % len(tokens)                            # interleaved, as in __init__
            kv.append(block.keys_values(tokens[i]) if keep else tokens[i])
            mask.append(text.mask[i])
        return ReadText(kv, mask, self.pooled(text.pooled))

    def forward(self, z, t, text=None, motion=None):
        """z (B, F, C, H, W), t (B,) in steps of the schedule, text a Text or ReadText, motion bool
        (B,): None = all on, False = motion-free. Returns (B, F, C, H, W)."""
        B, frames, C, H, W = z.shape
        p, D = self.cfg.patch_size, self.cfg.width
        if H % p or W % p:
            raise ValueError(f"latents of {H} x {W} are not divisible by patch size {p}")
        # Sampling hands in a ReadText: keys and values made once a prompt, not once a step. (Not
        # self.read: FSDP wraps that one for calls from outside, and we are inside already.)
        text = text if isinstance(text, ReadText) else GenTron.read(self, text, keep=False)
        x = self.patch(patchify(z, p))                                     # (B, F N, D)
        x = x + grid_positions(H // p, W // p, D, z.device).repeat(frames, 1)     # + (F N, D)
        c = self.time(sincos(t, 256)) + text.pooled                        # (B, D)
        # Frame positions go to temporal attention alone: without it, frames have no order
        pos = torch.arange(frames, device=z.device)                        # (F,)
        for block, kv, mask in zip(self.blocks, text.kv, text.mask):
            if self.checkpoint_activations and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, c, kv, mask, frames, pos, motion,
                                                      use_reentrant=False)
            else:
                x = block(x, c, kv, mask, frames, pos, motion)             # (B, F N, D)
        shift, scale = self.final_modulation(F.silu(c))[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        x = self.final(modulate(norm(x), shift, scale))                    # (B, F N, p p C)
        return unpatchify(x, p, z.shape)                                   # (B, F, C, H, W)


# -----------------------------------------------------------------------------
# 4. Diffusion (paper, 3.1): the schedule, the training loss, three samplers
# -----------------------------------------------------------------------------

class NoiseSchedule:
    """z_t = alpha_t z_0 + sigma_t noise, alpha^2 + sigma^2 = 1, t = 0 .. steps - 1.

    kind "linear" with objective "eps" is DDPM's and the paper's. "cosine" with "v" (predict
    v = alpha noise - sigma z_0) is for small latents, which the linear schedule drowns early.
    Raises ValueError for another kind or objective."""
    def __init__(self, kind="linear", objective="eps", steps=1000):
        if kind not in ("linear", "cosine"):
            raise ValueError(f"schedule is '{kind}'; it must be 'linear' or 'cosine'")
        if objective not in ("eps", "v"):
            raise ValueError(f"objective is '{objective}'; it must be 'eps' or 'v'")
        self.kind, self.objective, self.steps = kind, objective, steps
        if kind == "linear":
            # OURS: the paper gives no betas; these are DDPM's (Ho et al. 2020)
            betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
        else:                                              # Nichol & Dhariwal 2021, equation 17
            # level is alpha_t^2; 0.008 keeps the first steps from being too small to matter, and
            # 0.999 keeps the last from dividing by zero
            level = lambda t: math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = torch.tensor([min(1 - level(t + 1) / level(t), 0.999) for t in range(steps)],
                                 dtype=torch.float64)
        # float64 throughout: a thousand factors near 1 would lose digits, and 1 - alpha^2 more
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)  # alpha_t^2, (steps,)
        # One more entry at the end, so that t = -1 reads "no noise left": alpha 1, sigma 0
        self.alpha = torch.cat([self.alphas_cumprod, torch.ones(1, dtype=torch.float64)]).sqrt()
        self.sigma = (1 - self.alpha ** 2).sqrt()          # both (steps + 1,)

    def at(self, t, like):
        """alpha_t and sigma_t of t (B,), shaped to multiply `like` (B, ...)."""
        shape = (-1,) + (1,) * (like.ndim - 1)             # (B, 1, 1, ...)
        return (self.alpha[t.cpu()].to(like).view(shape), self.sigma[t.cpu()].to(like).view(shape))

    def q_sample(self, z0, t, noise):
        """Clean latents z0 (B, ...) -> latents at step t (B,), in one go; noise (B, ...)."""
        alpha, sigma = self.at(t, z0)
        return alpha * z0 + sigma * noise

    def target(self, z0, t, noise):
        """What the network should answer: (B, ...), shaped like z0 and noise; t (B,)."""
        if self.objective == "eps":
            return noise
        alpha, sigma = self.at(t, z0)
        return alpha * noise - sigma * z0

    def read(self, out, z, alpha, sigma):
        """The network's raw output (B, ...) -> its z0 and its eps; alpha, sigma are numbers. Both
        straight from the output: z0 by way of eps divides by alpha, and at high noise a v model
        would lose all digits in bf16."""
        if self.objective == "eps":
            return (z - sigma * out) / alpha, out
        # (z, v) is (z0, eps) turned by an angle, as alpha^2 + sigma^2 = 1: turn it back
        return alpha * z - sigma * out, sigma * z + alpha * out

    def draw_timesteps(self, n, generator, frames=1, layout=False):
        """n training timesteps, (n,) whole numbers; frames: how many of an item's see each other, a
        number or (n,). Uniform for eps, as in DDPM and the paper. layout: of the noisiest three
        tenths only."""
        if layout:
            # OURS: near pure noise nothing is left to learn but what goes where, the one thing that
            # only the text tells. Begun there, "left of" is learned within 600 steps, and kept; in
            # the crowd of all noise levels, which pull harder, there was no sign of it after 2,500.
            return torch.randint(7 * self.steps // 10, self.steps, (n,), generator=generator)
        if self.objective == "eps":
            return torch.randint(self.steps, (n,), generator=generator)
        # OURS: for v a logit-normal (Esser et al. 2024), most in the middle, where shapes are
        # decided; wider than theirs, as what goes where is decided near pure noise. F frames show
        # one scene F times: averaged, they hold sqrt(F) times less noise. So that a clip is as
        # well hidden as a picture is, alpha / sigma is divided by that: log(F) / 2 more.
        x = torch.as_tensor(frames).log() / 2 + 1.5 * torch.randn(n, generator=generator)
        return (torch.sigmoid(x) * self.steps).long().clamp(max=self.steps - 1)

    def timesteps(self, n):
        """n timesteps from pure noise down ("trailing" spacing): 999, 959, ... 39 for n = 25.
        Raises ValueError unless 1 <= n <= steps."""
        if not 1 <= n <= self.steps:
            raise ValueError(f"{n} sampling steps; there must be from 1 to {self.steps}")
        # Trailing, because sampling begins with pure noise: the first step must be the noisiest
        return [round(self.steps - k * self.steps / n) - 1 for k in range(n)]

    def denoise(self, predict, z, steps=25, sampler="ddpm", generators=None):
        """Generator: walks from noise z (B, ...) to clean latents and yields (t, z, z0) after each
        step: the timestep just used, the latents now, the estimate of the clean latents. The last z
        is z0.

        predict(z, t) -> the raw output. sampler: "ddpm" (Ho et al. 2020, with one torch.Generator
        an item, or torch's own), "ddim" (Song et al. 2021, eta = 0) or "dpm++" (Lu et al. 2022,
        DPM-Solver++(2M)).
        Raises ValueError for another sampler, or steps outside of 1 .. self.steps."""
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler is '{sampler}'; it must be one of {', '.join(SAMPLERS)}")
        times = self.timesteps(steps) + [-1]              # -1: no noise left
        before = None                                     # dpm++ remembers (z0, t) of the last step
        for t, s in zip(times, times[1:]):                # from t to the less noisy s
            alpha, sigma = self.alpha[t].item(), self.sigma[t].item()
            # z stays in fp32, whatever the model runs in: small steps would be lost in bf16
            out = predict(z, torch.full((len(z),), t, device=z.device)).float()
            z0, eps = self.read(out, z, alpha, sigma)
            z = SAMPLERS[sampler](self, z, z0, eps, t, s, before, generators)
            before = (z0, t)
            yield t, z, z0

    def sample(self, predict, z, steps=25, sampler="ddpm", generators=None):
        """`denoise` to the end: noise (B, ...) -> clean latents (B, ...)."""
        for _, z, _ in self.denoise(predict, z, steps, sampler, generators):
            pass
        return z


# The three updates: z at step t, the network's z0 and eps, all (B, ...) -> z at the less noisy s.

def ddim(schedule, z, z0, eps, t, s, before, generators):
    """Puts the predicted noise back, at the lower level: (B, ...) -> (B, ...)."""
    return schedule.alpha[s].item() * z0 + schedule.sigma[s].item() * eps


def ddpm(schedule, z, z0, eps, t, s, before, generators):
    """A draw from q(z_s | z_t, z0): a mean between z0 and z_t, plus fresh noise from one generator
    an item (but none at the last step). (B, ...) -> (B, ...)."""
    if s < 0:
        return z0                                         # no noise behind the last step
    (a_t, a_s), (s_t, s_s) = (x[[t, s]].tolist() for x in (schedule.alpha, schedule.sigma))
    beta = s_t ** 2 - (a_t / a_s * s_s) ** 2              # of the whole stride from s to t
    mean = (a_s * beta * z0 + a_t / a_s * s_s ** 2 * z) / s_t ** 2
    # Drawn item by item, on the CPU: a picture depends on its own seed, not on batch or device
    fresh = torch.stack([torch.randn(z.shape[1:], generator=g)
                         for g in generators or [None] * len(z)]).to(z)
    return mean + math.sqrt(beta) * s_s / s_t * fresh


def dpm_solver_pp(schedule, z, z0, eps, t, s, before, generators):
    """Exact for the linear part of the ODE, second order in z0: the last two estimates give its
    slope in lambda = log(alpha / sigma). The first and the last step are first order.
    (B, ...) -> (B, ...)."""
    if s < 0:
        return z0                                         # sigma 0: the limit, at infinite lambda
    lam = lambda i: math.log(schedule.alpha[i].item() / schedule.sigma[i].item())
    h = lam(s) - lam(t)                                   # > 0: lambda grows as noise goes
    if before is not None:
        # z0 extrapolated to the middle of this step, from its change over the last one
        r = (lam(t) - lam(before[1])) / h
        z0 = z0 + (z0 - before[0]) / (2 * r)
    return schedule.sigma[s].item() / schedule.sigma[t].item() * z \
        - schedule.alpha[s].item() * math.expm1(-h) * z0


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpm++": dpm_solver_pp}


@dataclass
class Draws:
    """All the randomness of one training step. draws[a:b] is the part of items a .. b - 1."""
    t: torch.Tensor                      # (B,) whole timesteps, 0 .. steps - 1
    noise: torch.Tensor                  # (B, F, C, H, W)
    drop_text: torch.Tensor              # (B,) bool: train on the null text
    still: torch.Tensor                  # (B,) bool: train motion-free, on one picture repeated

    def __getitem__(self, part):
        return Draws(self.t[part], self.noise[part], self.drop_text[part], self.still[part])


def randomness(seed, step, shape, schedule=None, p_drop_text=0.0, p_still=0.0, layout=False):
    """Draws for the whole global batch of one step, shape (B, F, C, H, W): a function of seed and
    step alone. Processes and micro-batches take slices of it, so their number never changes a run,
    nor does stopping and going on. Drawn on the CPU: the same on every device."""
    # A stride between seeds: two of them share no draws within a million steps
    g = torch.Generator().manual_seed(seed * 1_000_003 + step)
    # OURS: 10 % of captions are dropped, the field's usual rate for classifier-free guidance
    # Both drops are drawn even where the probability is 0, so changing it changes no other draw
    drop_text = torch.rand(shape[0], generator=g) < p_drop_text
    still = torch.rand(shape[0], generator=g) < p_still
    # A still's frames do not see each other: by its noise it is a picture
    frames = torch.where(still, 1, shape[1])
    t = (schedule.draw_timesteps(shape[0], g, frames, layout) if schedule
         else torch.zeros(shape[0]))
    return Draws(t, torch.randn(shape, generator=g), drop_text, still)


def training_loss(model, encoder, schedule, z0, captions, draws):
    """The loss of each item, (B,): mean squared error of the network's answer (paper 3.1).
    z0 (B, F, C, H, W) clean latents, captions B strings, draws of B items.

    Both conditions are dropped here, in sight. Text: the caption becomes "" (so the null text is
    exactly what sampling will use). Motion (paper 3.4): an item drawn as `still` holds one picture
    repeated F times, and its frames do not see each other."""
    drops = draws.drop_text.tolist()
    captions = ["" if drop else caption for caption, drop in zip(captions, drops)]
    motion = ~draws.still.to(z0.device) if model_config(model).temporal else None      # (B,)
    t, noise = draws.t.to(z0.device), draws.noise.to(z0.device)
    out = model(schedule.q_sample(z0, t, noise), t, encoder(captions), motion)
    error = out.float() - schedule.target(z0, t, noise)     # in fp32, whatever the model runs in
    return error.square().flatten(1).mean(1)                # the mean over items is the caller's


def model_config(model):
    """The config of a GenTron, also behind DistributedDataParallel or torch.compile."""
    while not hasattr(model, "cfg"):                        # wrappers can be nested
        model = getattr(model, "module", None) or model._orig_mod
    return model.cfg


# -----------------------------------------------------------------------------
# 5. Guidance (paper, 3.4)
# -----------------------------------------------------------------------------

def guided(model, text, null, cfg=4.0, motion_scale=1.0):
    """Text guidance and motion-free guidance in one: returns predict(z, t) for the samplers.

    The paper adds two differences to the unconditional prediction,

        e(null, off) + l_T (e(text, on) - e(null, on)) + l_M (e(null, on) - e(null, off)),

    l_T = cfg, l_M = motion_scale. Collected by network evaluation that is

        l_T e(text, on)  +  (l_M - l_T) e(null, on)  +  (1 - l_M) e(null, off),

    weights that sum to 1, so they apply to eps and to v alike. A weight of zero is not evaluated:
    motion_scale = 1 is plain text guidance, both 1 the conditional model. motion_scale = None turns
    temporal attention off everywhere: l_T e(text, off) + (1 - l_T) e(null, off).

    text, null: Texts of B rows (null may have 1). The branches run as one batch; their keys and
    values are computed here, once, not at every step. predict takes z (B, F, C, H, W) and t (B,)
    and returns the guided raw output (B, F, C, H, W), fp32."""
    # One branch an evaluation of the network: its weight, its text, motion on or off
    if motion_scale is None:
        branches = [(cfg, text, False), (1 - cfg, null, False)]
    else:
        branches = [(cfg, text, True),
                    (motion_scale - cfg, null, True),
                    (1 - motion_scale, null, False)]
    branches = [branch for branch in branches if branch[0] != 0]    # at least one: they sum to 1
    B, n, device = len(text.pooled), len(branches), text.pooled.device
    widen = lambda x: x.expand(B, *x.shape[1:])            # one null row for all prompts
    rows = [Text(tuple(map(widen, x.tokens)), tuple(map(widen, x.mask)), widen(x.pooled))
            for _, x, _ in branches]
    read = model.read(Text.cat(rows))                      # n B rows, branch by branch
    motion = torch.tensor([on for _, _, on in branches], device=device)                # (n,)
    motion = motion.repeat_interleave(B)                                               # (n B,)
    weights = torch.tensor([w for w, _, _ in branches], device=device)                 # (n,)

    def predict(z, t):
        # The branches differ in their conditions only: the same z and t, n times
        out = model(z.repeat(n, 1, 1, 1, 1), t.repeat(n), read, motion).float()
        return torch.einsum("n,nbfchw->bfchw", weights, out.unflatten(0, (n, B)))
    return predict


# -----------------------------------------------------------------------------
# 6. Text (paper, 3.2)
# -----------------------------------------------------------------------------

def split_words(caption):
    """'An orange circle!' -> ['a', 'orange', 'circle']. A CJK character is a word of its own."""
    # Kana, Han and Hangul, which put no spaces between words; else runs of letters and digits
    found = re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+", caption.lower())
    return ["a" if word == "an" else word for word in found]


class WordEncoder(nn.Module):
    """The small text encoder: a word-level vocabulary and a two-layer Transformer, trained together
    with the model. (The paper's are frozen CLIP and T5: `FrozenEncoder`. OURS: this one learns a
    small world's few dozen words in minutes, on a laptop, offline.)"""
    PAD, START, UNKNOWN = 0, 1, 2        # START makes sure that "" has one real token

    def __init__(self, vocabulary, dim=128, depth=2, heads=4, max_words=64):
        super().__init__()
        self.vocabulary, self.max_words, self.dim = list(vocabulary), max_words, dim
        self.index = {word: k + 3 for k, word in enumerate(self.vocabulary)}
        # nn.Embedding, not weight[ids], whose backward is not deterministic on several threads
        self.words = nn.Embedding(len(self.vocabulary) + 3, dim)
        self.attn = nn.ModuleList(Attention(dim, heads) for _ in range(depth))
        mlp = lambda: nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.mlp = nn.ModuleList(mlp() for _ in range(depth))

    def forward(self, captions):
        """List of B strings -> tokens (B, L, dim), mask (B, L), pooled (B, dim)."""
        rows = [[self.START] + [self.index.get(word, self.UNKNOWN) for word in split_words(caption)]
                for caption in captions]
        L = min(self.max_words, max(map(len, rows)))                       # START counts as a word
        rows = [(row + [self.PAD] * L)[:L] for row in rows]                # each L long
        ids = torch.tensor(rows, device=self.words.weight.device)          # (B, L)
        mask = ids != self.PAD                                             # (B, L)
        # Word order matters ("a left of b"): every word has its place, and hears the others turned
        # by how many words later they come, as frames do. OURS: so from the first step "left of" is
        # one thing to the noun before it and another to the noun behind it. With places alone the
        # two were still alike when, with this, the model had long learned who stands where.
        place = torch.arange(L, device=ids.device)
        words = self.words(ids)                                            # (B, L, dim)
        x = words + sincos(place, self.dim)
        for attn, mlp in zip(self.attn, self.mlp):
            x = x + attn(norm(x), mask=mask, pos=place)                    # (B, L, dim)
            x = x + mlp(norm(x))
        # OURS: half of a token is the word itself. Without it, words that the model cannot tell
        # apart yet (left and right, before it places things) grew alike for good: what they share
        # grew large, and drowned the rest.
        x = norm(x) + norm(words)
        # Pooled: the mean over real tokens; never 0 / 0, thanks to START
        return x, mask, (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def unknown(self, caption):
        """The words of one caption that the vocabulary lacks, in their order; all read UNKNOWN."""
        return [word for word in split_words(caption) if word not in self.index]

    def spell(self, caption):
        """What each token of one caption stands for: up to L strings."""
        return ["(start)", *split_words(caption)][:self.max_words]


class LabelEncoder(nn.Module):
    """Classes in place of sentences: a learned vector a class, and one for none. With adaLN
    conditioning the model is then exactly DiT, where the paper starts. An unknown class is a
    KeyError: ask `unknown` first."""
    def __init__(self, vocabulary, dim=128):
        super().__init__()
        self.vocabulary, self.dim = list(vocabulary), dim
        # "" is "no class": what a dropped caption becomes, and so the null text of guidance
        self.index = {label: k + 1 for k, label in enumerate(self.vocabulary)} | {"": 0}
        self.labels = nn.Embedding(len(self.vocabulary) + 1, dim)

    def forward(self, captions):
        """List of B strings -> tokens (B, 1, dim), mask (B, 1), pooled (B, dim)."""
        ids = [self.index[caption] for caption in captions]
        x = self.labels(torch.tensor(ids, device=self.labels.weight.device))       # (B, dim)
        mask = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
        return x[:, None], mask, x                         # a class is a text of one token

    def unknown(self, caption):
        """[caption] if it names no class, else []."""
        return [] if caption in self.index else [caption]

    def spell(self, caption):
        """What the one token stands for: [caption]."""
        return [caption]


class TextEncoder(nn.Module):
    """Captions -> Text, through one or several encoders.

    spec: "small", "small+small", "labels", "none"; "clip", "t5", "clip+t5", or the names or folders
    of other encoders of the transformers library, joined by +. vocabulary: words (small) or class
    names (labels). dim: channels of a small encoder or a label. Raises ValueError for a combination
    that makes no sense, or a pretrained encoder that cannot be loaded."""
    def __init__(self, spec="small", vocabulary=(), dim=128):
        super().__init__()
        self.spec, self.vocabulary, self.dim = spec, list(vocabulary), dim
        parts = [] if spec == "none" else spec.split("+")
        if "none" in parts or "" in parts or ("labels" in parts and len(parts) > 1):
            raise ValueError(f"text '{spec}': 'none' and 'labels' stand alone, "
                             f"others are joined by +")
        # "small+small" is two encoders of different weights: interleaving, without a download
        make = {"small": WordEncoder, "labels": LabelEncoder}
        self.encoders = nn.ModuleList(make[part](self.vocabulary, dim) if part in make
                                      else FrozenEncoder(part) for part in parts)
        self.trained = any(part in make for part in parts)                 # optimise it, save it
        self.dims = tuple(encoder.dim for encoder in self.encoders)        # a config's text_dims
        nothing = torch.zeros(0, device="cpu")             # (also while `unfilled` builds it)
        self.register_buffer("nothing", nothing, persistent=False)         # knows the device

    def forward(self, captions):
        """List of B strings -> Text. The null text is the encoding of ""."""
        if not self.encoders:                              # "none": only the batch size is left
            return Text((), (), self.nothing.new_zeros(len(captions), 0))
        tokens, mask, pooled = zip(*(encoder(captions) for encoder in self.encoders))
        return Text(tokens, mask, torch.cat(pooled, dim=-1))   # side by side: (B, sum of dims)

    def unknown(self, caption):
        """Words (or the class) that an encoder has never heard of: a sorted list of strings."""
        return sorted({word for encoder in self.encoders for word in encoder.unknown(caption)})


class FrozenEncoder(nn.Module):
    """A pretrained text encoder through transformers, never trained (paper 3.2: CLIP-L and
    Flan-T5-XXL).

    name: "clip", "t5", or a name or local folder. CLIP's pooled output is its own; T5 has none, so
    the mean over real tokens is taken (OURS: the paper does not say). Raises ValueError, in one
    line, if the package, the weights or the network are missing."""
    NAMES = {"clip": "openai/clip-vit-large-patch14", "t5": "google/flan-t5-xxl"}

    def __init__(self, name, max_tokens=120):
        super().__init__()
        # Imported here: nobody needs the package who trains the small encoder
        try:
            from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, T5EncoderModel
        except ImportError:
            raise ValueError(f"text '{name}' needs the transformers package; "
                             f"try: pip install -e '.[pretrained]'") from None
        path = self.NAMES.get(name, name)
        try:
            # The kind comes from the file, not from the name: a local folder can be called anything
            kind = AutoConfig.from_pretrained(path).model_type
            self.clip = kind.startswith("clip")
            if not (self.clip or kind in ("t5", "mt5", "umt5")):
                raise ValueError(f"'{path}' is a {kind} model; CLIP and T5 text encoders are known")
            # bf16 on a GPU halves T5-XXL; never fp16, in which T5 overflows
            dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
            family = CLIPTextModel if self.clip else T5EncoderModel        # T5 without its decoder
            with torch.device("cpu"):                      # (also while `unfilled` builds it)
                self.net = family.from_pretrained(path, dtype=dtype)
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            reason = first_line(error)                     # the rest is advice to programmers
            raise ValueError(f"text encoder '{path}' cannot be loaded ({reason}); "
                             f"try a local folder, or with a network: hf download {path}") from None
        self.net.requires_grad_(False).eval()
        config = self.net.config
        self.dim = config.hidden_size if self.clip else config.d_model
        # CLIP has learned 77 positions and no more; T5's are relative, so any length would do
        longest = config.max_position_embeddings if self.clip else max_tokens
        self.max_tokens = min(max_tokens, longest)

    def train(self, mode=True):
        """Stays in eval mode, also when the model around it is set to train. Returns self."""
        return super().train(False)                        # frozen: no dropout, ever

    @torch.no_grad()
    def forward(self, captions):
        """List of B strings -> tokens (B, L, dim), mask (B, L), pooled (B, dim), all fp32."""
        # Padded to the longest of this batch, not to max_tokens: captions are short
        batch = self.tokenizer(list(captions), padding=True, truncation=True,
                               max_length=self.max_tokens, return_tensors="pt").to(self.net.device)
        out = self.net(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        x, mask = out.last_hidden_state.float(), batch.attention_mask.bool()
        x = x * mask[..., None]                                            # (B, L, dim), padding 0
        # Both tokenizers end every text with an end token, so "" too has something to average
        pooled = out.pooler_output.float() if self.clip else x.sum(1) / mask.sum(1, True)
        return x, mask, pooled

    def unknown(self, caption):
        """[]: a subword tokenizer can spell any word."""
        return []

    def spell(self, caption):
        """What each token of one caption stands for, as the tokenizer writes it: L strings."""
        ids = self.tokenizer(caption, truncation=True, max_length=self.max_tokens).input_ids
        return self.tokenizer.convert_ids_to_tokens(ids)


# -----------------------------------------------------------------------------
# 7. Autoencoder (paper, 3.1: a frozen KL autoencoder, 8x down, 4 channels)
# -----------------------------------------------------------------------------

class ResBlock(nn.Module):
    """x + conv(conv(x)), each behind a GroupNorm and a SiLU."""
    def __init__(self, channels):
        super().__init__()
        # GroupNorm, not BatchNorm: latents of a picture must not depend on the rest of its batch
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        """(B, C, H, W) -> the same shape."""
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class VAE(nn.Module):
    """A small KL autoencoder: pictures (B, F, 3, H, W) in -1 .. 1 <-> latents (B, F, 4, H/8, W/8).

    encoder and decoder list the channels of each level, in the order of use; every level but the
    first halves the encoder's grid, and so does the pixel-unshuffle at the door. kl: weight of the
    KL term in the loss. `encode` returns latents of mean 0 and standard deviation 1 a channel, by
    the `mean` and `std` measured after training and stored with the weights (instead of a magic
    0.18215). Raises ValueError for levels that cannot be built."""
    def __init__(self, encoder=(24, 48, 96), decoder=(96, 64, 32), channels=4, kl=1e-4):
        super().__init__()
        self.config = dict(encoder=list(encoder), decoder=list(decoder), channels=channels, kl=kl)
        # GroupNorm's 8 groups want multiples of 8; the limits guard against a damaged checkpoint
        levels = [*encoder, *decoder]
        if not (1 <= len(encoder) == len(decoder) <= 8
                and all(isinstance(c, int) and c % 8 == 0 and 8 <= c <= 4096 for c in levels)
                and isinstance(channels, int) and 1 <= channels <= 256):
            raise ValueError(f"autoencoder {self.config}: as many encoder as decoder levels, "
                             f"each of a multiple of 8 channels")
        self.channels, self.down, self.kl = channels, 2 ** len(encoder), kl
        # Encoder, for the default sizes. Pixels become channels first: no convolution ever runs at
        # full resolution, where it would cost the most (OURS, for two CPU cores).
        layers = [nn.PixelUnshuffle(2),                                    # (12, H/2, W/2)
                  nn.Conv2d(12, encoder[0], 3, padding=1)]                 # (24, H/2, W/2)
        for c, below in zip(encoder, [*encoder[1:], None]):
            layers.append(ResBlock(c))
            if below:
                # -> (48, H/4, W/4) -> (96, H/8, W/8)
                layers.append(nn.Conv2d(c, below, 3, stride=2, padding=1))
        layers += [nn.GroupNorm(8, encoder[-1]), nn.SiLU(),
                   nn.Conv2d(encoder[-1], 2 * channels, 3, padding=1)]     # mean, log variance
        self.encoder = nn.Sequential(*layers)
        # Decoder: the way back. It has more to invent, so two blocks a level, but one at the last:
        # there are most positions, and each block costs the most.
        layers = [nn.Conv2d(channels, decoder[0], 3, padding=1)]           # (96, H/8, W/8)
        for c, above in zip(decoder, [*decoder[1:], None]):
            layers += [ResBlock(c), ResBlock(c)] if above else [ResBlock(c)]
            if above:
                # -> (64, H/4, W/4) -> (32, H/2, W/2); channels become positions, which is cheap
                layers += [nn.Conv2d(c, 4 * above, 1), nn.PixelShuffle(2)]
        layers += [nn.GroupNorm(8, decoder[-1]), nn.SiLU(),
                   nn.Conv2d(decoder[-1], 12, 3, padding=1),               # (12, H/2, W/2)
                   nn.PixelShuffle(2)]                                     # (3, H, W)
        self.decoder = nn.Sequential(*layers)
        # Buffers, so that they travel with the weights; measured at the end of training
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, x, noise):
        """The training loss of each item, (B,): x (B, F, 3, H, W), noise as `posterior`'s mean."""
        mean, logvar = self.posterior(x)                                   # (B, F, C, H/8, W/8)
        z = mean + noise * (0.5 * logvar).exp()                            # a draw, differentiable
        y = self.decoder(z.flatten(0, 1)).unflatten(0, x.shape[:2])        # (B, F, 3, H, W)
        error = (y.float() - x).flatten(1)
        # The divergence from a standard normal, in closed form; kl is small, so it keeps
        # the latents near 0 without costing much sharpness
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).float().flatten(1).mean(1)
        # OURS: squared error finds the objects soon, a little absolute error keeps flat ground flat
        return error.square().mean(1) + 0.1 * error.abs().mean(1) + self.kl * kl

    def posterior(self, x):
        """x (B, F, 3, H, W) -> mean and log variance, each (B, F, C, H/8, W/8)."""
        # It sees frame by frame: a clip's time is the Transformer's business (as in the paper)
        out = self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])      # (B, F, 2 C, H/8, W/8)
        mean, logvar = out.chunk(2, dim=2)
        return mean, logvar.clamp(-20, 4)                                  # keeps exp in bounds

    def encode(self, x):
        """x (B, F, 3, H, W) in -1 .. 1 -> normalised latents (B, F, C, H/8, W/8)."""
        scale = (1, 1, -1, 1, 1)                           # one mean and std a channel
        # The mean of the posterior, not a draw: the same picture always has the same latents
        return (self.posterior(x)[0] - self.mean.view(scale)) / self.std.view(scale)

    def decode(self, z):
        """Normalised latents (B, F, C, H/8, W/8) -> pictures (B, F, 3, H, W) in -1 .. 1."""
        scale = (1, 1, -1, 1, 1)
        z = z * self.std.view(scale) + self.mean.view(scale)
        return self.decoder(z.flatten(0, 1)).clamp(-1, 1).unflatten(0, z.shape[:2])


class PretrainedVAE(nn.Module):
    """Somebody else's frozen KL autoencoder, through diffusers: the same encode and decode.

    name: a hub name ("stabilityai/sd-vae-ft-ema") or a local folder. Its own scaling factor stands
    in for our measured std. Raises ValueError, in one line, if it cannot be loaded."""
    def __init__(self, name):
        super().__init__()
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise ValueError(f"vae '{name}' is no file, and to load it by name needs the diffusers "
                             f"package; try: pip install -e '.[pretrained]'") from None
        try:
            self.net = AutoencoderKL.from_pretrained(name).requires_grad_(False).eval()
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise ValueError(f"autoencoder '{name}' cannot be loaded ({reason}); "
                             f"try a local folder, or with a network: hf download {name}") from None
        self.name, self.channels = name, self.net.config.latent_channels
        # All levels but the last halve the grid: 4 levels, 8x down for Stable Diffusion's
        self.down = 2 ** (len(self.net.config.block_out_channels) - 1)
        self.scale, self.shift = self.net.config.scaling_factor, self.net.config.shift_factor or 0.0

    def encode(self, x):
        """x (B, F, 3, H, W) in -1 .. 1 -> scaled latents (B, F, C, H/8, W/8)."""
        z = self.net.encode(x.flatten(0, 1)).latent_dist.mean
        return ((z - self.shift) * self.scale).unflatten(0, x.shape[:2])

    def decode(self, z):
        """Scaled latents (B, F, C, H/8, W/8) -> pictures (B, F, 3, H, W), clamped to -1 .. 1."""
        y = self.net.decode((z / self.scale + self.shift).flatten(0, 1)).sample
        return y.clamp(-1, 1).unflatten(0, z.shape[:2])


def first_line(error):
    """What an exception says, in one line of at most 150 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:150]


def pick_device(name=None):
    """A torch.device: the one named, or else cuda, mps or cpu, whichever is there first. Raises
    ValueError for a device that is not there."""
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    # Only a real allocation tells: "cuda:7" is a good name, and so is a GPU of a broken driver
    try:
        zero = torch.zeros(1, device=name)
        zero.item()                                        # "meta" makes tensors without numbers
        return zero.device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = first_line(error)
        raise ValueError(f"device '{name}' cannot be used ({reason}); try --device cpu") from None


def to_float(clips):
    """uint8 (B, F, H, W, 3), numpy or torch -> float (B, F, 3, H, W) in -1 .. 1."""
    return torch.as_tensor(clips).movedim(-1, -3).float() / 127.5 - 1


def to_uint8(x):
    """The inverse of `to_float`: (B, F, 3, H, W) -> numpy uint8 (B, F, H, W, 3)."""
    # Rounded, or pictures would darken by half a level; clamped, or 256 would come out as 0
    x = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return x.movedim(-3, -1).cpu().numpy()


# -----------------------------------------------------------------------------
# 8. Generate: everything above, in the order of use
# -----------------------------------------------------------------------------

@torch.no_grad()
def generate(model, encoder, vae, schedule, prompts, seeds, size=(64, 64), frames=1, cfg=4.0,
             motion_scale=1.0, steps=25, sampler="ddpm", device="cpu", on_step=None):
    """B prompts and B seeds -> uint8 pictures (B, F, H, W, 3), a numpy array. size: H and W in
    pixels. cfg and motion_scale: see `guided`. Item i depends on prompts[i] and seeds[i] alone,
    never on its place in a batch. on_step(t, z, z0) is called after each step. Raises ValueError
    for an unknown sampler, too many steps, or a size that does not divide into patches."""
    # One generator an item, on the CPU: a seed draws the same noise on every device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # Latents, (F, C, H/8, W/8) an item, begin as pure noise
    shape = (frames, vae.channels, size[0] // vae.down, size[1] // vae.down)
    z = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    # The texts are read once; the steps below only run the blocks
    predict = guided(model, encoder(prompts), encoder([""]), cfg, motion_scale)
    for t, z, z0 in schedule.denoise(predict, z, steps, sampler, generators):
        if on_step:
            on_step(t, z, z0)                              # a progress bar, or a film of the steps
    return to_uint8(vae.decode(z))                         # only now: all steps were in latents


# -----------------------------------------------------------------------------
# 9. Checkpoints: plain dicts, lists, numbers, strings and tensors
# -----------------------------------------------------------------------------

def save_checkpoint(path, state):
    """Writes beside `path`, flushes, then renames: at every moment `path` is a whole checkpoint,
    the old one or the new. Raises OSError and leaves the old one untouched if the disk is full."""
    path = os.fspath(path)
    temporary = f"{path}.tmp"                    # in the same folder: no rename crosses disks
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": "gentron", "version": 1, **state}, file)
            # The bytes must reach the disk before the new name does, or a power cut leaves neither
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)              # atomic: a reader sees the old file or the new
    except (OSError, RuntimeError) as error:     # RuntimeError: torch's word for a full disk,
        while not isinstance(error, OSError) and error.__context__:
            error = error.__context__            # "unexpected pos 768": what went before says why
        if os.path.lexists(temporary):
            os.remove(temporary)
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OSError(f"cannot write {path}: {reason}; make room there, or choose another folder; "
                      f"what was there is untouched") from None


def load_checkpoint(path):
    """Reads a checkpoint, on the CPU, and returns the dict that was saved; nothing in the file is
    executed (weights_only). Raises ValueError, in one line, for a file that is missing, damaged or
    not ours."""
    path = os.fspath(path)
    try:
        size = os.path.getsize(path)
        with zipfile.ZipFile(path) as archive:
            # Ours are not compressed: what claims to unpack to more than its own size is a bomb
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise ValueError(f"{path} is damaged (it claims to hold more than its own size)")
            # torch.load alone accepts a flipped bit; the zip's own checksums do not
            bad = archive.testzip()
        if bad:
            raise ValueError(f"{path} is damaged (checksum of {bad})")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, not a checkpoint") from None
    except PermissionError:
        raise ValueError(f"{path} cannot be read (permission denied)") from None
    except ValueError:                           # the damage that was found above
        raise
    except pickle.UnpicklingError:               # (torch's own message says how to run it anyway)
        raise ValueError(f"{path} is refused: it holds more than plain data and tensors (a "
                         f"program, perhaps), or is damaged") from None
    except Exception as error:                   # whatever a broken archive or pickle can raise
        reason = first_line(error)
        raise ValueError(f"{path} is no readable checkpoint ({reason})") from None
    if not isinstance(state, dict) or state.get("format") != "gentron":
        raise ValueError(f"{path} is not a GenTron checkpoint")
    # A file of a later version may mean other things by the same names: refuse it, do not guess
    version = state.get("version")
    if version != 1:
        raise ValueError(f"{path} has format version {version!r:.20}; this code reads version 1")
    # From here on every entry is what its users take it for, and no larger than the file is
    model = state.keys() & {"config", "text", "schedule"} or state.get("stage") != "vae"
    needed = KINDS.keys() - {"weights", "ema", "optimizer"} if model else {"stage", "vae"}
    kinds = {name: kind for name, kind in KINDS.items() if name in needed or name in state}
    wrong = misfit({name: state[name] for name in kinds if name in state}, kinds, "")
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong!a:.80} is missing, or not what it must be")
    vae = state["vae"]
    for weights in (state.get("weights", {}), state.get("ema", {}), vae.get("weights", {})):
        # A tensor may repeat a few bytes for ever (stride 0)
        if sum(w.nbytes for w in weights.values()) > size:
            raise ValueError(f"{path} is damaged: its tensors claim more than the file holds")
    if "config" in state and "config" in vae:
        p, C = state["config"]["patch_size"], state["config"]["in_channels"]
        unit = max(1, p) * 2 ** len(vae["config"]["encoder"])
        if vae["config"]["channels"] != C or any(side % unit for side in state["size"]):
            raise ValueError(f"{path} is damaged: its model does not fit its autoencoder")
    return state


def is_weight(x):
    """Is x a plain tensor of real numbers, in memory? (Not sparse, nested, on "meta" ...)"""
    return (type(x) is torch.Tensor and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and x.layout == torch.strided and x.device.type == "cpu" and not x.is_nested)


def whole(low, high, step=1):
    """A kind (below): whole numbers low, low + step, ... high."""
    return lambda x: type(x) is int and x in range(low, high + 1, step)


# What a checkpoint holds. A kind is a type, a function that says if a value fits, [the kind of
# every item], {name: kind} ("*": any names), or a tuple of kinds, one of which must do. The ranges
# of what is in "config" and "vae" are checked by their classes.
WEIGHTS, PLAIN = {"*": is_weight}, (str, bool, int, float, type(None), [(str, bool, int, float)])
KINDS = {
    "stage": lambda x: x in ("vae", "t2i", "t2v"), "step": whole(0, 2 ** 40),
    "size": lambda x: type(x) is list and len(x) == 2 and all(map(whole(8, 4096), x)),
    "frames": whole(1, 1024), "fps": lambda x: type(x) in (int, float) and 0.01 <= x <= 1000,
    "config": {"depth": int, "width": int, "heads": int, "patch_size": int, "in_channels": int,
               "text_dims": [int], "conditioning": str, "temporal": bool},
    "text": {"spec": lambda x: type(x) is str and x.count("+") < 8, "vocabulary": [str],
             "dim": whole(8, 65536, 8)},
    "schedule": {"kind": str, "objective": str},
    "vae": ({"config": {"encoder": [int], "decoder": [int], "channels": int, "kl": float},
             "weights": WEIGHTS}, {"name": str}),
    "weights": WEIGHTS, "ema": WEIGHTS,                     # raw (last.pt alone has them), averaged
    "optimizer": {"param_groups": list, "state": {"*": {
        "step": is_weight, "exp_avg": is_weight, "exp_avg_sq": is_weight}}},
    "args": {"*": PLAIN}, "made": {"*": PLAIN},
}


def misfit(value, kind, name):
    """The dotted name of the first part of `value` that is not of its kind; None if all fit."""
    if isinstance(kind, tuple):
        wrong = [misfit(value, one, name) for one in kind]
        return None if None in wrong else max(wrong, key=len)      # of the one that came furthest
    if isinstance(kind, list) and isinstance(value, list):
        value, kind = dict(enumerate(value)), {"*": kind[0]}
    if isinstance(kind, dict) and isinstance(value, dict):
        kinds = dict.fromkeys(value, kind["*"]) if "*" in kind else kind
        for key in [*kinds, *(value.keys() - kinds.keys())]:       # some lack, some are too many
            part = f"{name}.{key}" if name else str(key)
            if key not in value or key not in kinds:
                return part
            if wrong := misfit(value[key], kinds[key], part):
                return wrong
        return None
    good = type(value) is kind if isinstance(kind, type) else callable(kind) and kind(value)
    return None if good else name


class Unfilled(torch.overrides.TorchFunctionMode):
    """Under it, and torch.device("meta"), modules are built without memory and nothing is drawn:
    for a model whose weights come from a file that may not hold what it says it does."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ not in ("normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_"):
            return function(*args, **(kwargs or {}))


def load_weights(module, weights, what, assign=False):
    """load_state_dict with names and shapes checked first. what: the part's name in the message.
    assign: the module was built `Unfilled`, and these tensors become its own. Raises ValueError
    that names one tensor which differs, where torch's own lists them all."""
    own = module.state_dict()
    for name in own.keys() | weights.keys():     # either may have names that the other lacks
        mine, theirs = (tuple(d[name].shape) if name in d else "absent" for d in (own, weights))
        if mine != theirs:
            raise ValueError(f"{what} does not fit: {name!a:.80} is {theirs} in the file, "
                             f"{mine} in the model")
    module.load_state_dict(weights, assign=assign)


class Net(nn.Module):
    """All that trains together: the Transformer and, if it is a small one, the text encoder."""
    # One module around both, and the loss inside of its forward, because the wrappers (data
    # parallel, FSDP, compile) act on one module's forward
    def __init__(self, model, text, schedule):
        super().__init__()
        self.model, self.text, self.schedule = model, text, schedule

    def forward(self, z0, captions, draws):
        """The training loss of each item, (B,): see `training_loss`."""
        return training_loss(self.model, self.text, self.schedule, z0, captions, draws)

    def weights(self):
        """state_dict less the frozen encoders, which are found again by name: {name: tensor}."""
        # T5-XXL alone would add 9 GB to every checkpoint
        frozen = tuple(f"{name}." for name, module in self.named_modules()
                       if isinstance(module, FrozenEncoder))
        return {k: v for k, v in self.state_dict().items() if not k.startswith(frozen)}

    def load(self, weights, what, assign=False):
        """The inverse of `weights`. what: the file's name, for the message of the ValueError that
        is raised if they do not fit. assign: see `load_weights`."""
        own = self.state_dict()
        frozen = {name: own[name] for name in own.keys() - self.weights().keys()}
        load_weights(self, {**frozen, **weights}, what, assign)


def fp32(weights):
    """{name: tensor} -> the same in fp32, copies: ema.pt, the file to share, has half precision."""
    return {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}


def build_vae(state):
    """The autoencoder that a checkpoint describes: a VAE or PretrainedVAE, frozen, fp32. Raises
    ValueError if its weights do not fit or it cannot be loaded by name."""
    part = state["vae"]                          # {"name": ...} or {"config": ..., "weights": ...}
    if part.get("name"):
        return PretrainedVAE(part["name"])
    with torch.device("meta"), Unfilled():       # shapes are compared before memory is asked for
        vae = VAE(**part["config"])
    load_weights(vae, fp32(part["weights"]), "the autoencoder", assign=True)
    return vae.requires_grad_(False).eval()


def build_net(state, weights="ema", text=None):
    """The Net that a t2i or t2v checkpoint describes, in eval mode on the CPU. weights: "ema", or
    "weights" for the raw ones. text: a ready encoder, to build none. Raises ValueError if it has no
    such weights, or they do not fit."""
    if "config" not in state:
        raise ValueError("the checkpoint holds an autoencoder only, no text-to-image model")
    if state.get(weights) is None:
        raise ValueError(f"the checkpoint holds no {'EMA' if weights == 'ema' else 'raw'} weights")
    schedule = NoiseSchedule(**state["schedule"])
    with torch.device("meta"), Unfilled():       # (see build_vae)
        text = TextEncoder(**state["text"]) if text is None else text
        net = Net(GenTron(GenTronConfig(**state["config"])), text, schedule)
    net.load(fp32(state[weights]), "the checkpoint", assign=True)
    return net.eval()


def find_checkpoint(stages=("t2i", "t2v")):
    """The path, as a string, of the newest finished or running t2i / t2v run's ema.pt under runs/,
    else of assets/nano.pt. Raises ValueError if there is neither, or a newer file is damaged."""
    newest_first = sorted(Path("runs").glob("*/ema.pt"), key=lambda path: -path.stat().st_mtime)
    for path in newest_first:                    # the stage is inside: a run folder has any name
        if load_checkpoint(path).get("stage") in stages:
            return str(path)
    shipped = Path(__file__).resolve().parent / "assets" / "nano.pt"
    if shipped.exists():
        return str(shipped)
    raise ValueError("no text-to-image run in runs/ and no assets/nano.pt; "
                     "train one: python train.py")
