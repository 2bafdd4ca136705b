"""The context that a converted model brings along, and conversions in stages: parts before the whole, linears before the rest."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from coat_kernels import CoatWarning
from coat_kernels.autograd import saved
from coat_kernels.config import COATConfig
from coat_kernels.nn import FP8GELU, FP8Linear, conversion_report, convert_to_coat, replace_linear_with_fp8
from tests.accuracy import sqnr
from tests.nn.blocks import llama


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.SiLU(inplace=True), nn.GroupNorm(2, 8), nn.Linear(8, 4))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_nothing_is_watched_after_a_forward_pass_that_was_stopped(error):
    """A stopped cell of a notebook: torch calls the hooks that clean up for an `Exception` only."""

    class Stopping(nn.Module):
        def forward(self, x):
            raise error

    part = convert_to_coat(nn.Sequential(nn.Linear(64, 64), Stopping()))
    with pytest.warns(CoatWarning, match="^0 was converted before"):
        model = convert_to_coat(nn.Sequential(part, nn.Linear(64, 64)))

    def state_after() -> tuple:
        for _ in range(2):
            with pytest.raises(error):
                model(torch.randn(8, 64))
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return saved._THREAD.context, torch._C._len_torch_function_stack(), hooks

    with ThreadPoolExecutor(1) as thread:  # what a fault leaves on would reach the tests that follow
        assert thread.submit(state_after).result() == (None, 0, None)


def test_the_context_is_on_in_calls():
    seen = []

    class Looking(nn.Linear):
        def forward(self, x):
            seen.append(saved._current())
            return super().forward(x)

    config = COATConfig(activation_format="int8")
    model = convert_to_coat(nn.Sequential(nn.Linear(64, 64), Looking(64, 64)), config)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(nn.ModuleList([convert_to_coat(small(), config)])))[0]):
        assert isinstance(each, nn.Sequential)
        assert type(each).__name__ == "Sequential"
        each.append(Looking(4, 4) if len(each) > 2 else nn.Identity())
        each(torch.randn(8, each[0].in_features))
        assert seen.pop().config is config or each is not model
    with torch.no_grad():
        model(torch.randn(8, 64))
    assert seen == [None]


def test_compiled_models_with_graph_breaks_leave_no_context():
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)

        def forward(self, x):
            x = self.act(self.up(x))
            torch._dynamo.graph_break()
            return self.down(x)

    torch._dynamo.reset()
    model = convert_to_coat(Breaking())
    x = torch.randn(128, 64)
    want = model(x)
    model.compile(backend="aot_eager")
    for call in (model, torch.compile(copy.deepcopy(model), backend="aot_eager")):
        assert sqnr(want, call(x)) > 110
        call(x).sum().backward()
        assert saved._current() is None
        assert not torch._C._len_torch_function_stack()


def test_converting_in_stages():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with pytest.raises(ValueError, match="has no torch.nn.Linear"):
        convert_to_coat(model[1])
    replace_linear_with_fp8(model)
    assert type(model) is nn.Sequential
    report = conversion_report(model)
    convert_to_coat(model)  # nothing is left but the context
    assert type(model) is not nn.Sequential
    assert conversion_report(model) == report
    with pytest.warns(CoatWarning, match="this model is converted already: nothing was changed"):
        convert_to_coat(model)


def test_converting_a_part_of_a_converted_model():
    model = convert_to_coat(nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.GELU()), nn.Linear(64, 4)))
    with pytest.warns(CoatWarning, match="was converted before, with a larger model: nothing was changed"):
        assert convert_to_coat(model[0]) is model[0]
    assert type(model[0]) is nn.Sequential  # a context of its own would know nothing of the model's
    block = llama(width=64, heads=2, dtype=torch.float32, tokens=4, batch=1).module
    convert_to_coat(block)
    classes = [type(module) for module in block.modules()]
    with pytest.warns(CoatWarning, match="was converted before, with a larger model: nothing was changed"):
        convert_to_coat(block.mlp)
    assert [type(module) for module in block.modules()] == classes


def test_converting_the_rest_of_a_model():
    model = nn.ModuleDict({"a": small(), "b": nn.Sequential(nn.Linear(8, 8), nn.GELU()), "c": nn.Linear(8, 8)})
    convert_to_coat(model["a"], filter_fn=lambda module, name: name != "0")
    replace_linear_with_fp8(model["c"])
    part = conversion_report(model["a"])
    with pytest.warns(CoatWarning, match="^a was converted before and stays as it is; the rest was converted"):
        convert_to_coat(model)
    assert [type(m) for m in model["b"]] == [FP8Linear, FP8GELU]
    assert type(model["a"][0]) is nn.Linear  # as its own conversion was told
    report = conversion_report(model)
    assert [row.name for row in report.converted] == ["a.1", "a.2", "a.5", "c", "b.0", "b.1"]
    assert {row.name: row.outcome for row in report.left}["a.0"] == "filter_fn"
    assert conversion_report(model["a"]) == part
    with pytest.warns(CoatWarning, match="this model is converted already"):
        convert_to_coat(model)


def test_converted_modules_that_are_the_whole_model():
    """A class of this package, one made from two, and a layer: each with the context in front, copied and pickled."""
    mlp = llama(width=64, heads=2, dtype=torch.float32, tokens=4, batch=1).module.mlp
    models = (mlp, nn.Linear(64, 64), nn.Linear(64, 64).requires_grad_(False))
    for model in models:
        names = [cls.__name__ for cls in type(model).__mro__]
        convert_to_coat(model, COATConfig(frozen_weight_format="e4m3"))
        x = torch.randn(4, 64)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(again) is type(model)
            assert again(x).equal(model(x))
        assert type(model).__name__ == names[0]
        assert isinstance(model, nn.Module)


def test_unknown_norms_are_reported():
    class T5LayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return x * self.weight

    model = convert_to_coat(nn.Sequential(nn.Linear(8, 8), T5LayerNorm()))
    (row,) = conversion_report(model).left
    assert (row.name, row.kind) == ("1", "T5LayerNorm")
    assert row.outcome.startswith("no 8-bit form of this class is known (")
