"""Norms, norms with rotary embedding and gated residuals in the interpreter, against the PyTorch reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from coat_kernels.formats.scaled8 import decode, encode
from coat_kernels.ops import triton_rows
from coat_kernels.ops.gated_residual import reference as gated_reference
from coat_kernels.ops.gated_residual import triton as gated
from coat_kernels.ops.gated_residual.settings import ResidualSettings
from coat_kernels.ops.norm import reference
from coat_kernels.ops.norm import triton as kernel
from coat_kernels.ops.norm.settings import NormGradients, NormSettings
from coat_kernels.ops.norm_rope import reference as rope_reference
from coat_kernels.ops.norm_rope import triton as rope
from coat_kernels.ops.norm_rope.factors import HeadFactors
from tests.rounding import U32, stored

#: Row, group size: a group and less, whole groups, a tail, several rows a tile or one, a row of several groups.
SHAPES = [(1, 16), (7, 128), (100, 16), (128, 128), (384, 128), (700, 256)]
#: center, plus_one, segments of gain and shift.
KINDS = {"rms": (False, False, 1, 0), "layer": (True, False, 1, 1), "bare": (True, False, 0, 0), "modulate": (True, True, 2, 2)}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: Tensor, want: Tensor, units: float = 64) -> bool:
    """Sums in another order: `units` of float32 of the row's largest; then one rounding to the dtype each."""
    assert got.shape == want.shape and got.dtype == want.dtype
    if not want.numel():
        return True
    largest = want.double().abs().flatten(1).amax(1).view(-1, *(1 for _ in want.shape[1:])) if want.ndim > 1 else want.double().abs().max()
    apart = (got.double() - want.double()).abs()
    return bool((apart <= units * U32 * (largest + 1) + 2 * stored(want.double(), want.dtype) * (want.dtype != torch.float32)).all())


def operands(row: int, kind: str, dtype: torch.dtype = torch.float32, rows: int = 6) -> tuple[Tensor, Tensor | None, Tensor | None]:
    _, plus_one, gains, shifts = KINDS[kind]
    gain = 0.2 * draw(gains, row, seed=1, dtype=dtype) + (not plus_one) if gains else None
    return draw(rows, row, dtype=dtype), gain, draw(shifts, row, seed=2) if shifts else None


@pytest.mark.parametrize(
    "row, group_size, kind", [(*shape, kind) for i, shape in enumerate(SHAPES) for kind in (list(KINDS)[i % 3], "modulate")[: 1 + i % 2]]
)
def test_norm(row: int, group_size: int, kind: str) -> None:
    center, plus_one, gains, shifts = KINDS[kind]
    for dtype, fmt in ((torch.float32, "auto"), (torch.bfloat16, "e4m3")):
        x, gain, shift = operands(row, kind, dtype)
        settings = NormSettings(plus_one, fmt, group_size, center)
        passes: dict[str, Any] = {"eps": 1e-6, "amax": True, "save": True}
        y, codes, scale, rstd, y_amax = kernel.norm(x, gain, shift, settings, **passes)
        want = reference.norm(x, gain, shift, settings, **passes)
        assert close(y, want[0]) and close(rstd, want[3])
        xhat = kernel.norm(x.float(), gain, shift, replace(settings, fmt="none"), **passes)[1]
        assert all(torch.equal(a, b) for a, b in zip((codes, scale), encode(xhat, fmt, group_size), strict=True))
        padded = torch.nn.functional.pad(y.float().abs(), (0, -row % group_size))
        assert torch.equal(y_amax, padded.unflatten(-1, (-1, group_size)).amax(-1))
        bare = kernel.norm(x, gain, shift, settings, eps=1e-6, amax=False, save=False)
        assert torch.equal(bare[0], y) and not any(t.numel() for t in bare[1:])
        again = (codes, scale, gain, shift, settings, dtype)
        assert close(kernel.norm_from_codes(*again), reference.norm_from_codes(*again))
        dy = draw(6, row, seed=3, dtype=dtype)
        needs_of = ((bool(gains), bool(shifts), True), (False, False, True), (False, bool(shifts), False))
        for needs in needs_of[: 1 if fmt == "auto" else 3]:
            back = (dy, codes, scale, rstd, gain, settings, NormGradients(max(gains, shifts, 1), *needs))
            got, wanted = kernel.norm_backward(*back), reference.norm_backward(*back)
            assert all(close(a, b) for a, b in zip(got, wanted, strict=True))


