"""Ranges of operators and model phases: off by default, one switch, and there in a profile when on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile

from flexattn_cuda import ops, profiling


@pytest.fixture
def switched_on():
    profiling.nvtx(True)
    yield
    profiling.nvtx(False)


def names(function) -> list[tuple[str, float, float]]:
    """(name, begin, end) of every range of ours in a profile of the call."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        function()
    return [
        (e.name, e.time_range.start, e.time_range.end) for e in recorded.events() if e.name.startswith("flexattn_cuda")
    ]


def ask():
    model = tiny.flex()
    inputs = {"input_ids": tiny.prompt(4, "image", 9)[None], "pixel_values_hr": tiny.images(1)}
    with torch.no_grad():
        return lambda: tiny.generate(model, steps=3, **inputs)


OPERATORS = ("hierarchical_attention", "select_tokens", "gather_tokens", "assign_slots", "project_hr_kv", "write_hr_kv")


@pytest.mark.slow
def test_phases_are_absent_until_switched_on():
    found = {name for name, *_ in names(ask())}
    assert found == {f"flexattn_cuda::{name}" for name in OPERATORS}


def test_every_phase_of_an_answer_is_named(switched_on):
    ranges = names(ask())
    found = [name for name, *_ in ranges]
    for phase in (
        "encode_images",
        "encode_tiles",
        "lay_out_hr_tokens",
        "prefill",
        "select",
        "project_hr_keys",
        "decode",
    ):
        assert f"flexattn_cuda.{phase}" in found, phase
    assert found.count("flexattn_cuda.prefill") == 1 and found.count("flexattn_cuda.decode") == 2

    begin, end = next((begin, end) for name, begin, end in ranges if name == "flexattn_cuda.prefill")
    inside = {name for name, b, e in ranges if begin <= b and e <= end}
    assert {"flexattn_cuda.select", "flexattn_cuda::hierarchical_attention"} <= inside
    # Tiles are encoded when the selection reaches them: on the way of a layer to its HR keys.
    tiles = [(b, e) for name, b, e in ranges if name == "flexattn_cuda.encode_tiles"]
    projections = [(b, e) for name, b, e in ranges if name == "flexattn_cuda.project_hr_keys"]
    assert all(any(first <= b and e <= last for first, last in projections) for b, e in tiles)


def test_the_answer_is_the_same(switched_on):
    named = ask()()
    profiling.nvtx(False)
    plain = ask()()
    assert torch.equal(named[1], plain[1])


def test_a_phase_ends_when_it_raises_and_hands_the_error_on(switched_on):
    def fails():
        with pytest.raises(ValueError, match="inside"), profiling.phase("failing"):
            raise ValueError("inside")
        with profiling.phase("next"):
            pass

    ranges = {name: (begin, end) for name, begin, end in names(fails)}
    assert ranges["flexattn_cuda.failing"][1] <= ranges["flexattn_cuda.next"][0]


def test_the_decorated_function_keeps_its_name_and_its_result(switched_on):
    @profiling.in_phase("doubling")
    def double(x: int, *, times: int = 2) -> int:
        """Twice."""
        return x * times

    assert (double(4), double(4, times=3), double.__name__, double.__doc__) == (8, 12, "double", "Twice.")
    assert [name for name, *_ in names(lambda: double(1))] == ["flexattn_cuda.doubling"]


def test_compiled_code_has_no_graph_break(switched_on):
    @profiling.in_phase("gather")
    def gather(tokens, index):
        return ops.gather_tokens(tokens, index) * 2

    tokens, index = torch.randn(1, 5, 8), torch.tensor([[3, 0, -1]], dtype=torch.int32)
    compiled = torch.compile(gather, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens, index), gather(tokens, index))


@pytest.mark.slow
@pytest.mark.parametrize("value, on", [("1", "True"), ("0", "False"), ("", "False"), (None, "False")])
def test_the_environment_switches_at_import(value, on):
    environment = {name: text for name, text in os.environ.items() if name != "FLEXATTN_NVTX"}
    if value is not None:
        environment["FLEXATTN_NVTX"] = value
    code = (
        "import torch\nfrom torch.profiler import profile\nfrom flexattn_cuda import profiling\n"
        "with profile() as p:\n    with profiling.phase('x'): torch.ones(1)\n"
        "print(any(e.name == 'flexattn_cuda.x' for e in p.events()))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == on, done.stderr


# -------------------------------------------------------------------------------------------- what a profiler receives

TOOL = r"""
#include <cstdio>
#include <nvtx3/nvToolsExt.h>
// A profiler as NVTX loads it: prints the domains, and the ranges that begin and end.
template <typename Function>
void replace(NvtxFunctionTable table, int which, Function function) {
  *table[which] = reinterpret_cast<NvtxFunctionPointer>(function);
}
nvtxDomainHandle_t create(const char* name) {
  std::printf("domain %s\n", name);
  return reinterpret_cast<nvtxDomainHandle_t>(1);
}
int push(nvtxDomainHandle_t, const nvtxEventAttributes_t* range) {
  std::printf("push %s\n", range->message.ascii);
  return 0;
}
int pop(nvtxDomainHandle_t) { std::printf("pop\n"); return 0; }
extern "C" int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t export_table) {
  auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(export_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table;
  unsigned size;
  callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size);
  replace(table, NVTX_CBID_CORE2_DomainCreateA, create);
  replace(table, NVTX_CBID_CORE2_DomainRangePushEx, push);
  replace(table, NVTX_CBID_CORE2_DomainRangePop, pop);
  return 1;
}
"""
PROGRAM = r"""
#define FLEXATTN_WITH_CUDA
#include "nvtx.h"
using namespace flexattn::torch_binding;
int main() {
  { NvtxRange off("off"); }
  nvtx_switch() = true;
  {
    NvtxRange outer("outer");
    NvtxRange inner("inner");
    nvtx_switch() = false;  // what was begun is ended
  }
}
"""


def test_a_profiler_receives_domain_and_ranges(tmp_path):
    """With the header of a CUDA toolkit, which needs neither its libraries nor a GPU."""
    root = Path(__file__).parents[2]
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), *sorted(Path("/usr/local").glob("cuda-*"))]
    include = next((home / "include" for home in homes if (home / "include/nvtx3/nvToolsExt.h").exists()), None)
    compiler = shutil.which("g++")
    if include is None or compiler is None:
        pytest.skip("no CUDA toolkit with nvtx3, or no g++")
    for name, text, flags in (
        ("tool.so", TOOL, ["-shared", "-fPIC"]),
        ("program", PROGRAM, [f"-I{root}/csrc/torch", "-ldl"]),
    ):
        (tmp_path / f"{name}.cpp").write_text(text)
        subprocess.run(
            [compiler, "-std=c++17", f"-I{include}", "-o", tmp_path / name, tmp_path / f"{name}.cpp", *flags],
            check=True,
        )
    environment = os.environ | {"NVTX_INJECTION64_PATH": str(tmp_path / "tool.so")}
    done = subprocess.run([tmp_path / "program"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == ["domain flexattn_cuda", "push outer", "push inner", "pop", "pop"]
