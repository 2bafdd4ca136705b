"""`CAME8bit` against the paper's algorithm in float32, and as an optimizer of its own."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from coat_kernels.optim import CAME8bit


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Came:
    """arXiv 2307.02047, algorithm 2, on one tensor; a vector keeps its second moment whole and takes the momentum as update."""

    def __init__(self, p: torch.Tensor, lr: float, betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16), clip: float = 1.0, decay: float = 0.0):
        self.p, self.lr, self.betas, self.eps, self.clip, self.decay = p.double(), lr, betas, eps, clip, decay
        self.m, self.v, self.r = torch.zeros_like(self.p), [0.0, 0.0], [0.0, 0.0]

    @staticmethod
    def root(averages: list, x: torch.Tensor, beta: float) -> torch.Tensor:
        if x.dim() == 1:
            averages[0] = beta * averages[0] + (1 - beta) * x
            return averages[0].sqrt()
        averages[0] = beta * averages[0] + (1 - beta) * x.mean(1)
        averages[1] = beta * averages[1] + (1 - beta) * x.mean(0)
        return (torch.outer(averages[0], averages[1]) / averages[0].mean()).sqrt()

    def step(self, g: torch.Tensor) -> None:
        g = g.double()
        h = g / self.root(self.v, g * g + self.eps[0], self.betas[1])
        h = h / max(1.0, float(h.square().mean().sqrt()) / self.clip)
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * h
        u = self.m
        if g.dim() == 2:
            u = self.m / self.root(self.r, (h - self.m) ** 2 + self.eps[1], self.betas[2])
        self.p = self.p - self.lr * self.decay * self.p - self.lr * u


@pytest.mark.parametrize("shape", [(24, 40), (40, 17), (130,), (3, 300)])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1, "clip_threshold": 0.5, "betas": (0.5, 0.9, 0.99), "eps": (1e-3, 1e-3)}], ids=str
)
def test_with_float32_states_it_is_the_papers_algorithm(shape: tuple[int, ...], steps: int, options: dict) -> None:
    param = nn.Parameter(random(*shape))
    decay, clip = options.get("weight_decay", 0.0), options.get("clip_threshold", 1.0)
    paper = Came(param.detach(), 1e-3, **{k: v for k, v in options.items() if k in ("betas", "eps")}, clip=clip, decay=decay)
    optimizer = CAME8bit([param], lr=1e-3, min_quant_numel=1 << 20, **options)
    start = param.detach().double()
    for step in range(steps):
        param.grad = random(*shape, seed=step + 1) * 10.0 ** (step % 3 - 2)
        paper.step(param.grad)
        optimizer.step()
    # the parameter is rounded to float32 at each step; the update itself agrees to 1e-5
    tolerance = steps * 6e-8 * start.abs().max() + 1e-5 * (paper.p - start).abs().max()
    assert (param.detach().double() - paper.p).abs().max() <= tolerance


@pytest.mark.parametrize("shape", [(24, 40), (40, 300), (16, 3072)])
def test_8_bit_momentum_stays_close(shape: tuple[int, int]) -> None:
    param = nn.Parameter(random(*shape))
    paper, optimizer = Came(param.detach(), 1e-3), CAME8bit([param], lr=1e-3, min_quant_numel=0)
    start = param.detach().double()
    for step in range(10):
        param.grad = random(*shape, seed=step + 1)
        paper.step(param.grad)
        optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype == torch.uint8
    # dynamic8 loses 1 to 2 % of a value under a step, and the instability's root divides by what is lost too
    assert (param.detach().double() - paper.p).norm() <= 0.05 * (paper.p - start).norm()


def test_state_bytes() -> None:
    params = [nn.Parameter(random(*shape)) for shape in ((16, 3072), (512, 768), (3000,))]
    optimizer = CAME8bit(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = [sum(v.nbytes for k, v in optimizer.state[p].items() if k != "step") / p.numel() for p in params]
    assert held[0] <= 1.52
    assert held[1] <= 1.05
    assert held[2] == 8  # a small vector: float32 momentum and a whole second moment
    report = optimizer.get_memory_efficiency_report()
    assert report["state_bytes"] == sum(h * p.numel() for h, p in zip(held, params, strict=True))
    assert report["quantized_parameters"] == params[0].numel() + params[1].numel()


def test_it_descends_and_resumes_byte_for_byte() -> None:
    def run(until: int, resume_at: int | None) -> tuple[list[float], torch.Tensor]:
        model = nn.Linear(64, 80)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = CAME8bit(model.parameters(), lr=1e-2)
        x = random(200, 64)
        y, losses = x @ random(64, 80, seed=1) / 8, []
        for step in range(until):
            if step == resume_at:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = CAME8bit(model.parameters(), lr=5.0)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, model.weight.detach()

    losses, weight = run(60, None)
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(run(60, 20)[1], weight)


def test_groups_maximize_and_16_bit_parameters() -> None:
    up, down = nn.Parameter(random(40, 50).bfloat16()), nn.Parameter(random(40, 50).bfloat16())
    first = CAME8bit([{"params": [up], "maximize": True, "lr": 1e-2}], min_quant_numel=0, param_rounding="stochastic", seed=4)
    second = CAME8bit([down], lr=1e-2, min_quant_numel=0, param_rounding="stochastic", seed=4)
    for step in range(4):
        up.grad = random(40, 50, seed=step).bfloat16()
        down.grad = -up.grad
        first.step()
        second.step()
    assert torch.equal(up, down)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"betas": (0.9, 0.999)}, "betas must be 3 numbers"),
        ({"eps": (1e-30, 1e-16, 1e-8)}, "eps must be a tuple of 2 numbers of 0 or more"),
        ({"clip_threshold": 0.0}, "Invalid clip_threshold value: 0.0; it must be above 0"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"min_quant_numel": -1}, "min_quant_numel must be an integer of 0 or more, got -1"),
        ({"block_size": 32}, "block size 32 is not offered"),
        ({"param_rounding": "split"}, "CAME8bit offers 'nearest' and 'stochastic'"),
        ({"capturable": True}, "CAME8bit does not support capturable=True"),
    ],
)
def test_constructor_errors(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CAME8bit([nn.Parameter(torch.zeros(3))], **option)


def test_a_dictionary_of_adamw_is_refused() -> None:
    param = nn.Parameter(torch.zeros(4, 5))
    adamw = torch.optim.AdamW([param])
    param.grad = torch.ones_like(param)
    adamw.step()
    with pytest.raises(ValueError, match="state of parameter 0"):
        CAME8bit([param]).load_state_dict(adamw.state_dict())
