"""In-place conversion of models to modules that save their activations in 8 bits."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .._native import CoatWarning
from ..autograd.saved import compress_saved_activations
from ..config import COATConfig
from . import _diffusers, _transformers
from ._swap import Unconvertible, is_converted, put_in_front
from .activation import convert_gelu, convert_silu
from .linear import FP8Linear
from .norm import RMS_NORMS, convert_layer_norm, convert_rms_norm, path_of
from .report import ConversionReport, ReportRow

Filter = Callable[[nn.Module, str], bool]
Convert = Callable[[nn.Module, COATConfig], str]
Rules = dict[str, tuple[Convert, tuple[str, ...]]]


def _convert_linear(module: nn.Module, config: COATConfig) -> str:
    assert isinstance(module, nn.Linear)
    layer = FP8Linear.from_linear(module, config)
    stored = "weight_codes" in layer.__dict__
    if config.frozen_weight_format is None or stored:
        return "FP8Linear, weight in FP8" if stored else "FP8Linear"
    return "FP8Linear, weight trained and so not stored in FP8"


_LINEAR: Rules = {path_of(nn.Linear): (_convert_linear, ())}
_ALL: Rules = {
    **_LINEAR,
    path_of(nn.LayerNorm): (convert_layer_norm, ()),
    **{path: (convert_rms_norm, ()) for path in RMS_NORMS},
    path_of(nn.GELU): (convert_gelu, ()),
    path_of(nn.SiLU): (convert_silu, ()),
    **_diffusers.MODULES,
    **_transformers.MODULES,
}
#: What users may expect to be converted: left ones are reported.
_EXPECTED = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.GELU, nn.SiLU)
_ADAPTERS = "peft.tuners."
_CONDITIONING = "conditioning: one row a sample"
_REPLACED = "the 8-bit form of the module that it belongs to does its work"


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Every module with its name and the reason, if there is one, to leave it whatever it is. Parents come before their children."""
    pending: list[tuple[str, nn.Module, str | None]] = [("", model, None)]
    seen: set[int] = set()
    while pending:
        name, module, reason = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module, None if reason == _CONDITIONING and isinstance(module, nn.Linear) else reason
        if isinstance(module, _Root) and module is not model:
            continue  # its own conversion has decided about all in it
        path = path_of(type(module))
        children = []
        for child_name, child in module.named_children():
            why = reason
            if path.startswith(_ADAPTERS) and child_name.startswith("lora_"):
                why = "an adapter: small, and trained as it is"
            elif path.startswith(_diffusers.CONDITIONING):
                why = _CONDITIONING
            children.append((f"{name}.{child_name}" if name else child_name, child, why))
        pending += reversed(children)


def _convert_modules(model: nn.Module, config: COATConfig, filter_fn: Filter | None, rules: Rules) -> ConversionReport:
    converted: list[ReportRow] = []
    left: list[ReportRow] = []
    replaced: set[int] = set()  # children that their converted parents no longer need in 8 bits
    walk = list(_walk(model))
    # a weight that two modules hold (an embedding and the head) would be stored beside itself
    holders = Counter(id(module._parameters.get("weight")) for module in model.modules())
    tied = {weight for weight, count in holders.items() if count > 1}
    for name, module, reason in walk:
        rule, kind = rules.get(path_of(type(module))), type(module).__name__
        if is_converted(module):  # by an earlier call
            replaced |= _unused_children(module, rule)
            continue
        if id(module) in replaced:
            left.append(ReportRow(name, kind, _REPLACED))
            continue
        if rule is None or reason is not None:
            expected = rules is _ALL and (isinstance(module, _EXPECTED) or _is_norm(module))
            if (expected or isinstance(module, nn.Linear)) and not isinstance(module, FP8Linear):
                left.append(ReportRow(name, kind, reason or _why_unknown(module)))
            continue
        if "forward" in module.__dict__:
            left.append(ReportRow(name, kind, "its forward was replaced: convert before adapters or hooks are put on it"))
            continue
        if filter_fn is not None and not filter_fn(module, name):
            left.append(ReportRow(name, kind, "filter_fn"))
            continue
        given = replace(config, frozen_weight_format=None) if id(module._parameters.get("weight")) in tied else config
        try:
            converted.append(ReportRow(name, kind, rule[0](module, given)))
        except Unconvertible as why:
            left.append(ReportRow(name, kind, str(why)))
            continue
        replaced |= _unused_children(module, rule)
    return ConversionReport(tuple(converted), tuple(left))


def _unused_children(module: nn.Module, rule: tuple[Convert, tuple[str, ...]] | None) -> set[int]:
    return set() if rule is None else {id(getattr(module, child, None)) for child in rule[1]}


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and not any(True for _ in module.children())


def _why_unknown(module: nn.Module) -> str:
    if isinstance(module, nn.GroupNorm):
        return "GroupNorm: no 8-bit form; compress_saved_activations packs what it saves"
    if not isinstance(module, _EXPECTED):
        return f"no 8-bit form of this class is known ({path_of(type(module))})"
    return f"a subclass with a forward pass of its own ({path_of(type(module))})"


def _checked(model: Any, config: Any) -> COATConfig:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if config is not None and not isinstance(config, COATConfig):
        raise TypeError(f"config must be a COATConfig, got {type(config).__name__}: coat_kernels.config.COATConfig() has the defaults")
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no torch.nn.Linear: there is nothing to convert")
    return config or COATConfig()


