"""The CAME step as an op: every instruction set against the float64 reference, by feature and phase; bad numbers; errors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from coat_kernels.formats.dynamic8 import BLOCK_SIZES
from coat_kernels.ops.came_8bit import CameBucket, CameFormat, CameSettings, came_8bit_
from coat_kernels.ops.came_8bit.reference import came_8bit as reference_step
from coat_kernels.ops.came_8bit.settings import NUMBERS, phase_of, tensor_numbers

WARMUP = 6
#: Empty, scalar, vectors; matrices of all forms; under and over a vector, a tile of 2048 and the sizes that penalties need.
SHAPES = [(0,), (0, 4), (), (1,), (300,), (4500,), (16, 64), (64, 16), (12, 200), (5, 9, 3, 3)]
SHAPES += [(1, 77), (77, 1), (3, 3), (2, 5), (130, 7), (131, 140), (3, 2100), (3, 4096), (300, 16)]
RULE = {"lr": 1e-4, "betas": (0.8, 0.99, 0.999), "weight_decay": 0.1}
#: Name -> what is stored, and the numbers that switch it on.
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "agr": ({}, {"grad_l1": 1.0}),
    "edges": ({"edge_suppression": True}, {"grad_l1": 1.0, "edge_penalty": 0.15}),
    "frequency": ({}, {"frequency_penalty": 0.08}),
    "rank": ({"lora_rank_penalty": True}, {"rank_penalty_strength": 0.5, "low_rank_emphasis": 1.2}),
    "spatial": ({"spatial_awareness": True}, {"detail_preservation": 0.8}),
    "background": ({}, {"background_regularization": True}),
    "rows": ({}, {"eta": 2.0}),
    "no came": ({"came": False}, {}),
}
FEATURES["all"] = tuple({k: v for part in FEATURES.values() for k, v in part[i].items() if k != "came"} for i in range(2))  # type: ignore[assignment]
#: Share of codes one step beside the float64 reference's. Momentum and torque: float32 sums over a tensor, 1e-6 of a value, meet a
#: rounding boundary. Codes rounded by chance: logarithm and root are good to 2e-4 of a code.
MAY_DIFFER = {"exp_avg": 1e-3, "torque": 1e-3, "lr_mask": 2e-3, "edge_history": 2e-3}
#: Elements whose gradient (or whose edge) lies within float32 rounding of the limit that decides, a sign or a threshold.
UNDECIDED = 2e-4

every_feature = pytest.mark.parametrize("feature", FEATURES)
stored = pytest.mark.parametrize("use_8bit", [True, False], ids=["8bit", "float32"])


@pytest.fixture
def cpu(machine: torch.device) -> torch.device:
    """Each instruction set of the CPU: the op has no CUDA kernel."""
    if machine.type != "cpu":
        pytest.skip("came_8bit has no CUDA kernel")
    return machine


@dataclasses.dataclass
class Tensors:
    """Parallel lists of what one launch steps, in any phase."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    fmt: CameFormat

    def copy(self) -> Tensors:
        states = [{name: array.clone() for name, array in state.items()} for state in self.states]
        return Tensors([p.clone() for p in self.params], [g.clone() for g in self.grads], states, self.fmt)

    def enter(self, phase: str) -> None:
        """The states of the phase: those of phases that are over go."""
        self.fmt = dataclasses.replace(self.fmt, phase=phase)
        for param, state in zip(self.params, self.states, strict=True):
            names = {array.name for array in self.fmt.arrays(param.shape)} | {"step"}
            for name in set(state) - names:
                del state[name]

    def step(self, hyper: CameSettings, **kwargs: bool) -> None:
        CameBucket(self.params, self.grads, self.states, list(range(len(self.params))), self.fmt, **kwargs).step(hyper, self.grads)


def make(fmt: CameFormat, shapes=SHAPES, dtype=torch.float32, grad_dtype=torch.float32, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=generator).mul(0.1).to(dtype) for s in shapes]
    tensors = Tensors(params, [torch.empty(s, dtype=grad_dtype) for s in shapes], [], fmt)
    for param in params:
        state = {a.name: torch.full(a.shape, a.fill, dtype=a.dtype) for a in fmt.arrays(param.shape)}
        tensors.states.append({**state, "step": torch.zeros(())})
    new_gradients(tensors, seed)
    return tensors


