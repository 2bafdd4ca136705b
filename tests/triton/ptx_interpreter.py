"""Inline PTX for Triton's interpreter, so that the assembly of the kernels runs, unmodified, on a CPU.

`install()` before a kernel runs. Approximate units are computed in float64 and then moved at random by the error the PTX manual
states, so that what passes does not rest on exact results. This checks the logic of the assembly, not ptxas and not the hardware.
"""

from __future__ import annotations

import re

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

U32, F32 = np.uint32, np.float32
#: Documented maximal errors: lg2 absolute in [0.5, 2] and relative outside, the others relative.
LG2_ERROR, EX2_ERROR, RCP_ERROR, SQRT_ERROR = 2.0**-22, 2.0**-22, 2.0**-23, 2.0**-23

_noise = np.random.default_rng(0)


def _float(bits: np.ndarray) -> np.ndarray:
    return bits.view(F32).astype(np.float64)


def _flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0.0, x), x)


def _bits(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x.astype(F32)).view(U32)
    return np.where(np.isnan(x), U32(0x7FFFFFFF), bits)  # every NaN an NVIDIA unit makes


def _jitter(x: np.ndarray, error: float) -> np.ndarray:
    return x * (1 + error * _noise.uniform(-1, 1, x.shape))


def _lg2(x: np.ndarray) -> np.ndarray:
    y = np.log2(x)
    near_one = (x >= 0.5) & (x <= 2)
    absolute = y + LG2_ERROR * _noise.uniform(-1, 1, y.shape)
    # the unit is exact at 1: an all-equal group must come back as it was
    return np.where(x == 1, 0.0, np.where(near_one, absolute, _jitter(y, LG2_ERROR)))


def _ex2(x: np.ndarray) -> np.ndarray:
    return np.where(x == np.rint(x), np.exp2(x), _jitter(np.exp2(x), EX2_ERROR))


def _toward(x: np.ndarray, up: bool) -> np.ndarray:
    """float64 `x` rounded to float32 toward +inf or -inf."""
    nearest = x.astype(F32)
    wrong = nearest.astype(np.float64) < x if up else nearest.astype(np.float64) > x
    return np.where(wrong, np.nextafter(nearest, F32(np.inf if up else -np.inf)), nearest)


def _float8(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32 to FP8 codes, to nearest even; saturating, NaN to 0x7F."""
    top = torch.finfo(dtype).max
    values = torch.from_numpy(np.ascontiguousarray(x, dtype=F32))
    codes = values.clamp(-top, top).to(dtype).view(torch.uint8)
    return torch.where(values.isnan(), 0x7F, codes).numpy().astype(U32)


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    source = np.stack([(word >> U32(8 * i)) & U32(255) for word in (a, b) for i in range(4)])
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> U32(4 * i)) & U32(15)
        byte = np.take_along_axis(source, (nibble & U32(7))[None].astype(np.int64), 0)[0]
        sign = np.where(byte & U32(128), U32(255), U32(0))
        out |= np.where(nibble & U32(8), sign, byte) << U32(8 * i)
    return out


_INTEGER = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "not": lambda a: ~a,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mad": lambda a, b, c: a * b + c,
    "prmt": _prmt,
}
_FLOATING = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
    "max": np.fmax,
    "min": np.fmin,
    "neg": lambda a: -a,
    "lg2": _lg2,
    "ex2": _ex2,
    "rcp": lambda a: _jitter(1 / a, RCP_ERROR),
    "sqrt": lambda a: _jitter(np.sqrt(a), SQRT_ERROR),
}


def _arithmetic(opcode: str, args: list[np.ndarray]) -> np.ndarray:
    name, *modifiers = opcode.split(".")
    if modifiers[-1] != "f32":
        return _INTEGER[name](*args).astype(U32)
    values = [_float(a) for a in args]
    if "ftz" in modifiers:
        values = [_flush(v) for v in values]
    result = _FLOATING[name](*values)
    if "rm" in modifiers or "rp" in modifiers:
        return _bits(_toward(result, up="rp" in modifiers))
    rounded = result.astype(F32)
    return _bits(_flush(rounded) if "ftz" in modifiers else rounded)


def run(asm: str, registers: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Execute straight-line PTX on vectors of `size` 32-bit registers."""
    env = dict(registers)

    def value(operand: str) -> np.ndarray:
        if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", operand):
            return np.full(size, int(operand[2:], 16), U32)
        if re.fullmatch(r"0[xX][0-9A-Fa-f]+|\d+", operand):
            return np.full(size, int(operand, 0), U32)
        return env[operand]

    body = asm.strip().removeprefix("{").removesuffix("}")
    for statement in re.sub(r"\.reg[^;]*;", "", body).split(";"):
        if not statement.strip():
            continue
        opcode, operands = statement.split(None, 1)
        target, *sources = re.findall(r"\{[^}]*\}|[^,\s]+", operands)
        if opcode == "mov.b32" and target.startswith("{"):
            low, high = re.findall(r"\w+", target)
            env[low], env[high] = value(sources[0]) & U32(0xFFFF), value(sources[0]) >> U32(16)
        elif opcode == "mov.b32" and sources[0].startswith("{"):
            low, high = re.findall(r"\w+", sources[0])
            env[target] = (value(low) & U32(0xFFFF)) | (value(high) << U32(16))
        elif opcode == "mov.b32":
            env[target] = value(sources[0])
        elif opcode == "cvt.rn.f16x2.e4m3x2":
            codes = np.stack([value(sources[0]) & U32(255), (value(sources[0]) >> U32(8)) & U32(255)]).astype(np.uint8)
            halves = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float16).numpy()
            halves = np.where(np.isnan(halves), np.uint16(0x7FFF), halves.view(np.uint16)).astype(U32)
            env[target] = halves[0] | (halves[1] << U32(16))
        elif opcode == "cvt.f32.f16":
            halves = value(sources[0]).astype(np.uint16).view(np.float16)
            env[target] = _bits(halves.astype(np.float64))
        elif re.fullmatch(r"cvt\.rn\.satfinite\.(e4m3|e5m2)x2\.f32", opcode):
            dtype = torch.float8_e4m3fn if "e4m3" in opcode else torch.float8_e5m2
            high, low = (_float8(value(s).view(F32), dtype) for s in sources)
            env[target] = low | (high << U32(8))
        else:
            env[target] = _arithmetic(opcode, [value(s) for s in sources])
    return env


