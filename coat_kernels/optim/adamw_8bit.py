"""AdamW with both moments in bitsandbytes' dynamic 8-bit map."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.step_8bit import Hyperparameters8bit
from ._adam import LowBitAdamW
from ._blockwise import BlockwiseOptimizer


class AdamW8bit(BlockwiseOptimizer, LowBitAdamW):
    r"""`torch.optim.AdamW` with its moments in bitsandbytes' dynamic 8-bit map (arXiv 2110.02861): 2.03 bytes a parameter.

    .. math::
        p \leftarrow p\,(1 - \text{lr}\,\lambda) - \text{lr}\,\hat m / (\sqrt{\hat v} + \epsilon)

    Codes, maps and scales are byte-compatible with `bitsandbytes.optim.AdamW8bit`: its state dictionaries load, and
    `export_bitsandbytes_state_dict` goes back. One launch steps all tensors. A non-zero second moment never takes the code of zero.

    Args:
        params: parameters, named parameters or param groups: float32, bfloat16 or float16 tensors of any layout.
        lr: learning rate, a float or a 1-element tensor; a CUDA tensor is read on the device.
        betas: decay rates of the two moments, floats in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        block_size: elements that share a scale: a power of two from 64 to 4096.
        param_rounding: as in `FP8AdamW`: "nearest", "stochastic" or "split".
        min_quant_numel: tensors with fewer elements (counted globally, not by shard) keep float32 moments.
        seed: of stochastic rounding of parameters.
        maximize: ascend instead of descend.
        amsgrad, differentiable: not supported; True raises.
        foreach, fused: None, or True, runs the fused kernels; False for both, or fused=False, the PyTorch reference.
        capturable: the step may be captured in a CUDA graph.

    Raises:
        ValueError, TypeError, RuntimeError: at construction or at the first step, for what is not supported.
    """

    _settings = BlockwiseOptimizer._settings
    _rule = "adamw"
    _hyper_type = Hyperparameters8bit

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        block_size: int = 256,
        param_rounding: str = "nearest",
        min_quant_numel: int = 4096,
        seed: int = 0,
        maximize: bool = False,
        amsgrad: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        self._set_block_size(block_size)
        LowBitAdamW.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            param_rounding=param_rounding,
            min_quant_numel=min_quant_numel,
            seed=seed,
            maximize=maximize,
            amsgrad=amsgrad,
            foreach=foreach,
            fused=fused,
            capturable=capturable,
            differentiable=differentiable,
        )
