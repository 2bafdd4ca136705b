"""`Automagic_CameAMP_Improved_8Bit` as an optimizer: bytes, phases, checkpoints, reports, and parameters of every kind."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from coat_kernels._native import CoatWarning
from coat_kernels.ops.came_8bit import CameFormat
from coat_kernels.optim import AutomagicCameAMP

W = 10
#: Steps whose counts lie in each phase of a warm-up of W, and on both sides of its borders.
COUNTS = (1, 4, 5, 9, 10, 14)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def set_grads(params: list[nn.Parameter], step: int) -> None:
    for i, param in enumerate(params):
        param.grad = (random(*param.shape, seed=97 * step + i) * 1e-2).to(param.device, param.dtype)


def model(device: torch.device | str = "cpu") -> list[nn.Parameter]:
    """A LoRA pair, a small matrix, a vector, a kernel of a convolution, a scalar."""
    shapes = [(16, 300), (300, 16), (12, 14), (70,), (8, 3, 5, 5), ()]
    return [nn.Parameter((random(*shape, seed=900 + i) * 0.1).to(device)) for i, shape in enumerate(shapes)]


def make(params: Any, **options: Any) -> AutomagicCameAMP:
    return AutomagicCameAMP(params, **{"lr": 1e-3, "warmup_steps": W, "min_8bit_size": 1000, **options})


# ---- what is stored


@pytest.mark.parametrize("shape", [(16, 3072), (3072, 16)])
def test_state_bytes_of_lora_factors(shape: tuple[int, int], device: torch.device) -> None:
    """At most 4.8 bytes an element in the first half of the warm-up and 2.6 after it; AdamW's take 8."""
    param = nn.Parameter(random(*shape).to(device) * 0.01)
    optimizer = make([param], profile="balanced")
    seen = {}
    for count in range(1, W + 2):
        set_grads([param], count)
        optimizer.step()
        report = optimizer.get_memory_efficiency_report()
        allocated = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in optimizer.state[param].values()}
        assert report["state_bytes"] <= sum(allocated.values()) <= report["state_bytes"] + 16 * len(optimizer.state[param])
        seen[count] = report["state_bytes_per_parameter"]
    early, middle, late = seen[1], seen[W // 2], seen[W]
    assert seen == {c: early if 2 * (c + 1) < W else middle if c + 1 < W else late for c in seen}
    assert early <= 4.8
    assert middle <= 2.8
    assert late <= 2.6


def test_states_end_with_their_phase() -> None:
    param = nn.Parameter(random(16, 300))
    optimizer = make([param])
    held = {}
    for count in range(1, W + 2):
        set_grads([param], count)
        optimizer.step()
        held[count] = set(optimizer.state[param]) - {"step"}
    late = {"exp_avg", "exp_avg_absmax", "lr_mask", "lr_max", "tail"} | {f"{n}_{s}" for n in ("exp_avg_sq", "res") for s in ("row", "col")}
    middle = late | {"polarity", "row_variance"}
    early = middle | {"torque", "edge_history"}
    # the step with count c belongs to the first half where 2 c < W; what later steps do not need is gone right after
    assert held == {c: early if 2 * (c + 1) < W else middle if c + 1 < W else late for c in held}


@pytest.mark.parametrize(("options", "widths"), [({}, (1, 4)), ({"force_8bit": True}, (1, 1)), ({"optim_bits": 32}, (4, 4))])
def test_which_tensors_are_kept_in_8_bits(options: dict, widths: tuple[int, int]) -> None:
    params = [nn.Parameter(random(16, 300)), nn.Parameter(random(8, 10))]
    optimizer = make(params, min_8bit_size=4096, **options)
    set_grads(params, 0)
    optimizer.step()
    for param, width in zip(params, widths, strict=True):
        for name in ("exp_avg", "torque", "lr_mask", "edge_history"):
            assert optimizer.state[param][name].element_size() == width, name
    report = optimizer.get_memory_efficiency_report()
    eights = sum(p.numel() for p, width in zip(params, widths, strict=True) if width == 1)
    assert (report["8bit_parameters"], report["32bit_parameters"]) == (eights, 4880 - eights)


def test_bfloat16_parameters_are_kept_in_8_bits_too() -> None:
    param = nn.Parameter(random(16, 300).bfloat16())
    optimizer = make([param])
    set_grads([param], 0)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype == torch.uint8


def test_the_report_is_true_to_the_bytes() -> None:
    params = model()
    optimizer = make(params)
    assert optimizer.get_memory_efficiency_report()["total_parameters"] == 0
    for count in range(1, W + 1):
        set_grads(params, count)
        optimizer.step()
        report = optimizer.get_memory_efficiency_report()
        arrays = [(k, v) for state in optimizer.state_dict()["state"].values() for k, v in state.items() if k != "step"]
        assert report["states_breakdown"] == {name: sum(v.nbytes for k, v in arrays if k == name) for name in dict(arrays)}
        assert report["state_bytes"] == sum(report["states_breakdown"].values())
    total = sum(p.numel() for p in params)
    assert report["total_parameters"] == total
    assert report["8bit_parameters"] == 4800 * 2
    assert report["compression_ratio"] == 9600 / total
    assert report["memory_saved_mb"] == (8 * total - report["state_bytes"]) / 2**20


def test_the_report_names_what_is_off() -> None:
    params = model()
    off = make(params).get_memory_efficiency_report()["features_off"]
    flat = "parameters with fewer than two dimensions, flattened ones too, have no rows and columns"
    assert off["edge_suppression"] == {"reason": "needs more than 2 rows and more than 2 columns", "tensors": 2, "parameters": 71}
    for name in ("factored_moments", "spatial_awareness", "background_regularization", "row_scaling"):
        assert off[name] == {"reason": flat, "tensors": 2, "parameters": 71}
    assert off["lora_rank_penalty"]["tensors"] == 3  # the kernel has 8 rows
    assert make(params, profile="memory_optimized", full_finetune=True).get_memory_efficiency_report()["features_off"].keys() == {
        "factored_moments"
    }
    flattened = [nn.Parameter(torch.zeros(100_000))]
    assert len(make(flattened).get_memory_efficiency_report()["features_off"]) == 7


# ---- checkpoints


@pytest.mark.parametrize("count", COUNTS)
def test_a_resumed_run_is_the_run(count: int) -> None:
    params = model()
    optimizer = make(params, seed=3)
    for step in range(count):
        set_grads(params, step)
        optimizer.step()
    saved = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(twins, seed=3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    again = resumed.state_dict()
    for number, state in saved["state"].items():
        assert state.keys() == again["state"][number].keys()
        assert {key: torch.equal(value, again["state"][number][key]) for key, value in state.items()} == dict.fromkeys(state, True)
        assert all(value.dtype == again["state"][number][key].dtype for key, value in state.items())
    for step in range(count, count + 8):
        for opt, own in ((optimizer, params), (resumed, twins)):
            set_grads(own, step)
            opt.step()
    assert all(map(torch.equal, params, twins))


def test_a_copied_optimizer_goes_on_alike() -> None:
    params = model()
    optimizer = make(params)
    set_grads(params, 0)
    optimizer.step()
    twins, twin = copy.deepcopy([params, optimizer])
    for step in range(1, 8):
        for opt, own in ((optimizer, params), (twin, twins)):
            set_grads(own, step)
            opt.step()
    assert all(map(torch.equal, params, twins))


def test_momentum_of_another_block_size_is_converted_and_said() -> None:
    params = model()
    optimizer = make(params)
    set_grads(params, 0)
    optimizer.step()
    other = make(params, block_size=64)
    with pytest.warns(CoatWarning, match="exp_avg from dynamic8 in groups of 256 to dynamic8 in groups of 64"):
        other.load_state_dict(optimizer.state_dict())


def test_dictionaries_that_cannot_be_loaded() -> None:
    params = [nn.Parameter(random(16, 300))]
    optimizer = make(params)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    saved = optimizer.state_dict()
    adamw = torch.optim.AdamW(params)
    adamw.step()
    for other, foreign, message in (
        (make(params, optim_bits=32), saved, "of parameter 0 is torch.u?int8; torch.float32 is needed"),
        (make(params, warmup_steps=2), saved, r"holds \['edge_history', 'polarity', 'row_variance', 'torque'\], which Automagic"),
        (make(params, edge_suppression=False), saved, r"holds \['edge_history'\], which Automagic"),
        (make(params, profile="memory_optimized", edge_suppression=True, lora_rank_penalty=True), saved, "holds .'row_variance'"),
        (make(params), adamw.state_dict(), "state of parameter 0 has no"),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(foreign)
        assert other.state_dict()["state"] == before["state"] == {}


# ---- the step


def test_parameters_without_gradient_do_not_count_the_step() -> None:
    params, alone = model(), model()
    optimizer, single = make(params), make(alone)
    for step in range(2 * W):
        set_grads(params, step)
        if step % 2:
            params[0].grad = None
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params[:2]] == [W, 2 * W]
    # the pair is in different phases of its warm-up for a while; each goes the way it would alone, AGR's sum apart
    assert "polarity" not in optimizer.state[params[0]]
    for p in alone:
        p.grad = None
    before = [p.detach().clone() for p in alone]
    single.step()
    assert all(map(torch.equal, before, alone))
    assert not single.state[alone[0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_16_bit_parameters_follow_the_float32_run(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    param, twin = (nn.Parameter((random(16, 80) * 1e-3).to(dtype).to(kind)) for kind in (dtype, torch.float32))
    optimizers = make([param]), make([twin])
    start = twin.detach().clone()
    param.grad_dtype = None
    for step in range(5):
        grad = random(16, 80, seed=step).to(grad_dtype)
        param.grad, twin.grad = grad, grad.float()
        for optimizer in optimizers:
            optimizer.step()
    # updates of up to 1e-3 on parameters of 1e-3; each of the 5 steps rounds them by 2^-9 in bfloat16
    assert (param.detach().float() - twin.detach()).norm() < 0.02 * (twin.detach() - start).norm()


def test_small_updates_of_bfloat16_are_not_lost_by_chance_rounding() -> None:
    def drift(rounding: str) -> float:
        param = nn.Parameter(torch.ones(64, 64).bfloat16())
        optimizer = make([param], lr=1e-5, weight_decay=0.0, full_finetune=True, param_rounding=rounding, warmup_steps=0)
        for _ in range(50):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return float(1 - param.detach().float().mean())

    assert drift("nearest") == 0
    assert drift("stochastic") > 1e-5


@pytest.mark.parametrize("shape", [(0,), (), (1,), (3,), (0, 4), (1, 50), (50, 1), (2, 2), (3, 3), (11, 11), (2, 3, 0), (129,), (257,)])
def test_shapes_without_room(shape: tuple[int, ...], device: torch.device) -> None:
    params = [nn.Parameter(random(*shape).to(device)), nn.Parameter(random(40).to(device))]
    optimizer = make(params, force_8bit=True)
    start = [p.detach().clone() for p in params]
    for step in range(W + 2):
        set_grads(params, step)
        optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(params[1], start[1])
    assert params[0].numel() == 0 or not torch.equal(params[0], start[0])
    make(params, force_8bit=True).load_state_dict(optimizer.state_dict())


def test_non_contiguous_parameters_and_gradients_go_the_same_way() -> None:
    odd, plain = nn.Parameter(random(60, 20).t()), nn.Parameter(random(60, 20).t().contiguous())
    optimizers = make([odd]), make([plain])
    for step in range(W + 1):
        plain.grad = random(20, 60, seed=step)
        odd.grad = random(20, 60, seed=step).t().contiguous().t()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(odd, plain)


def test_the_reference_and_the_kernel_go_together() -> None:
    kernel, loop = model(), model()
    optimizers = make(kernel), make(loop, fused=False)
    start = [p.detach().clone() for p in kernel]
    for step in range(W + 4):
        for params, optimizer in zip((kernel, loop), optimizers, strict=True):
            set_grads(params, step)
            optimizer.step()
    for a, b, origin in zip(kernel, loop, start, strict=True):
        # codes at a rounding boundary may differ by a step, and a sign of an update near zero with them
        assert (a - b).norm() <= 0.05 * (b - origin).norm()


def test_param_groups_closure_and_added_groups() -> None:
    params = model()
    optimizer = make([{"params": params[:2], "lr": 1e-4}], weight_decay=0.1)
    optimizer.add_param_group({"params": params[2:], "edge_penalty": 0.0, "frequency_penalty": 0.0})

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum((p - 0.5).square().sum() for p in params)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3 * W)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("lr_type", ["float", "tensor"])
def test_a_warm_up_of_the_scheduler_starts_from_zero(lr_type: str) -> None:
    param = nn.Parameter(random(16, 80))
    optimizer = make([param], lr=1e-3 if lr_type == "float" else torch.tensor(1e-3), warmup_steps=40, lr_bump=1e-9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 10, 1.0))
    sizes = []
    for step in range(20):
        before = param.detach().clone()
        set_grads([param], step)
        optimizer.step()
        scheduler.step()
        sizes.append(float((param.detach() - before).norm()))
    assert sizes[0] == 0
    ratios = [size / sizes[10] for size in sizes[:10]]
    # the size of an update wanders by a third; its learning rate is a tenth more at each step
    assert all(0.5 * step / 10 < ratio < 2 * step / 10 for step, ratio in enumerate(ratios) if step)
    assert float(optimizer.state[param]["lr_max"]) == pytest.approx(1e-3)


def test_the_learning_rate_scales_the_update_in_every_phase() -> None:
    for count in COUNTS:
        moves = []
        for lr in (1e-3, 2.5e-4, 0.0):
            param = nn.Parameter(random(16, 80))
            optimizer = make([param], lr=1e-3, weight_decay=0.0, optim_bits=32, lr_bump=0.0)
            for step in range(count):
                set_grads([param], step)
                optimizer.param_groups[0]["lr"] = lr if step == count - 1 and count > 1 else 1e-3
                before = param.detach().clone()
                optimizer.step()
            moves.append(param.detach() - before)
        if count > 1:
            assert torch.allclose(moves[1], moves[0] / 4, rtol=1e-3, atol=3e-7)  # atol: rounding of parameters up to 4
            assert not moves[2].any()


def test_maximize_is_descent_on_the_negative() -> None:
    up, down = nn.Parameter(random(16, 80)), nn.Parameter(random(16, 80))
    optimizers = make([up], maximize=True), make([down])
    for step in range(W + 2):
        up.grad, down.grad = random(16, 80, seed=step), -random(16, 80, seed=step)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(up, down)


def test_grad_scaler_skips_and_unscales() -> None:
    param, twin = nn.Parameter(random(16, 80)), nn.Parameter(random(16, 80))
    optimizer, plain = make([param]), make([twin])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, value in enumerate((1.0, math.inf, 0.5, -2.0)):
        weight = random(16, 80, seed=step) * value
        optimizer.zero_grad()
        scaler.scale((param * weight).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if math.isfinite(value):
            twin.grad = weight.clone()
            plain.step()
    assert torch.allclose(param, twin, rtol=1e-6, atol=1e-7)  # sums of |g| are taken before unscaling
    assert optimizer.state[param]["step"] == 3


def test_agr_sums_over_the_group() -> None:
    def move(others: float) -> torch.Tensor:
        param, rest = nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.zeros(100))
        optimizer = make([param, rest], profile="memory_optimized", warmup_steps=0)
        param.grad, rest.grad = torch.ones(4, 8), torch.full((100,), others)
        param.grad[0, 0] = 31.0  # half of the sum of its own tensor
        optimizer.step()
        return param.detach()

    alone, among_others = move(0.0), move(1e6)
    assert alone[0, 0] / alone[1, 1] < 0.6 * among_others[0, 0] / among_others[1, 1]


@pytest.mark.parametrize("profile", [None, "memory_optimized"])
def test_nan_gradients_show_and_infinities_do_not_spread_over_the_group(profile: str | None) -> None:
    hit, spared = nn.Parameter(random(16, 80)), nn.Parameter(random(16, 80))
    optimizer = make([hit, spared], profile=profile)
    for step in range(3):
        set_grads([hit, spared], step)
        if step == 1:
            hit.grad[3, 4] = math.nan
        optimizer.step()
    assert hit.isnan().any()
    assert spared.isfinite().all()


def test_step_parameter_steps_one() -> None:
    params = model()
    optimizer = make(params)
    set_grads(params, 0)
    before = [p.detach().clone() for p in params]
    optimizer.step_parameter(params[1], optimizer.param_groups[0], 1)
    assert not torch.equal(params[1], before[1])
    assert all(torch.equal(p, b) for i, (p, b) in enumerate(zip(params, before, strict=True)) if i != 1)


def test_a_format_says_what_it_is() -> None:
    with pytest.raises(ValueError, match="rule 'came' has no warm-up phases"):
        CameFormat(rule="came", phase="early")
    with pytest.raises(ValueError, match="rule is one of"):
        CameFormat(phase="first")
    with pytest.raises(ValueError, match="'split' is not offered"):
        CameFormat(param_rounding="split")


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 5])
@pytest.mark.parametrize("first", [0.0, 1e-8])
def test_a_schedule_that_starts_at_nothing_reaches_the_same_step(warmup_steps: int, first: float) -> None:
    """However little the first steps' learning rate was, later steps are the later learning rate's."""
    moved = []
    for start in (first, 1e-4):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(16, 64))
        optimizer = AutomagicCameAMP([weight], lr=start, warmup_steps=warmup_steps, min_8bit_size=0, lr_bump=1e-9, weight_decay=0.0)
        for step in range(8):
            optimizer.param_groups[0]["lr"] = start if step < 3 else 1e-4
            weight.grad = torch.randn(16, 64)
            before = weight.detach().clone()
            optimizer.step()
        moved.append(float((weight - before).norm()))
    # the mask's codes lie 8 % apart, and rows differ a little in what they were before
    assert moved[0] == pytest.approx(moved[1], rel=0.12)
