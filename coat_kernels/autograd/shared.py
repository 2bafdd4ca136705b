"""What linear layers share of a tensor that several of them read: its FP8 codes, and the maxima that its producer found on the way.

Two-stage group scaling (COAT, arXiv 2410.19313, section 4.2): the kernel that writes a tensor writes the maxima of its groups too,
and the codes then cost one pass over the tensor instead of two. Entries are keyed by tensor object and go with it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops import fp8_gemm
from ..ops import tensor_quant as _registers_the_ops  # noqa: F401

#: Elements a maximum of the first of the two stages, where the producer has not done it.
STAGE = 128

Codes = tuple[Tensor, Tensor]  # codes uint8 and scale float32, 0-dim or [rows, 1]

_CODES = WeakTensorKeyDictionary()  # tensor -> {per_row: (version, codes)}
_AMAX = WeakTensorKeyDictionary()  # tensor -> (version, maxima of its groups)


def wants_amax(x: Tensor) -> bool:
    """Whether who computes a tensor on this device should find the maxima of its groups: FP8 products will ask for them."""
    return not torch.compiler.is_compiling() and fp8_gemm.gemm_mode(x.device) == "fp8"


def offer_amax(y: Tensor, group_amax: Tensor) -> None:
    """Hand on the maxima of y's groups.

    Args:
        y: [..., D].
        group_amax: float32 [..., groups], the largest finite magnitude of each group; empty: nothing to offer.
    """
    if group_amax.numel() and y.grad_fn is not None:
        _AMAX[y] = y._version, group_amax


def quantize(x: Tensor, fmt: str, per_row: bool) -> Codes:
    """x [..., K] with one scale, or one for each row."""
    codes, scale, _ = torch.ops.coat_kernels.quantize_tensor(x.contiguous(), fmt, STAGE, per_row)
    return codes, scale


def shared_codes(x: Tensor, per_row: bool) -> Codes:
    """x as e4m3 codes [M, K], quantized once however many layers read this tensor object, if it is an activation.

    A leaf may be a buffer that its owner refills unnoticed (`.data`, numpy) and keeps for long: its codes are not kept.
    """
    if torch.compiler.is_compiling() or x.grad_fn is None:
        return rows_of(quantize(x.detach(), "e4m3", per_row), x)
    known: dict[bool, tuple[int, Codes]] = _CODES.setdefault(x, {})
    version, codes = known.get(per_row, (-1, None))
    if codes is None or version != x._version:
        amax_version, amax = _AMAX.get(x, (-1, None))
        if amax is not None and amax_version == x._version:
            codes = torch.ops.coat_kernels.quantize_with_amax(x.detach().contiguous(), amax, "e4m3", per_row)
        else:
            codes = quantize(x.detach(), "e4m3", per_row)
        codes = rows_of(codes, x)
        known[per_row] = x._version, codes
    return codes


def rows_of(codes: Codes, x: Tensor) -> Codes:
    """Codes and scales of x [..., K] as matrices."""
    return codes[0].reshape(-1, x.shape[-1]), codes[1].reshape(-1, 1) if codes[1].dim() else codes[1]
