"""What Triton kernels on rows [R, D] share: tiles of whole rows, sums along rows, and the second half of sums over rows.

A tile is [ROWS · GROUPS, G]: ROWS rows of GROUPS groups (a power of two, as many as a row has or more) of G elements. So codes and scales
of a group are those of a tile's line. Sums over rows are made by blocks of rows whose number depends on the shape alone, each writing its
partial sums, which `add_blocks` adds in order: two runs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..formats.scaled8 import num_row_groups
from ..formats.triton_launch import device_guard
from ..formats.triton_params import to_dtype, to_float32
from ..formats.triton_scaled8 import decode_scaled, encode_scaled

#: Elements of a tile of short rows.
_TILE = 2048
#: The longest row that a program holds: 16 warps of 32 elements a thread.
MAX_ROW = 16384
#: Blocks of rows that add up separately: two for each multiprocessor of an H200.
BLOCKS = 264
#: Columns and blocks of a tile of `add_blocks_kernel`.
_COLUMNS, _LINES = 64, 32


@triton.jit
def tile_lines(first, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Row (int64) and group of each line of a tile that starts at row `first`."""
    index = tl.arange(0, ROWS * GROUPS)
    return first + (index // GROUPS).to(tl.int64), index % GROUPS


@triton.jit
def tile_columns(group, G: tl.constexpr):
    return group[:, None] * G + tl.arange(0, G)[None, :]


@triton.jit
def lines_exist(line, group, end, row, G: tl.constexpr):
    """Which groups of a tile exist: rows before `end`."""
    return (line < end) & (group * G < row)


@triton.jit
def tile_mask(line, group, end, row, G: tl.constexpr, WHOLE: tl.constexpr):
    """Which elements exist: rows before `end`. Rows of whole groups have a mask that 16-byte accesses can take."""
    if WHOLE:
        return tl.broadcast_to(lines_exist(line, group, end, row, G)[:, None], [line.shape[0], G])
    else:
        return (line < end)[:, None] & (tile_columns(group, G) < row)


@triton.jit
def tile_of(first, end, row, G: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """Of the tile at row `first`: row and group of its lines, columns, offsets and mask of its elements, and which groups exist."""
    line, group = tile_lines(first, GROUPS, ROWS)
    columns = tile_columns(group, G)
    mask = tile_mask(line, group, end, row, G, WHOLE)
    return line, group, columns, line[:, None] * row + columns, mask, lines_exist(line, group, end, row, G)


@triton.jit
def row_sum(values, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Sum of each row of a tile, for each of its lines."""
    sums = tl.sum(values, axis=1)
    if GROUPS == 1:
        return sums
    else:
        sums = tl.sum(tl.reshape(sums, [ROWS, GROUPS]), axis=1)
        return tl.reshape(tl.broadcast_to(sums[:, None], [ROWS, GROUPS]), [ROWS * GROUPS])


@triton.jit
def load_factor(ptr, segment, row, columns, mask):
    """A factor [segments, row] for the lines of a tile, by the segment of each; float32, 0 outside."""
    return to_float32(tl.load(ptr + segment[:, None] * row + columns, mask=mask, other=0.0))


@triton.jit
def load_values(codes_ptr, scale_ptr, offsets, line, group, groups, mask, exists, FMT: tl.constexpr, ISA: tl.constexpr):
    """float32 values of a tile that was stored by `store_values`; 0 outside."""
    if FMT == 0:
        return to_float32(tl.load(codes_ptr + offsets, mask=mask, other=0.0))
    else:
        codes = tl.load(codes_ptr + offsets, mask=mask, other=0)
        scale = tl.load(scale_ptr + line * groups + group, mask=exists, other=0.0)
        return decode_scaled(codes, scale, FMT, ISA)


@triton.jit
def store_values(
    codes_ptr,
    scale_ptr,
    values,
    offsets,
    line,
    group,
    groups,
    row,
    mask,
    exists,
    FMT: tl.constexpr,
    DTYPE: tl.constexpr,
    G: tl.constexpr,
    ISA: tl.constexpr,
):
    """Codes and scales of a tile, or with FMT 0 its values."""
    if FMT == 0:
        tl.store(codes_ptr + offsets, to_dtype(values, DTYPE, ISA), mask=mask)
    else:
        count = tl.minimum(row - group * G, G).to(tl.int32)
        codes, scale = encode_scaled(values, count, FMT, ISA)
        tl.store(codes_ptr + offsets, codes, mask=mask)
        tl.store(scale_ptr + line * groups + group, scale, mask=exists)


@triton.jit
def store_block_sums(ptr, sums, group, row, G: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Sums [ROWS · GROUPS, G] over the rows of a block, its rows in a tile added, to the `row` elements at `ptr`."""
    if ROWS > 1:
        sums = tl.sum(tl.reshape(sums, [ROWS, GROUPS * G]), axis=0)
        columns = tl.arange(0, GROUPS * G)
        tl.store(ptr + columns, sums, mask=columns < row)
    else:
        columns = tile_columns(group, G)
        tl.store(ptr + columns, sums, mask=columns < row)


@triton.jit
def add_blocks_kernel(
    partial_ptr,  # float32 [segments, blocks, row]
    out_ptr,  # float32 [segments, row]
    blocks,
    row,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out = sum over blocks."""
    parts = tl.cdiv(row, COLUMNS)
    segment = (tl.program_id(0) // parts).to(tl.int64)
    columns = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    lines = tl.arange(0, LINES)[:, None]
    total = tl.zeros([LINES, COLUMNS], tl.float32)
    for first in range(0, blocks, LINES):
        mask = (first + lines < blocks) & (columns < row)
        total += tl.load(partial_ptr + (segment * blocks + first + lines) * row + columns, mask=mask, other=0.0)
    tl.store(out_ptr + segment * row + columns, tl.sum(total, axis=0)[None, :], mask=columns < row)


def add_blocks(partial: Tensor, out: Tensor) -> None:
    """out, float32 [segments, row], becomes the sum over blocks of float32 [segments, blocks, row]."""
    segments, blocks, row = partial.shape
    with device_guard(partial):
        add_blocks_kernel[(triton.cdiv(row, _COLUMNS) * segments,)](partial, out, blocks, row, LINES=_LINES, COLUMNS=_COLUMNS, num_warps=4)


@dataclass(frozen=True)
class RowTiles:
    """How rows [R, D] are cut into tiles.

    Args:
        rows, row: R and D.
        group_size: G.
        per_thread: elements a thread holds where a row is long enough.
    """

    rows: int
    row: int
    group_size: int
    per_thread: int = 32

    def __post_init__(self) -> None:
        if self.row > MAX_ROW:
            raise ValueError(
                f"on a GPU rows of at most {MAX_ROW} elements are normalized, got {self.row}: one program holds a whole row; "
                "use torch's own norm for this layer"
            )

    @property
    def groups(self) -> int:
        return num_row_groups(self.row, self.group_size)

    @property
    def groups_in_tile(self) -> int:
        return triton.next_power_of_2(self.groups)

    @property
    def rows_in_tile(self) -> int:
        return max(_TILE // (self.groups_in_tile * self.group_size), 1)

    @property
    def tile(self) -> int:
        return self.rows_in_tile * self.groups_in_tile * self.group_size

    @property
    def num_warps(self) -> int:
        return min(max(self.tile // (32 * self.per_thread), 1), 16)

    @property
    def programs(self) -> int:
        return triton.cdiv(self.rows, self.rows_in_tile)

    def constants(self) -> dict[str, int | bool]:
        whole = self.row % self.group_size == 0
        return {"G": self.group_size, "GROUPS": self.groups_in_tile, "ROWS": self.rows_in_tile, "WHOLE": whole}


def blocks_of(segment_rows: int, segments: int, step: int) -> tuple[int, int]:
    """Blocks of each segment and the rows of a block, a multiple of `step`."""
    wanted = max(BLOCKS // segments, 1)
    rows = triton.cdiv(triton.cdiv(max(segment_rows, 1), wanted), step) * step
    return triton.cdiv(segment_rows, rows), rows
