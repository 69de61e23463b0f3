"""The benchmark of the CPU operators: methods are timed side by side, and the table is written."""

from __future__ import annotations

import csv

import bench_ops
import pytest


@pytest.mark.parametrize(
    "operation, has_sdpa", [("decode N=1 Nk=656 M=512 last row float32", True), ("select_tokens 24 -> 9 -> 72", False)]
)
def test_ratios_are_printed_and_written(tmp_path, capsys, operation, has_sdpa):
    file = tmp_path / "ops.csv"
    bench_ops.main(["--threads", "1", "--seconds", "0.01", "--only", operation, "--csv", str(file)])
    with open(file, newline="") as opened:
        (row,) = csv.DictReader(opened)
    assert row["case"] == operation and float(row["eager_over_ours"]) > 0
    assert bool(row["sdpa_ms"]) == bool(row["sdpa_over_ours"]) == has_sdpa
    assert operation in capsys.readouterr().out