def new_gradients(tensors: Tensors, seed: int) -> None:
    """Heavy-tailed gradients with a common part from step to step, and rows of very different size."""
    for i, grad in enumerate(tensors.grads):
        common, own = torch.Generator().manual_seed(1000 + i), torch.Generator().manual_seed(77 * seed + i)
        value = torch.randn(grad.shape, generator=common) + torch.randn(grad.shape, generator=own)
        value = value * torch.exp(torch.randn(grad.shape, generator=own)) * 1e-3
        if grad.dim() > 1 and len(grad) > 2:
            value[1] *= 1e-2
        grad.copy_(value)


def reference(old: Tensors, hyper: CameSettings, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Parameters and arrays after a step, tensor by tensor. Tails are those of `old`."""
    steps = [int(state["step"]) + 1 for state in old.states]
    lr_max = torch.cat([state["lr_max"] for state in old.states]) if old.fmt.rule == "cameamp" else None
    numbers = tensor_numbers(steps, lr_max, hyper, old.fmt)
    results = []
    for i, (param, grad) in enumerate(zip(old.params, old.grads, strict=True)):
        arrays = {array.name: old.states[i][array.name] for array in old.fmt.arrays(param.shape)}
        row = dict(zip(NUMBERS, numbers.rows[i].tolist(), strict=True))
        known = {"numbers": row, "tables": numbers.tables, "step": steps[i], "index": i, "fmt": old.fmt, "hyper": hyper, "dtype": dtype}
        results.append(reference_step(param, grad, arrays, **known))
    return results


def check_step(tensors: Tensors, hyper: CameSettings) -> None:
    """Steps, and holds the result to the float64 reference's."""
    old = tensors.copy()
    tensors.step(hyper)
    for before, state in zip(old.states, tensors.states, strict=True):
        if "tail" in state:  # refreshed on the way to the step
            before["tail"].copy_(state["tail"])
    off = dict.fromkeys(MAY_DIFFER, 0)
    total = undecided = 0
    for i, (want, arrays) in enumerate(reference(old, hyper)):
        state = tensors.states[i]
        assert state["step"] == old.states[i]["step"] + 1
        if not want.numel():
            continue
        total += want.numel()
        decided = torch.ones_like(want, dtype=torch.bool)
        for name, array in arrays.items():
            if name in ("tail", "lr_max"):
                continue
            if array.dtype in (torch.uint8, torch.int8):
                differs = (state[name].int() - array.int()).abs()
                if name == "polarity":
                    decided &= unpacked(differs, want.shape) == 0
                elif name in off:
                    # an element undecided by its sign or by an edge may lie any number of codes beside
                    far = differs.view(want.shape) > 1
                    decided &= ~far
                    off[name] += int((differs == 1).sum())
            else:
                check_floats(name, state[name], array, decided)
        undecided += int((~decided).sum())
        check_params(tensors.params[i], want, old.params[i], decided)
    assert undecided <= UNDECIDED * total + 1
    for name, share in MAY_DIFFER.items():
        assert off[name] <= share * total + 2, f"{name}: {off[name]} of {total}"


def unpacked(packed: Tensor, shape: torch.Size) -> Tensor:
    bits = packed.view(-1, 1) >> torch.arange(8) & 1
    return bits.flatten()[: shape.numel()].view(shape)


def check_floats(name: str, got: Tensor, want: Tensor, decided: Tensor) -> None:
    got, want = got.double(), want.double()
    if name == "row_variance":  # bfloat16: a value at a rounding boundary
        assert torch.allclose(got, want, rtol=2.0**-7, atol=0, equal_nan=True)
        return
    if name in ("lr_mask", "edge_history"):
        decided &= (got - want).abs().view(decided.shape) <= 2e-6 * want.abs().view(decided.shape) + 1e-12
        return
    # a moving average may cancel: float32 rounding of its terms, and of sums over the tensor, not of what is left
    finite = want[want.isfinite()]
    assert torch.allclose(got, want, rtol=3e-6, atol=2e-6 * float(finite.abs().max()) if finite.numel() else 0, equal_nan=True)


def check_params(got: Tensor, want: Tensor, before: Tensor, decided: Tensor) -> None:
    got, want, before = got[decided], want[decided], before[decided]
    if not got.numel():
        return
    if got.dtype == torch.float32:
        update = (want - before).abs()
        finite = update[update.isfinite()]
        # sums over the tensor reach every update: their float32 rounding, and a unit in the last place of the parameter
        atol = 1e-5 * float(finite.max()) if finite.numel() else 0
        assert torch.allclose(got, want, rtol=1.2e-7, atol=atol, equal_nan=True)
        return
    # an update whose float32 value lies within its last bits of a rounding boundary may be stored one step beside
    assert (got != want).sum() <= 2e-3 * got.numel() + 1
    assert torch.allclose(got.float(), want.float(), rtol=2.0**-7 if got.dtype == torch.bfloat16 else 2.0**-10, atol=1e-7)


def settings(**numbers: Any) -> CameSettings:
    return CameSettings(**{**RULE, **numbers})


def walk(tensors: Tensors, numbers: dict[str, Any], steps: int = WARMUP + 2) -> None:
    """Checked steps through all phases, lr rising to step 3 and falling after the warm-up."""
    for step in range(1, steps + 1):
        tensors.enter(phase_of(step, WARMUP))
        new_gradients(tensors, step)
        lr = 1e-4 * min(1, step / 3) * min(1, (steps + 1 - step) / 3)
        check_step(tensors, settings(**{**numbers, "lr": lr}))


@every_feature
@stored
def test_agrees_with_the_reference(feature: str, use_8bit: bool, cpu: torch.device) -> None:
    kept, numbers = FEATURES[feature]
    tensors = make(CameFormat(phase="early", use_8bit=use_8bit, seed=5, **kept))
    walk(tensors, numbers)
    assert all(torch.isfinite(p).all() for p in tensors.params)


@stored
def test_the_paper_s_rule(use_8bit: bool, cpu: torch.device) -> None:
    tensors = make(CameFormat(rule="came", use_8bit=use_8bit))
    for step in range(5):
        new_gradients(tensors, step)
        check_step(tensors, CameSettings(lr=1e-3, betas=(0.9, 0.999, 0.9999), weight_decay=0.1))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(block_size: int, cpu: torch.device) -> None:
    shapes = [(block_size - 1,), (block_size,), (3, block_size + 1), (16, 400), (4, 2 * block_size)]
    kept, numbers = FEATURES["all"]
    tensors = make(CameFormat(phase="early", block_size=block_size, **kept), shapes)
    walk(tensors, numbers, 3)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_parameters(dtype: torch.dtype, rounding: str, grad_dtype: torch.dtype, cpu: torch.device) -> None:
    kept, numbers = FEATURES["all"]
    tensors = make(CameFormat(phase="early", param_rounding=rounding, seed=3, **kept), SHAPES, dtype, grad_dtype)
    for phase in ("early", "middle", "late"):
        tensors.enter(phase)
        new_gradients(tensors, len(phase))
        check_step(tensors, settings(**{**numbers, "lr": 1e-3}))


def test_maximize_and_grad_scale(cpu: torch.device) -> None:
    kept, numbers = FEATURES["all"]
    tensors = make(CameFormat(phase="early", **kept))
    walk(tensors, {**numbers, "maximize": True, "grad_scale": torch.full((1,), 0.37)}, 3)


@stored
def test_bounds_of_the_learning_rates(use_8bit: bool, cpu: torch.device) -> None:
    tensors = make(CameFormat(phase="early", use_8bit=use_8bit), [(16, 64), (300,), (5, 9, 3, 3)])
    walk(tensors, {"min_lr": 3.2e-5, "max_lr": 1.01e-4, "lr_bump": 5e-5})


def test_constant_learning_rates(cpu: torch.device) -> None:
    """min_lr = max_lr: one value, whatever the code."""
    tensors = make(CameFormat(phase="early"), [(16, 64)])
    for _ in range(3):
        old = tensors.copy()
        hyper = settings(min_lr=1e-4, max_lr=1e-4)
        tensors.step(hyper)
        check_params(tensors.params[0], reference(old, hyper)[0][0], old.params[0], torch.ones(16, 64, dtype=torch.bool))


def test_rounding_by_chance_keeps_small_bumps(cpu: torch.device) -> None:
    """A bump of a twentieth of a code, 64 times in the same direction, arrives on average."""
    tensors = make(CameFormat(phase="middle", seed=9), [(64, 512)])
    tensors.grads[0].fill_(1e-3)
    bump = 3e-7
    for _ in range(65):  # the first step has no past
        tensors.step(settings(lr_bump=bump))
    table = tensor_numbers([66], torch.tensor([1e-4]), settings(), tensors.fmt).tables[0]
    value = table[tensors.states[0]["lr_mask"].long()].mean()
    # 32,768 elements, 64 roundings of at most half a code of 5.6e-6 each: the mean's deviation is 1.2e-7
    assert value == pytest.approx(1e-4 + 64 * bump, abs=5e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("feature", ["none", "all"])
@stored
def test_a_bad_gradient_spoils_its_own_tensor(feature: str, bad: float, use_8bit: bool, cpu: torch.device) -> None:
    """Means over rows, columns and the tensor carry it through the tensor, in the reference too; the others are as without it."""
    kept, numbers = FEATURES[feature]
    shapes = [(16, 64), (300,), (64, 16), (5, 9, 3, 3)]
    for phase in ("early", "middle", "late"):
        tensors = make(CameFormat(phase=phase, use_8bit=use_8bit, **kept), shapes)
        clean = tensors.copy()
        for spoilt in (0, 3):
            tensors.grads[spoilt].view(-1)[70] = bad
        for _ in range(2):
            check_step(tensors, settings(**numbers))
            clean.step(settings(**numbers))
        for i in (1, 2):
            assert torch.equal(tensors.params[i], clean.params[i])
            assert all(torch.equal(tensors.states[i][name], clean.states[i][name]) for name in clean.states[i])
        for i in (0, 3):
            assert not tensors.params[i].isfinite().any()
            if use_8bit:  # no code for NaN: momentum and torque store 0
                assert (tensors.states[i]["exp_avg"] == 127).all()
                assert all((tensors.states[i][name] == 0).all() for name in ("torque", "edge_history") if name in tensors.states[i])


@pytest.mark.parametrize("phase", ["early", "middle", "late"])
def test_a_zero_gradient_only_decays(phase: str, cpu: torch.device) -> None:
    kept, numbers = FEATURES["all"]
    tensors = make(CameFormat(phase=phase, **{**kept, "lora_rank_penalty": False}))
    before = tensors.copy()
    for grad in tensors.grads:
        grad.zero_()
    tensors.step(settings(**numbers))
    for p, old in zip(tensors.params, before.params, strict=True):
        assert torch.allclose(p, old * (1 - 1e-5), rtol=2e-7, atol=0)


@pytest.mark.parametrize("phase", ["early", "middle", "late"])
def test_any_number_of_threads_and_tensors_gives_the_same_bits(phase: str, cpu: torch.device) -> None:
    kept, numbers = FEATURES["all"]
    shapes = [(16, 3072), (3072, 16), (70_000,), (33, 77), (16, 3072), (1,)]
    together = make(CameFormat(phase=phase, **kept), shapes)
    alone = together.copy()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for _ in range(2):
            together.step(settings(**numbers))
        torch.set_num_threads(1)
        for _ in range(2):
            alone.step(settings(**numbers))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, together.params, alone.params))
    for state, other in zip(together.states, alone.states, strict=True):
        assert all(torch.equal(state[name], other[name]) for name in state)


