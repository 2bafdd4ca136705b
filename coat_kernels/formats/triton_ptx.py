"""Inline PTX under the Triton formats, and what replaces it where PTX does not run: the arithmetic, no format rules.

`ISA` is the one switch, a constexpr that every device function takes:

    PORTABLE   plain Triton operations: the interpreter, which runs no inline assembly
    PTX        approximate logarithm, exponential and reciprocal units through PTX (sm_75 and later)
    PTX_FP8    also the FP8 conversions (sm_89 and later)

The library's log2 costs 28 instructions and the unit's one; with the library the fused step ran at 0.4 of copy bandwidth on an H200.
Functions on four packed codes ask for `pack=4`: Triton hands them four consecutive elements of a thread in one register.
"""

from __future__ import annotations

import triton
import triton.language as tl

PORTABLE = tl.constexpr(0)
PTX = tl.constexpr(1)
PTX_FP8 = tl.constexpr(2)

#: 2^23 as a float: adding it puts a small integer into the low bits of the pattern, rounded to nearest even.
MAGIC = tl.constexpr(8388608.0)
MAGIC_BITS = tl.constexpr(0x4B000000)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def small_int_to_float(i):
    """Exact float32 of 0 <= i < 2^23, without the conversion unit (it runs at the rate of the exponential)."""
    return float_of(i | MAGIC_BITS) - MAGIC


