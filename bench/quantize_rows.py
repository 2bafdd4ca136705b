"""Rows of stand-alone quantize and dequantize: groups of 128 values, and blocks of 256 with the dynamic map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import CheckFailed
from .environment import version
from .rows import chosen, dtype_name, measured, reason
from .timing import CLOCKS, OtherLoad, Run, contest, make_copy
from .works import QuantizeWork

GROUP, BLOCK = 128, 256
COPY = "copy"
#: Elements that are held against the reference, which is slow.
CHECKED_NUMEL = 1 << 18
#: Share of codes that may differ by one step: formats/README.md, the GPU's bound.
DIFFERING_CODES = 0.004
#: Median relative error of a round trip: e4m3 rounds by at most 2^-4; a dynamic 8-bit map is coarser for small values.
ROUND_TRIP_TOLERANCE = 0.05


@dataclass(frozen=True)
class Quantizer:
    """One way of making 8-bit codes of a tensor and back.

    Args:
        encode: tensor -> what `decode` takes.
        decode: (encoded, dtype) -> tensor.
        metadata_bytes: for each element, beside its one-byte code.
        codec: of this package, where the codes can be held against its reference.
        signed: whether it takes negative values; unsigned ones are given magnitudes.
    """

    name: str
    distribution: str
    encode: Callable[[Tensor], object]
    decode: Callable[[object, torch.dtype], Tensor]
    metadata_bytes: float = 5 / GROUP
    codec: str | None = None
    signed: bool = True


def _coat(fmt: str, expand: bool, codec: str, signed: bool = True) -> Quantizer:
    def encode(x: Tensor) -> object:
        import coat_kernels

        return coat_kernels.quantize_group(x, fmt, GROUP, expand)

    def decode(q: object, dtype: torch.dtype) -> Tensor:
        import coat_kernels

        return coat_kernels.dequantize_group(q, dtype)

    return Quantizer(f"coat {codec}", "torch", encode, decode, codec=codec, signed=signed)


def _coat_dynamic8_encode(x: Tensor) -> object:
    import coat_kernels

    return coat_kernels.quantize_blockwise(x, BLOCK)


def _coat_dynamic8_decode(q: object, dtype: torch.dtype) -> Tensor:
    import coat_kernels

    return coat_kernels.dequantize_blockwise(q, dtype)


def _eager_encode(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.view(-1, GROUP)
    fp8 = torch.finfo(torch.float8_e4m3fn)
    scale = groups.abs().amax(dim=1, keepdim=True).float() / fp8.max
    return (groups / scale).clamp(-fp8.max, fp8.max).to(torch.float8_e4m3fn), scale


def _eager_decode(encoded: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    codes, scale = encoded
    return (codes.float() * scale).to(dtype).view(-1)


def _bitsandbytes_encode(x: Tensor) -> object:
    from bitsandbytes.functional import quantize_blockwise

    return quantize_blockwise(x, blocksize=BLOCK)


def _bitsandbytes_decode(encoded: tuple, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    codes, state = encoded
    return dequantize_blockwise(codes, state)


BASELINE = Quantizer("torch eager e4m3", "torch", _eager_encode, _eager_decode, metadata_bytes=4 / GROUP)
QUANTIZERS = (
    BASELINE,
    _coat("e4m3", True, "e4m3_expand"),
    _coat("e4m3", False, "e4m3"),
    _coat("log8", True, "log8", signed=False),
    Quantizer("coat dynamic8", "torch", _coat_dynamic8_encode, _coat_dynamic8_decode, 4 / BLOCK, codec="dynamic8"),
    Quantizer("bitsandbytes dynamic8", "bitsandbytes", _bitsandbytes_encode, _bitsandbytes_decode, metadata_bytes=4 / BLOCK),
)


def _check_blocks(encoded, x: Tensor) -> float:
    """Nothing may differ from the reference: the rule has no logarithm."""
    from coat_kernels.formats.dynamic8 import encode_blocks

    codes, absmax = encode_blocks(x.reshape(-1)[:CHECKED_NUMEL], BLOCK, signed=True)
    if not (torch.equal(encoded.absmax[: absmax.numel()], absmax) and torch.equal(encoded.codes.reshape(-1)[: codes.numel()], codes)):
        raise CheckFailed("codes or absmax differ from the reference's; they must be identical")
    return 0.0


def _check_codes(encoded, x: Tensor, quantizer: Quantizer) -> float:
    """Share of the first codes that differ from the reference's (in float64)."""
    from coat_kernels.formats.codecs import get_codec
    from coat_kernels.formats.reference import encode_group

    head = x.reshape(-1)[:CHECKED_NUMEL].float()
    codes, amax, k16 = encode_group(head, get_codec(quantizer.codec), GROUP, signed=quantizer.signed, dtype=torch.float64)
    n_groups = amax.numel()
    if not (torch.equal(encoded.amax[:n_groups], amax) and torch.equal(encoded.k16[:n_groups], k16)):
        raise CheckFailed("amax or k16 differ from the reference's; they must be identical")
    got = encoded.codes.view(torch.uint8).reshape(-1)[: codes.numel()].to(torch.int16)
    step = (got - codes.to(torch.int16)).abs()
    share = (step > 0).float().mean().item()
    if step.max() > 1 or share > DIFFERING_CODES:
        raise CheckFailed(f"{share:.2%} of the codes differ from the reference's, by up to {step.max().item()}")
    return share


