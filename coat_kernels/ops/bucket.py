"""A bucket: tensors of one device, dtype and state format that a single launch steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..backends import require_backend
from .pointer_table import PointerTable, addresses
from .state import StepFormat, joined


class Bucket:
    """Launch-ready form of parallel lists of parameters, gradients and state; each fused step has its own subclass.

    Args:
        params, grads: contiguous tensors of one device; each list of one dtype.
        states: for each parameter the arrays of `fmt.arrays`, contiguous, and `step`, a 0-dim float32.
        indices: each tensor's number in the random generator's key.
        fmt: how the state is stored.
        use_reference: run the PyTorch reference instead of a kernel.

    Raises:
        BackendUnavailable: no kernel for the device.
    """

    #: The op's row in the support table.
    op: ClassVar[str]
    #: Arrays whose addresses lie between `grad` and `step` in the pointer table; 0 for those a format does not have.
    columns: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: list[dict[str, Tensor]],
        indices: list[int],
        fmt: Any,
        *,
        use_reference: bool = False,
    ) -> None:
        self.params, self.states, self.indices, self.fmt = params, states, indices, fmt
        self.device = params[0].device
        self.param_dtype, self.grad_dtype = params[0].dtype, grads[0].dtype
        self.backend = "reference" if use_reference else require_backend(self.op, self.device)
        self.arrays = [self._arrays(state, fmt, param) for state, param in zip(states, params, strict=True)]
        columns = {
            "param": addresses(params),
            "grad": addresses(grads),
            **{name: [held[name].data_ptr() if name in held else 0 for held in self.arrays] for name in self.columns},
            "step": addresses([state["step"] for state in states]),
            "numel": [param.numel() for param in params],
            "index": indices,
            **self._extra_columns(),
        }
        self.table = PointerTable(columns, self.device)

    @staticmethod
    def _arrays(state: dict[str, Tensor], fmt: StepFormat, param: Tensor) -> dict[str, Tensor]:
        return {array.name: joined(state, array) for array in fmt.arrays(param.shape)}

    def _extra_columns(self) -> dict[str, list[int]]:
        """Columns of the op's own after `index`."""
        return {}

    def set_params(self, params: Sequence[Tensor]) -> None:
        """Step these tensors from now on: the same shapes and dtype, perhaps at other addresses."""
        self.params = params
        self.table.set_params(params)

    def set_grads(self, grads: Sequence[Tensor]) -> bool:
        """Read these gradients from now on: the same shapes and dtype; whether any lies at a new address.

        The bucket keeps their addresses and not the tensors, which would otherwise live through the next forward pass.
        """
        return self.table.set_grads(grads)

    def step(self, hyper: Any, grads: Sequence[Tensor]) -> None:
        """Advance every tensor by one step, in place; nothing changes where `found_inf` is set.

        `grads` are those that the bucket was made with or `set_grads` was last given.
        """
        if self.backend in ("Triton", "CUDA"):
            self._step_gpu(hyper)
        elif hyper.found_inf is None or not bool(hyper.found_inf):
            if self.backend == "C++":
                self._step_cpu(hyper)
            else:
                self._step_reference(hyper, grads)

    def _step_cpu(self, hyper: Any) -> None:
        raise NotImplementedError

    def _step_gpu(self, hyper: Any) -> None:
        raise NotImplementedError

    def _step_reference(self, hyper: Any, grads: Sequence[Tensor]) -> None:
        raise NotImplementedError
