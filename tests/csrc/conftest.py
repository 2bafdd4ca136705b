"""The native module under every instruction set of this processor, called as the ops call it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from coat_kernels._native import native
from coat_kernels.formats.codecs import Codec, num_groups
from coat_kernels.formats.parameters import DTYPE_INDEX

ISAS = native.isas() if native is not None else []


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


class Native:
    """`native`'s functions on tensors. Outputs start poisoned."""

    @staticmethod
    def quantize(
        x: Tensor, codec: Codec, group_size: int = 128, *, signed: bool = True, rounding: str = "nearest", key: int = 0, threads: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = num_groups(x.numel(), group_size)
        codes = torch.full(codec.codes_shape((x.numel(),)), 0xA5, dtype=torch.uint8)
        amax, k16 = torch.full((groups,), torch.nan), torch.zeros(groups, dtype=torch.uint8)
        native.quantize_group(
            x=x.data_ptr(),
            x_dtype=DTYPE_INDEX[x.dtype],
            numel=x.numel(),
            codec=codec.index,
            is_signed=signed,
            group_size=group_size,
            stochastic=rounding == "stochastic",
            key=key,
            codes=codes.data_ptr(),
            amax=amax.data_ptr(),
            k16=k16.data_ptr(),
            threads=threads,
        )
        return codes, amax, k16

    @staticmethod
    def dequantize(
        codes: Tensor,
        amax: Tensor,
        k16: Tensor,
        codec: Codec,
        group_size: int = 128,
        dtype: torch.dtype = torch.float32,
        numel: int | None = None,
    ) -> Tensor:
        """`numel` counts where codes share bytes; without it their count is even."""
        out = torch.full((codes.numel() * 8 // codec.bits if numel is None else numel,), torch.nan, dtype=dtype)
        native.dequantize_group(
            codes=codes.data_ptr(),
            amax=amax.data_ptr(),
            k16=k16.data_ptr(),
            numel=out.numel(),
            codec=codec.index,
            group_size=group_size,
            out=out.data_ptr(),
            out_dtype=DTYPE_INDEX[dtype],
            threads=1,
        )
        return out


@pytest.fixture
def kernels() -> type[Native]:
    return Native
