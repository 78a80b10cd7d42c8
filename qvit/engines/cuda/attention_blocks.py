"""How the attention of many heads is cut into blocks and warps, and what each block has in shared memory.

The three ways of ``src/attention.cu``:

- split: few heads, or few queries of each. A block has 16 queries of a head, and its warps share out the keys, so that more of
  the GPU is busy.
- ring: Hopper, and at least one image for each block that a head has. One block a multiprocessor, with so many heads in shared
  memory that warps seldom wait for one.
- plain: all else, and windows. A block has one head of several images, one after another, and two of them in shared memory.

`attention.py` makes the launch.
"""

from __future__ import annotations

from dataclasses import dataclass

from qvit.engines.cuda.layout import pad
from qvit.engines.cuda.shape import Shape
from qvit.engines.cuda.tiles import MOST_SHARED
from qvit.engines.cuda.windows import bias_bytes

_QUERIES = 16  # of a tile, which a warp has at a time
_KEYS = 32  # of a step of the second product
_LONGEST_IN_REGISTERS = 264  # tokens whose scores a warp keeps
_MOST_TOKENS = 1024  # for which `src/attention_once.cuh` bounds its errors
_MANY_TOKENS = 208  # beyond these, fewer warps have room for their scores
_PLAIN_WARPS, _PLAIN_BLOCKS = 4, 3  # of a block, and such blocks of a multiprocessor
_RING_WARPS, _RING_MOST = 12, 5  # of a block with a ring: warps, and heads in the ring
_SPLIT_MOST, _SPLIT_BLOCKS = 4, 2  # blocks of a multiprocessor that are split: in all at most, and at a time
# Where there are many of them, of few queries each, and registers suffice. On an H100 DeiT-B's last launch takes 42 us instead
# of 47 at 4 bits, 40 instead of 44 at 2.
_MANY_SPLIT_BLOCKS, _MANY_SPLIT_WARPS = 3, 7
_MOST_WINDOWS = 8  # of a block
_BLOCKS_BUSY = 16  # blocks of windows that a multiprocessor should get at least, four at a time
_RING_BESIDE = 1024  # bytes that a ring has beside its heads, at most


@dataclass(frozen=True)
class AttentionBlocks:
    """Blocks of a launch of attention.

    Attributes:
        warps: of a block.
        resident: blocks that a multiprocessor's registers are to have room for at a time.
        grid: blocks in all.
        shared: bytes of shared memory of a block.
        pack: images, or windows, whose head a block has, one after another.
        ring: heads in a ring in shared memory; 0: there is none.
        split: whether a block's warps share out the keys of 16 queries.
        long: whether scores are computed three times, as registers do not hold them.
    """

    warps: int
    resident: int
    grid: tuple[int, int, int]
    shared: int
    pack: int = 1
    ring: int = 0
    split: bool = False
    long: bool = False

    def defines(self) -> dict[str, int]:
        """The constants of ``src/attention.cu`` that say so."""
        return {
            "WARPS": self.warps,
            "BLOCKS": self.resident,
            "RING": self.ring,
            "SPLIT": int(self.split),
            "LONG": int(self.long),
        }


def choose_attention(
    shape: Shape, multiprocessors: int, hopper: bool, windowed: bool, queries: int | None = None
) -> AttentionBlocks:
    """The way that is fastest.

    Args:
        shape: the sequences.
        multiprocessors: of the GPU.
        hopper: whether it has bulk copies.
        windowed: whether sequences are windows, whose scores get a bias of positions.
        queries: of a sequence, its first tokens; all of them where it is left out.
    """
    queries = shape.tokens if queries is None else queries
    long = shape.tokens > _LONGEST_IN_REGISTERS
    if not (windowed or long):
        if queries < shape.tokens or shape.images * shape.heads * _tiles(queries) <= _SPLIT_MOST * multiprocessors:
            return _split(shape, queries)
        if hopper and shape.images >= multiprocessors // shape.heads:
            return _ring(shape, multiprocessors)
    return _plain(shape, multiprocessors, long, windowed, queries)


def most_tokens(head_dim: int, most_shared: int) -> int:
    """The longest sequence whose attention runs at all: a block has the keys and values of a head in ``most_shared`` bytes."""
    return min(_MOST_TOKENS, most_shared // (_KEYS * _key_and_value(head_dim)) * _KEYS)


def _tiles(queries: int) -> int:
    """Of a head."""
    return -(-queries // _QUERIES)


def _keys_and_values(shape: Shape) -> int:
    """Bytes of a head in shared memory: codes of keys and values, and sums of the keys' codes."""
    return pad(shape.tokens, _KEYS) * _key_and_value(shape.head_dim)


def _key_and_value(head_dim: int) -> int:
    return 2 * head_dim + 4


def _split(shape: Shape, queries: int) -> AttentionBlocks:
    warps = -(-shape.tokens // _KEYS)
    # Totals of rows, what warps tell each other, three constants a channel, then sums of values and of the map's codes.
    shared = _keys_and_values(shape) + 128 * warps + pad(12 * warps, 16) + 12 * shape.head_dim
    shared += warps * (4 * _QUERIES * shape.head_dim + 256)
    many = queries < shape.tokens and warps <= _MANY_SPLIT_WARPS
    resident = _MANY_SPLIT_BLOCKS if many else _SPLIT_BLOCKS
    return AttentionBlocks(warps, resident, (_tiles(queries) * shape.images * shape.heads, 1, 1), shared, split=True)


def _ring(shape: Shape, multiprocessors: int) -> AttentionBlocks:
    of_head = _keys_and_values(shape) + shape.tokens * shape.head_dim
    ring = min(_RING_MOST, (MOST_SHARED - _RING_BESIDE) // of_head)
    warps = min(_RING_WARPS if shape.tokens <= _MANY_TOKENS else 8, _tiles(shape.tokens))
    shared = ring * of_head + 12 * shape.head_dim + pad(24 * ring + 4, 16)  # three constants a channel, barriers, a counter
    pack = -(-shape.images // max(1, multiprocessors // shape.heads))
    return AttentionBlocks(warps, 1, (-(-shape.images // pack) * shape.heads, 1, 1), shared, pack, ring)


def _plain(shape: Shape, multiprocessors: int, long: bool, windowed: bool, queries: int) -> AttentionBlocks:
    warps, resident, heads = _PLAIN_WARPS, _PLAIN_BLOCKS, shape.images * shape.heads
    if windowed and shape.tokens <= 64:
        resident = 16 // warps
    elif not long and shape.tokens > _MANY_TOKENS:
        resident = 8 // warps
    # A block with several images of one head loads the next one's keys and values meanwhile, and in windows the bias of
    # positions once; as long as there are blocks for all.
    if windowed:
        pack = max(1, min(_MOST_WINDOWS, heads // (_BLOCKS_BUSY * multiprocessors)))
    else:
        pack = -(-heads // (resident * multiprocessors))
    shared = (1 if long else 2) * _keys_and_values(shape) + (bias_bytes(shape.tokens) if windowed else 0)
    # Few heads: their queries are shared out among more blocks, each of which loads the keys and values.
    parts = min(-(-_tiles(queries) // warps), max(1, 2 * multiprocessors // heads)) if pack == 1 else 1
    return AttentionBlocks(warps, resident, (-(-shape.images // pack) * shape.heads, parts, 1), shared, pack, long=long)
