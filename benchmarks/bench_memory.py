"""Memory of attention in training: peak resident memory of a forward and a backward pass, without the inputs.

    python benchmarks/bench_memory.py [--N 2048] [--M 5184] [--rows all,64] [--csv FILE] [--json FILE]

Each number comes from a process of its own (Linux). `ours` is ops.hierarchical_attention; `eager` holds the N x (N+M)
matrix; `split` is eager too, but holds N x N and, for the rows that see HR keys, R x (N+M), so that it differs from
eager only where few rows see them. Both eager forms are lean: one softmax, scaled queries, a mask applied in place, no
map. The gradients of ours and of eager torch are compared with the float64 reference, a head at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import measuring
import tables
import torch

from flexattn_cuda import ops, reference

WAYS = ("ours", "eager", "split")
NAMES = ("q", "k", "v", "k_hr", "v_hr")


@dataclass
class TrainingCase:
    """N causal queries and keys of one sample, and M HR keys that all rows see, or R rows, each with its own mask.

    rows: "all", or R as a number: these rows are spread over the sequence, and each sees half of the HR keys.
    """

    N: int = 2048
    M: int = 5184
    rows: str = "all"
    heads: int = 8
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        N, M, H, d = self.N, self.M, self.heads, self.head_dim

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(self.dtype)

        self.leaves = [normal(1, H, N, d), normal(1, H, N, d), normal(1, H, N, d), normal(M, H, d), normal(M, H, d)]
        self.grad_out = normal(1, N, H, d)
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
        slots = torch.arange(M, dtype=torch.int32)[None]
        self.options = {"hr_slots": slots, "hr_count": torch.tensor([M], dtype=torch.int32)}
        if self.rows == "all":
            self.listed = torch.arange(N)
            self.hidden_hr = torch.zeros(N, M, dtype=torch.bool)
            self.options["hr_from"] = torch.zeros(1, dtype=torch.int32)
        else:
            R = int(self.rows)
            self.listed = torch.arange(1, R + 1) * N // R - 1
            self.hidden_hr = torch.rand(R, M, generator=generator) < 0.5
            self.options["hr_rows"] = self.listed.to(torch.int32)[None]
            self.options["hr_row_bits"] = ops.pack_bits(~self.hidden_hr)[None]

    # Masks are inputs: they must be made before anything is measured.

    @cached_property
    def hidden_of_all(self) -> torch.Tensor:
        """[N, M + N] bool, for `eager`."""
        hidden = torch.ones(self.N, self.M, dtype=torch.bool)
        hidden[self.listed] = self.hidden_hr
        return torch.cat([hidden, self.hidden], 1)

    @cached_property
    def hidden_of_rows(self) -> torch.Tensor:
        """[R, M + N] bool, for `split`."""
        return torch.cat([self.hidden_hr, self.hidden[self.listed]], 1)

    def _softmax(self, q: torch.Tensor, k: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return ((q * self.head_dim**-0.5) @ k.transpose(2, 3)).masked_fill_(hidden, -torch.inf).softmax(-1)

    def _all_keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        _, k, v, k_hr, v_hr = self.leaves
        return torch.cat([k_hr.transpose(0, 1)[None], k], 2), torch.cat([v_hr.transpose(0, 1)[None], v], 2)

    def ours(self) -> torch.Tensor:
        q, k, v, k_hr, v_hr = self.leaves
        return ops.hierarchical_attention(q, k, v, k_hr=k_hr, v_hr=v_hr, **self.options).out

    def eager(self) -> torch.Tensor:
        keys, values = self._all_keys()
        return (self._softmax(self.leaves[0], keys, self.hidden_of_all) @ values).transpose(1, 2)

    def split(self) -> torch.Tensor:
        if self.rows == "all":
            return self.eager()
        q, k, v = self.leaves[:3]
        keys, values = self._all_keys()
        seeing = self._softmax(q[:, :, self.listed], keys, self.hidden_of_rows) @ values
        plain = self._softmax(q, k, self.hidden) @ v
        return plain.index_copy(2, self.listed, seeing).transpose(1, 2)

    def gradients(self, way: str) -> tuple[torch.Tensor, ...]:
        """Return the gradients of q, k, v, k_hr and v_hr."""
        return torch.autograd.grad(getattr(self, way)(), self.leaves, self.grad_out)

    def reference_gradients(self) -> tuple[torch.Tensor, ...]:
        """Return the same in float64 from `reference.py`, a head at a time."""
        found = []
        for head in range(self.heads):
            at = slice(head, head + 1)
            leaves = [leaf.detach()[:, at].double().requires_grad_() for leaf in self.leaves]
            q, k, v, k_hr, v_hr = leaves
            out = reference.hierarchical_attention(q, k, v, k_hr=k_hr, v_hr=v_hr, **self.options).out
            found.append(torch.autograd.grad(out, leaves, self.grad_out[:, :, at].double()))
        return tuple(torch.cat(parts, 1) for parts in zip(*found))


def peak_bytes(case: TrainingCase, way: str) -> int:
    """Return the peak resident memory of forward and backward without what is there before. Call once per process."""
    if way != "ours":
        _ = case.hidden_of_all, case.hidden_of_rows
    small = TrainingCase(8, 40, "all" if case.rows == "all" else "2", case.heads, case.head_dim, case.dtype)
    small.gradients(way)  # loads what a first call loads
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = _status("VmRSS")
    gradients = case.gradients(way)
    peak = _status("VmHWM") - before
    assert all(gradient.isfinite().all() for gradient in gradients)
    return peak


def _status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def gradient_errors(case: TrainingCase) -> dict[str, dict[str, float]]:
    """Return the max error of each gradient over its max, of ours and of eager torch in the same dtype."""
    exact = case.reference_gradients()
    errors = {}
    for way in ("ours", "eager"):
        pairs = zip(NAMES, case.gradients(way), exact)
        errors[way] = {name: ((found - true).abs().max() / true.abs().max()).item() for name, found, true in pairs}
    return errors


@dataclass(frozen=True)
class Sizes:
    """What is measured. The fields are columns of the table, and arguments of TrainingCase."""

    N: int
    M: int
    rows: str
    heads: int
    head_dim: int


def in_a_process(N: int, M: int, rows: str, heads: int, head_dim: int, what: str) -> Any:
    """Run this file in a process of its own; return the bytes of a way or, with "gradients", their errors."""
    sizes = Sizes(N, M, rows, heads, head_dim)
    command = [sys.executable, __file__, "--one", json.dumps(dataclasses.asdict(sizes)), what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what} at {sizes} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def answer(case: TrainingCase, what: str) -> None:
    """Print what `in_a_process` asks for."""
    torch.set_num_threads(1)
    print(json.dumps(gradient_errors(case) if what == "gradients" else peak_bytes(case, what)))


@dataclass(frozen=True)
class Row:
    sizes: Sizes
    peaks: dict[str, int]  # bytes, by way
    errors: dict[str, dict[str, float]]  # by way and gradient; empty if they were not compared

    def over(self, way: str) -> float:
        return self.peaks["ours"] / self.peaks[way]

    def columns(self) -> dict[str, Any]:
        """Return the row of the CSV file."""
        return {
            **dataclasses.asdict(self.sizes),
            **{f"{way}_bytes": peak for way, peak in self.peaks.items()},
            **{f"ours_over_{way}": self.over(way) for way in WAYS[1:]},
            **{f"{way}_error_{name}": error for way, found in self.errors.items() for name, error in found.items()},
            **measuring.machine("cpu").columns(),
        }

    def cells(self) -> list[str]:
        """Return the row of the printed table."""
        return [
            self.sizes.rows,
            *(f"{self.peaks[way] / 2**20:.1f}" for way in WAYS),
            *(f"{self.over(way):.1%}" for way in WAYS[1:]),
            *(f"{max(self.errors[way].values()):.1e}" if self.errors else "-" for way in WAYS[:2]),
        ]


def measure(sizes: Sizes, gradients: bool) -> Row:
    arguments = dataclasses.astuple(sizes)
    peaks = {way: in_a_process(*arguments, way) for way in WAYS}
    return Row(sizes, peaks, in_a_process(*arguments, "gradients") if gradients else {})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--N", type=int, default=2048, help="queries and sequence keys (default: 2048)")
    parser.add_argument("--M", type=int, default=5184, help="HR keys (default: 5184)")
    parser.add_argument("--heads", type=int, default=8, help="attention heads (default: 8)")
    parser.add_argument("--head-dim", type=int, default=64, help="channels of a head (default: 64)")
    parser.add_argument("--rows", default="all,64",
                        help="rows that see HR keys: all, or a number, comma-separated (default: all,64)")  # fmt: skip
    parser.add_argument("--no-gradients", action="store_true",
                        help="do not compare the gradients with the float64 reference")  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.one:
        answer(TrainingCase(**json.loads(args.one[0])), args.one[1])
        return
    cases = [Sizes(args.N, args.M, rows, args.heads, args.head_dim) for rows in args.rows.split(",")]
    rows = [measure(case, gradients=not args.no_gradients) for case in cases]
    tables.print_table(
        f"Peak memory of forward and backward above the inputs, in MiB; "
        f"float32, N={args.N}, M={args.M}, H={args.heads}, d={args.head_dim}",
        ["rows that see HR", *WAYS, "ours/eager", "ours/split", "gradient error: ours", "eager float32"],
        [row.cells() for row in rows],
    )
    columns = [row.columns() for row in rows]
    if args.csv:
        tables.write_csv(args.csv, columns)
    if args.json:
        args.json.write_text(json.dumps(columns, indent=1) + "\n")


if __name__ == "__main__":
    main()