def test_misaligned_parameters_and_gradients(cpu: torch.device) -> None:
    kept, numbers = FEATURES["all"]
    plain = make(CameFormat(phase="early", **kept), [(16, 70), (64, 16)])
    shifted = plain.copy()
    for i, shape in enumerate([(16, 70), (64, 16)]):
        shifted.params[i] = torch.empty(16 * 70 + 3)[3 : 3 + math.prod(shape)].view(shape).copy_(plain.params[i])
        shifted.grads[i] = torch.empty(16 * 70 + 1)[1 : 1 + math.prod(shape)].view(shape).copy_(plain.grads[i])
    plain.step(settings(**numbers))
    shifted.step(settings(**numbers))
    for i in range(2):
        assert torch.equal(shifted.params[i], plain.params[i])
        assert all(torch.equal(shifted.states[i][name], plain.states[i][name]) for name in plain.states[i])


def test_found_inf_changes_nothing(cpu: torch.device) -> None:
    kept, numbers = FEATURES["all"]
    tensors = make(CameFormat(phase="early", **kept))
    before = tensors.copy()
    tensors.step(settings(**numbers, found_inf=torch.ones(1)))
    assert all(map(torch.equal, tensors.params, before.params))
    for state, old in zip(tensors.states, before.states, strict=True):
        assert all(torch.equal(state[name], old[name]) for name in old)
    tensors.step(settings(**numbers, found_inf=torch.zeros(1)))
    assert tensors.states[0]["step"] == 1


