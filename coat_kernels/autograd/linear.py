"""Linear layers that save their input in FP8, or not at all.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum of dy over the rows

dx needs no x. So a layer whose weight is frozen saves nothing but a reference to its weight; one whose weight is trained saves x once, as
FP8 codes that all layers share which read the same tensor, or by reference if that costs nothing (`saved.can_rebuild`). A weight that is
stored in FP8 is decoded for each product and saved as its codes.

Where the hardware multiplies FP8 (`ops/fp8_gemm`), activations and weights are e4m3 and gradients e5m2 (COAT, arXiv 2410.19313). A scale on
the contracted dimension, where no FP8 product takes one, is multiplied into the other operand before that is quantized, which is exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import fp8_gemm
from ..ops import tensor_quant as _registers_the_ops  # noqa: F401
from ..ops.fp8_gemm import fp8_matmul
from . import saved
from .first_order import first_order
from .shared import Codes, quantize, rows_of, shared_codes

#: With fewer rows (modulation, conditioning) a product costs less than the quantization of its weight.
MIN_FP8_ROWS = 32


def decode(codes: Codes, dtype: torch.dtype) -> Tensor:
    out: Tensor = torch.ops.coat_kernels.dequantize_tensor(codes[0], codes[1], "e4m3", dtype)
    return out


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, per_row: bool = False, products: bool = True, compress: bool = True
) -> Tensor:
    """`torch.nn.functional.linear` that saves its input in FP8, or not at all if the weight is frozen.

    Args:
        x: [..., K], any float dtype; float64 is never compressed.
        weight: [N, K] of x's dtype; under autocast of any float dtype.
        bias: [N].
        per_row: one FP8 scale for each row of x instead of one for the tensor.
        products: multiply in FP8 where the hardware does; False: in x's dtype everywhere.
        compress: False saves x as it is and multiplies in its dtype.

    Returns:
        [..., N], with x's dtype, or autocast's.
    """
    given = x  # layers share the codes of the tensor that they are given, not of autocast's copies
    x, dtype = _autocast(x)
    compress = compress and x.dtype != torch.float64 and x.numel() > 0
    trained = torch.is_grad_enabled() and weight.requires_grad
    mode = _mode(x) if compress and products else "storage"
    fits = weight.dtype == x.dtype
    if (mode == "storage" and not trained and fits) or (dtype is None and not fits):  # the second: torch's own error
        return F.linear(x, weight, bias)  # saves the weight and nothing else
    keep_input = trained and (not compress or _rebuilds(x))
    x_codes, x_scale = None, None
    if mode == "fp8" or (trained and not keep_input):
        x_codes, x_scale = shared_codes(given, per_row)
    return saved.announce(_Linear.apply(x, weight, bias, x_codes, x_scale, dtype, mode, per_row, keep_input))


def stored_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, *, per_row: bool = False, products: bool = True
) -> Tensor:
    """`linear` with a frozen weight that is stored in e4m3.

    Args:
        x: [..., K]; a gradient flows to it and to bias.
        codes: uint8 [N, K].
        scale: float32, one number or one for each output channel [N, 1].
        bias: [N].
        per_row: of x's scale, in an FP8 product.
        products: as for `linear`.
    """
    given = x
    x, _ = _autocast(x)
    mode = _mode(x) if products and x.dtype != torch.float64 and x.numel() else "storage"
    x_codes, x_scale = shared_codes(given, per_row) if mode == "fp8" else (None, None)
    return saved.announce(_StoredLinear.apply(x, codes, scale, bias, x_codes, x_scale, mode, per_row))


def _autocast(x: Tensor) -> tuple[Tensor, torch.dtype | None]:
    """x as autocast hands it to `F.linear`, and the dtype that the parameters are cast to."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x, None
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), dtype


def _mode(x: Tensor) -> str:
    return fp8_gemm.gemm_mode(x.device) if x.numel() >= MIN_FP8_ROWS * x.shape[-1] else "storage"


