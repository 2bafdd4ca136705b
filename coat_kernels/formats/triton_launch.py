"""What every launcher of a Triton kernel asks: the instruction set, Triton's names of dtypes, the device guard."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from .triton_ptx import PORTABLE, PTX, PTX_FP8

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def tl_dtype(dtype: torch.dtype) -> tl.dtype:
    return _DTYPES[dtype]


@lru_cache
def _cuda_instruction_set(index: int) -> int:
    return PTX_FP8.value if torch.cuda.get_device_capability(index) >= (8, 9) else PTX.value


def instruction_set(tensor: Tensor) -> int:
    """The `ISA` for kernels on the tensor's device; PORTABLE in Triton's interpreter, which alone takes CPU tensors."""
    return _cuda_instruction_set(tensor.get_device()) if tensor.is_cuda else PORTABLE.value


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def signed32(value: int) -> int:
    """The int32 with the pattern of `value` modulo 2^32: one argument type for every seed."""
    return ((value + 0x80000000) & 0xFFFFFFFF) - 0x80000000
