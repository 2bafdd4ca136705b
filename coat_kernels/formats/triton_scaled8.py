"""The scaled 8-bit formats as Triton device functions: README.md, "Scaled 8-bit (activations)".

Tensors are [R, G], one group a row; scales, maxima and lengths are [R]. `FMT` is a number of `scaled8.FORMAT_INDEX`, `ISA` chooses
between assembly and portable operations (`triton_ptx.py`). Codes and scales are those of `scaled8.py`, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codecs import CODECS, NAN_CODE
from .scaled8 import AUTO_BASE, AUTO_ELEMENT, AUTO_SQUARES, FORMAT_INDEX, MAX, MIN_AMAX, NAN_CODES
from .triton import INF_BITS, code_value, codec_constant, round_to_code
from .triton_ptx import PORTABLE, PTX_FP8, bits_of, float_of

E4M3, E5M2 = tl.constexpr(FORMAT_INDEX["e4m3"]), tl.constexpr(FORMAT_INDEX["e5m2"])
INT8, AUTO = tl.constexpr(FORMAT_INDEX["int8"]), tl.constexpr(FORMAT_INDEX["auto"])
_MIN_AMAX = tl.constexpr(MIN_AMAX)
_NAN_CODE, _INT8_NAN = tl.constexpr(NAN_CODE), tl.constexpr(NAN_CODES["int8"])
_SQUARES, _BASE, _ELEMENT = tl.constexpr(AUTO_SQUARES), tl.constexpr(AUTO_BASE), tl.constexpr(AUTO_ELEMENT)
#: Adding it leaves a small signed integer, rounded to even, in the low byte of the pattern.
_INT8_MAGIC = tl.constexpr(12582912.0)

_MAX = {FORMAT_INDEX[name]: value for name, value in MAX.items()}
_CODEC = {FORMAT_INDEX[name]: CODECS[name].index for name in ("e4m3", "e5m2")}


@triton.constexpr_function
def format_max(fmt):
    """The largest code's value."""
    return _MAX[fmt]


@triton.constexpr_function
def codec_of(fmt):
    """The number in `codecs.CODECS` of a format of small floats."""
    return _CODEC[fmt]


# Four products to four codes. A byte of magnitude 0 loses its sign: adding 0x7F carries into its top bit unless it is 0.
_PACK_FLOAT8 = """{ .reg .f32 p0, p1, p2, p3; .reg .b16 a, b; .reg .b32 w, t;
    mul.rn.f32 p0, $1, $5; mul.rn.f32 p1, $2, $6; mul.rn.f32 p2, $3, $7; mul.rn.f32 p3, $4, $8;
    cvt.rn.satfinite.FORMAT.f32 a, p1, p0;
    cvt.rn.satfinite.FORMAT.f32 b, p3, p2;
    mov.b32 w, {a, b};
    and.b32 t, w, 0x7F7F7F7F;
    add.u32 t, t, 0x7F7F7F7F;
    or.b32 t, t, 0x7F7F7F7F;
    and.b32 $0, w, t; }"""
PACK_E4M3 = tl.constexpr(_PACK_FLOAT8.replace("FORMAT", "e4m3x2"))
PACK_E5M2 = tl.constexpr(_PACK_FLOAT8.replace("FORMAT", "e5m2x2"))

_NUMBERS = range(4)
_PACK = "prmt.b32 s0, s0, s1, 0x0040; prmt.b32 s2, s2, s3, 0x0040; prmt.b32 s0, s0, s2, 0x5410;"
#: x · 0 brings the NaN back that saturating takes away.
_SATURATE = "max.f32 p, p, 0fC2FE0000; min.f32 p, p, 0f42FE0000; fma.rn.f32 p, IN, 0f00000000, p;"


