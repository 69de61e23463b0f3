"""The GPU benchmark, on the CPU at tiny sizes: every method is called, compared and timed, and errors are found."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import os

import bench_attention
import pytest
import torch
from attention import check as exact
from attention import comparison, methods, plan, results
from attention.case import AttentionCase
from attention.clock import EventClock, PreparedCall
from attention.comparison import About, Comparison, WrongResultError
from attention.methods import METHODS, OURS, VOLTA
from attention.plan import QUICK

from flexattn_cuda import ops


def run(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    code = bench_attention.main(["--device", "cpu", "--quick", "--out", str(tmp_path), *arguments])
    with open(tmp_path / "attention.csv", newline="") as file:
        return code, list(csv.DictReader(file))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything")
    return *run(folder, "--seed", "3", "--all"), folder


@pytest.mark.slow
def test_every_case_is_there_with_the_machine_and_the_seed(everything):
    code, rows, _ = everything
    assert code == 0
    assert {row["case"] for row in rows} == {
        "copy",
        "prefill",
        "decode",
        "select_tokens",
        "gather_tokens",
        "assign_slots",
        "write_hr_kv",
    }
    assert {(row["torch"], row["seed"]) for row in rows} == {(torch.__version__, "3")} and all(
        row["device"] for row in rows
    )
    prefill = {(row["preset"], row["batch"], row["selected"]) for row in rows if row["case"] == "prefill"}
    presets = [("released", "70"), ("paper", "70"), ("released", "0")]
    assert prefill == {(preset, batch, selected) for preset, selected in presets for batch in "12"}
    decode = [row for row in rows if row["case"] == "decode"]
    assert {row["queries"] for row in decode} == {"1"} and {
        row["input_sets"] for row in decode if row["batch"] != "1"
    } == {"2"}
    assert all(int(row["bytes"]) * int(row["input_sets"]) >= QUICK.decode_bytes for row in decode if row["bytes"])


@pytest.mark.slow
@pytest.mark.parametrize("method", [*OURS, "eager", "sdpa math", "flex_attention"])
def test_methods_give_what_the_reference_gives_and_are_timed(everything, method):
    rows = [row for row in everything[1] if row["method"] == method and row["case"] == "prefill"]
    assert len(rows) == 6 and not any(row["note"] for row in rows)
    for row in rows:
        assert float(row["median_us"]) > 0 and int(row["runs"]) >= 5 and float(row["over_ours"]) > 0
        assert 0 < float(row["error_out"]) < 0.02
        assert bool(row["error_map"]) == (method in (*OURS, "eager")), "the others have no map"


@pytest.mark.slow
def test_a_backend_that_does_not_run_says_why(everything):
    rows = [row for row in everything[1] if row["method"] == "sdpa cudnn"]
    assert rows and all(row["note"].startswith("RuntimeError: No ") and not row["median_us"] for row in rows)


def test_methods_that_were_not_timed_are_listed_by_reason():
    rows = [results.Row(About(name, "prefill"), "sdpa cudnn", "no kernel") for name in ("one", "two")]
    assert results.notes(rows) == ["not timed: sdpa cudnn on one; two: no kernel"]


def spoil(monkeypatch, which: str, value: float) -> None:
    """hierarchical_attention gives one element that is off by a value."""
    right = ops.hierarchical_attention

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        changed = getattr(result, which).clone()  # the backward pass needs the output as it was
        changed[0, 0, 0, 0] += value
        return result._replace(**{which: changed})

    monkeypatch.setattr(ops, "hierarchical_attention", wrong)


def test_a_wrong_result_is_not_timed_and_fails(tmp_path, monkeypatch, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("no triton here\nand more")

    spoil(monkeypatch, "out", float("nan"))
    monkeypatch.setattr(methods, "compiled_flex_attention", no_compiler)
    code, rows = run(tmp_path)
    assert {row["note"] for row in rows if row["method"] == "flex_attention"} == {"RuntimeError: no triton here"}
    ours = [row for row in rows if row["method"] in OURS and row["case"] in ("prefill", "decode")]
    assert (
        code == 1
        and ours
        and all("the output is wrong: error nan" in row["note"] and not row["median_us"] for row in ours)
    )
    assert any(row["median_us"] for row in rows if row["method"] == "eager")
    assert f"{len(ours)} of ours wrong" in capsys.readouterr().out


@pytest.mark.parametrize("which", ["out", "map"])
@pytest.mark.parametrize("value", [float("nan"), 0.5])
def test_the_check_finds_a_wrong_element(monkeypatch, capsys, which, value):
    spoil(monkeypatch, which, value)
    assert bench_attention.main(["--device", "cpu", "--quick", "--check"]) == 1
    assert capsys.readouterr().err.count(" is wrong: error ") == 16


def test_a_wrong_selection_fails(monkeypatch, capsys):
    right = ops.select_tokens
    monkeypatch.setattr(
        ops, "select_tokens", lambda *a, **o: (result := right(*a, **o))._replace(count=result.count + 1)
    )
    assert bench_attention.main(["--device", "cpu", "--quick", "--check"]) == 1
    assert "select_tokens, ours: it differs from the reference" in capsys.readouterr().err


def test_check_compares_every_kernel_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench_attention.main(["--device", "cpu", "--quick", "--check"]) == 0
    assert "22 calls compared, 0 wrong" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_limit_leaves_the_rest_out(tmp_path, capsys):
    code, rows = run(tmp_path, "--seconds", "0")
    assert code == 0 and {row["note"] for row in rows if row["name"] != "copy"} == {
        "left out, the limit of 0 s was reached"
    }
    assert "prefill released B=1 M=70" in capsys.readouterr().out


def test_a_gpu_that_is_too_small_leaves_a_case_out(tmp_path, monkeypatch):
    def too_small(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(exact, "exact_attention", too_small)
    code, rows = run(tmp_path)
    assert code == 0
    assert {row["note"] for row in rows if row["name"].startswith(("prefill", "decode"))} == {
        "left out, the GPU's memory is too small"
    }


def test_no_gpu_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_attention.main([]) == 2
    assert capsys.readouterr().err == "bench_attention: torch sees no GPU on this machine.\n"


def attention_case(queries: int, batch: int = 1) -> AttentionCase:
    return plan.Plan(QUICK, "cpu", 0, (), seed=0).case(queries, 40, 5, batch)


@pytest.mark.parametrize("before", [None, "80"])
def test_the_v100s_kernels_are_chosen_during_the_call_alone(monkeypatch, before):
    monkeypatch.delenv("FLEXATTN_CAPABILITY", raising=False)
    if before:
        monkeypatch.setenv("FLEXATTN_CAPABILITY", before)
    case = attention_case(20)
    seen = []
    case.ours = lambda: seen.append(os.environ["FLEXATTN_CAPABILITY"])
    methods.methods_of([case], native=90)[VOLTA][0]()
    assert seen == ["70"] and os.environ.get("FLEXATTN_CAPABILITY") == before


@pytest.mark.parametrize("queries, native, there", [(20, 90, True), (20, 70, False), (1, 90, False)])
def test_the_v100s_kernels_take_part_where_they_differ(queries, native, there):
    compared = plan.compare_attention([attention_case(queries)], About("a case", "prefill"), native, flex=False)
    assert (VOLTA in compared.methods) == there
    assert list(compared.methods) == [method for method in METHODS if method in compared.methods]


def test_keys_of_the_peers_are_put_together_ahead():
    """So that no call is timed with it, whichever set of inputs it comes to first."""
    case = attention_case(1, batch=2)
    assert case.all_keys()[0] is case.all_keys()[0] and case.all_keys()[0].shape == (2, 2, 45, 64)
    case = dataclasses.replace(case, joined=False)
    assert case.all_keys()[0] is not case.all_keys()[0]


@pytest.mark.parametrize("error", [0.02, float("nan"), float("inf")])
def test_what_rounding_does_not_explain_is_wrong(error):
    exact = torch.ones(3, dtype=torch.float64)
    assert comparison.max_error("it", exact.half() + 2**-10, exact, magnitude=1.0, roundings=1) == 2**-10
    with pytest.raises(WrongResultError, match="it is wrong: error"):
        comparison.max_error("it", exact.half() + error, exact, magnitude=1.0, roundings=1)


def test_a_peer_that_cannot_be_compiled_has_its_reason():
    def broken(method, call):
        raise TypeError("no triton here\nand more")

    checked = comparison.check(Comparison(About("a case", "prefill"), {"flex_attention": [print]}, broken, 0))
    assert not checked.errors and checked.reasons == {"flex_attention": "TypeError: no triton here"}
    with pytest.raises(TypeError, match="no triton"):
        comparison.check(Comparison(About("a case", "prefill"), {"eager": [print]}, broken, 0))


def test_the_clock_waits_until_a_call_is_queued_before_the_gpu_comes_to_it(monkeypatch):
    """Launches that the GPU has to wait for are measured again behind twice the reads."""
    reads, calls, waits = [], [], iter([True, True, False])

    class Event:
        def __init__(self, enable_timing):
            pass

        record = synchronize = lambda self: None
        query = lambda self: next(waits)  # noqa: E731
        elapsed_time = lambda self, end: 250.0  # noqa: E731

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = EventClock.__new__(EventClock)
    clock.buffer = type("Buffer", (), {"sum": lambda self: reads.append(1)})()
    prepared = PreparedCall(lambda: calls.append("call"), lambda: calls.append("before"))
    assert clock(prepared) == 0.25
    assert len(reads) == 1 + 2 + 4 and calls == ["before", "call"] * 3


def test_inputs_are_gone_through_in_turn():
    said = []
    turn = results.in_turn([lambda: said.append("a"), lambda: said.append("b")])
    for _ in range(3):
        turn()
    assert said == ["a", "b", "a"]


@pytest.mark.slow
def test_images_where_there_is_matplotlib(everything):
    *_, folder = everything
    drawn = {path.name for path in folder.glob("*.png")}
    assert drawn == ({"prefill.png", "decode.png"} if importlib.util.find_spec("matplotlib") else set())
