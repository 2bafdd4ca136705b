"""Saving and loading: byte-exact round trips, exchange with `torch.optim.AdamW`, and dictionaries that cannot be read."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from coat_kernels import CoatWarning
from coat_kernels.config import FP8QuantizationConfig
from coat_kernels.optim import FP8AdamW

CONFIGS = {
    "default": {},
    "log8": {"fp8_config": FP8QuantizationConfig(m2_format="log8")},
    "plain e5m2, groups of 32": {
        "fp8_config": FP8QuantizationConfig(m1_format="e5m2", m2_format="e5m2", block_size=32, use_dynamic_range_expansion=False)
    },
    "second moment alone": {"fp8_config": FP8QuantizationConfig(use_fp8_m1=False)},
    "split": {"param_rounding": "split"},
    "softsign8 and bfloat16": {"fp8_config": FP8QuantizationConfig(m1_format="softsign8", m2_format="bfloat16")},
    "four bits, odd sizes": {"fp8_config": FP8QuantizationConfig(m1_format="e2m1", m2_format="e2m1", block_size=64), "min_quant_numel": 0},
}
configs = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 90), nn.Linear(90, 7)).to(torch.bfloat16)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(module.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i)).to(p)
        optimizer.step()


def assert_same(first: dict, second: dict) -> None:
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for number, state in first["state"].items():
        assert state.keys() == second["state"][number].keys()
        for key, value in state.items():
            assert value.dtype == second["state"][number][key].dtype
            assert torch.equal(value, second["state"][number][key]), key


@configs
def test_resume_is_exact(options: dict) -> None:
    module = model()
    optimizer = FP8AdamW(module.parameters(), lr=1e-2, **options)
    train(module, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = model()
    other.load_state_dict(saved["model"])
    resumed = FP8AdamW(other.parameters(), lr=0.5, **options)
    resumed.load_state_dict(saved["optimizer"])
    assert_same(resumed.state_dict(), optimizer.state_dict())
    train(module, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same(resumed.state_dict(), optimizer.state_dict())
    assert all(map(torch.equal, module.parameters(), other.parameters()))


def test_saved_tensors_own_their_storage() -> None:
    module = model()
    optimizer = FP8AdamW(module.parameters())
    train(module, optimizer, range(1))
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        for value in state.values():
            assert value.is_contiguous()
            assert value.untyped_storage().nbytes() == value.nbytes
    before = copy.deepcopy(saved)
    train(module, optimizer, range(1, 2))
    assert_same(saved, before)


def test_accelerate_prepares_without_changing_a_byte() -> None:
    accelerate = pytest.importorskip("accelerate")
    module = model()
    optimizer = FP8AdamW(module.parameters())
    train(module, optimizer, range(2))
    before = optimizer.state_dict()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared_module, prepared = accelerator.prepare(module, optimizer)
    assert_same(prepared.state_dict(), before)
    train(prepared_module, prepared, range(2, 3))
    assert prepared.state_dict()["state"][0]["step"] == 3


def test_torch_adamw_goes_in_and_out() -> None:
    module, twin = model().float(), model().float()
    theirs = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.05, betas=(0.8, 0.9))
    train(module, theirs, range(5))
    ours = FP8AdamW(twin.parameters(), lr=1.0, fused=True)
    ours.load_state_dict(theirs.state_dict())
    group = ours.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["fused"]) == (3e-3, 0.05, (0.8, 0.9), True)
    assert "decoupled_weight_decay" not in group
    exported = ours.export_adamw_state_dict()
    for number, state in theirs.state_dict()["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            got, want = exported["state"][number][key], state[key]
            assert (got - want).norm() <= 0.04 * want.norm()  # half a step of e4m3, narrowed by the expansion
        assert exported["state"][number]["step"] == 5
    again = torch.optim.AdamW(twin.parameters())
    again.load_state_dict(exported)
    train(twin, again, range(5, 6))
    assert again.param_groups[0]["lr"] == 3e-3


def test_hooks_run_and_may_replace_the_dictionary() -> None:
    module = model()
    optimizer = FP8AdamW(module.parameters(), lr=1e-2)
    train(module, optimizer, range(1))
    saved = optimizer.state_dict()
    other = FP8AdamW(model().parameters())
    seen = []
    other.register_load_state_dict_pre_hook(lambda _, d: seen.append("pre") or {**d, "param_groups": [{**d["param_groups"][0], "lr": 7.0}]})
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    other.load_state_dict(saved)
    assert seen == ["pre", 7.0]


def test_schedulers_initial_lr_survives() -> None:
    module = model()
    optimizer = FP8AdamW(module.parameters(), lr=1e-2)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    other = FP8AdamW(model().parameters(), lr=1.0)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["initial_lr"] == 1e-2


def broken(change) -> dict:
    module = model()
    optimizer = FP8AdamW(module.parameters(), lr=1e-2)
    train(module, optimizer, range(2))
    saved = optimizer.state_dict()
    change(saved)
    return saved


def set_version(d: dict) -> None:
    d["param_groups"][0]["state_format"]["version"] = 99


CASES = {
    "no state": (lambda d: d.pop("state"), r"no optimizer state dict: \['state'\] missing"),
    "version": (set_version, "format version 99; this coat_kernels reads version 1"),
    "group count": (
        lambda d: d["param_groups"].append(d["param_groups"][0]),
        "different number of parameter groups: 2, the optimizer has 1",
    ),
    "group size": (lambda d: d["param_groups"][0]["params"].pop(), "doesn't match the size of optimizer's group"),
    "foreign state": (lambda d: d["state"].update({99: {}}), r"state of parameters \[99\] belongs to none"),
    "shape": (lambda d: d["state"][0].update(exp_avg=torch.zeros(3, 3, dtype=torch.uint8)), "exp_avg of parameter 0 has shape"),
    "cast codes": (lambda d: d["state"][0].update(exp_avg=d["state"][0]["exp_avg"].bfloat16()), "exp_avg of parameter 0 is torch.bfloat16"),
    "truncated metadata": (
        lambda d: d["state"][0].update(exp_avg_amax=torch.zeros(2)),
        r"exp_avg_amax of parameter 0 has shape \(2,\); \(43,\) is needed",
    ),
    "missing metadata": (lambda d: d["state"][0].pop("exp_avg_sq_k16"), "has no 'exp_avg_sq_k16'"),
    "codes without amax": (lambda d: d["state"][0].pop("exp_avg_amax"), "torch.uint8 without its scales"),
    "missing step": (lambda d: d["state"][0].pop("step"), "has no 'step'"),
    "damaged k16": (lambda d: d["state"][0]["exp_avg_k16"].zero_(), "exp_avg_k16 of parameter 0 holds a 0"),
    "another optimizer's": (lambda d: d["state"].update({0: {"square_avg": torch.zeros(3), "step": 1}}), "no 'exp_avg', only"),
    "a state too many": (lambda d: d["state"][0].update(slow=torch.zeros(3)), r"holds \['slow'\], which FP8AdamW does not keep"),
    "bitsandbytes, unknown map": (
        lambda d: d["state"].update(
            {0: {"state1": torch.zeros(90, 60, dtype=torch.uint8), "absmax1": torch.zeros(22), "qmap1": torch.zeros(256), "step": 1}}
        ),
        "qmap1 of parameter 0 is not bitsandbytes' signed dynamic map",
    ),
    "amsgrad": (lambda d: d["state"][0].update(max_exp_avg_sq=torch.zeros(3)), "amsgrad maximum"),
    "unknown codec": (lambda d: d["param_groups"][0]["state_format"].update(exp_avg="e5m9"), "unknown codec 'e5m9'; known codecs: "),
    "no codec": (lambda d: d["param_groups"][0].pop("state_format"), "does not say of which codec"),
    "residual": (lambda d: d["state"][0].update(residual=torch.zeros(90, 60, dtype=torch.int8)), "saved with param_rounding='split'"),
}


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=CASES.keys())
def test_what_cannot_be_read_is_refused_and_changes_nothing(change, message: str) -> None:
    module = model()
    optimizer = FP8AdamW(module.parameters(), lr=2e-2)
    train(module, optimizer, range(3))
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken(change))
    assert_same(optimizer.state_dict(), before)
    train(module, optimizer, range(3, 4))


def test_dictionaries_of_torch_that_mean_something_else_are_refused() -> None:
    module = model()
    optimizer = FP8AdamW(module.parameters())
    amsgrad = torch.optim.AdamW(module.parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="saved with amsgrad=True, which FP8AdamW does not support"):
        optimizer.load_state_dict(amsgrad.state_dict())
    adam = torch.optim.Adam(module.parameters(), weight_decay=0.1)
    with pytest.raises(ValueError, match="L2 weight decay"):
        optimizer.load_state_dict(adam.state_dict())


def test_another_threshold_reads_what_was_saved() -> None:
    """Tensors saved in float32 are encoded, quantized ones decoded, where the optimizer now keeps them so."""
    for saved_at, loaded_at in ((0, 1 << 30), (1 << 30, 0)):
        module, twin = model(), model()
        optimizer = FP8AdamW(module.parameters(), min_quant_numel=saved_at)
        train(module, optimizer, range(3))
        other = FP8AdamW(twin.parameters(), min_quant_numel=loaded_at)
        if loaded_at == 0:
            other.load_state_dict(optimizer.state_dict())
            want = optimizer.export_adamw_state_dict()["state"][0]["exp_avg"]
            got = other.export_adamw_state_dict()["state"][0]["exp_avg"]
            assert (got - want).norm() <= 0.04 * want.norm()
        else:
            other.load_state_dict(optimizer.state_dict())
            assert torch.equal(other.state[twin[0].weight]["exp_avg"], optimizer.export_adamw_state_dict()["state"][0]["exp_avg"])


def test_another_codec_or_group_size_is_converted_and_said() -> None:
    module = model()
    saved = FP8AdamW(module.parameters(), fp8_config=FP8QuantizationConfig(block_size=64, m2_format="log8"))
    train(module, saved, range(3))
    other = FP8AdamW(model().parameters())
    with pytest.warns(CoatWarning) as said:
        other.load_state_dict(saved.state_dict())
    messages = sorted(str(warning.message) for warning in said)
    assert messages == [
        "the loaded state was converted, exp_avg from e4m3_expand in groups of 64 to e4m3_expand in groups of 128, in 1 arrays; "
        "values moved by rounding",
        "the loaded state was converted, exp_avg_sq from log8 in groups of 64 to e4m3_expand in groups of 128, in 1 arrays; "
        "values moved by rounding",
    ]
    want, got = saved.export_adamw_state_dict()["state"][0], other.export_adamw_state_dict()["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        # one more rounding to e4m3: at most half a step of 1/8, expanded
        assert (got[name] - want[name]).norm() <= 0.05 * want[name].norm()
