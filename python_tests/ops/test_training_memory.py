"""Training holds no N x (N+M) matrix: peak resident memory of forward and backward, each in a process of its own."""

from __future__ import annotations

import functools
import sys

import bench_memory
import pytest
from accuracy import assert_as_good_as_eager, floor

N, M, HEADS, HEAD_DIM = 1024, 2592, 8, 64

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")


@functools.cache
def peak(rows: str, way: str) -> int:
    return bench_memory.in_a_process(N, M, rows, HEADS, HEAD_DIM, way)


def results_and_scratch() -> int:
    """Bytes of output and gradients, which any implementation returns, and of one head's sums of key gradients."""
    sequence, high_resolution = N * HEADS * HEAD_DIM * 4, M * HEADS * HEAD_DIM * 4
    return 4 * sequence + 2 * high_resolution + 2 * (sequence + 2 * high_resolution) // HEADS


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["all", "64"])
def test_less_than_half_of_one_heads_matrix_beside_the_results(rows):
    one_heads_matrix = N * (N + M) * 4
    assert peak(rows, "ours") < results_and_scratch() + one_heads_matrix / 2


@pytest.mark.slow
def test_under_15_percent_of_eager():
    """And eager is seen to hold three matrices at once: probabilities, their gradient, and that of the logits."""
    eager = peak("all", "eager")
    assert eager > 3 * HEADS * N * (N + M) * 4
    assert peak("all", "ours") < 0.15 * eager


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["all", "64"])
def test_gradients_equal_the_reference(rows):
    case = bench_memory.TrainingCase(N=256, M=648, rows=rows)
    exact = case.reference_gradients()
    for name, ours, eager, true in zip(bench_memory.NAMES, case.gradients("ours"), case.gradients("eager"), exact):
        assert_as_good_as_eager(ours, eager, true, case.dtype, f"gradient of {name}")


def test_split_and_joined_eager_are_the_same_function():
    case = bench_memory.TrainingCase(N=64, M=96, rows="8")
    for eager, split in zip(case.gradients("eager"), case.gradients("split")):
        assert (eager - split).abs().max() <= floor(case.dtype, eager.abs().max().item())
