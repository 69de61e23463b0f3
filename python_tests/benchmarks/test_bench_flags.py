"""The native driver reads its flags, and refuses with one sentence what it cannot time. (Its kernels need a GPU.)"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
PROGRAM = r"""
#include <cstdio>
#include "bench/flags.h"
int main(int count, char** words) try {
  const auto f = flexattn::bench::parse(count, words);
  std::printf("%s %lld %lld %lld %d %d %s", f.op.c_str(), (long long)f.kv_heads, (long long)f.keys,
              (long long)f.selected, f.cold_l2, f.profile, f.dtype.c_str());
} catch (const std::invalid_argument& error) { std::printf("%s", error.what()); return 1; }
"""


@pytest.fixture(scope="module")
def parse(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("flags")
    (folder / "main.cpp").write_text(PROGRAM)
    subprocess.run([compiler, "-std=c++17", f"-I{CSRC}", "-o", folder / "parse", folder / "main.cpp"], check=True)

    def run(line: str) -> tuple[int, str]:
        done = subprocess.run([folder / "parse", *line.split()], capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "line, read",
    [
        ("attention", "attention 32 640 576 0 0 fp16"),
        ("attention --queries 700 --heads 8", "attention 8 700 576 0 0 fp16"),
        (
            "--cold-l2 attention --kv-heads 4 --queries 1 --keys 3000 --profile --dtype bf16",
            "attention 4 3000 576 1 1 bf16",
        ),
        ("attention --queries 5 --lr-side 0 --selected 0 --cold-l2 --warm-l2", "attention 32 5 0 0 0 fp16"),
        ("gather --selected 5184", "gather 32 640 5184 0 0 fp16"),
        ("write --kv-heads 8 --selected 52", "write 8 640 52 0 0 fp16"),
    ],
)
def test_flags_are_read_and_defaults_follow_them(parse, line, read):
    assert parse(line) == (0, read)


@pytest.mark.parametrize(
    "line, said",
    [
        ("", "name what to time: attention, select, gather, assign or write."),
        ("gatherr", "the operator is 'gatherr', allowed: attention, select, gather, assign, write."),
        ("attention --dtype fp64", "--dtype is 'fp64', allowed: fp16, bf16, fp32."),
        ("attention --querys 3", "there is no flag --querys; --help lists them."),
        ("attention select", "there is no flag select; --help lists them."),
        ("attention --queries", "--queries needs a value."),
        ("attention --queries 3x", "--queries is '3x', it must be a number."),
        ("attention --queries 0", "--queries is 0, it must be at least 1."),
        ("attention --keys 5", "--keys is 5, it must be at least 640."),
        ("attention --kv-heads 5", "--heads must be a multiple of --kv-heads."),
        ("attention --queries 5", "--lr-side 24 takes 576 of the keys and there are 5; --lr-side 0 asks for no map."),
        ("assign --selected 0", "--selected must be at least 1 for assign."),
        ("write --head-dim 5", "--head-dim must be even for write."),
        ("attention --window -1", "--window is -1, it must be at least 0."),
        ("attention --softcap -1", "--softcap must not be negative."),
        ("attention --bidirectional 641", "--bidirectional must not be more than --keys."),
        ("select --hr-side 46341", "--hr-side is 46341, it must be at most 46340."),
        ("gather --selected 5185", "--selected is more than the hr-side x hr-side tokens."),
    ],
)
def test_what_cannot_be_timed_is_one_sentence(parse, line, said):
    assert parse(line) == (1, said)