def _note(model: nn.Module, report: ConversionReport, filter_fn: Filter | None) -> None:
    before = _report_before(model)
    if not report.converted and before is None:
        if filter_fn is not None and any(row.outcome == "filter_fn" for row in report.left):
            names = ", ".join(row.name for row in report.left[:3])
            raise ValueError(f"filter_fn(module, name) accepted none of {len(report.left)} modules ({names}, ...)")
        raise ValueError(f"nothing in this model could be converted:\n{report}")
    model.__dict__["coat_report"] = report if before is None else before + report


def _report_before(model: nn.Module) -> ConversionReport | None:
    """What earlier conversions of this model and of parts of it did; None: there were none."""
    own: ConversionReport | None = model.__dict__.get("coat_report")
    if own is not None:
        return own
    reports = [(name, module.__dict__["coat_report"]) for name, module in model.named_modules() if "coat_report" in module.__dict__]
    return sum((report.inside(name) for name, report in reports), ConversionReport()) if reports else None


def replace_linear_with_fp8(model: nn.Module, config: COATConfig | None = None, filter_fn: Filter | None = None) -> nn.Module:
    """Turn every `nn.Linear` of a model into an `FP8Linear`, in place; PEFT, ai-toolkit and sd-scripts still recognise the layers.

    Args:
        model: converted in place. PEFT's adapters (`lora_A`, `lora_B`) are left; their base layers are converted.
        config: `COATConfig`: `activation_linear_granularity`, `frozen_weight_format`, `frozen_weight_granularity`.
        filter_fn: `filter_fn(module, name)` says which layers to convert; None: all.

    Returns:
        model. `conversion_report(model)` says what was converted, what was left and why.

    Raises:
        TypeError: model is no module, config no `COATConfig`.
        ValueError: the model has no linear layer, or filter_fn accepts none.
    """
    config = _checked(model, config)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if any(isinstance(module, FP8Linear) for module in linears) and not any(type(module) is nn.Linear for module in linears):
        warnings.warn("the linear layers of this model are converted already: nothing was changed", CoatWarning, stacklevel=2)
        return model
    _note(model, _convert_modules(model, config, filter_fn, _LINEAR), filter_fn)
    return model


def convert_to_coat(model: nn.Module, config: COATConfig | None = None, filter_fn: Filter | None = None) -> nn.Module:
    """Make a model save its activations in 8 bits, in place: linear layers, norms, activation functions, and what they feed.

    Modules get the class of their 8-bit form and keep identity, names, parameters, state dictionary and hooks. Known are torch's
    modules, diffusers' (FLUX, SD3, SDXL) and transformers' (Llama and its kin); the rest of the model runs inside
    `compress_saved_activations`, which calling the model enters and leaves. LoRA may be put on before or after; older PEFT releases
    call `model.forward`, past that: with those convert what `get_peft_model` returns. Load weights and move the model before you
    convert it or after, as you like; wrap it in FSDP after.

    Parts that were converted before keep their own conversion; converting a model whose layers all went through
    `replace_linear_with_fp8` adds the context.

    Args:
        model: converted in place.
        config: `COATConfig`; with `use_fp8_activation=False` the model stays as it is.
        filter_fn: `filter_fn(module, name)` says which modules to convert; None: all that have an 8-bit form.

    Returns:
        model. `conversion_report(model)` says what was converted, what was left and why.

    Raises:
        TypeError: model is no module, config no `COATConfig`.
        ValueError: the model has no linear layer, or filter_fn accepts nothing.
    """
    config = _checked(model, config)
    if not config.use_fp8_activation:
        return model
    inside = [name for name, module in model.named_modules() if isinstance(module, _Root)]
    if "" in inside:
        warnings.warn("this model is converted already: nothing was changed", CoatWarning, stacklevel=2)
        return model
    report = _convert_modules(model, config, filter_fn, _ALL)
    if not report.converted and inside:
        warnings.warn(f"this model is converted already ({', '.join(inside)}): nothing was changed", CoatWarning, stacklevel=2)
        return model
    if not report.converted and _report_before(model) is None and _holds_converted(model):
        warnings.warn(
            f"all of this {type(model).__name__} that has an 8-bit form was converted before, with a larger model: nothing was changed",
            CoatWarning,
            stacklevel=2,
        )
        return model
    _note(model, report, filter_fn)
    if inside:
        warnings.warn(f"{', '.join(inside)} was converted before and stays as it is; the rest was converted", CoatWarning, stacklevel=2)
    put_in_front(model, _Root)
    model.coat_context = config  # type: ignore[assignment]
    return model


def _holds_converted(model: nn.Module) -> bool:
    return any(is_converted(module) or isinstance(module, FP8Linear) for module in model.modules())


class _Root(nn.Module):
    """A converted model: what autograd saves while it is called is compressed.

    Not hooks: torch skips those that clean up after a KeyboardInterrupt, and the context would stay on for the thread. Compiled
    forward passes leave compression to the compiler.
    """

    coat_context: COATConfig

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super()._call_impl(*args, **kwargs)
        with compress_saved_activations(self.coat_context):
            return super()._call_impl(*args, **kwargs)