def check(quantizer: Quantizer, x: Tensor) -> dict:
    """The errors of a round trip of `x`, for the row; `CheckFailed` if one is over its tolerance."""
    encoded = quantizer.encode(x)
    found = {}
    if quantizer.codec:
        found["codes_differing"] = _check_blocks(encoded, x) if quantizer.codec == "dynamic8" else _check_codes(encoded, x, quantizer)
    back = quantizer.decode(encoded, x.dtype).reshape(-1)[:CHECKED_NUMEL].float()
    head = x.reshape(-1)[:CHECKED_NUMEL].float()
    error = ((back - head).abs() / head.abs()).median().item()
    if not error <= ROUND_TRIP_TOLERANCE:
        raise CheckFailed(f"median error of the round trip is {error:.3g}, {ROUND_TRIP_TOLERANCE} allowed")
    return {**found, "round_trip_median": error}


def quantize_rows(
    work: QuantizeWork, *, wanted=lambda name: True, quantizers=QUANTIZERS, rounds: int = 15, budget_s: float = 6.0
) -> list[dict]:
    """Two rows a quantizer, one for each direction; each is compared with the same thing written in eager torch."""
    quantizers = chosen(work.name, quantizers, BASELINE, wanted)
    if not quantizers:
        return []
    generator = torch.Generator(work.device).manual_seed(0)
    x = torch.randn(work.numel, device=work.device, generator=generator).mul_(1e-3).to(work.dtype)
    rows, runs, overhead = [], {}, {}
    for quantizer in quantizers:
        pair = [_base_row(work, quantizer, direction) for direction in ("quantize", "dequantize")]
        rows += pair
        values = x if quantizer.signed else x.abs()
        try:
            if version(quantizer.distribution) is None:
                raise ModuleNotFoundError(f"{quantizer.distribution} is not installed")
            found = check(quantizer, values)
            encoded = quantizer.encode(values)
        except Exception as error:
            for row in pair:
                row["error"] = reason(error)
            continue
        runs[pair[0]["entrant"]] = Run(lambda q=quantizer, v=values: q.encode(v))
        runs[pair[1]["entrant"]] = Run(lambda q=quantizer, e=encoded: q.decode(e, work.dtype))
        for row in pair:
            row["check"] = found
            overhead[row["entrant"]] = quantizer.metadata_bytes
    copy_run, copy_bytes = make_copy(work.device)
    with OtherLoad() as load:
        times = contest({COPY: copy_run, **runs}, CLOCKS[work.clock], rounds=rounds, budget_s=budget_s)
    copy_rate = copy_bytes / times[COPY].median
    for row in rows:
        if row["entrant"] in runs:
            mine = times[row["entrant"]]
            row.update(measured(mine, work.numel, work.dtype.itemsize + 1 + overhead[row["entrant"]], copy_rate))
            row["other_cores"] = load.cores
            row["ratio_to_torch_eager"] = mine.ratio_to(times[f"{BASELINE.name} {row['kind']}"])
    return rows


def _base_row(work: QuantizeWork, quantizer: Quantizer, direction: str) -> dict:
    return {
        "kind": direction,
        "work": work.name,
        "device": work.device,
        "entrant": f"{quantizer.name} {direction}",
        "parameters": work.numel,
        "dtype": dtype_name(work.dtype),
        "clock": work.clock,
    }
