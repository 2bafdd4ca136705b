"""The machinery under every optimizer of the package: validation, state, launches, reports.

A concrete optimizer names the fused step it launches (`_bucket_type`), how a parameter's state is stored (`_state_format`) and
what the step's numbers are (`_hyperparameters`); its file stays short.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..formats.parameters import PARAM_DTYPES
from ..ops.bucket import Bucket
from ..ops.state import StepFormat
from . import _state_dict
from ._names import check_names
from ._plan import Launch, Plan, build_launch, gradients, is_dtensor, local
from ._states import allocate

#: Refuses a step under graph capture with capturable=False; torch renamed it after 2.10.
_graph_health_check = getattr(Optimizer, "_accelerator_graph_capture_health_check", None) or Optimizer._cuda_graph_capture_health_check


class LowBitOptimizer(Optimizer):
    """Base of optimizers whose states are stored in few bits: a `torch.optim.Optimizer` in every other respect."""

    #: GradScaler hands over `grad_scale` and `found_inf` instead of unscaling and synchronising itself.
    _step_supports_amp_scaling = True

    #: Attributes that a pickled or copied optimizer keeps.
    _settings: ClassVar[tuple[str, ...]] = ()
    #: Optimizers of one family read each other's states.
    _family: ClassVar[str]
    #: The fused step.
    _bucket_type: ClassVar[type[Bucket]]

    def __new__(cls, *args: Any, **kwargs: Any) -> LowBitOptimizer:
        known = inspect.signature(cls.__init__).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            check_names(cls.__name__, kwargs, known)  # before __init__ does, to suggest the nearest
        return super().__new__(cls)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._plans: dict[Any, Plan] = {}
        super().__init__(params, defaults)

    @abstractmethod
    def _state_format(self, param: Tensor, step: int = 0) -> Any:
        """How this parameter's state is stored (a `StepFormat`) after `step` steps; most formats do not depend on the count."""

    @abstractmethod
    def _hyperparameters(self, group: dict[str, Any], grads: list[Any]) -> Any:
        """The numbers of one step of a param group; `grads` are the gradients of its parameters (None where there is none)."""

    # ---- parameters and groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; refuses what the kernels cannot step, before anything is stored."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        self._plans.clear()

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        if group.get("amsgrad"):
            raise ValueError(f"{name} does not support amsgrad=True: its running maximum has no 8-bit form here; use torch.optim.AdamW")
        if group.get("differentiable"):
            raise ValueError(f"{name} does not support differentiable=True: autograd does not record the fused step; use torch.optim.AdamW")
        if group.get("fused") and group.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together; leave one at None")
        for position, param in enumerate(group["params"]):
            if param.dtype not in PARAM_DTYPES:
                raise TypeError(
                    f"{name} steps float32, bfloat16 and float16 parameters; parameter {position} of its group is {param.dtype}"
                    + ("; torch.optim.AdamW takes complex ones" if param.is_complex() else "; convert it, or give it to torch.optim.AdamW")
                )
            self._state_format(param)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_plans": {}, **{name: getattr(self, name) for name in self._settings}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss, run with gradients enabled.

        Returns:
            The closure's loss, or None.
        """
        _graph_health_check(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            self._run(index, group, group["params"])
        return loss

    @torch.no_grad()
    def step_parameter(self, param: Tensor, group: dict[str, Any], index: int) -> None:
        """Step one parameter alone, as its gradient arrives (optimizer in backward).

        Args:
            param: a parameter of `group` with a gradient.
            group: its param group.
            index: its position in `group["params"]`.
        """
        if index >= len(group["params"]) or group["params"][index] is not param:
            raise ValueError(f"parameter {index} of the given group is not the given parameter; pass its own group and position")
        self._run(("parameter", id(param)), group, [param])

    def _run(self, key: Any, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = gradients(params)
        plan = self._plans.get(key)
        if plan is None or not plan.prepare(params, grads):
            plan = self._plans[key] = self._build_plan(group, params, grads)
        plan.run(params, grads, self._hyperparameters(group, grads))

    def _build_plan(self, group: dict[str, Any], params: list[Tensor], grads: list[Any]) -> Plan:
        use_reference = group["fused"] is False or (group["fused"] is None and group["foreach"] is False)
        numbers = self._parameter_numbers()
        buckets: dict[Any, list[int]] = defaultdict(list)
        for position, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is None:
                continue
            self._check_gradient(param, grad, group)
            staged = is_dtensor(param) or not param.is_contiguous() or not grad.is_contiguous()
            fmt = self._state_format(param, self._step_count(param))
            buckets[(param.device, param.dtype, grad.dtype, fmt, staged)].append(position)
        launches: list[Launch] = []
        for (device, _, _, fmt, staged), positions in buckets.items():
            own = [params[i] for i in positions]
            self._ensure_states(own, fmt, device)
            launches.append(
                build_launch(
                    self._bucket_type,
                    params,
                    grads,
                    positions,
                    [self.state[p] for p in own],
                    [numbers[id(p)] for p in own],
                    fmt,
                    staged=staged,
                    use_reference=use_reference,
                )
            )
        return Plan(params, grads, launches)

    def _check_gradient(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        name = type(self).__name__
        if grad.layout != torch.strided:
            raise RuntimeError(f"{name} does not support sparse gradients, got {grad.layout}; use sparse=False or torch.optim.SparseAdam")
        if grad.dtype not in PARAM_DTYPES:
            raise TypeError(f"{name} takes float32, bfloat16 and float16 gradients, got {grad.dtype}")
        if group["capturable"] and param.device.type != "cuda":
            raise RuntimeError(f"capturable=True needs parameters on a CUDA device, got {param.device}; leave capturable=False")

    def _step_count(self, param: Tensor) -> int:
        """Steps that a parameter has taken; 0 for formats that do not depend on it, whose counts live on the device."""
        return 0

    def _ensure_states(self, params: list[Tensor], fmt: StepFormat, device: torch.device) -> None:
        fresh = [p for p in params if "step" not in self.state[p]]
        for param, state in zip(fresh, allocate([local(p).shape for p in fresh], fmt, device), strict=True):
            self.state[param].update(state)
        for param in params:
            for key, value in self.state[param].items():
                if isinstance(value, Tensor) and value.device != device and not (key == "step" and fmt.steps_on_host):
                    raise ValueError(
                        f"state {key!r} is on {value.device} and its parameter on {device}; move both, or move the model before making "
                        "the optimizer and load the state dict afterwards"
                    )

    def _parameter_numbers(self) -> dict[int, int]:
        """Each parameter's number over all groups: it keys the random generator, so it must survive a resume."""
        numbers = count()
        return {id(p): next(numbers) for group in self.param_groups for p in group["params"]}

    # ---- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, with codes and metadata as plain tensors of their own storage.

        Each param group also carries `state_format`: version, codecs and group size, which `load_state_dict` checks.
        """
        return _state_dict.save(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; nothing changes if it cannot be read.

        Codes of this optimizer's own codec and group size are copied byte for byte; others are converted, with a `CoatWarning`.
        The dictionaries of `torch.optim` (float32 states) and bitsandbytes (8-bit) load too where their states have the same names.

        Raises:
            ValueError: a foreign or truncated dictionary, an unknown version or map, a wrong shape.
        """
        _state_dict.load(self, state_dict)

    def export_adamw_state_dict(self) -> dict[str, Any]:
        """The state as `torch.optim.AdamW` reads it: of the AdamW classes.

        Raises:
            TypeError: the optimizer keeps other states than AdamW's.
        """
        name = type(self).__name__
        raise TypeError(f"{name} does not keep AdamW's two moments, so there is nothing to export; start torch.optim.AdamW afresh")

    # ---- report

    def get_memory_efficiency_report(self) -> dict[str, Any]:
        """What the states take now.

        Returns:
            `parameters` (elements with state), `quantized_parameters`, `quantized_share`, `state_bytes` (all arrays, without step
            counts), `state_bytes_per_parameter`, `adamw_float32_bytes` (8 a parameter) and `saving`
            (the share of those that is saved).
        """
        parameters = quantized = total = 0
        for param, state in self.state.items():
            if "step" not in state:
                continue
            fmt = self._state_format(param, self._step_count(param))
            held = local(param).numel()
            parameters += held
            quantized += held if all(moment.codec.quantized for moment in fmt.moments) else 0
            total += sum(value.nbytes for key, value in state.items() if key != "step")
        return {
            "parameters": parameters,
            "quantized_parameters": quantized,
            "quantized_share": quantized / parameters if parameters else 0.0,
            "state_bytes": total,
            "state_bytes_per_parameter": total / parameters if parameters else 0.0,
            "adamw_float32_bytes": 8 * parameters,
            "saving": 1 - total / (8 * parameters) if parameters else 0.0,
        }
