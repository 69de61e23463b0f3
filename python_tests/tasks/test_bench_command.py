"""`flexattn bench`: what each row measures, and input that cannot be used. No time is asserted."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys

import pytest
import tiny_checkpoint
import torch
from refusals import refused

from flexattn_cuda.analysis import flops
from flexattn_cuda.analysis.forced import in_tiles
from flexattn_cuda.analysis.measuring import Meter
from flexattn_cuda.errors import InputError
from flexattn_cuda.mechanism.config import SYSTEMS
from flexattn_cuda.tasks import bench
from flexattn_cuda.tasks.options import BenchOptions

SMALL = dict(device="cpu", text_tokens=7, new_tokens=2, repetitions=2)


@pytest.fixture
def config_alone(tmp_path):
    """A folder with the configuration of a small model and no weights."""
    tiny_checkpoint.config().save_pretrained(tmp_path / "shape")
    return tmp_path / "shape"


def measured(**options) -> list[bench.Row]:
    """Measure in this process."""
    return [bench.measure(case) for case in bench.prepare_bench(BenchOptions(**SMALL | options)).cases]


def test_every_system_is_measured_with_random_weights(config_alone):
    prepared = bench.prepare_bench(BenchOptions(**SMALL, model=str(config_alone)))
    assert prepared.random
    rows = {case.system: bench.measure(case) for case in prepared.cases}
    assert tuple(rows) == SYSTEMS
    for row in rows.values():
        assert min(row.prompt_s, row.token_s, row.answers_per_s, row.tokens_per_s) > 0
        assert row.answers_per_s == pytest.approx(1 / (row.prompt_s + 2 * row.token_s))
        assert row.peak_mib * 2**20 > 100 * 2**20  # Python and torch themselves
    # Pools of 3 x 3 cells, of which each has 36 of 324 tokens: random and center choose one in every layer.
    chosen = {system: (row.selected, row.tiles) for system, row in rows.items()}
    assert chosen["center"] == (36, 1) and chosen["random"][0] == 36
    assert chosen["flexattn"] == (round(0.43 * 324), 9) and chosen["flexattn-paper"] == (32, 9)
    assert chosen["llava"] == chosen["hd"] == chosen["xattn"] == (None, None)
    assert rows["hd"].positions > rows["xattn"].positions == rows["llava"].positions == 7 + 36


def test_tokens_are_selected_as_asked_for_whatever_the_maps_say(config_alone):
    [row] = measured(model=str(config_alone), systems="flexattn", selected=50, tiles=2, batch_size=3)
    assert (row.selected, row.tiles) == (50, 2)
    tokens = in_tiles(50, 2, side=18, zoom=3)
    assert len(tokens.unique()) == 50 and bool((tokens // 18 < 6).all()) and bool((tokens % 18 < 12).all())


def test_resolutions_are_measured_where_a_system_has_several(config_alone):
    options = BenchOptions(**SMALL, model=str(config_alone), systems="llava,flexattn,hd", zooms="4, 2")
    cases = bench.prepare_bench(options).cases
    assert [(one.system, bench._empty(one).side) for one in cases] == [
        ("llava", 48), ("flexattn", 96), ("flexattn", 192), ("hd", 64),
    ]  # fmt: skip


def test_throughput_is_that_of_the_batch(config_alone):
    [row] = measured(model=str(config_alone), systems="llava", batch_size=3)
    assert row.tokens_per_s == pytest.approx(3 / row.token_s)


def test_a_row_without_memory_leaves_the_others(config_alone, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(bench, "random_model", full)
    [row] = measured(model=str(config_alone), systems="llava")
    assert row.failure == "does not fit into the memory" and row.prompt_s is None


def test_logits_that_are_not_finite_are_refused(config_alone, monkeypatch):
    real = bench.random_model

    def broken(*arguments):
        model = real(*arguments)
        torch.nn.init.constant_(model.lm_head.weight, torch.nan)
        return model

    monkeypatch.setattr(bench, "random_model", broken)
    with pytest.raises(InputError, match="NaN or infinite in torch.float32; choose another --dtype"):
        measured(model=str(config_alone), systems="llava")


READING = """
import torch
from flexattn_cuda.analysis.measuring import Meter