def _pack_int8(saturate: str = "") -> str:
    """Four products, rounded, to four bytes; the maximum turns NaN into -128."""
    rounded = "".join(
        f"mul.rn.f32 p, IN, ${5 + i}; {saturate} add.rn.f32 p, p, 0f4B400000; max.f32 p, p, 0f4B3FFF80; mov.b32 s{i}, p;".replace(
            "IN", f"${1 + i}"
        )
        for i in _NUMBERS
    )
    return "{ .reg .f32 p; .reg .b32 s0, s1, s2, s3;" + rounded + _PACK + "mov.b32 $0, s0; }"


PACK_INT8 = tl.constexpr(_pack_int8())
PACK_INT8_SATURATED = tl.constexpr(_pack_int8(_SATURATE))

# Four codes to four numbers and their products with four scales. Float16 holds every FP8 value.
_SCALE = "".join(f"cvt.f32.f16 f, h{i}; mul.rn.f32 ${i}, f, ${5 + i};" for i in range(4))
_REGISTERS = "{ .reg .b16 h0, h1, h2, h3, a, b; .reg .b32 v, w; .reg .f32 f;"
UNPACK_E4M3 = tl.constexpr(
    _REGISTERS
    + "mov.b32 {a, b}, $4; cvt.rn.f16x2.e4m3x2 v, a; cvt.rn.f16x2.e4m3x2 w, b; mov.b32 {h0, h1}, v; mov.b32 {h2, h3}, w;"
    + _SCALE
    + "}"
)
# e5m2 is the upper half of float16
UNPACK_E5M2 = tl.constexpr(
    _REGISTERS + "prmt.b32 v, $4, 0, 0x1404; prmt.b32 w, $4, 0, 0x3424; mov.b32 {h0, h1}, v; mov.b32 {h2, h3}, w;" + _SCALE + "}"
)