def test_the_reference_bucket_is_the_reference() -> None:
    kept, numbers = FEATURES["all"]
    tensors = make(CameFormat(phase="early", **kept))
    old = tensors.copy()
    tensors.step(settings(**numbers), use_reference=True)
    for state, before in zip(tensors.states, old.states, strict=True):
        if "tail" in state:
            before["tail"].copy_(state["tail"])
    for i, (want, arrays) in enumerate(reference(old, settings(**numbers), torch.float32)):
        assert torch.equal(tensors.params[i], want)
        assert all(torch.equal(tensors.states[i][name], array) for name, array in arrays.items() if name != "lr_max")


def lists(tensors: Tensors) -> list[list[Tensor]]:
    arrays = [state[a.name] for p, state in zip(tensors.params, tensors.states, strict=True) for a in tensors.fmt.arrays(p.shape)]
    return [tensors.params, tensors.grads, arrays, [state["step"] for state in tensors.states]]


def options(fmt: CameFormat, numbers: dict[str, Any]) -> dict[str, Any]:
    kept = {field.name: getattr(fmt, field.name) for field in dataclasses.fields(fmt)}
    return {**kept, **{name: value for name, value in numbers.items() if name not in ("lr", "betas", "eps", "grad_l1")}}


def test_op_schema_and_opcheck() -> None:
    kept, numbers = FEATURES["all"]
    tensors = make(CameFormat(phase="early", **kept), [(300,), (16, 70)])
    twin = tensors.copy()
    arguments = (*lists(tensors), torch.tensor(1e-4), [0.8, 0.99, 0.999], [1e-30, 1e-16, 1e-8], 1.0)
    keywords = options(tensors.fmt, {**numbers, "weight_decay": 0.1})
    torch.library.opcheck(came_8bit_.default, arguments, keywords)
    mutated = {a.name for a in came_8bit_.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert mutated == {"params", "arrays", "steps"}
    other = twin.copy()
    came_8bit_(*lists(twin), *arguments[4:], **keywords)
    other.step(settings(**numbers))
    assert all(map(torch.equal, twin.params, other.params))


def test_op_errors() -> None:
    tensors = make(CameFormat(), [(300,)])

    def call(position: int | None = None, value: list[Tensor] | None = None, **keywords: Any) -> None:
        arguments: list[Any] = lists(tensors)
        if position is not None:
            arguments[position] = value
        came_8bit_(*arguments, torch.tensor(1e-4), [0.8, 0.99, 0.999], [1e-30, 1e-16, 1e-8], 1.0, **keywords)

    before = tensors.copy()
    with pytest.raises(ValueError, match="1 params need as many grads and steps"):
        call(1, [])
    with pytest.raises(TypeError, match=r"grads\[0\] has dtype torch.float64"):
        call(1, [tensors.grads[0].double()])
    with pytest.raises(ValueError, match=r"params\[0\] is .* contiguous: False"):
        call(0, [torch.zeros(300, 2)[:, 0]])
    with pytest.raises(ValueError, match=r"arrays\[1\] \(exp_avg_absmax\) is torch.float32 \(2,\) on cpu; torch.float32 \(5,\)"):
        call(block_size=64)
    with pytest.raises(TypeError, match="a float32 scalar in host memory is needed"):
        call(3, [torch.zeros(2)])
    with pytest.raises(ValueError, match="rule is one of"):
        call(rule="adam")
    with pytest.raises(ValueError, match="param_rounding='split' is not offered"):
        call(param_rounding="split")
    assert torch.equal(tensors.params[0], before.params[0])
    assert all(torch.equal(tensors.states[0][name], before.states[0][name]) for name in before.states[0])
