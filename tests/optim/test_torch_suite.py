"""What torch asks of its own optimizers, over its database of configurations, for every optimizer of the package (`cases.py`)."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from cases import ADAMW, CAME, CAMEAMP, INFOS, MUON, supported
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal import common_optimizers as torch_db

infos = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def inputs(info: torch_db.OptimizerInfo, device: torch.device) -> list[torch_db.OptimizerInput]:
    return [i for i in info.optim_inputs_func(device=str(device), dtype=torch.float32) if supported(i.kwargs)]


def on_device(kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


def problem(info: torch_db.OptimizerInfo, device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    bias = info.optim_cls not in MUON  # which takes matrices alone
    module = nn.Sequential(nn.Linear(10, 20, bias), nn.Tanh(), nn.Linear(20, 3, bias)).to(device)
    return module, torch.randn(64, 10, device=device)


def loss_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (module(x) - x[:, :3]).square().mean()


@infos
@pytest.mark.parametrize("schedule", [None, 0, 1])
def test_goes_the_right_direction(info, schedule: int | None, device: torch.device) -> None:
    for optimizer_input in inputs(info, device):
        module, x = problem(info, device)
        kwargs = on_device(optimizer_input.kwargs, device)
        optimizer = info.optim_cls(module.parameters(), **{"lr": 1e-2, **kwargs})
        schedulers = [make(optimizer) for make in info.scheduler_inputs[schedule]] if schedule is not None else []
        first = loss_of(module, x)
        for _ in range(20):
            optimizer.zero_grad()
            loss = loss_of(module, x)
            loss.backward()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        if kwargs.get("maximize"):
            assert loss_of(module, x) > first, optimizer_input
        else:
            assert loss_of(module, x) < first, optimizer_input


#: Of an update of lr; torch runs Muon's iteration in bfloat16.
TOLERANCE = {**ADAMW, **dict.fromkeys(MUON, 0.1)}


@pytest.mark.parametrize("info", [info for info in INFOS if info.optim_cls in TOLERANCE], ids=lambda info: info.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torchs(info, dtype: torch.dtype, device: torch.device) -> None:
    peer = torch.optim.Muon if info.optim_cls in MUON else torch.optim.AdamW
    for optimizer_input in inputs(info, device):
        kwargs = {"lr": 1e-3, **on_device(optimizer_input.kwargs, device)}
        lr = float(kwargs["lr"])
        start = torch.randn(40, 50, device=device).to(dtype)
        ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.float().clone())
        optimizers = info.optim_cls([ours], **kwargs), peer([theirs], **kwargs)
        for _ in range(3):
            grad = torch.randn(40, 50, device=device).to(dtype)
            ours.grad, theirs.grad = grad, grad.float()
            for optimizer in optimizers:
                optimizer.step()
        # three stores in the parameter's dtype
        rounding = 3e-7 if dtype == torch.float32 else 3 * 2.0**-8
        bound = 3 * lr * TOLERANCE[info.optim_cls] + rounding * theirs.detach().abs()
        assert ((ours.float() - theirs).abs() <= bound + 1e-9).float().mean() > 0.98


@infos
@pytest.mark.parametrize("impl", ["fused", "foreach"])
def test_implementations_agree_with_the_loop(info, impl: str, device: torch.device) -> None:
    for optimizer_input in inputs(info, device):
        kwargs = on_device(optimizer_input.kwargs, device)
        if impl == "foreach" and isinstance(kwargs.get("lr"), torch.Tensor) and not kwargs.get("capturable"):
            continue
        results = []
        for flags in ({impl: True}, {"fused": False}):
            module, x = problem(info, device)
            optimizer = info.optim_cls(module.parameters(), **kwargs, **flags)
            for _ in range(7):
                optimizer.zero_grad()
                loss_of(module, x).backward()
                optimizer.step()
            results.append([p.detach() for p in module.parameters()])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3 if info.name.endswith("QuantAll") else 1e-5)


@infos
def test_errors_are_torchs(info) -> None:
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        params = case.optimizer_error_input.params
        params = [nn.Parameter(torch.zeros(3))] if params is None else params
        kwargs = case.optimizer_error_input.kwargs
        if case.error_type is UserWarning:
            with pytest.warns(UserWarning, match=case.error_regex):
                info.optim_cls(params, **kwargs)
        else:
            with pytest.raises(case.error_type, match=case.error_regex):
                info.optim_cls(params, **kwargs)


@infos
def test_param_groups_override_defaults(info, device: torch.device) -> None:
    still, moving = (nn.Parameter(torch.ones(5, 6, device=device)) for _ in range(2))
    optimizer = info.optim_cls([{"params": [still], "lr": 0.0, "weight_decay": 0.5}, {"params": [moving]}], lr=1e-2, weight_decay=0.0)
    for p in (still, moving):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(still, torch.ones_like(still))
    if info.optim_cls in (*CAME, *CAMEAMP):  # whose first updates are no multiple of lr
        assert (moving < 1).all()
        return
    # gradients of one: by lr in each element, or, orthogonalized, by lr over the root of their number, and Newton-Schulz's half to double
    step = 1e-2 if info.optim_cls not in MUON else 1e-2 / 30**0.5
    assert ((1 - moving) / step).sub(1).abs().max() <= (0.5 if info.optim_cls in MUON else 1e-5)


@infos
def test_tensor_lr_equals_float_lr(info, device: torch.device) -> None:
    results = []
    for lr in (1e-2, torch.tensor(1e-2), torch.tensor([1e-2], device=device)):
        module, x = problem(info, device)
        optimizer = info.optim_cls(module.parameters(), lr=lr)
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(module, x).backward()
            optimizer.step()
        results.append(module[0].weight.detach())
    # a tensor holds lr in float32, a float in double
    assert torch.allclose(results[1], results[0], atol=1e-7)
    assert torch.equal(results[2], results[1])


@infos
def test_no_gradients_and_zero_gradients(info, device: torch.device) -> None:
    module, _ = problem(info, device)
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = info.optim_cls(module.parameters(), weight_decay=0.0)
    optimizer.step()
    assert not any(optimizer.state.values())
    for _ in range(3):
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(map(torch.equal, module.parameters(), before))


@infos
def test_state_dict_round_trip_goes_on_alike(info, device: torch.device) -> None:
    for optimizer_input in inputs(info, device):
        module, x = problem(info, device)
        kwargs = on_device(optimizer_input.kwargs, device)
        optimizer = info.optim_cls(module.parameters(), **kwargs)

        def step(m: nn.Module, o: torch.optim.Optimizer, x: torch.Tensor = x) -> None:
            o.zero_grad()
            loss_of(m, x).backward()
            o.step()

        step(module, optimizer)
        twin = copy.deepcopy(module)
        other = info.optim_cls(twin.parameters(), **kwargs)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        deep = copy.deepcopy([module, optimizer])
        for _ in range(3):
            step(module, optimizer)
            step(twin, other)
            step(*deep)
        assert all(map(torch.equal, module.parameters(), twin.parameters()))
        assert all(map(torch.equal, module.parameters(), deep[0].parameters()))


@infos
def test_found_inf_skips(info, device: torch.device) -> None:
    module, x = problem(info, device)
    optimizer = info.optim_cls(module.parameters())
    loss_of(module, x).backward()
    before = [p.detach().clone() for p in module.parameters()]
    optimizer.grad_scale, optimizer.found_inf = torch.ones(1, device=device), torch.ones(1, device=device)
    optimizer.step()
    assert all(map(torch.equal, module.parameters(), before))
    assert optimizer.state[module[0].weight]["step"] == 0


@infos
def test_compiled_training_step(info, device: torch.device) -> None:
    """`torch.compile` of a function that steps breaks its graph at the step and runs it as it is."""
    module, x = problem(info, device)
    optimizer = info.optim_cls(module.parameters(), lr=1e-2)

    @torch.compile(backend="eager")
    def train_step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(module, x)
        loss.backward()
        optimizer.step()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = [train_step().item() for _ in range(10)]
    assert losses[-1] < losses[0]


@infos
def test_a_misspelt_option_gets_the_nearest_name(info) -> None:
    cls = info.optim_cls.__mro__[info.name.endswith("QuantAll")]
    with pytest.raises(TypeError, match=f"{cls.__name__} got an unexpected keyword argument 'maximise'; did you mean 'maximize'"):
        cls([nn.Parameter(torch.zeros(3, 3))], maximise=True)


@infos
def test_only_adamws_states_are_exported_as_adamws(info) -> None:
    optimizer = info.optim_cls([nn.Parameter(torch.zeros(3, 3))])
    if info.optim_cls in ADAMW:
        assert optimizer.export_adamw_state_dict()["param_groups"]
    else:
        with pytest.raises(TypeError, match="does not keep AdamW's two moments"):
            optimizer.export_adamw_state_dict()
