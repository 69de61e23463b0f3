"""The CPU operators against the same thing in eager torch, as ratios within one run.

    python benchmarks/bench_ops.py [--threads 1,2] [--csv ops.csv] [--only decode]

Eager attention is what a model without these operators would run: all keys in one tensor (sequence and gathered HR keys
concatenated), a mask, matmul, softmax, matmul, and the map from the probabilities. `sdpa` is torch's fused attention on
the same keys and mask; it has no map. Ours and theirs take turns, and the median of each is compared.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import measuring
import torch
from attention_case import AttentionCase
from torch.nn import functional

from flexattn_cuda import ops

S = 24  # side of the LR grid


@dataclass
class Attention(AttentionCase):
    @property
    def name(self) -> str:
        kind = "decode" if self.N == 1 else "prefill"
        kind = "training" if self.backward else kind
        extras = f" Hkv={self.kv_heads}" if self.kv_heads != self.heads else ""
        return f"{kind} N={self.N} Nk={self.Nk} M={self.M} {self.rows} row{'s' * (self.rows == 'all')} {str(self.dtype)[6:]}{extras}"


class Selection:
    """Map to HR tokens, as released: min-max, threshold, 9 x 9 pool, 72 x 72 tokens."""

    name = "select_tokens 24 -> 9 -> 72"

    def __init__(self):
        self.map = torch.rand(1, 1, 1, S * S, generator=torch.Generator().manual_seed(0)) ** 8
        self.live = torch.tensor([[[0, 0, S, S]]], dtype=torch.int32)

    def ours(self):
        return ops.select_tokens(self.map, self.live, hr_side=72, scale=255.0, threshold=48.0, pool_side=9)

    def eager(self):
        grid = self.map.view(1, 1, S, S)
        a = (grid - grid.min()) / (grid.max() - grid.min())
        pooled = functional.adaptive_max_pool2d((a * 255 > 48).float(), 9)
        mask = functional.interpolate(pooled, size=72, mode="nearest").bool().flatten()
        return mask, mask.nonzero()

    def run(self, which):
        return getattr(self, which)


class Gather:
    name = "gather_tokens M=2250 D=1024"

    def __init__(self):
        self.tokens = torch.randn(1, 72 * 72, 1024)
        self.index = torch.randperm(72 * 72)[:2250].sort().values.int()[None]

    def ours(self):
        return ops.gather_tokens(self.tokens, self.index)

    def eager(self):
        return self.tokens[:, self.index[0].long()]

    def run(self, which):
        return getattr(self, which)


def cases() -> list:
    prefill = [Attention(640, 640, M, rows) for rows in ("last", "all") for M in (0, 512, 2250) if M or rows == "last"]
    decode = [Attention(1, 656, M) for M in (0, 512, 2250, 5184)]
    others = [
        Attention(640, 640, 512, "last", torch.bfloat16),
        Attention(640, 640, 2250, "all", torch.bfloat16),
        Attention(1, 656, 2250, "last", torch.bfloat16),
        Attention(640, 640, 512, "last", torch.float16),
        Attention(1, 656, 2250, "last", torch.float16),
        Attention(640, 640, 512, "last", kv_heads=4),
        Attention(1, 656, 2250, "last", kv_heads=4),
        Attention(640, 640, 512, "last", backward=True),
        Attention(640, 640, 2250, "all", backward=True),
    ]
    return [*prefill, *decode, *others, Selection(), Gather()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default="1,2", help="thread counts, comma-separated (default: 1,2)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring for each case (default: 1)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--csv", help="file for the table")
    arguments = parser.parse_args()

    machine = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{machine}, B=1 H={Attention.heads} d={Attention.head_dim}, times are medians")
    print(f"{'case':58} {'threads':>7} {'ours':>9} {'eager':>9} {'sdpa':>9}   eager/ours  sdpa/ours")
    table = []
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        for case in cases():
            if arguments.only not in case.name:
                continue
            with torch.set_grad_enabled(getattr(case, "backward", False)):
                names = [name for name in ("ours", "eager", "sdpa") if hasattr(case, name)]
                found = measuring.medians({name: case.run(name) for name in names}, arguments.seconds)
            ms = {name: found[name][0] * 1e3 if name in found else None for name in ("ours", "eager", "sdpa")}
            ratio = {name: ms[name] / ms["ours"] if ms[name] else None for name in ("eager", "sdpa")}
            text = {name: f"{value:7.3f}ms" if value else "-" for name, value in ms.items()}
            print(
                f"{case.name:58} {threads:7} {text['ours']:>9} {text['eager']:>9} {text['sdpa']:>9}"
                f"   {ratio['eager']:9.2f}x {ratio['sdpa']:9.2f}x" if ratio["sdpa"] else
                f"{case.name:58} {threads:7} {text['ours']:>9} {text['eager']:>9} {'-':>9}   {ratio['eager']:9.2f}x",
                flush=True,
            )  # fmt: skip
            table.append(
                {"case": case.name, "threads": threads, "runs": found["ours"][1]}
                | {f"{name}_ms": value for name, value in ms.items()}
                | {f"{name}_over_ours": value for name, value in ratio.items()}
            )
    if arguments.csv:
        measuring.write_csv(arguments.csv, table)


if __name__ == "__main__":
    main()
