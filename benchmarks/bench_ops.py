"""The CPU operators against the same thing in eager torch, as ratios within one run.

    python benchmarks/bench_ops.py [--threads 1,2] [--csv ops.csv] [--only decode]

Eager attention is what a model without these operators would run: all keys in one tensor (sequence and gathered HR keys
concatenated), a mask, matmul, softmax, matmul, and the map from the probabilities. `sdpa` is torch's fused attention on
the same keys and mask; it has no map. Ours and theirs take turns, and the median of each is compared.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from flexattn_cuda import ops

H, D, S = 16, 64, 24
FIRST = 32  # first LR key of the picture


@dataclass
class Attention:
    """One call: N queries at the end of Nk keys, M HR keys, seen by the last row or by all."""

    N: int
    Nk: int
    M: int
    rows: str = "last"
    dtype: torch.dtype = torch.float32
    kv_heads: int = H
    backward: bool = False

    @property
    def name(self) -> str:
        kind = "decode" if self.N == 1 else "prefill"
        kind = "training" if self.backward else kind
        extras = f" Hkv={self.kv_heads}" if self.kv_heads != H else ""
        return f"{kind} N={self.N} Nk={self.Nk} M={self.M} {self.rows} row{'s' * (self.rows == 'all')} {str(self.dtype)[6:]}{extras}"

    def __post_init__(self):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(self.dtype).requires_grad_(self.backward)

        self.q = normal(1, H, self.N, D)
        self.k, self.v = normal(1, self.kv_heads, self.Nk, D), normal(1, self.kv_heads, self.Nk, D)
        self.k_hr, self.v_hr = normal(self.M, self.kv_heads, D), normal(self.M, self.kv_heads, D)
        self.slots = torch.arange(self.M, dtype=torch.int32)[None]
        self.count = torch.tensor([self.M], dtype=torch.int32)
        self.hidden = torch.ones(self.N, self.Nk).tril(self.Nk - self.N) == 0
        self.weight = torch.randn(1, self.N, H, D, generator=generator).to(self.dtype)
        self.leaves = [self.q, self.k, self.v] + ([self.k_hr, self.v_hr] if self.M else [])

    def ours(self):
        hr = dict(k_hr=self.k_hr, v_hr=self.v_hr, hr_slots=self.slots, hr_count=self.count) if self.M else {}
        if self.rows == "all" and self.M:
            hr["hr_from"] = torch.zeros(1, dtype=torch.int32)
        else:
            hr["hr_rows"] = torch.tensor([[self.N - 1]], dtype=torch.int32)
        ranges = torch.tensor([[[FIRST, FIRST + S * S]]], dtype=torch.int32)
        result = ops.hierarchical_attention(self.q, self.k, self.v, **hr, map_ranges=ranges, map_size=S * S)
        return result.out, result.map

    def _heads(self, x):
        return x.repeat_interleave(H // self.kv_heads, 1) if self.kv_heads != H else x

    def _all_keys(self):
        tokens = self.slots[0].long()
        join = lambda seq, pool: torch.cat([seq, pool[tokens].transpose(0, 1)[None]], 2)  # noqa: E731
        return self._heads(join(self.k, self.k_hr)), self._heads(join(self.v, self.v_hr))

    def _softmax(self, q, k, hidden):
        logits = torch.matmul(q, k.transpose(2, 3)) * D**-0.5
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        return logits.softmax(-1, dtype=torch.float32).to(q.dtype)

    def eager(self):
        """Sequence attention for every row; the rows that see HR keys once more over all keys."""
        hidden = None if self.N == 1 else self.hidden
        k, v = self._heads(self.k), self._heads(self.v)
        if self.M and self.rows == "all":
            all_k, all_v = self._all_keys()
            mask = functional.pad(self.hidden, (0, self.M))
            out = torch.matmul(self._softmax(self.q, all_k, mask), all_v)
            plain = self._softmax(self.q[:, :, -1:], k, None)
        else:
            plain = self._softmax(self.q, k, hidden)
            if not self.M or self.N > 1:
                out = torch.matmul(plain, v)
            if self.M:
                all_k, all_v = self._all_keys()
                last = torch.matmul(self._softmax(self.q[:, :, -1:], all_k, None), all_v)
                out = last if self.N == 1 else torch.cat([out[:, :, :-1], last], 2)
        map = plain[:, :, -1, FIRST : FIRST + S * S].detach().float().sum(1)
        return out.transpose(1, 2), map

    def sdpa(self):
        if not self.M:
            out = functional.scaled_dot_product_attention(
                self.q, self._heads(self.k), self._heads(self.v), is_causal=self.N > 1
            )
        elif self.rows == "all" or self.N == 1:
            mask = None if self.N == 1 else ~functional.pad(self.hidden, (0, self.M))
            out = functional.scaled_dot_product_attention(self.q, *self._all_keys(), attn_mask=mask)
        else:
            k, v = self._heads(self.k), self._heads(self.v)
            out = functional.scaled_dot_product_attention(self.q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], is_causal=True)
            last = functional.scaled_dot_product_attention(self.q[:, :, -1:], *self._all_keys())
            out = torch.cat([out, last], 2)
        return out.transpose(1, 2), None

    def run(self, which: str) -> Callable:
        function = getattr(self, which)
        if not self.backward:
            return function
        return lambda: torch.autograd.grad(function()[0], self.leaves, self.weight)


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


def medians(functions: dict[str, Callable], seconds: float) -> dict[str, tuple[float, int]]:
    """Median seconds of each and the number of runs; they take turns, so that a slow moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times["ours"]) < 5:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(found), len(found)) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default="1,2", help="thread counts, comma-separated (default: 1,2)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring for each case (default: 1)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--csv", help="file for the table")
    arguments = parser.parse_args()

    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, B=1 H={H} d={D}, times are medians")
    print(f"{'case':58} {'threads':>7} {'ours':>9} {'eager':>9} {'sdpa':>9}   eager/ours  sdpa/ours")
    table = []
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        for case in cases():
            if arguments.only not in case.name:
                continue
            with torch.set_grad_enabled(getattr(case, "backward", False)):
                names = [name for name in ("ours", "eager", "sdpa") if hasattr(case, name)]
                found = medians({name: case.run(name) for name in names}, arguments.seconds)
            ms = {name: found[name][0] * 1e3 if name in found else None for name in ("ours", "eager", "sdpa")}
            ratio = {name: ms[name] / ms["ours"] if ms[name] else None for name in ("eager", "sdpa")}
            text = {name: f"{value:7.3f}ms" if value else "-" for name, value in ms.items()}
            print(
                f"{case.name:58} {threads:7} {text['ours']:>9} {text['eager']:>9} {text['sdpa']:>9}"
                f"   {ratio['eager']:9.2f}x {ratio['sdpa']:9.2f}x" if ratio["sdpa"] else
                f"{case.name:58} {threads:7} {text['ours']:>9} {text['eager']:>9} {'-':>9}   {ratio['eager']:9.2f}x",
                flush=True,
            )  # fmt: skip
            table.append([case.name, threads, found["ours"][1], ms["ours"], ms["eager"], ms["sdpa"], ratio["eager"], ratio["sdpa"]])
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "threads", "runs", "ours_ms", "eager_ms", "sdpa_ms", "eager_over_ours", "sdpa_over_ours"])
            writer.writerows(table)


if __name__ == "__main__":
    main()
