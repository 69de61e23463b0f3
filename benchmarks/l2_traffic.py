"""What attention reads and writes in a GPU's memory, from a simulation of its L2 cache.

    python benchmarks/l2_traffic.py [--batch 8] [--heads 32] [--kv-heads 32] [--queries 2624] [--hr 0]
                                    [--head-dim 128] [--csv FILE]

No GPU is needed, and nothing here was measured on one. Blocks start in the order of the very function that the kernels
ask, on as many slots as a GPU has; each step, every running block reads the next tile of what it streams, or stalls one
time in five. The cache holds whole tiles of 64 rows, and gives up the one that was used longest ago. "traffic" is the
bytes that miss it, over those that must move once; "before" is the same with the heads of all samples taking turns.
"steps" is the steps until the last block ends, over those of slots that are never empty.

    forward    prefill and, of the gradients, those of queries: a block owns queries, keys and values pass by
    backward   gradients of keys and values: a block owns 64 keys, 128 on a V100; queries and gradients of the output
               pass by
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import tables

from flexattn_cuda.native import compiled

ROWS = 64  # of a tile
MB = 2**20


@dataclass(frozen=True)
class Gpu:
    """owned_tiles: Tiles of keys that a block of the backward pass owns."""

    name: str
    l2_bytes: int
    multiprocessors: int
    owned_tiles: int = 1


GPUS = (Gpu("V100", 6 * MB, 80, owned_tiles=2), Gpu("A100", 40 * MB, 108), Gpu("H100", 50 * MB, 132))
RESIDENT = {"forward": 2, "backward": 1}  # blocks of a multiprocessor, by the launch bounds of the kernels
STALLS = 0.2


@dataclass(frozen=True)
class Call:
    """Causal attention in half precision."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    hr: int
    head_dim: int

    @property
    def tile_bytes(self) -> int:
        return 2 * ROWS * self.head_dim

    @property
    def tiles(self) -> int:
        """Tiles of the sequence."""
        return -(-self.queries // ROWS)

    @property
    def hr_tiles(self) -> int:
        return -(-self.hr // ROWS)


class Cache:
    """An L2 cache that holds this many tiles. misses: Tiles that were not there."""

    def __init__(self, tiles: int) -> None:
        self.room, self.misses = tiles, 0
        self.tiles: OrderedDict[Hashable, None] = OrderedDict()

    def use(self, *tiles: Hashable) -> None:
        for tile in tiles:
            if tile in self.tiles:
                self.tiles.move_to_end(tile)
                continue
            self.misses += 1
            self.tiles[tile] = None
            if len(self.tiles) > self.room:
                self.tiles.popitem(last=False)


@dataclass(frozen=True)
class Block:
    """Tiles that it owns, and of each step those that pass by; tiles that two blocks share have one name."""

    owned: tuple[Hashable, ...]
    passing: list[tuple[Hashable, ...]]
    written: tuple[Hashable, ...]


def forward_block(call: Call, head: int, tile: int) -> Block:
    own, sample = call.tiles - 1 - tile, head // call.heads
    kv_head = sample * call.kv_heads + head % call.heads * call.kv_heads // call.heads
    keys = [*range(own + 1), *range(call.tiles, call.tiles + call.hr_tiles)]
    passing = [(("k", kv_head, key), ("v", kv_head, key)) for key in keys]
    return Block((("q", head, own),), passing, (("out", head, own),))


def backward_block(call: Call, kv_head: int, tile: int, owned_tiles: int) -> Block:
    group = call.heads // call.kv_heads
    heads = range(kv_head * group, (kv_head + 1) * group)
    keys = range(tile * owned_tiles, min((tile + 1) * owned_tiles, call.tiles))
    passing = [(("q", head, row), ("grad_out", head, row)) for head in heads for row in range(keys[0], call.tiles)]
    owned, written = (
        tuple((name, kv_head, key) for key in keys for name in names) for names in ("kv", ("grad_k", "grad_v"))
    )
    return Block(owned, passing, written)


def blocks_of(call: Call, kernel: str, gpu: Gpu, l2_bytes: int) -> Iterator[Block]:
    """Yield the blocks in the order in which they start, for a cache of this size."""
    if kernel == "forward":
        heads, tiles, streamed = call.heads, call.tiles, 2 * (call.queries + call.hr) * call.kv_heads // call.heads
    else:
        heads, tiles = call.kv_heads, -(-call.tiles // gpu.owned_tiles)
        streamed = 2 * call.queries * call.heads // call.kv_heads
    for head, tile in compiled.block_order(call.batch * heads, tiles, 2 * streamed * call.head_dim, l2_bytes):
        if kernel == "forward":
            yield forward_block(call, head, tile)
        else:
            yield backward_block(call, head, tile, gpu.owned_tiles)


def simulate(call: Call, kernel: str, gpu: Gpu, grouped: bool) -> tuple[float, float]:
    """Return traffic and steps, as the module's docstring defines them."""
    blocks = blocks_of(call, kernel, gpu, gpu.l2_bytes if grouped else 2**62)  # which all heads fit into at once
    cache, slots = Cache(gpu.l2_bytes // call.tile_bytes), gpu.multiprocessors * RESIDENT[kernel]
    chance = random.Random(0)
    running: list[tuple[Block, Iterator]] = []
    seen: set[Hashable] = set()
    steps = work = 0
    while True:
        for block in itertools.islice(blocks, slots - len(running)):
            cache.use(*block.owned)
            seen.update(block.owned, block.written, *block.passing)
            running.append((block, iter(block.passing)))
            work += len(block.passing)
        if not running:
            return cache.misses / len(seen), steps * slots * (1 - STALLS) / work
        steps += 1
        running = [one for one in running if chance.random() < STALLS or advance(cache, *one)]


def advance(cache: Cache, block: Block, passing: Iterator) -> bool:
    """Let a block read what passes next; return False when it is done."""
    tiles = next(passing, None)
    cache.use(*(block.written if tiles is None else tiles))
    return tiles is not None


def rows(call: Call) -> Iterator[dict[str, str]]:
    for kernel, gpu in itertools.product(RESIDENT, GPUS):
        (before, steps_before), (now, steps) = (simulate(call, kernel, gpu, grouped) for grouped in (False, True))
        yield {
            "kernel": kernel,
            "GPU": gpu.name,
            "L2 MB": str(gpu.l2_bytes // MB),
            "traffic before": f"{before:.2f}",
            "traffic": f"{now:.2f}",
            "steps before": f"{steps_before:.2f}",
            "steps": f"{steps:.2f}",
        }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = {"batch": 8, "heads": 32, "kv-heads": 32, "queries": 2624, "hr": 0, "head-dim": 128}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    args = parser.parse_args(arguments)
    call = Call(args.batch, args.heads, args.kv_heads, args.queries, args.hr, args.head_dim)
    table = list(rows(call))
    tables.print_table(f"Simulated: {call}", list(table[0]), [list(row.values()) for row in table])
    if args.csv:
        tables.write_csv(args.csv, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