@triton.jit
def nan_unless_finite(x, ISA: tl.constexpr):
    """float32 `x` with NaN for infinities, so that one test, and every maximum, tells both."""
    if ISA == PORTABLE:
        return tl.where((bits_of(x) & 0x7FFFFFFF) < INF_BITS, x, float("nan"))
    else:
        return tl.inline_asm_elementwise("fma.rn.f32 $0, $1, 0f00000000, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def group_maximum(marked, ISA: tl.constexpr):
    """Largest finite magnitude of each group of `nan_unless_finite` values; 0 where there is none."""
    if ISA == PORTABLE:
        return tl.max(tl.where(marked == marked, tl.abs(marked), 0.0), axis=1)
    else:
        amax = tl.max(tl.abs(marked), axis=1)  # takes the other of a NaN and a number
        return tl.where(amax == amax, amax, 0.0)


@triton.jit
def scale_under(amax, FMT: tl.constexpr):
    """The scale of groups whose largest finite magnitude is `amax`."""
    return tl.div_rn(tl.maximum(amax, _MIN_AMAX), tl.full(amax.shape, format_max(FMT), tl.float32))


@triton.jit
def _inverse_scale(amax, FMT: tl.constexpr):
    return tl.div_rn(tl.full(amax.shape, format_max(FMT), tl.float32), tl.maximum(amax, _MIN_AMAX))[:, None]


@triton.jit
def codes_under(marked, amax, FMT: tl.constexpr, SATURATE: tl.constexpr, ISA: tl.constexpr):
    """uint8 codes of `nan_unless_finite` values under `amax`. FMT is not AUTO; without SATURATE no magnitude lies above amax."""
    inverse = _inverse_scale(amax, FMT)
    if FMT == INT8:
        if ISA == PORTABLE:
            held = tl.minimum(tl.maximum(tl.where(marked == marked, marked, 0.0) * inverse, -format_max(FMT)), format_max(FMT))
            return tl.where(marked == marked, bits_of(held + _INT8_MAGIC) & 0xFF, _INT8_NAN).to(tl.uint8)
        else:
            factors = tl.broadcast_to(inverse, marked.shape)
            return tl.inline_asm_elementwise(
                PACK_INT8_SATURATED if SATURATE else PACK_INT8,
                "=r,f,f,f,f,f,f,f,f",
                [marked, factors],
                dtype=tl.uint8,
                is_pure=True,
                pack=4,
            )
    elif ISA == PTX_FP8:
        factors = tl.broadcast_to(inverse, marked.shape)
        return tl.inline_asm_elementwise(
            PACK_E4M3 if FMT == E4M3 else PACK_E5M2, "=r,f,f,f,f,f,f,f,f", [marked, factors], dtype=tl.uint8, is_pure=True, pack=4
        )
    else:
        scaled = marked * inverse
        codes = round_to_code(tl.abs(scaled), codec_of(FMT))
        codes = tl.where(codes == 0, 0, codes | ((bits_of(scaled) >> 24) & 0x80))
        return tl.where(marked == marked, codes, _NAN_CODE).to(tl.uint8)


@triton.jit
def _int8_and_squares(marked, amax, ISA: tl.constexpr):
    """int8 codes, and the sum of their squares as int32 [R]; NaN counts 0.

    No dp4a over packed codes: which four elements an instruction of inline assembly gets depends on the layout, and in rows of odd length
    they are of four groups.
    """
    codes = codes_under(marked, amax, INT8, False, ISA)
    numbers = (codes.to(tl.int32) ^ 0x80) - 0x80
    return codes, tl.sum(tl.where(codes == _INT8_NAN, 0, numbers * numbers), axis=1)


@triton.jit
def encode_scaled(x, count, FMT: tl.constexpr, ISA: tl.constexpr):
    """Codes uint8 [R, G] and scales float32 [R] of float32 x [R, G].

    Masked elements are 0. `count` is int32 [R], the groups' real lengths; it counts in AUTO alone.
    """
    marked = nan_unless_finite(x, ISA)
    amax = group_maximum(marked, ISA)
    if FMT == AUTO:
        numbers, squares = _int8_and_squares(marked, amax, ISA)
        takes_int8 = _SQUARES * squares > _BASE + _ELEMENT * count
        codes = tl.where(takes_int8[:, None], numbers, codes_under(marked, amax, E4M3, False, ISA))
        return codes, tl.where(takes_int8, -scale_under(amax, INT8), scale_under(amax, E4M3))
    else:
        return codes_under(marked, amax, FMT, False, ISA), scale_under(amax, FMT)


@triton.jit
def _decode_int8(codes, scale):
    """The byte, its sign bit flipped, is the low byte of a float: no conversion."""
    number = float_of((codes.to(tl.int32) ^ 0x80) | 0x4B000000) - 8388736.0
    return tl.where(codes == _INT8_NAN, float("nan"), number * scale[:, None])


@triton.jit
def _decode_float8(codes, scale, FMT: tl.constexpr, ISA: tl.constexpr):
    if ISA == PTX_FP8:
        factors = tl.broadcast_to(scale[:, None], codes.shape)
        return tl.inline_asm_elementwise(
            UNPACK_E4M3 if FMT == E4M3 else UNPACK_E5M2,
            "=&f,=&f,=&f,=&f,r,f,f,f,f",
            [codes, factors],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        CODEC: tl.constexpr = codec_of(FMT)
        magnitude = codes.to(tl.int32) & 0x7F
        value = code_value(magnitude, CODEC) * scale[:, None]
        # e5m2's 0x7C is infinity and comes as one from code_value
        value = tl.where(magnitude > (codec_constant(CODEC, "max_code") + (1 if FMT == E5M2 else 0)), float("nan"), value)
        return tl.where(codes >= 0x80, -value, value)


@triton.jit
def decode_scaled(codes, scale, FMT: tl.constexpr, ISA: tl.constexpr):
    """float32 values [R, G] of uint8 codes [R, G] and scales float32 [R]."""
    if FMT == AUTO:
        size = tl.abs(scale)
        return tl.where((scale < 0)[:, None], _decode_int8(codes, size), _decode_float8(codes, size, E4M3, ISA))
    elif FMT == INT8:
        return _decode_int8(codes, scale)
    else:
        return _decode_float8(codes, scale, FMT, ISA)