class _Results:
    def __init__(self, handles: list[interpreter.TensorHandle]) -> None:
        self._handles = handles

    def get_result(self, i: int) -> interpreter.TensorHandle:
        return self._handles[i]


def _inline_asm(self, asm, constraints, values, types, is_pure, pack):  # type: ignore[no-untyped-def]
    """`create_inline_asm` of Triton's builder: `pack` consecutive elements go to one invocation, bytes four to a register."""
    shape = np.broadcast_shapes(*[v.data.shape for v in values])
    total = int(np.prod(shape))
    calls = -(-total // pack)
    registers: dict[str, np.ndarray] = {}
    number = sum(pack if t.scalar.primitive_bitwidth == 32 else pack // 4 for t in types)
    for v in values:
        flat = np.broadcast_to(v.data, shape).reshape(-1)
        flat = np.concatenate([flat, np.zeros(calls * pack - total, flat.dtype)]).reshape(calls, pack)
        if flat.dtype.itemsize == 4:
            for i in range(pack):
                registers[f"${number + i}"] = np.ascontiguousarray(flat[:, i]).view(U32)
            number += pack
        else:
            assert flat.dtype.itemsize == 1 and pack == 4
            registers[f"${number}"] = np.ascontiguousarray(flat).view(U32).reshape(calls)
            number += 1
    with np.errstate(all="ignore"):
        env = run(asm, registers, calls)
    handles, number = [], 0
    for t in types:
        dtype = interpreter._get_np_dtype(t)
        width = pack if t.scalar.primitive_bitwidth == 32 else 1
        out = np.stack([env[f"${number + i}"] for i in range(width)], axis=1)
        number += width
        handles.append(interpreter.TensorHandle(np.ascontiguousarray(out).view(dtype).reshape(-1)[:total].reshape(shape), t.scalar))
    return _Results(handles)


def _reduce(apply):  # type: ignore[no-untyped-def]
    """The interpreter walks a custom reduction element by element; ours is the maximum that keeps NaN."""

    def apply_impl(self, input):  # type: ignore[no-untyped-def]
        if getattr(self.combine_fn, "__name__", "") == "_larger_or_nan":
            return self.min_max(input[0], val_reduce_op=np.max)
        return apply(self, input)

    return apply_impl


def install() -> None:
    interpreter.InterpreterBuilder.create_inline_asm = _inline_asm
    interpreter.ReduceOps.apply_impl = _reduce(interpreter.ReduceOps.apply_impl)
    convert = interpreter._convert_float

    def to_nearest(x, source, target, rounding):  # type: ignore[no-untyped-def]
        if source.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16).reshape(x.shape)
        return convert(x, source, target, rounding)

    interpreter._convert_float = to_nearest
