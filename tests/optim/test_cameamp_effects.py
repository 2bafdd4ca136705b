"""Each feature of `Automagic_CameAMP_Improved_8Bit` alone: it does what its name says, and nothing where it is off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from coat_kernels.optim import AutomagicCameAMP

#: Everything that has a switch, switched off; the rest of the rule is CAME with the warm-up's mask.
OFF: dict[str, Any] = {
    "edge_suppression": False,
    "background_regularization": False,
    "spatial_awareness": False,
    "frequency_penalty": 0.0,
    "lora_rank_penalty": False,
    "full_finetune": True,
    "weight_decay": 0.0,
    "optim_bits": 32,
}
LR = 1e-3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(grads: list[torch.Tensor], start: torch.Tensor | None = None, **options: Any) -> tuple[torch.Tensor, AutomagicCameAMP]:
    """The move that these gradients make from `start`, and the optimizer afterwards; a second group keeps AGR's sum large."""
    param = nn.Parameter(torch.zeros_like(grads[0]) if start is None else start.clone())
    begin = param.detach().clone()
    rest = nn.Parameter(torch.zeros(1000))
    optimizer = AutomagicCameAMP([param, rest], **{**OFF, "lr": LR, **options})
    for grad in grads:
        param.grad, rest.grad = grad.clone(), torch.full_like(rest, 100.0)
        optimizer.step()
    return param.detach() - begin, optimizer


def held(optimizer: AutomagicCameAMP, name: str) -> torch.Tensor:
    return optimizer.state[optimizer.param_groups[0]["params"][0]][name]


@pytest.mark.parametrize("profile", [None, "memory_optimized", "quality_optimized", "balanced"])
@pytest.mark.parametrize("warmup_steps", [500, 12, 0])
def test_a_constant_gradient_moves_every_element_down(profile: str | None, warmup_steps: int) -> None:
    """The original's update took the sign of momentum times gradient: half of the elements went up."""
    # one direction to each row, so that the frequency penalty changes no sign
    grad = (0.5 + random(24, 40).abs()) * (random(24, 1, seed=1).sign())
    param = nn.Parameter(random(24, 40, seed=2))
    optimizer = AutomagicCameAMP([param], lr=1e-4, profile=profile, warmup_steps=warmup_steps, weight_decay=0.0, force_8bit=True)
    for _ in range(6):
        before = param.detach().clone()
        param.grad = grad.clone()
        optimizer.step()
        assert torch.equal((before - param.detach()).sign(), grad.sign())


@pytest.mark.parametrize("profile", [None, "memory_optimized", "quality_optimized", "balanced"])
def test_least_squares_descends_inside_the_warm_up(profile: str | None) -> None:
    x, target = random(256, 32), random(256, 24, seed=1)
    target = target * 0.1 + x @ random(32, 24, seed=2) / 6
    model = nn.Linear(32, 24)
    nn.init.zeros_(model.weight)
    optimizer = AutomagicCameAMP(model.parameters(), lr=1e-3, profile=profile, force_8bit=True)
    losses = []
    for _ in range(249):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
    assert all(b < a for a, b in zip(losses[:100:10], losses[10:100:10], strict=False))


def test_updates_never_go_against_the_gradient() -> None:
    """Where momentum still points the other way: the gradient's sign in the first half of the warm-up, no move after it."""
    grads = [torch.ones(6, 8)] * 3 + [torch.ones(6, 8)]
    grads[3] = grads[3].clone()
    grads[3][2:4] = -0.2
    for warmup_steps, expected in ((500, 1), (0, 0), (5, 0)):
        before, _ = run(grads[:3], warmup_steps=warmup_steps)
        after, _ = run(grads, warmup_steps=warmup_steps)
        last = after - before
        assert (last[[0, 1, 4, 5]] < 0).all()
        assert torch.equal(last[2:4].sign(), torch.full((2, 8), float(expected)))


def test_edge_suppression_moves_edges_less() -> None:
    grads = [torch.ones(20, 20) for _ in range(8)]
    for grad in grads:
        grad[10, 10] = 30.0
    options = {"edge_threshold": 0.6, "edge_penalty": 1.0}
    with_it, optimizer = run(grads, edge_suppression=True, **options)
    without, other = run(grads, **options)
    assert held(optimizer, "edge_history")[10, 10] > 0
    assert (held(optimizer, "edge_history") > 0).sum() <= 5, "the spike and its neighbours"
    assert "edge_history" not in other.state[other.param_groups[0]["params"][0]]
    assert with_it[10, 10].abs() < 0.9 * without[10, 10].abs()
    assert torch.allclose(with_it[:5, :5], without[:5, :5], rtol=0.02)  # the RMS clips see the spike
    higher, _ = run(grads, edge_suppression=True, edge_penalty=1.0, edge_threshold=50.0)
    assert torch.equal(higher, without)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_edges_of_a_gradient_do_not_depend_on_its_scale(scale: float) -> None:
    """After the warm-up's first half edges weigh in AGR alone: on an edge it takes a larger share of the gradient."""
    grad = torch.ones(20, 20) * scale
    grad[10, 10] = 100 * scale  # a fifth of the sum of magnitudes

    def move(**options: Any) -> torch.Tensor:
        param = nn.Parameter(torch.zeros(20, 20))
        # without came and with a limit that nothing reaches, the move is in proportion to gradient over factored root
        settings = {
            **OFF,
            "warmup_steps": 0,
            "came": False,
            "clip_threshold": 1e3,
            "eps": (1e-30, 1e-16, 0.0),
            "edge_penalty": 1.0,
            **options,
        }
        optimizer = AutomagicCameAMP([param], lr=LR, **settings)
        param.grad = grad.clone()
        optimizer.step()
        return param.detach()

    off, on = move(), move(edge_suppression=True)
    contrast = [float(m[10, 10] / m[10, 0]) for m in (off, on)]
    assert contrast[1] < 0.8 * contrast[0]
    assert torch.allclose(move(edge_suppression=True, edge_threshold=30.0), off)


