"""The benchmarks of a decoding step: what it costs outside of the kernels, and how its keys are cut."""

from __future__ import annotations

import csv
import itertools

import bench_decode
import decode_waves
import pytest

TABLE = list(
    itertools.product(decode_waves.BATCHES, decode_waves.KEY_HEADS, decode_waves.KEYS, decode_waves.MULTIPROCESSORS)
)


@pytest.mark.slow
def test_steps_are_counted_and_written(tmp_path, capsys):
    file = tmp_path / "decode.csv"
    bench_decode.main(["--seconds", "0.01", "--csv", str(file)])
    with open(file, newline="") as opened:
        rows = {row["step"]: row for row in csv.DictReader(opened)}
    for kind in ("growing", "fixed"):
        assert float(rows[f"steady, {kind} pools"]["projected rows per HR layer"]) == 0
        assert float(rows[f"churn, {kind} pools"]["projected rows per HR layer"]) > 0
    assert all(float(row["waits"]) == 1 and float(row["operators per HR layer"]) < 6 for row in rows.values())
    assert "over sdpa" in capsys.readouterr().out


def test_cuts_are_printed_and_written(tmp_path, capsys):
    file = tmp_path / "waves.csv"
    decode_waves.main(["--hr", "100", "--csv", str(file)])
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == len(TABLE) and all(0 < float(row["full now"]) <= 1 for row in rows)
    assert "Blocks of the decode kernel" in capsys.readouterr().out


@pytest.mark.parametrize("hr", [0, 500])
def test_a_call_takes_fewer_steps_than_with_blocks_for_one_gpu(hr):
    """A wave takes as long as its chunk, and 32 keys for the rest of a block. Few heads fill one wave."""
    for batch, kv_heads, keys, multiprocessors in TABLE:
        call = decode_waves.Call(batch, kv_heads, keys, hr, multiprocessors)
        before, now = decode_waves.cut_before(call), decode_waves.cut_now(call)
        assert now.chunk % 64 == 0
        assert now.waves(call) * (now.chunk + 32) <= before.waves(call) * (before.chunk + 32)
        if not hr and call.wave >= 8 * batch * kv_heads:
            assert now.waves(call) == 1


@pytest.mark.parametrize("kv_heads", [32, 16])
def test_a_token_of_a_7b_model_fills_a_v100_in_one_wave(kv_heads):
    """A prompt of 640 and a tenth of the HR tokens: two blocks for each of the 80 multiprocessors, or more."""
    call = decode_waves.Call(batch=1, kv_heads=kv_heads, keys=640, hr=518, multiprocessors=80)
    now = decode_waves.cut_now(call)
    assert now.waves(call) == 1 and now.blocks >= 160
