"""
exercises_test.py: grades the code exercises of EXERCISES.md. The kit (assignment.py) has a copy.

Each test compares with a formula that is computed in another way. None needs a trained model, and
none needs the solution of another exercise.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import gentron as G
import train


def same(a, b, tolerance=1e-5):
    """Asserts that two tensors have one shape and differ by at most `tolerance` anywhere."""
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert (a - b).abs().max() <= tolerance


def draw(*shape, seed=0):
    """Fixed random numbers of a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- 1. patchify

def test_exercise_1_patchify_puts_each_number_where_the_formula_says():
    B, F, C, H, W, p = 2, 3, 4, 4, 6, 2
    z = draw(B, F, C, H, W)
    x = G.patchify(z, p)
    assert x.shape == (B, F * (H // p) * (W // p), p * p * C)
    for f, c, i, j in [(0, 0, 0, 0), (1, 2, 3, 1), (2, 3, 0, 5), (2, 1, 2, 4), (0, 3, 1, 2)]:
        token = f * (H // p) * (W // p) + (i // p) * (W // p) + j // p     # row by row
        place = (i % p * p + j % p) * C + c                                # channels last
        assert torch.equal(x[:, token, place], z[:, f, c, i, j])


def test_exercise_1_unpatchify_is_the_inverse():
    z = draw(2, 3, 4, 6, 4)
    assert torch.equal(G.unpatchify(G.patchify(z, 2), 2, z.shape), z)


# ---- 2. q_sample

@pytest.mark.parametrize("kind, objective",
                         [("linear", "eps"), ("cosine", "v"), ("straight", "flow")])
def test_exercise_2_q_sample_mixes_picture_and_noise(kind, objective):
    schedule, t = G.NoiseSchedule(kind, objective), torch.tensor([0, 500, 999])
    z0, noise = draw(3, 1, 2, 4, 4), draw(3, 1, 2, 4, 4, seed=1)
    z = schedule.q_sample(z0, t, noise)
    for k in range(3):                                     # item by item, with plain numbers
        alpha, sigma = schedule.alpha[t[k]].item(), schedule.sigma[t[k]].item()
        same(z[k], alpha * z0[k] + sigma * noise[k])


# ---- 3. the step to s

def test_exercise_3_ddim_walks_along_one_noise():
    # If the network always answers the same v, each step of DDIM turns (z0, eps) by an angle, and
    # the clean picture is z0 = alpha z - sigma v at every step
    schedule = G.NoiseSchedule("cosine", "v")
    z, v = draw(2, 1, 3, 4, 4), draw(2, 1, 3, 4, 4, seed=1)
    for t, z_s, z0 in schedule.denoise(lambda z, t: v, z, 4, "ddim"):
        alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
        same(z0, alpha * z - sigma * v)
        times = [*schedule.timesteps(4), -1]
        s = times[times.index(t) + 1]
        # The angle of a step is atan2(sigma, alpha)
        angle = math.atan2(schedule.sigma[s], schedule.alpha[s]) - math.atan2(sigma, alpha)
        same(z_s, math.cos(angle) * z + math.sin(angle) * v)
        z = z_s
    same(z, z0)                                            # no noise is left


def test_exercise_3_a_perfect_network_is_led_to_its_picture():
    schedule, z0 = G.NoiseSchedule("linear", "eps"), draw(2, 1, 3, 4, 4, seed=2)

    def perfect(z, t):
        alpha, sigma = schedule.at(t, z)
        return (z - alpha * z0) / sigma
    for sampler in ("ddim", "ddpm"):
        *_, (_, z, _) = schedule.denoise(perfect, draw(2, 1, 3, 4, 4), 10, sampler)
        same(z, z0, 1e-3)


def test_exercise_3_ddpm_keeps_the_right_amount_of_noise():
    # With z0 = 0 known, z at step s must be noise of standard deviation sigma_s
    schedule = G.NoiseSchedule("linear", "eps")
    perfect = lambda z, t: z / schedule.at(t, z)[1]
    z = draw(64, 1, 4, 16, 16)
    for t, z, _ in schedule.denoise(perfect, z, 5, "ddpm"):
        times = [*schedule.timesteps(5), -1]
        sigma = schedule.sigma[times[times.index(t) + 1]].item()
        assert abs(z.std().item() - sigma) < 0.02


def test_exercise_3_the_corrector_takes_langevin_steps_at_the_middle_levels():
    # pc, in float64: DDPM's posterior (its equation 7), and steps of 0.4 sigma^2 along the score
    schedule, z = G.NoiseSchedule("linear", "eps"), draw(1, 1, 4, 4, 4)
    assert all(len(schedule.timesteps(n, "pc")) == n for n in range(1, 99))
    times, network = schedule.timesteps(11, "pc"), lambda z, t: torch.tanh(z)
    assert len(set(times)) == 7 and sorted(times)[::-1] == times and times.count(570) == 3
    *_, (_, ours, _) = schedule.denoise(network, z, 11, "pc", [torch.Generator().manual_seed(0)])
    g, alpha, sigma = torch.Generator().manual_seed(0), schedule.alpha, schedule.sigma
    z = z.double()
    for t, s in zip(times, [*times[1:], -1]):
        eps, fresh = network(z, t), torch.randn(1, 4, 4, 4, generator=g) if s >= 0 else 0
        a, z0 = alpha[t] / alpha[s], (z - sigma[t] * eps) / alpha[t]
        beta, score = sigma[t] ** 2 - (a * sigma[s]) ** 2, -eps / sigma[t]
        mean = (a * sigma[s] ** 2 * z + alpha[s] * beta * z0) / sigma[t] ** 2
        z = (z + 0.4 * sigma[t] ** 2 * score + 0.8 * sigma[t] * fresh if s == t else
             mean + sigma[s] / sigma[t] * beta.sqrt() * fresh)
    same(ours / z.abs().max(), z.float() / z.abs().max(), 1e-4)


# ---- 4. guided

class Toy(nn.Module):
    """In the place of GenTron: answers a different number for each text, time and motion."""
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls = []

    def prepare(self, text):
        return [None], [text.mask[0]], text.pooled

    def forward(self, z, t, text, motion):
        self.calls.append(len(z))
        text = text[2].sum(1).view(-1, 1, 1, 1, 1)
        on = 1 if motion is None else motion.float().view(-1, 1, 1, 1, 1)
        return z * text + 10 * on * text ** 2 + t.view(-1, 1, 1, 1, 1)


def toy():
    """A Toy, the Text of two prompts and the null text, z and t."""
    pooled = torch.tensor([[2.0], [3.0], [0.5]])           # the last row is the null text
    text = G.Text((torch.zeros(3, 1, 1),), (torch.ones(3, 1, dtype=torch.bool),), pooled)
    return Toy(), text, draw(2, 4, 3, 2, 2), torch.tensor([7, 7])


@pytest.mark.parametrize("cfg, motion, branches", [(4.0, 1.2, 3), (7.5, 1.0, 2), (1.0, 1.0, 1),
                                                   (0.0, 0.0, 1), (2.0, 2.0, 2)])
def test_exercise_4_guided_is_the_formula_of_the_paper(cfg, motion, branches):
    model, text, z, t = toy()

    def e(pooled, on):                                     # one evaluation of the network
        return Toy()(z, t, (None, None, pooled), torch.full((2,), on))
    prompts, null = text.pooled[:2], text.pooled[2:].expand(2, 1)
    expected = (e(null, False) + cfg * (e(prompts, True) - e(null, True))
                + motion * (e(null, True) - e(null, False)))
    with torch.no_grad():
        same(G.guided(model, text, cfg, motion)(z, t), expected, 1e-3)
    # A branch of weight zero is not evaluated. Each evaluation is two rows of the batch
    assert sum(model.calls) == branches * 2


def test_exercise_4_guided_without_motion():
    model, text, z, t = toy()
    e = lambda pooled: Toy()(z, t, (None, None, pooled), torch.zeros(2, dtype=torch.bool))
    prompts, null = text.pooled[:2], text.pooled[2:].expand(2, 1)
    with torch.no_grad():
        same(G.guided(model, text, 3.0, None)(z, t), e(null) + 3 * (e(prompts) - e(null)), 1e-3)


# ---- 5. the motion-free branch

def test_exercise_5_motion_off_is_attention_under_the_identity_mask():
    torch.manual_seed(0)
    attention, x, pos = G.Attention(16, 2), draw(4, 5, 16), torch.arange(5)
    motion = torch.tensor([True, False, True, False])
    with torch.no_grad():
        y = attention(x, pos=pos, motion=motion)
        on = attention(x, pos=pos)                         # all frames see each other
        alone = attention(x.reshape(20, 1, 16)).view(4, 5, 16)     # each frame is its own clip
        same(y[motion], on[motion])
        same(y[~motion], alone[~motion])


# ---- 6. the EMA update

def test_exercise_6_the_average_follows_the_weights():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    averages = [w.detach() + 1 for w in weights]
    args = SimpleNamespace(lr=0.1, lr_decay=0, grad_accum=1, ema=0.9, precision="fp32",
                           device=torch.device("cpu"))
    net, x = Squares(weights), torch.randn(4, 3)
    run = SimpleNamespace(net=net, weights=weights, averages=averages,
                          optimizer=torch.optim.AdamW(weights))
    for step in (0, 20, 200):
        before = [a.clone() for a in averages]
        train.training_step(run, [x], step, args)
        decay = min(0.9, (1 + step) / (10 + step))         # 0.1, 0.7, 0.9
        for old, new, weight in zip(before, averages, weights):
            same(new, decay * old + (1 - decay) * weight.detach())
            assert not new.requires_grad


class Squares(nn.Module):
    """A loss an item, as `Net` has it."""
    def __init__(self, weights):
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def forward(self, x):
        return sum(((x - w) ** 2).sum(1) for w in self.weights)


# ---- 7. the text mask

def test_exercise_7_padding_never_changes_a_caption():
    torch.manual_seed(0)
    encoder = G.WordEncoder(["a", "red", "circle", "left", "of"], dim=32)
    short, long = "a red circle", "a red circle left of a red circle"
    with torch.no_grad():
        tokens, mask, pooled = encoder([short, long, ""])
        assert mask.dtype == torch.bool and mask.sum(1).tolist() == [4, 9, 1]     # with START
        for k, caption in enumerate((short, long, "")):
            alone, alone_mask, alone_pooled = encoder([caption])
            same(tokens[k][mask[k]], alone[0][alone_mask[0]])
            same(pooled[k], alone_pooled[0])


def test_exercise_7_an_unknown_word_is_no_padding():
    encoder = G.WordEncoder(["a", "red", "circle"], dim=32)
    assert encoder(["a blue circle", "a"])[1].tolist() == [[True] * 4, [True, True, False, False]]