@triton.jit
def log2(x, ISA: tl.constexpr):
    if ISA == PORTABLE:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(x, ISA: tl.constexpr):
    if ISA == PORTABLE:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sqrt(x, ISA: tl.constexpr):
    if ISA == PORTABLE:
        return tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x, ISA: tl.constexpr):
    if ISA == PORTABLE:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def divide(a, b, ISA: tl.constexpr):
    """a / b of ordinary numbers, exact where the quotient is a float32: one correction of the reciprocal unit's result."""
    if ISA == PORTABLE:
        return a / b
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 r, q, e;
            rcp.approx.ftz.f32 r, $2;
            mul.rn.f32 q, $1, r;
            neg.f32 e, q;
            fma.rn.f32 e, e, $2, $1;
            fma.rn.f32 $0, e, r, q; }""",
            "=f,f,f",
            [a, b],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def scaled_reciprocal(x, scale, ISA: tl.constexpr):
    """scale / x. Two neighbours share one reciprocal, 1/a = b/(ab): a·b must stay well inside float32's range."""
    if ISA == PORTABLE:
        return scale / x
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 r;
            mul.f32 r, $2, $3;
            rcp.approx.ftz.f32 r, r;
            mul.f32 r, r, $4;
            mul.f32 $0, r, $3;
            mul.f32 $1, r, $2; }""",
            "=&f,=&f,f,f,f,f",
            [x, scale],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )


# exp2(inverse_k · log2(|q| / 448) + log_top) of four E4M3 codes with one conversion a pair and no logarithm. f16 of a code (which
# normalises subnormals), shifted left by 8, holds its exponent and 3 mantissa bits m as a fixed-point piecewise linear log2 with
# 18 fraction bits. What that lacks, 2^18·(log2(1 + m/8) - m/8) = 0, 11777, 18855, 22133, 22272, 19776, 15035, 8360 (rounded so
# that none is off by more than 0.43 against m = 6, the mantissa of 448), takes bits 14..0: two byte permutes look it up for four
# codes (the high byte's table carries bit 15, the lowest of m). Under the exponent byte 0x42 these 23 bits read as
# 32 + 15 + log2|q|. Code 0 gets the byte 0xE2 and NaN 0x62: far out negative and positive, their exponentials are 0 and inf.
_E4M3_POWER = """{ .reg .b16 a, b; .reg .b32 h0, h1, s, t, lo, hi, x, k, u, v; .reg .f32 f;
    mov.b32 {a, b}, $4;
    cvt.rn.f16x2.e4m3x2 h0, a;
    cvt.rn.f16x2.e4m3x2 h1, b;
    and.b32 s, h0, 0x03800380;
    and.b32 t, h1, 0x03800380;
    shl.b32 s, s, 1;
    mad.lo.u32 s, t, 32, s;
    prmt.b32 s, s, s, 0x0031;
    prmt.b32 lo, 0x75A70100, 0xA8BB4000, s;
    prmt.b32 hi, 0xD649AE00, 0xA03ACD57, s;
    prmt.b32 x, h0, h1, 0x7531;
    and.b32 x, x, 0x7F7F7F7F;
    sub.u32 k, 0x97979797, x;
    shr.u32 t, k, 1;
    or.b32 t, t, k;
    not.b32 t, t;
    and.b32 t, t, 0x20202020;
    and.b32 k, k, 0x80808080;
    or.b32 k, k, t;
    or.b32 k, k, 0x42424242;
    prmt.b32 u, lo, hi, 0x5140;
    prmt.b32 v, lo, hi, 0x7362;
    prmt.b32 s, x, k, 0x5140;
    prmt.b32 t, x, k, 0x7362;
    prmt.b32 x, u, s, 0x5410;
    mov.b32 f, x; add.rn.f32 f, f, 0fC25F3ABB; fma.rn.f32 f, f, $5, $9; ex2.approx.ftz.f32 $0, f;
    prmt.b32 x, v, s, 0x7610;
    mov.b32 f, x; add.rn.f32 f, f, 0fC25F3ABB; fma.rn.f32 f, f, $6, $10; ex2.approx.ftz.f32 $1, f;
    prmt.b32 x, u, t, 0x5432;
    mov.b32 f, x; add.rn.f32 f, f, 0fC25F3ABB; fma.rn.f32 f, f, $7, $11; ex2.approx.ftz.f32 $2, f;
    prmt.b32 x, v, t, 0x7632;
    mov.b32 f, x; add.rn.f32 f, f, 0fC25F3ABB; fma.rn.f32 f, f, $8, $12; ex2.approx.ftz.f32 $3, f;
"""
_E4M3_SIGNS = """
    shl.b32 x, h0, 16; and.b32 x, x, 0x80000000; mov.b32 s, $0; or.b32 s, s, x; mov.b32 $0, s;
    and.b32 x, h0, 0x80000000; mov.b32 s, $1; or.b32 s, s, x; mov.b32 $1, s;
    shl.b32 x, h1, 16; and.b32 x, x, 0x80000000; mov.b32 s, $2; or.b32 s, s, x; mov.b32 $2, s;
    and.b32 x, h1, 0x80000000; mov.b32 s, $3; or.b32 s, s, x; mov.b32 $3, s;
"""
E4M3_POWER_SIGNED = tl.constexpr(_E4M3_POWER + _E4M3_SIGNS + "}")
# Unsigned codes carry no sign bit to strip.
E4M3_POWER_UNSIGNED = tl.constexpr(_E4M3_POWER.replace("    and.b32 x, x, 0x7F7F7F7F;\n", "") + "}")


@triton.jit
def e4m3_power(codes, inverse_k, log_top, SIGNED: tl.constexpr):
    """sign(q) · (|q| / 448)^inverse_k · 2^log_top of E4M3 codes; ±inf for NaN codes. All of one shape. PTX_FP8 only."""
    return tl.inline_asm_elementwise(
        E4M3_POWER_SIGNED if SIGNED else E4M3_POWER_UNSIGNED,
        "=&f,=&f,=&f,=&f,r,f,f,f,f,f,f,f,f",
        [codes, inverse_k, log_top],
        dtype=tl.float32,
        is_pure=True,
        pack=4,
    )


@triton.jit
def steps_below_top(codes):
    """code - 255 as float32; code 0 becomes -3e7 or less, whose exponential is 0. The byte is the float's low byte: no conversion."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 k, w; .reg .f32 f;
        and.b32 k, $4, 0x7F7F7F7F;
        add.u32 k, k, 0x7F7F7F7F;
        or.b32 k, k, $4;
        not.b32 k, k;
        and.b32 k, k, 0x80808080;
        or.b32 k, k, 0x4B4B4B4B;
        prmt.b32 w, $4, k, 0x4440; mov.b32 f, w; add.rn.f32 $0, f, 0fCB4B4BFF;
        prmt.b32 w, $4, k, 0x5551; mov.b32 f, w; add.rn.f32 $1, f, 0fCB4B4BFF;
        prmt.b32 w, $4, k, 0x6662; mov.b32 f, w; add.rn.f32 $2, f, 0fCB4B4BFF;
        prmt.b32 w, $4, k, 0x7773; mov.b32 f, w; add.rn.f32 $3, f, 0fCB4B4BFF; }""",
        "=&f,=&f,=&f,=&f,r",
        [codes],
        dtype=tl.float32,
        is_pure=True,
        pack=4,
    )


_PACK_FLOAT8 = """{ .reg .b32 s0, s1, s2, s3; .reg .b16 a, b;
    and.b32 s0, $5, 0x80000000; or.b32 s0, s0, $1;
    and.b32 s1, $6, 0x80000000; or.b32 s1, s1, $2;
    and.b32 s2, $7, 0x80000000; or.b32 s2, s2, $3;
    and.b32 s3, $8, 0x80000000; or.b32 s3, s3, $4;
    cvt.rn.satfinite.FORMAT.f32 a, s1, s0;
    cvt.rn.satfinite.FORMAT.f32 b, s3, s2;
    mov.b32 $0, {a, b}; }"""
PACK_E4M3 = tl.constexpr(_PACK_FLOAT8.replace("FORMAT", "e4m3x2"))
PACK_E5M2 = tl.constexpr(_PACK_FLOAT8.replace("FORMAT", "e5m2x2"))


@triton.jit
def pack_float8(magnitude, signs, MANTISSA_BITS: tl.constexpr):
    """uint8 codes of `magnitude` >= 0 with the sign bits of `signs`, to nearest even, saturating. PTX_FP8 only."""
    return tl.inline_asm_elementwise(
        PACK_E4M3 if MANTISSA_BITS == 3 else PACK_E5M2,
        "=r,r,r,r,r,r,r,r,r",
        [magnitude, signs],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def pack_bytes(y):
    """uint8 of y rounded to nearest even, 0 <= y < 256 or y = -inf, which gives 0. Not in PORTABLE."""
    return tl.inline_asm_elementwise(
        """{ .reg .f32 f; .reg .b32 s0, s1, s2, s3;
        add.rn.f32 f, $1, 0f4B000000; mov.b32 s0, f;
        add.rn.f32 f, $2, 0f4B000000; mov.b32 s1, f;
        add.rn.f32 f, $3, 0f4B000000; mov.b32 s2, f;
        add.rn.f32 f, $4, 0f4B000000; mov.b32 s3, f;
        prmt.b32 s0, s0, s1, 0x0040;
        prmt.b32 s2, s2, s3, 0x0040;
        prmt.b32 $0, s0, s2, 0x5410; }""",
        "=r,f,f,f,f",
        [y],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


# c = floor(y), f = y - c; c + 1 where u < f - curve·f·(1 - f), that is ceil(y - curve·f·(1 - f) - u), with u = (byte + 1/2)/256.
# The byte of the word that element i draws from sits in 1 + u·2^-7 = 0x3F80bb80: one permute, no conversion.
_DITHER = """
    max.f32 y, IN, 0f00000000;
    add.rm.f32 c, y, 0f4B400000;
    sub.rn.f32 c, c, 0f4B400000;
    sub.rn.f32 c, y, c;
    neg.f32 f, c;
    fma.rn.f32 c, f, c, c;
    neg.f32 f, CURVE;
    fma.rn.f32 y, f, c, y;
    prmt.b32 w, WORD, 0x3F800080, SELECT; mov.b32 f, w;
    fma.rn.f32 y, f, 0fC3000000, y;
    add.rp.f32 y, y, 0f4B400080; mov.b32 OUT, y;
"""
PACK_DITHERED = tl.constexpr(
    "{ .reg .f32 y, c, f; .reg .b32 w, s0, s1, s2, s3;"
    + "".join(
        _DITHER.replace("IN", f"${1 + i}")
        .replace("CURVE", f"${5 + i}")
        .replace("WORD", f"${9 + i}")
        .replace("OUT", f"s{i}")
        .replace("SELECT", f"0x76{i}4")
        for i in range(4)
    )
    + "prmt.b32 s0, s0, s1, 0x0040; prmt.b32 s2, s2, s3, 0x0040; prmt.b32 $0, s0, s2, 0x5410; }"
)


@triton.jit
def pack_dithered(y, curve, words):
    """uint8 of y rounded up or down by chance (README.md, "Stochastic rounding"); y = -inf gives 0.

    `words` are the generator's, one for each element; neighbours 4i .. 4i + 3 hold the same one. Not in PORTABLE.
    """
    return tl.inline_asm_elementwise(PACK_DITHERED, "=r,f,f,f,f,f,f,f,f,r,r,r,r", [y, curve, words], dtype=tl.uint8, is_pure=True, pack=4)
