"""The executor itself: faults that were planted are caught, and what has none passes."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import BACKEND

pytestmark = pytest.mark.skipif(BACKEND == "cpu", reason="make simt")


def run(fault: str) -> torch.Tensor:
    out = torch.zeros(64, dtype=torch.int32)
    torch.ops.flexattn_faults.run(fault, out)
    return out


def test_a_kernel_without_a_fault_passes():
    assert torch.equal(run("none"), (torch.arange(64, dtype=torch.int32) + 1) % 64)
    assert run("none, bytes").view(torch.uint8)[:64].tolist() == list(range(64))
    assert run("none, launches").tolist() == [3] * 32 + [2] * 32


def test_shared_memory_begins_as_nan():
    values = run("unwritten")
    assert values.view(torch.float32).isnan().all() and values.view(torch.float16).isnan().all()
    assert values.view(torch.bfloat16).isnan().all()


@pytest.mark.skipif(BACKEND != "races", reason="memory is watched in the build `races`")
@pytest.mark.parametrize(
    "fault, says",
    [
        ("race", "race: .* byte [0-9]+ of shared memory that thread [0-9]+ of block 0 (wrote|read)"),
        ("reuse", "race: (reads|writes) byte [0-9]+ of shared memory that thread [0-9]+ of block 0 (wrote|read)"),
        ("reader", "race: (reads|writes) byte [0-9]+ of shared memory that thread [0-9]+ of block 0 (wrote|read)"),
        ("overlap", "race: writes byte [0-9]+ of shared memory that thread [01] of block 0 wrote"),
        ("readers of blocks", "race: writes a byte of global memory that thread 0 of block 0 read"),
        ("blocks", "race: writes a byte of global memory that thread 0 of block 0 wrote"),
    ],
)
def test_a_race_is_caught(fault, says):
    with pytest.raises(RuntimeError, match=f"{fault}, block [01], thread [0-9]+: {says}"):
        run(fault)


def test_a_barrier_that_some_threads_miss_is_caught():
    with pytest.raises(RuntimeError, match="barrier, block 0, .* waits for ever at __syncthreads: not all threads reach it"):
        run("barrier")


def test_a_shuffle_that_some_lanes_miss_is_caught():
    with pytest.raises(RuntimeError, match="shuffle, block 0, .*__shfl_xor_sync"):
        run("shuffle")


@pytest.mark.skipif(BACKEND != "sanitizers", reason="AddressSanitizer is in the build `sanitizers`")
@pytest.mark.parametrize("fault", ["shared", "global"])
def test_a_read_out_of_bounds_is_caught(fault):
    code = f"import conftest, torch; torch.ops.flexattn_faults.run({fault!r}, torch.zeros(64, dtype=torch.int32))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.path.dirname(__file__))
    assert done.returncode != 0 and "ERROR: AddressSanitizer" in done.stderr
