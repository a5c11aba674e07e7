"""
test_gentron.py: the paper's claims as assertions, then tiny runs of the real scripts.

    python -m pytest                 # all but the slow ones
    python -m pytest -m slow         # those: long training, many processes

A fresh model's output is exactly zero, so an equality test on it would pass whatever the code does:
every equality below is tried on models whose parameters are all random (`randomised`).
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data as D
import gentron as G

HERE = Path(__file__).resolve().parent


def randomised(module, seed=0, std=0.08):
    """Every parameter drawn anew, also those that start at zero; biases too."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * std)
    return module.eval()


def largest(a, b):
    """The largest absolute difference."""
    return (a - b).abs().max().item()


def tiny(text_dims=(24,), depth=3, **more):
    return randomised(G.GenTron(G.GenTronConfig(depth=depth, width=32, heads=4, text_dims=text_dims, **more)))


def some_text(dims=(24,), B=2, L=5, lengths=None, seed=0):
    """Random Text; lengths: real tokens of each row (default: all)."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths or [L] * B)
    mask = torch.arange(L)[None] < lengths[:, None]
    return G.Text(tuple(torch.randn(B, L, d, generator=g) for d in dims), (mask,) * len(dims),
                  torch.randn(B, sum(dims), generator=g))


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# The Transformer
# -----------------------------------------------------------------------------

@pytest.mark.parametrize("p,shape", [(1, (2, 3, 4, 6, 10)), (2, (2, 1, 4, 6, 10)), (2, (1, 3, 5, 8, 4))])
def test_unpatchify_inverts_patchify(p, shape):
    z = noise(*shape)
    x = G.patchify(z, p)
    assert x.shape == (shape[0], shape[1] * shape[3] * shape[4] // p ** 2, p * p * shape[2])
    assert torch.equal(G.unpatchify(x, p, shape), z)
    # a token is one patch of one frame: token 1 of frame 0 is the patch right of the first
    assert torch.equal(x[0, 1].sort().values, z[0, 0, :, 0:p, p:2 * p].flatten().sort().values)


def test_positions_tell_rows_from_columns_and_need_no_table():
    small, large = G.grid_positions(4, 6, 32), G.grid_positions(8, 9, 32)
    assert largest(small.view(4, 6, 32), large.view(8, 9, 32)[:4, :6]) == 0    # any grid, one rule
    assert len({tuple(row.tolist()) for row in small}) == 24                   # no two places alike


@pytest.mark.parametrize("conditioning", ["cross", "adaln"])
@pytest.mark.parametrize("temporal", [False, True])
def test_every_block_starts_as_the_identity(conditioning, temporal):
    torch.manual_seed(0)
    model = G.GenTron(G.GenTronConfig(depth=2, width=32, heads=4, text_dims=(24,), conditioning=conditioning,
                                      temporal=temporal))
    x, c, pos = noise(2, 3 * 6, 32), noise(2, 32), G.sincos(torch.arange(3), 32)
    read = model.read(some_text())
    for block, kv, mask in zip(model.blocks, read.kv, read.mask):
        assert torch.equal(block(x, c, kv, mask, 3, pos, None), x)
    z = noise(2, 3, 4, 4, 6)
    assert torch.equal(model(z, torch.tensor([3, 900]), some_text()), torch.zeros_like(z))
    # and it can leave that start: gates, cross and final layer all get a gradient once one moves
    randomised(model)
    model(z, torch.tensor([3, 900]), some_text()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("preset,millions", [("XL/2", 930.0), ("G/2", 3083.8)])
def test_presets_have_the_papers_parameter_counts(preset, millions):
    with torch.device("meta"):
        model = G.GenTron(G.GenTronConfig(**G.PRESETS[preset]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.025)


def test_preset_comments_are_true():
    source = (HERE / "gentron.py").read_text()
    for name, sizes in G.PRESETS.items():
        if name == "nano":
            continue
        with torch.device("meta"):
            count = sum(p.numel() for p in G.GenTron(G.GenTronConfig(**sizes)).parameters()) / 1e6
        said = float(re.search(rf'"{name}":.*?#\s+([\d.]+) M', source)[1])
        assert said == pytest.approx(count, abs=0.06), f"{name} has {count:.1f} M"


def test_an_item_gets_the_same_result_alone_and_in_a_batch():
    model, text, z, t = tiny(), some_text(B=3), noise(3, 1, 4, 4, 6), torch.tensor([5, 400, 990])
    together = model(z, t, text)
    for i in range(3):
        one = G.Text((text.tokens[0][i:i + 1],), (text.mask[0][i:i + 1],), text.pooled[i:i + 1])
        assert largest(model(z[i:i + 1], t[i:i + 1], one), together[i:i + 1]) < 1e-5


def test_padding_never_changes_the_output_and_real_words_do():
    model, z, t = tiny(), noise(2, 1, 4, 4, 4), torch.tensor([10, 800])
    text = some_text(lengths=[5, 3])
    before = model(z, t, text)
    text.tokens[0][1, 3:] = 100.0                                # rubbish where the mask says padding
    assert torch.equal(model(z, t, text), before)
    wider = G.Text.cat([text, some_text(B=1, L=9)])              # padded further
    assert largest(model(torch.cat([z, z[:1]]), torch.cat([t, t[:1]]), wider)[:2], before) < 1e-5
    text.tokens[0][1, 2] = noise(24)                             # a real word
    after = model(z, t, text)
    assert largest(after[0], before[0]) == 0 and largest(after[1], before[1]) > 1e-4


def test_block_k_reads_encoder_k_mod_K():
    model = tiny(text_dims=(24, 40), depth=4)
    assert [block.cross.kv.in_features for block in model.blocks] == [24, 40, 24, 40]
    seen = []
    for block in model.blocks:
        block.cross.kv.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    text = some_text((24, 40))
    model(noise(2, 1, 4, 4, 4), torch.tensor([1, 2]), text)
    for k, got in enumerate(seen):
        assert largest(got, G.norm(text.tokens[k % 2])) == 0


def test_adaln_conditioning_has_no_cross_attention_and_reads_the_pooled_text():
    model, z, t = tiny(conditioning="adaln"), noise(2, 1, 4, 4, 4), torch.tensor([10, 800])
    assert all(block.cross is None for block in model.blocks)
    a, b = some_text(seed=0), some_text(seed=1)
    assert largest(model(z, t, a), model(z, t, b)) > 1e-4
    assert torch.equal(model(z, t, a), model(z, t, G.Text(b.tokens, b.mask, a.pooled)))


def test_every_config_field_is_read():
    source = (HERE / "gentron.py").read_text()
    for name in G.GenTronConfig.__dataclass_fields__:
        assert len(re.findall(rf"cfg\.{name}\b", source)) > 0 or name == "text_dims"


def test_equals_diffusers_dit():
    """With adaLN and one vector a class, the Transformer is DiT: diffusers' own, weights copied over."""
    diffusers = pytest.importorskip("diffusers")
    depth, heads, width, classes = 3, 4, 64, 10
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=4,
        num_layers=depth, sample_size=8, patch_size=2, num_embeds_ada_norm=classes, norm_eps=1e-6)
    randomised(theirs)
    ours = G.GenTron(G.GenTronConfig(depth=depth, width=width, heads=heads, text_dims=(width,),
                                     conditioning="adaln"))
    embedding = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks[1:]:         # theirs has a time MLP and a label table a block
        block.norm1.emb.load_state_dict(embedding.state_dict())

    def copy(linear, *sources):
        linear.weight.data = torch.cat([s.weight for s in sources]).reshape(linear.weight.shape).clone()
        linear.bias.data = torch.cat([s.bias for s in sources]).clone()
    # their patch embedding is a convolution (D, C, p, p); our patches are (p, p, C)
    ours.patch.weight.data = theirs.pos_embed.proj.weight.permute(0, 2, 3, 1).reshape(width, -1).clone()
    ours.patch.bias.data = theirs.pos_embed.proj.bias.clone()
    copy(ours.time[0], embedding.timestep_embedder.linear_1)
    copy(ours.time[2], embedding.timestep_embedder.linear_2)
    # they write cosines first, and their frequencies end one step lower (downscale_freq_shift = 1)
    ours.time[0].weight.data = torch.cat(ours.time[0].weight.data.chunk(2, 1)[::-1], 1)
    ours.pooled.weight.data, ours.pooled.bias.data = torch.eye(width), torch.zeros(width)
    for mine, block in zip(ours.blocks, theirs.transformer_blocks):
        copy(mine.modulation, block.norm1.linear)
        copy(mine.attn.q, block.attn1.to_q)
        copy(mine.attn.kv, block.attn1.to_k, block.attn1.to_v)
        copy(mine.attn.out, block.attn1.to_out[0])
        copy(mine.mlp[0], block.ff.net[0].proj)
        copy(mine.mlp[2], block.ff.net[2])
    copy(ours.final_modulation, theirs.proj_out_1)
    copy(ours.final, theirs.proj_out_2)

    z, t, labels = noise(3, 4, 8, 8), torch.tensor([0, 333, 999]), torch.tensor([1, 5, 9])
    vectors = embedding.class_embedder.embedding_table(labels)
    text = G.Text((vectors[:, None],), (torch.ones(3, 1, dtype=torch.bool),), vectors)
    shifted = lambda x, dim, period=10_000: plain(x, dim, period ** ((dim // 2) / (dim // 2 - 1))
                                                  if dim == 256 else period)
    plain, G.sincos = G.sincos, shifted
    try:
        with torch.no_grad():
            a, b = ours(z[:, None], t, text)[:, 0], theirs(z, timestep=t, class_labels=labels).sample
    finally:
        G.sincos = plain
    assert b.abs().max() > 0.1
    assert largest(a, b) < 1e-4 * b.abs().max().item()


# -----------------------------------------------------------------------------
# The temporal branch
# -----------------------------------------------------------------------------

def test_a_fresh_video_model_equals_its_image_parent_on_every_frame():
    parent = tiny()
    torch.manual_seed(1)
    video = G.GenTron(G.GenTronConfig(depth=3, width=32, heads=4, text_dims=(24,), temporal=True))
    weights = {**video.state_dict(), **parent.state_dict()}
    video.load_state_dict(weights)
    z, t, text = noise(2, 5, 4, 4, 6), torch.tensor([50, 700]), some_text()
    out = video.eval()(z, t, text)
    for f in range(5):
        assert largest(out[:, f:f + 1], parent(z[:, f:f + 1], t, text)) < 1e-5


def test_motion_off_is_attention_under_the_identity_mask():
    attention = randomised(G.Attention(32, 4))
    x, pos = noise(6, 5, 32), G.sincos(torch.arange(5), 32)
    off = attention(x, pos=pos, motion=torch.zeros(6, dtype=torch.bool))
    # the same, written with the mask tensor of the paper
    W, b = attention.kv.weight.chunk(2), attention.kv.bias.chunk(2)
    q = attention.split(attention.q(x + pos))
    k, v = attention.split(F.linear(x + pos, W[0], b[0])), attention.split(F.linear(x, W[1], b[1]))
    scores = q @ k.transpose(-1, -2) / math.sqrt(8)
    masked = scores.masked_fill(~torch.eye(5, dtype=torch.bool), -math.inf).softmax(-1) @ v
    assert largest(off, attention.out(masked.transpose(1, 2).flatten(2))) < 1e-6
    # and motion on is plain softmax attention, positions in q and k alone
    on = attention(x, pos=pos, motion=torch.ones(6, dtype=torch.bool))
    full = scores.softmax(-1) @ v
    assert largest(on, attention.out(full.transpose(1, 2).flatten(2))) < 1e-5
    assert largest(on, off) > 1e-3


def test_motion_off_separates_the_frames_and_motion_on_joins_them():
    model, text, t = tiny(temporal=True), some_text(B=1), torch.tensor([300])
    z = noise(1, 4, 4, 4, 4)
    changed = z.clone()
    changed[:, 2] += 1
    off, on = torch.tensor([False]), torch.tensor([True])
    before, after = model(z, t, text, off), model(changed, t, text, off)
    assert largest(before[:, [0, 1, 3]], after[:, [0, 1, 3]]) == 0
    assert largest(before[:, 2], after[:, 2]) > 1e-3
    before, after = model(z, t, text, on), model(changed, t, text, on)
    assert min(largest(before[:, f], after[:, f]) for f in range(4)) > 1e-4
    assert torch.equal(model(z, t, text), before)                         # None = all on


def test_a_batch_may_mix_motion_on_and_off():
    model, text, t, z = tiny(temporal=True), some_text(B=3), torch.tensor([3, 300, 900]), noise(3, 4, 4, 4, 4)
    motion = torch.tensor([True, False, True])
    mixed, on, off = model(z, t, text, motion), model(z, t, text, ~motion | motion), model(z, t, text, motion & ~motion)
    assert largest(mixed[[0, 2]], on[[0, 2]]) < 1e-6 and largest(mixed[1], off[1]) < 1e-6


def test_a_still_stays_a_still_without_motion():
    model, text, t = tiny(temporal=True), some_text(), torch.tensor([30, 600])
    z = noise(2, 1, 4, 4, 4).repeat(1, 6, 1, 1, 1)
    out = model(z, t, text, torch.tensor([False, False]))
    assert largest(out, out[:, :1].expand_as(out)) == 0


def test_a_single_frame_is_the_same_with_motion_on_and_off():
    model, text, t, z = tiny(temporal=True), some_text(), torch.tensor([30, 600]), noise(2, 1, 4, 4, 4)
    assert largest(model(z, t, text, torch.tensor([True] * 2)), model(z, t, text, torch.tensor([False] * 2))) < 1e-5


def test_frame_order_matters_with_motion_on():
    model, text, t, z = tiny(temporal=True), some_text(), torch.tensor([30, 600]), noise(2, 4, 4, 4, 4)
    order = [2, 0, 3, 1]
    assert largest(model(z[:, order], t, text), model(z, t, text)[:, order]) > 1e-3


# -----------------------------------------------------------------------------
# Diffusion
# -----------------------------------------------------------------------------

@pytest.mark.parametrize("kind,theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("objective", ["eps", "v"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
@pytest.mark.parametrize("steps", [10, 25])
def test_samplers_equal_diffusers(kind, theirs, objective, sampler, steps):
    diffusers = pytest.importorskip("diffusers")
    prediction = {"eps": "epsilon", "v": "v_prediction"}[objective]
    common = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule=theirs,
                  prediction_type=prediction, timestep_spacing="trailing")
    other = {"ddim": lambda: diffusers.DDIMScheduler(**common, clip_sample=False),
             "ddpm": lambda: diffusers.DDPMScheduler(**common, clip_sample=False),
             "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(**common, final_sigmas_type="zero")}[sampler]()
    schedule = G.NoiseSchedule(kind, objective)
    predict = lambda z, t: 0.3 * torch.tanh(z + torch.linspace(-1, 1, z[0].numel()).view(z[0].shape)) + \
        0.5 * z * torch.cos(t.view(-1, 1, 1, 1, 1) / 300.0)
    start = noise(2, 1, 4, 4, 4)
    ours = schedule.sample(predict, start, steps, sampler,
                           [torch.Generator().manual_seed(k) for k in range(2)])
    fresh = [torch.Generator().manual_seed(k) for k in range(2)]
    other.set_timesteps(steps)
    assert other.timesteps.tolist() == schedule.timesteps(steps)
    z = start
    for t in other.timesteps:
        out = predict(z, torch.full((2,), int(t)))
        if sampler == "ddpm":           # the same fresh noise, through the same generators
            original = diffusers.schedulers.scheduling_ddpm.randn_tensor
            diffusers.schedulers.scheduling_ddpm.randn_tensor = lambda shape, **_: torch.stack(
                [torch.randn(shape[1:], generator=g) for g in fresh])
            try:
                z = other.step(out, t, z).prev_sample
            finally:
                diffusers.schedulers.scheduling_ddpm.randn_tensor = original
        else:
            z = other.step(out, t, z).prev_sample
    assert largest(ours, z) < 1e-5 * max(1.0, z.abs().max().item())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
@pytest.mark.parametrize("objective", ["eps", "v"])
def test_the_last_step_returns_x0(sampler, objective):
    """A network that knows the answer gets exactly there, without a last helping of noise."""
    schedule, truth = G.NoiseSchedule("cosine", objective), noise(2, 1, 4, 4, 4, seed=5)

    def oracle(z, t):
        alpha, sigma = schedule.at(t, z)
        eps = (z - alpha * truth) / sigma
        return eps if objective == "eps" else alpha * eps - sigma * truth
    walk = list(schedule.denoise(oracle, noise(2, 1, 4, 4, 4), 10, sampler,
                                 [torch.Generator().manual_seed(k) for k in range(2)]))
    assert len(walk) == 10 and torch.equal(walk[-1][1], walk[-1][2])
    assert largest(walk[-1][1], truth) < 1e-4


def test_schedules_are_what_they_say():
    linear, cosine = G.NoiseSchedule("linear"), G.NoiseSchedule("cosine", "v")
    betas = np.linspace(1e-4, 0.02, 1000)
    assert linear.alphas_cumprod.numpy() == pytest.approx(np.cumprod(1 - betas), rel=1e-12)
    level = np.cos((np.arange(1, 999) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert cosine.alphas_cumprod[:998].numpy() == pytest.approx(level, rel=1e-9)
    z0, eps, t = noise(4, 1, 4, 2, 2), noise(4, 1, 4, 2, 2, seed=2), torch.tensor([0, 99, 500, 999])
    for schedule in (linear, G.NoiseSchedule("linear", "v"), cosine):
        z = schedule.q_sample(z0, t, eps)
        assert (schedule.alpha ** 2 + schedule.sigma ** 2 - 1).abs().max() < 1e-12
        for i, step in enumerate(t.tolist()):                   # a perfect answer gives back z0 and eps
            answer = schedule.target(z0, t, eps)[i]
            back, back_eps = schedule.read(answer, z[i], schedule.alpha[step].item(), schedule.sigma[step].item())
            assert largest(back, z0[i]) < 2e-4 / schedule.alpha[step].item() ** 1 and largest(back_eps, eps[i]) < 1e-4


def test_loss_is_the_mean_squared_error_of_eps_or_v():
    encoder = G.TextEncoder("small", ["red"], dim=24)
    randomised(encoder)
    model = tiny()
    z0 = noise(3, 1, 4, 4, 4)
    draws = G.randomness(0, 7, z0.shape)
    for objective in ("eps", "v"):
        schedule = G.NoiseSchedule("cosine", objective)
        alpha, sigma = (x[draws.t].float().view(-1, 1, 1, 1, 1) for x in (schedule.alpha, schedule.sigma))
        z = alpha * z0 + sigma * draws.noise
        target = draws.noise if objective == "eps" else alpha * draws.noise - sigma * z0
        expected = (model(z, draws.t, encoder(["red"] * 3)) - target).square().mean((1, 2, 3, 4))
        assert largest(G.training_loss(model, encoder, schedule, z0, ["red"] * 3, draws), expected) < 1e-5


def test_drop_rates_and_motion_are_as_asked():
    draws = [G.randomness(3, step, (1000, 1, 1, 1, 1), 0.1, 0.25) for step in range(40)]
    n = 40_000
    for name, p in (("drop_text", 0.1), ("still", 0.25)):
        share = torch.cat([getattr(d, name) for d in draws]).float().mean().item()
        assert abs(share - p) < 3 * math.sqrt(p * (1 - p) / n)
    t = torch.cat([d.t for d in draws]).float()
    assert t.min() == 0 and t.max() == 999 and abs(t.mean() - 499.5) < 3 * 288.7 / math.sqrt(n)
    again = G.randomness(3, 17, (1000, 1, 1, 1, 1), 0.1, 0.25)
    assert torch.equal(again.noise, draws[17].noise) and torch.equal(again.t, draws[17].t)
    assert not torch.equal(draws[16].noise, draws[17].noise)


# -----------------------------------------------------------------------------
# Guidance and text
# -----------------------------------------------------------------------------

def test_guidance_is_the_papers_formula():
    model, z, t = tiny(temporal=True), noise(2, 3, 4, 4, 4), torch.tensor([40, 900])
    text, null = some_text(lengths=[5, 4]), some_text(B=1, L=1, seed=9)
    nulls = G.Text((null.tokens[0].expand(2, -1, -1),), (null.mask[0].expand(2, -1),), null.pooled.expand(2, -1))
    on, off = torch.tensor([True] * 2), torch.tensor([False] * 2)
    e_on, e_null, e_off = model(z, t, text, on), model(z, t, nulls, on), model(z, t, nulls, off)
    for l_t, l_m in ((7.5, 1.3), (7.5, 1.0), (1.0, 1.0), (2.0, 0.0), (1.0, 1.2), (3.0, 3.0)):
        expected = e_off + l_t * (e_on - e_null) + l_m * (e_null - e_off)
        assert largest(G.guided(model, text, null, l_t, l_m)(z, t), expected) < 1e-4
    # motion-free throughout
    expected = e_off + 4 * (model(z, t, text, off) - e_off)
    assert largest(G.guided(model, text, null, 4.0, None)(z, t), expected) < 1e-4


def test_guidance_of_one_is_the_conditional_model_and_evaluates_nothing_else():
    model, z, t, text, null = tiny(), noise(2, 1, 4, 4, 4), torch.tensor([40, 900]), some_text(), some_text(B=1, seed=9)
    rows = []
    model.register_forward_pre_hook(lambda m, inputs: rows.append(len(inputs[0])))
    out = G.guided(model, text, null, 1.0)(z, t)
    assert rows == [2] and largest(out, model(z, t, text)) < 1e-5
    rows.clear()
    G.guided(model, text, null, 4.0)(z, t)
    assert rows == [4]                                              # two branches, one forward


def test_guidance_reaches_all_channels():
    model, z, t, text, null = tiny(), noise(2, 1, 4, 4, 4), torch.tensor([40, 900]), some_text(), some_text(B=1, seed=9)
    change = G.guided(model, text, null, 5.0)(z, t) - G.guided(model, text, null, 1.0)(z, t)
    assert (change.abs().amax((0, 1, 3, 4)) > 1e-3).all()           # each of the 4


def test_cached_keys_and_values_change_nothing_and_are_computed_once():
    model, z, t, text = tiny(text_dims=(24, 40), depth=4), noise(2, 1, 4, 4, 4), torch.tensor([40, 900]), \
        some_text((24, 40))
    assert largest(model(z, t, model.read(text)), model(z, t, text)) < 1e-6
    calls = []
    for block in model.blocks:
        block.cross.kv.register_forward_hook(lambda *_: calls.append(1))
    predict = G.guided(model, text, some_text((24, 40), B=1, seed=3), 4.0)
    G.NoiseSchedule("cosine", "v").sample(predict, z, 10)
    assert len(calls) == 4                                          # one a block, not one a step


def test_null_text_in_training_is_the_null_text_in_sampling():
    encoder = randomised(G.TextEncoder("small", D.vocabulary(), dim=24))
    model, schedule = tiny(), G.NoiseSchedule("cosine", "v")
    z0, captions = noise(4, 1, 4, 4, 4), ["a red circle", "a blue star", "a pink ring", "two red stars"]
    seen = []
    hook = encoder.register_forward_hook(lambda m, inputs, out: seen.append(out))
    draws = G.randomness(0, 0, z0.shape, p_drop_text=1.0)
    G.training_loss(model, encoder, schedule, z0, captions, draws)
    hook.remove()
    null = encoder([""])
    assert null.mask[0].sum() >= 1                                  # at least one real token
    for row in range(4):
        assert largest(seen[0].tokens[0][row][seen[0].mask[0][row]], null.tokens[0][0]) < 1e-6
        assert largest(seen[0].pooled[row], null.pooled[0]) < 1e-6


def test_small_encoder_ignores_padding_order_matters_and_unknown_words_are_named():
    encoder = randomised(G.TextEncoder("small+small", D.vocabulary(), dim=24))
    alone, beside = encoder(["a red circle"]), encoder(["a red circle", "a red circle left of a blue square"])
    n = alone.mask[0].sum().item()
    assert n == 4 and beside.mask[0].sum(1).tolist() == [4, 9]
    for k in range(2):
        assert largest(alone.tokens[k][0], beside.tokens[k][0][:n]) < 1e-5
    assert largest(alone.pooled[0], beside.pooled[0]) < 1e-5
    a, b = encoder(["a red circle left of a blue square"]), encoder(["a blue circle left of a red square"])
    assert largest(a.pooled, b.pooled) > 1e-4
    assert encoder.unknown("a rde circle") == ["rde"]
    assert G.split_words("An orange, circle!") == ["a", "orange", "circle"]
    assert G.split_words("红色圆 red") == ["红", "色", "圆", "red"]


def test_labels_are_one_vector_a_class():
    encoder = G.TextEncoder("labels", ["corgi", "pug"], dim=16)
    text = encoder(["pug", "", "corgi"])
    assert text.tokens[0].shape == (3, 1, 16) and text.mask[0].all()
    assert torch.equal(text.pooled, encoder.encoders[0].labels.weight[[2, 0, 1]])
    assert encoder.unknown("cat") == ["cat"]


@pytest.mark.parametrize("spec", ["labels+small", "none+small", "small+", ""])
def test_text_specs_that_make_no_sense_are_refused(spec):
    with pytest.raises(ValueError):
        G.TextEncoder(spec, ["a"])