reading = Meter("cpu")(lambda: torch.ones(64 * 2**20, dtype=torch.uint8)[:1].clone())
print(reading.peak_bytes, reading.extra_bytes, reading.seconds > 0, reading.logits.tolist())
"""


def test_a_reading_holds_the_memory_that_a_call_takes_at_its_peak():
    # In a process of its own, as rows are measured: an older one gives memory that it holds already.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", READING], capture_output=True, text=True, check=True)
    peak, extra, *rest = done.stdout.split()
    size = 63 * 2**20  # the kernel counts pages of several threads late
    assert size <= int(extra) < 2 * size and int(peak) > int(extra)
    assert rest == ["True", "[1]"]


def test_a_meter_waits_for_the_gpu_before_and_after_a_call(monkeypatch):
    calls = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 8)
    reading = Meter("cuda:0")(lambda: calls.append("call"))
    assert calls == ["reset_peak_memory_stats", "synchronize", "call", "synchronize"]
    assert (reading.peak_bytes, reading.extra_bytes) == (8, 5)


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_csv_and_plot(flexattn, config_alone, tmp_path):
    pytest.importorskip("matplotlib")
    files = ("--csv", tmp_path / "bench.csv", "--plot", tmp_path / "bench.png")
    sizes = ("--text-tokens", 7, "--new-tokens", 2, "--repetitions", 1, "--threads", 1, "--device", "cpu")
    code, out, err = flexattn("bench", "--model", config_alone, "--systems", "llava,flexattn", *sizes, *files)
    assert code == 0 and "random weights in float32" in out and f"wrote {tmp_path / 'bench.png'}" in err
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    llava, flex = csv.DictReader((tmp_path / "bench.csv").open())
    assert (llava["system"], llava["selected"], flex["system"], flex["selected"]) == ("llava", "", "flexattn", "139")
    assert (flex["weights"], flex["dtype"], flex["threads"], flex["failure"]) == ("random", "float32", "1", "")
    counted = flops.count(tiny_checkpoint.config(), 7, selected=139)
    assert float(flex["prompt_tflops"]) == pytest.approx(sum(counted.values()) / 1e12)
    assert float(flex["tflop_per_s"]) == pytest.approx(float(flex["prompt_tflops"]) / float(flex["prompt_s"]))


def test_a_checkpoint_is_measured_with_its_weights(checkpoint, tmp_path):
    case = bench.prepare_bench(BenchOptions(**SMALL, model=str(checkpoint), systems="flexattn")).cases[0]
    assert case.weights == checkpoint and bench.measure(case).token_s > 0
    shutil.copyfile(checkpoint / "config.json", tmp_path / "config.json")
    assert bench.prepare_bench(BenchOptions(**SMALL, model=str(tmp_path))).random


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--systems", "llava,best"], "no system 'best'"),
        (["--shape", "70b"], "7b, 13b"),
        (["--shape", "7b", "--model", "x"], "--model and --shape exclude each other"),
        (["--model", "nowhere"], "no checkpoint 'nowhere'"),
        (["--zooms", "2,x"], "zooms is '2,x'; it must be whole numbers, separated by commas"),
        (["--zooms", "0"], "the zoom is 0; it must be at least 1"),
        (["--selected", 5000], "5000 selected tokens of an image that has 1296"),
        (["--selected", 200, "--tiles", 1], "200 selected tokens do not fit into 1 tiles of 144 tokens each"),
        (["--new-tokens", 0], "new tokens is 0; it must be at least 1"),
        (["--new-tokens", 999], "are too long for the model, which has 512 positions; choose fewer"),
        (["--device", "tpu"], "the device is 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
        (["--dtype", "int8"], "the dtype is 'int8'; allowed: auto, float32"),
        (["--csv", "no/such/bench.csv"], "cannot be written: there is no folder no/such"),
        (["--plot", "bench.docx"], "must end in"),
    ],
)
def test_bad_input_of_bench_is_told_in_one_sentence(flexattn, arguments, said):
    assert said in refused(flexattn("bench", *arguments))