def test_norm_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of several tiles in each of two segments, the last one short."""
    monkeypatch.setattr(triton_rows, "BLOCKS", 6)
    x, gain, shift = operands(100, "modulate", rows=2 * 37)
    settings = NormSettings(plus_one=True, fmt="int8", group_size=64, center=True)
    _, codes, scale, rstd, _ = reference.norm(x, gain, shift, settings, eps=1e-6, amax=False, save=True)
    back = (x, codes, scale, rstd, gain, settings, NormGradients(2, gain=True, shift=True, x=True))
    got, want = kernel.norm_backward(*back), reference.norm_backward(*back)
    assert all(close(a, b, 256) for a, b in zip(got, want, strict=True))


def test_rows_beyond_a_program_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of at most 16384 elements are normalized, got 16385"):
        kernel.norm_from_codes(*[torch.ones(1, 16385)] * 2, None, None, NormSettings(False, "none", 128), torch.float32)


@pytest.mark.parametrize(
    "head_dim, heads, interleaved, rotated",
    [(8, 3, True, True), (8, 1, False, True), (12, 1, True, True), (12, 9, False, True), (7, 2, True, False)],
)
def test_norm_rope(head_dim: int, heads: int, interleaved: bool, rotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "BLOCKS", 4)
    for dtype, first_tokens in ((torch.float32, 2), (torch.bfloat16, 0)):
        x, dy = (draw(2, 3, heads, head_dim, seed=i, dtype=dtype) for i in (0, 1))
        weight = 1 + 0.5 * draw(head_dim, seed=2).sin()
        first_weight = weight.flip(0).to(torch.bfloat16) if first_tokens else None
        cos = sin = None
        if rotated:
            angle = draw(3, head_dim // 2, seed=3)
            angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
            cos, sin = 1.1 * angle.cos(), 1.1 * angle.sin()
        factors = HeadFactors(weight, first_weight, first_tokens, cos, sin, interleaved)
        y, rstd = rope.norm_rope(x, factors, 1e-6)
        want_y, want_rstd = rope_reference.norm_rope(x, factors, 1e-6)
        assert close(y, want_y) and close(rstd, want_rstd)
        for need_weight, need_x in ((True, True), (False, True), (True, False))[: 1 if first_tokens else 3]:
            need = {"need_weight": need_weight, "need_x": need_x}
            got = rope.norm_rope_backward(dy, y, rstd, factors, **need)
            wanted = rope_reference.norm_rope_backward(dy, y, rstd, factors, **need)
            assert all(close(a, b, 512) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("row, group_size, segments", [(7, 128, 2), (100, 16, 1), (384, 128, 2), (700, 256, 1)])
def test_gated_residual(row: int, group_size: int, segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "BLOCKS", 3)
    monkeypatch.setattr(gated, "_TILE", 256)
    for dtype, fmt in ((torch.float32, "auto"), (torch.bfloat16, "int8"), (torch.bfloat16, "none")):
        residual, x = (draw(6, row, seed=i, dtype=dtype) for i in (0, 1))
        gate = draw(segments, row, seed=2)
        settings = ResidualSettings(fmt, group_size)
        y, codes, scale = gated.gated_residual(residual, x, gate, settings, save=True)
        want = gated_reference.gated_residual(residual, x, gate, settings, save=True)
        assert close(y, want[0]) and torch.equal(codes, want[1]) and torch.equal(scale, want[2])
        for need_gate, need_x in ((True, True), (False, True), (True, False)):
            need = {"need_gate": need_gate, "need_x": need_x}
            got = gated.gated_residual_backward(residual, (codes, scale), gate, settings, **need)
            wanted = gated_reference.gated_residual_backward(residual, (codes, scale), gate, settings, **need)
            assert all(close(a, b) for a, b in zip(got, wanted, strict=True))


def test_what_is_not_finite_stays_where_it_is() -> None:
    x = draw(4, 200)
    x[1, 150], x[2, 3] = math.nan, math.inf
    _, codes, scale = gated.gated_residual(x, x, torch.ones(1, 200), ResidualSettings("e4m3", 64), save=True)
    bad = decode(codes, scale, "e4m3", 64).isnan()
    assert bad.sum() == 2 and bad[1, 150] and bad[2, 3]
    settings = NormSettings(plus_one=False, fmt="e4m3", group_size=64, center=True)
    y = kernel.norm(x, None, None, settings, eps=1e-6, amax=False, save=True)[0]
    assert y[1:3].isnan().all() and y[0::3].isfinite().all()
