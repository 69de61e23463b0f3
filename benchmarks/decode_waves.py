"""How the decode kernel cuts the keys into blocks, and how full the waves are that a GPU runs them in.

    python benchmarks/decode_waves.py [--hr 0] [--csv waves.csv]

No GPU is needed: the cut comes from the very function that the launcher asks, and from the rule before it, which wanted
320 blocks of 256, 128 or 64 keys on any GPU. A multiprocessor holds three blocks of heads with keys of their own, and
two of heads that share them. "full" is the share of the waves' room that reads keys: 1 when every block of every wave
has a whole chunk.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from typing import Any

import tables

from flexattn_cuda.native import compiled

HEADS = 32
BATCHES, KEY_HEADS, KEYS, MULTIPROCESSORS = (1, 2, 4, 8, 16), (8, 32), (1024, 2048, 4096, 8192), (80, 132)


@dataclass(frozen=True)
class Call:
    """A decode call of one query row and what runs it."""

    batch: int
    kv_heads: int
    keys: int
    hr: int
    multiprocessors: int

    @property
    def wave(self) -> int:
        """Blocks that the GPU runs at a time."""
        return self.multiprocessors * (3 if self.kv_heads == HEADS else 2)


@dataclass(frozen=True)
class Cut:
    """Keys in a chunk, and blocks of all heads together."""

    chunk: int
    blocks: int

    def waves(self, call: Call) -> int:
        return -(-self.blocks // call.wave)

    def full(self, call: Call) -> float:
        read = call.batch * call.kv_heads * (call.keys + call.hr)
        return read / (self.waves(call) * call.wave * self.chunk)


def cut_before(call: Call) -> Cut:
    for chunk in (256, 128, 64):
        blocks = call.batch * call.kv_heads * (-(-call.keys // chunk) + -(-call.hr // chunk))
        if blocks >= 320:
            break
    return Cut(chunk, blocks)


def cut_now(call: Call) -> Cut:
    return Cut(*compiled.decode_splits(call.batch * call.kv_heads, call.keys, call.hr, call.wave))


def row(call: Call) -> dict[str, Any]:
    before, now = cut_before(call), cut_now(call)
    found: dict[str, Any] = {
        "SMs": call.multiprocessors, "batch": call.batch, "key heads": call.kv_heads, "keys": call.keys,
    }  # fmt: skip
    for name, cut in (("before", before), ("now", now)):
        found |= {f"chunk {name}": cut.chunk, f"blocks {name}": cut.blocks}
        found |= {f"waves {name}": cut.waves(call), f"full {name}": round(cut.full(call), 2)}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hr", type=int, default=0, help="HR keys beside those of the sequence (default: 0)")
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    args = parser.parse_args(arguments)
    rows = [
        row(Call(batch, kv_heads, keys, args.hr, multiprocessors))
        for multiprocessors, kv_heads, batch, keys in itertools.product(MULTIPROCESSORS, KEY_HEADS, BATCHES, KEYS)
    ]
    tables.print_table("Blocks of the decode kernel", list(rows[0]), [[str(x) for x in r.values()] for r in rows])
    if args.csv:
        tables.write_csv(args.csv, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