def test_frequency_penalty_removes_high_frequencies_and_keeps_low_ones() -> None:
    x = torch.arange(32) / 32 * 2 * torch.pi
    low = (1.5 + torch.sin(x))[:, None] * (1.5 + torch.cos(x))
    checkers = ((torch.arange(32)[:, None] + torch.arange(32)) % 2) * 2.0 - 1.0

    def shares(strength: float) -> tuple[float, float]:
        move, _ = run([low + checkers], frequency_penalty=strength, warmup_steps=0, came=False)
        # divided by the factored root, which both components share, the move is still their sum
        return float((move * checkers).sum().abs()), float((move * low).sum().abs())

    (high0, low0), (high1, low1) = shares(0.0), shares(1.0)
    assert high1 < 1e-3 * high0
    assert low1 > low0
    high, low = shares(0.5)
    assert 0.5 < (high / low) / (high0 / low0) < 0.65  # half of the gradient's, and the factored root evens out


def test_rank_penalty_shrinks_the_tail_and_leaves_the_head() -> None:
    start = random(16, 200)

    def values(**options: Any) -> torch.Tensor:
        moved, _ = run([random(16, 200, seed=i) * 1e-3 for i in range(80)], start, warmup_steps=0, lr=1e-2, max_lr=1.0, **options)
        return torch.linalg.svdvals(start + moved)

    before, off, on = torch.linalg.svdvals(start), values(), values(lora_rank_penalty=True, rank_penalty_strength=3.0)
    assert (on[10:] < off[10:] - 0.05 * before[10:]).all()
    assert torch.allclose(on[:8], off[:8], rtol=0.03)
    assert on[10:].sum() < 0.9 * off[10:].sum()


def test_rank_penalty_leaves_rank_ten_and_large_matrices_alone() -> None:
    for shape in ((10, 50), (130, 140)):
        grads = [random(*shape, seed=i) for i in range(2)]
        on, optimizer = run(grads, random(*shape, seed=9), lora_rank_penalty=True, rank_penalty_strength=1.0)
        off, _ = run(grads, random(*shape, seed=9))
        assert torch.equal(on, off)
        report = optimizer.get_memory_efficiency_report()["features_off"]["lora_rank_penalty"]
        assert report == {"reason": "needs a shorter side of 11 to 128", "tensors": 2, "parameters": grads[0].numel() + 1000}


def test_low_rank_emphasis_weighs_the_torque() -> None:
    grads = [random(16, 30)] * 3  # agreement: the torque is positive, more of it is more momentum
    small, _ = run(grads, lora_rank_penalty=True, rank_penalty_strength=0.0, low_rank_emphasis=1.0, came=False, clip_threshold=10.0)
    large, _ = run(grads, lora_rank_penalty=True, rank_penalty_strength=0.0, low_rank_emphasis=2.0, came=False, clip_threshold=10.0)
    assert large.norm() > 1.05 * small.norm()


def test_spatial_awareness_moves_the_mask_faster_where_rows_vary() -> None:
    grad = torch.ones(8, 64)
    grad[4:, ::2] = 0.05  # rows of one value, rows of two
    options = {"warmup_steps": 500, "detail_preservation": 5.0, "lr": 1e-4, "lr_bump": 1e-6}
    _, aware = run([grad] * 20, spatial_awareness=True, **options)
    _, plain = run([grad] * 20, **options)
    rise = (held(aware, "lr_mask") - 1e-4).mean(1)
    assert torch.allclose(held(plain, "lr_mask"), torch.tensor(1e-4 + 19 * 1e-6), rtol=1e-5)  # the first step has no sign to agree with
    assert torch.allclose(rise[:4], torch.tensor(0.5 * 19e-6), rtol=1e-3)
    assert (rise[4:] > 1.2 * rise[:4]).all()
    _, less = run([grad] * 20, spatial_awareness=True, **{**options, "detail_preservation": 0.1})
    assert torch.allclose((held(less, "lr_mask") - 1e-4).mean(1), torch.tensor(0.5 * 19e-6), rtol=1e-3)


