"""Products of FP8 codes, `out = (A·scale_a) @ (B·scale_b)^T`: on tensor cores where a GPU has them for FP8, decoded elsewhere.

Both operands lie with the contracted dimension contiguous, the one layout that Hopper's FP8 instructions read. There is no kernel of
this package: `torch._scaled_mm` multiplies.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._native import CoatWarning

#: First compute capability whose tensor cores multiply FP8.
FP8_CAPABILITY = (8, 9)
#: cuBLASLt reads rows of FP8 in 16-byte pieces.
ALIGNMENT = 16

_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def gemm_mode(device: torch.device) -> str:
    """How linear layers multiply on a device: "fp8" on tensor cores, or "storage", where FP8 is how tensors are stored and nothing more."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "storage"
    properties = torch.cuda.get_device_properties(device)  # a constant to torch.compile, unlike get_device_capability
    return "fp8" if (properties.major, properties.minor) >= FP8_CAPABILITY else "storage"


@cache
def say_storage(device: torch.device) -> None:
    """Warn, once a device, that a GPU multiplies in the activations' dtype because it cannot multiply FP8."""
    if device.type == "cuda" and gemm_mode(device) == "storage":
        warnings.warn(
            f"{torch.cuda.get_device_name(device)} has no FP8 tensor cores (compute capability 8.9 and later have): FP8 tensors save "
            "memory there, and products run in the dtype of the activations",
            CoatWarning,
            stacklevel=3,
        )


def check_fp8_matmul(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, a_fmt: str, b_fmt: str) -> None:
    for name, codes, scale, fmt in (("a", a, scale_a, a_fmt), ("b", b, scale_b, b_fmt)):
        if fmt not in _FLOAT8:
            raise ValueError(f"{name}_fmt {fmt!r} has no FP8 product; use 'e4m3' or 'e5m2'")
        if codes.dim() != 2 or codes.dtype != torch.uint8:
            raise ValueError(f"{name} must be uint8 codes with two dimensions, got {codes.dtype} {tuple(codes.shape)}")
        if scale.dtype != torch.float32 or scale.shape not in ((), (codes.shape[0], 1)):
            raise ValueError(
                f"scale_{name} must be float32, one number or one a row of {name}, ({codes.shape[0]}, 1), "
                f"got {scale.dtype} {tuple(scale.shape)}"
            )
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} must have as many columns: the contracted dimension")


def fp8_matmul(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    a_fmt: str = "e4m3",
    b_fmt: str = "e4m3",
    fast_accum: bool = False,
) -> Tensor:
    """out [M, N] = (decode(a)·scale_a) @ (decode(b)·scale_b)^T + bias, accumulated in float32.

    Args:
        a: codes uint8 [M, K]. b: codes uint8 [N, K]. Sizes need no alignment: codes 0, which are zeros, fill them up.
        scale_a, scale_b: float32, one number, or one a row, [M, 1] and [N, 1].
        bias: [N].
        out_dtype: float32, bfloat16 or float16.
        a_fmt, b_fmt: "e4m3" or "e5m2"; a GPU multiplies all pairs but two e5m2.
        fast_accum: let the tensor cores accumulate in fewer bits: for forward products.

    Raises:
        ValueError: shapes, dtypes or formats that do not fit.
    """
    check_fp8_matmul(a, scale_a, b, scale_b, a_fmt, b_fmt)
    rows, columns = a.shape[0], b.shape[0]
    if not a.numel() or not b.numel():
        out = torch.zeros(rows, columns, dtype=out_dtype, device=a.device)
        return out if bias is None else out + bias.to(out_dtype)
    per_row = bool(scale_a.dim() or scale_b.dim())
    a, b = _aligned(a, 1), _aligned(_aligned(b, 1), ALIGNMENT)
    if per_row:
        scale_a = scale_a.expand(rows, 1).contiguous()
        scale_b = F.pad(scale_b.expand(columns, 1), (0, 0, 0, b.shape[0] - columns)).t().contiguous()
    # row-wise products of cuBLASLt and CUTLASS come in bfloat16 alone, and a bias has the product's dtype
    product_dtype = torch.bfloat16 if per_row and a.is_cuda else out_dtype
    fused = bias is not None and product_dtype == out_dtype and out_dtype != torch.float32
    out = torch._scaled_mm(
        a.view(_FLOAT8[a_fmt]),
        b.view(_FLOAT8[b_fmt]).t(),
        scale_a=scale_a,
        scale_b=scale_b,
        bias=F.pad(bias.to(out_dtype), (0, b.shape[0] - columns)) if bias is not None and fused else None,
        out_dtype=product_dtype,
        use_fast_accum=fast_accum,
    )
    out = out[:, :columns] if b.shape[0] != columns else out
    out = out.to(out_dtype)
    return out if bias is None or fused else out + bias.to(out_dtype)


def _aligned(codes: Tensor, rows_multiple: int) -> Tensor:
    """Zero codes fill the columns up to a multiple of 16, and the rows to one of `rows_multiple`."""
    right, below = -codes.shape[1] % ALIGNMENT, -codes.shape[0] % rows_multiple
    return F.pad(codes, (0, right, 0, below)) if right or below else codes