def _rebuilds(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and saved.can_rebuild(x)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _forward_fp8(x_codes: Codes, weight: Codes, bias: Tensor | None, x: Tensor) -> Tensor:
    y = fp8_matmul(*x_codes, *weight, bias, x.dtype, fast_accum=True)
    return y.reshape(*x.shape[:-1], weight[0].shape[0])


def _folded(dy: Tensor, scale: Tensor) -> Codes:
    """dy times a scale of the contracted dimension, and the number left of that scale: so small scales do not underflow in float16."""
    largest = scale.max()
    return dy * (scale / largest).to(dy.dtype), largest


def _grad_input_fp8(dy: Tensor, weight: Codes, per_row: bool) -> Tensor:
    codes, scale = weight
    if scale.dim():
        dy, scale = _folded(dy, scale.reshape(1, -1))
    transposed = torch.ops.coat_kernels.transpose_codes(codes)
    return fp8_matmul(*quantize(dy, "e5m2", per_row), transposed, scale, None, dy.dtype, a_fmt="e5m2")


def _grad_weight_fp8(dy: Tensor, x_codes: Codes) -> Tensor:
    codes, scale = x_codes
    if scale.dim():
        dy, scale = _folded(dy, scale)
        dy_codes, dy_scale = quantize(dy.t(), "e5m2", True)
    else:
        dy_codes, dy_scale = quantize(dy, "e5m2", False)
        dy_codes = torch.ops.coat_kernels.transpose_codes(dy_codes)
    return fp8_matmul(dy_codes, dy_scale, torch.ops.coat_kernels.transpose_codes(codes), scale, None, dy.dtype, a_fmt="e5m2")


class _Linear(torch.autograd.Function):
    """Saves the weight by reference and, if the weight is trained, x: as it is (`keep_input`) or as `x_codes`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_codes: Tensor | None,
        x_scale: Tensor | None,
        dtype: torch.dtype | None,
        mode: str,
        per_row: bool,
        keep_input: bool,
    ) -> Tensor:
        ctx.dtype, ctx.mode, ctx.per_row, ctx.keep_input = dtype, mode, per_row, keep_input
        ctx.x_shape = x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        needed = ctx.needs_input_grad[1]
        if keep_input:
            ctx.save_for_backward(weight, x)
        elif needed:
            ctx.save_for_backward(weight, x_codes, x_scale)
        else:
            ctx.save_for_backward(weight)
        if mode == "fp8":
            assert x_codes is not None and x_scale is not None
            return _forward_fp8((x_codes, x_scale), quantize(weight, "e4m3", per_row), bias, x)
        return F.linear(x, _cast(weight, dtype), None if bias is None else _cast(bias, dtype))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, *kept = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dweight = dbias = None
        if need_x:
            if ctx.mode == "fp8":
                dx = _grad_input_fp8(rows, quantize(weight, "e4m3", ctx.per_row), ctx.per_row)
            else:
                dx = rows @ _cast(weight, ctx.dtype)
            dx = dx.reshape(ctx.x_shape)
        if need_weight:
            if ctx.mode == "fp8":
                codes = rows_of(quantize(kept[0], "e4m3", ctx.per_row), kept[0]) if ctx.keep_input else tuple(kept)
                dweight = _grad_weight_fp8(rows, codes).to(weight.dtype)
            else:
                x = kept[0].reshape(-1, weight.shape[1]) if ctx.keep_input else decode(tuple(kept), dy.dtype)
                dweight = (rows.t() @ x).to(weight.dtype)
        if need_bias:
            dbias = rows.sum(0).to(ctx.bias_dtype)
        return dx, dweight, dbias, None, None, None, None, None, None


class _StoredLinear(torch.autograd.Function):
    """Saves the weight's codes and scale by reference, nothing of x and no decoded weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        x_codes: Tensor | None,
        x_scale: Tensor | None,
        mode: str,
        per_row: bool,
    ) -> Tensor:
        ctx.mode, ctx.per_row, ctx.x_shape = mode, per_row, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(codes, scale)
        if mode == "fp8":
            assert x_codes is not None and x_scale is not None
            scale = scale.expand(codes.shape[0], 1) if per_row else scale
            return _forward_fp8((x_codes, x_scale), (codes, scale), bias, x)
        return F.linear(x, decode((codes, scale), x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        codes, scale = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            if ctx.mode == "fp8":
                dx = _grad_input_fp8(rows, (codes, scale), ctx.per_row)
            else:
                dx = rows @ decode((codes, scale), dy.dtype)
            dx = dx.reshape(ctx.x_shape)
        if ctx.needs_input_grad[3]:
            dbias = rows.sum(0).to(ctx.bias_dtype)
        return dx, None, None, dbias, None, None, None, None