def test_background_regularization_halves_rows_that_hardly_vary() -> None:
    grad = random(8, 64).abs() + 1
    grad[2] = 1.0
    on, _ = run([grad], warmup_steps=0, background_regularization=True)
    off, _ = run([grad], warmup_steps=0)
    ratio = (on / off).mean(1)
    assert ratio[2] == pytest.approx(0.5)
    assert torch.allclose(ratio[torch.arange(8) != 2], torch.tensor(1.0))
    small, _ = run([grad * 1e-5], warmup_steps=0, background_regularization=True)
    assert torch.allclose(small / off, on / off, rtol=1e-3), "the limit is relative: gradients of LoRA are all small"


def test_the_mask_learns_from_signs_in_the_warm_up_and_freezes_after_it() -> None:
    steady, flipping = torch.ones(4, 8), torch.ones(4, 8)
    grads = []
    for step in range(30):
        flipping = -flipping
        grads.append(torch.cat([steady, flipping]) * (1 + step % 2))
    masks = {}
    for steps in (1, 9, 19, 30):
        _, optimizer = run(grads[:steps], warmup_steps=20, lr=1e-4, lr_bump=5e-6)
        masks[steps] = held(optimizer, "lr_mask")
    assert torch.equal(masks[1], torch.full((8, 8), 1e-4))
    assert torch.allclose(masks[9], torch.tensor([1e-4 + 8 * 5e-6, 1e-4 - 8 * 5e-6]).repeat_interleave(4)[:, None].expand(8, 8))
    assert torch.allclose(masks[19][4:], torch.tensor(1e-4 - 18 * 5e-6))
    assert torch.equal(masks[30], masks[19])


def test_the_mask_stays_within_its_bounds() -> None:
    grads = [torch.ones(4, 8)] * 10
    _, optimizer = run(grads, lr=1e-4, lr_bump=5e-5, max_lr=2e-4)
    assert torch.allclose(held(optimizer, "lr_mask"), torch.tensor(2e-4))
    _, optimizer = run([g * (-1.0) ** i for i, g in enumerate(grads)], lr=1e-4, lr_bump=5e-5, min_lr=8e-5)
    assert torch.allclose(held(optimizer, "lr_mask"), torch.tensor(8e-5))


def test_eta_slows_rows_of_large_norm_unless_full_finetune() -> None:
    start = torch.zeros(4, 64)
    start[1] = 1.0  # norm 8
    grad = [random(4, 64)]
    scaled, _ = run(grad, start, full_finetune=False, eta=2.0)
    plain, _ = run(grad, start)
    ratio = scaled.norm(dim=1) / plain.norm(dim=1)
    assert torch.allclose(ratio[[0, 2, 3]], torch.ones(3))
    assert ratio[1] == pytest.approx(1 / (2 * (8 + 0.25) ** 0.5), rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 5e-4},
        {"min_lr": 9e-4},
        {"max_lr": 1.001e-3},
        {"lr_bump": 1e-5},
        {"eps": (1e-2, 1e-16, 1e-8)},
        {"eps": (1e-30, 1e-2, 1e-8)},
        {"eps": (1e-30, 1e-16, 1e6)},
        {"clip_threshold": 0.5},
        {"betas": (0.5, 0.99, 0.999)},
        {"betas": (0.8, 0.5, 0.999)},
        {"betas": (0.8, 0.99, 0.5)},
        {"eta": 1.0},
        {"beta1_decay": 0.9},
        {"weight_decay": 0.1},
        {"warmup_steps": 0},
        {"edge_threshold": 0.2},
        {"adaptation_rate": 0.9},
        {"came": False},
        {"full_finetune": True},
        {"edge_suppression": False},
        {"edge_penalty": 0.9},
        {"background_regularization": False},
        {"spatial_awareness": False},
        {"frequency_penalty": 0.5},
        {"detail_preservation": 0.1},
        {"lora_rank_penalty": False},
        {"rank_penalty_strength": 1.0},
        {"low_rank_emphasis": 2.0},
        {"optim_bits": 32},
        {"min_8bit_size": 100_000},
        {"force_8bit": True, "min_8bit_size": 100_000},
        {"maximize": True},
        {"seed": 1},
        {"block_size": 64},
    ],
    ids=str,
)
def test_no_option_is_ignored(change: dict) -> None:
    """Every option changes the course of a run, which crosses the three phases; `force_8bit` keeps it where `min_8bit_size` would not."""

    def course(**options: Any) -> torch.Tensor:
        start = random(16, 48, seed=50) * 0.1
        grads = [random(16, 48, seed=i // 3) * 1e-2 for i in range(16)]
        for grad in grads:
            grad[3] = 1e-4  # a row of background
        settings = {"warmup_steps": 11, "lr": 1e-3, "max_lr": 2e-3, "min_8bit_size": 100, "eta": 2.0, **options}
        param = nn.Parameter(start.clone())
        optimizer = AutomagicCameAMP([param], **settings)
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
        return param.detach()

    assert torch.equal(course(), course())
    equal = torch.equal(course(**change), course())
    assert equal if "force_8bit" in change else not equal
