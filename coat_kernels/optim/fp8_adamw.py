"""AdamW with both moments in 8 bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..config import FP8QuantizationConfig
from ..formats import get_codec
from ..ops.adamw_fp8 import AdamWFP8Bucket, Hyperparameters, StateFormat, storage_rounding
from ._adam import LowBitAdamW


class FP8AdamW(LowBitAdamW):
    r"""`torch.optim.AdamW` with its two moments in one byte each and five bytes of metadata a group.

    .. math::
        p \leftarrow p\,(1 - \text{lr}\,\lambda) - \text{lr}\,\hat m / (\sqrt{\hat v} + \epsilon)

    The update uses the moments before they are encoded: the first step equals torch's, and no non-zero v becomes zero.
    Formats: COAT (arXiv 2410.19313), as defined in `coat_kernels/formats/README.md`.

    Args:
        params: parameters, named parameters or param groups: float32, bfloat16 or float16 tensors of any layout.
        lr: learning rate, a float or a 1-element tensor; a CUDA tensor is read on the device.
        betas: decay rates of the two moments, floats in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        fp8_config: formats of the moments; default `FP8QuantizationConfig()`: e4m3 with expansion, groups of 128.
        param_rounding: how an updated 16-bit parameter is stored. "nearest"; "stochastic", which does not lose updates under half a
            step; "split", bfloat16 with an int8 residual in the state, a 24-bit weight. float32 parameters are stored exactly.
        min_quant_numel: tensors with fewer elements (counted globally, not by shard) keep float32 moments.
        seed: of stochastic rounding.
        maximize: ascend instead of descend.
        amsgrad, differentiable: not supported; True raises.
        foreach, fused: None, or True, runs the fused kernels; False for both, or fused=False, the PyTorch reference.
        capturable: the step may be captured in a CUDA graph: lr, grad_scale and found_inf as CUDA tensors.

    Raises:
        ValueError, TypeError, RuntimeError: at construction or at the first step, for what is not supported.
    """

    _bucket_type = AdamWFP8Bucket
    _hyper_type = Hyperparameters
    _settings = (*LowBitAdamW._settings, "fp8_config")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        fp8_config: FP8QuantizationConfig | None = None,
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
        if fp8_config is not None and not isinstance(fp8_config, FP8QuantizationConfig):
            raise TypeError(f"fp8_config must be an FP8QuantizationConfig, got {type(fp8_config).__name__}")
        self.fp8_config = fp8_config or FP8QuantizationConfig()
        super().__init__(
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

    def _state_format(self, param: Tensor, step: int = 0) -> StateFormat:
        config = self.fp8_config
        quantized = param.numel() >= self.min_quant_numel
        plain = get_codec("float32")
        return StateFormat(
            exp_avg=config.exp_avg_codec if quantized else plain,
            exp_avg_sq=config.exp_avg_sq_codec if quantized else plain,
            group_size=config.block_size,
            exp_avg_rounding=config.m1_rounding,
            exp_avg_sq_rounding=config.exp_avg_sq_rounding,
            param_rounding=storage_rounding(param.dtype, self.param_rounding),
            seed=self.seed,
        )
