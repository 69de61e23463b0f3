"""The executor itself: planted faults are caught, sound kernels pass, and memory accesses cost what they should."""

import ctypes
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from backend import BACKEND

from flexattn_cuda import ops

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(BACKEND == "cpu", reason="make simt")


watches_memory = pytest.mark.skipif(BACKEND != "races", reason="memory is watched in the build `races`")


def run(fault: str, size: int = 0) -> torch.Tensor:
    out = torch.zeros(64, dtype=torch.int32)
    out[0] = size
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


@watches_memory
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


@watches_memory
@pytest.mark.parametrize("fault", ["after a shuffle", "after a vote", "after an mma", "after an ldmatrix"])
def test_no_collective_but_syncwarp_orders_memory(fault):
    assert run("after __syncwarp")[:32].tolist() == [*range(1, 32), 0]
    with pytest.raises(RuntimeError, match=f"{fault}, .* race: .* shared memory .* nothing between that orders them"):
        run(fault)


@watches_memory
@pytest.mark.parametrize("first, then", [("written", "read by ldmatrix"), ("read by ldmatrix", "written")])
def test_rows_of_ldmatrix_belong_to_other_lanes_too(first, then):
    run(f"{first}, ordered, {then}")
    with pytest.raises(RuntimeError, match=f"{first}, {then}, block 0, .* race: .* nothing between that orders them"):
        run(f"{first}, {then}")


@watches_memory
@pytest.mark.parametrize(
    "fault, says",
    [
        ("read in flight", "reads byte .* copies to by a cp.async that it has not waited for"),
        ("write in flight", "writes byte .* copies to by a cp.async that it has not waited for"),
        ("no barrier", "reads byte .* (wrote|copies to by a cp.async)"),
        ("too early", "(writes byte .* read|reads byte .* (wrote|copies to by a cp.async))"),
    ],
)
def test_what_cp_async_writes_is_nobodys_until_it_was_waited_for_and_passed_on(fault, says):
    assert run("copy").tolist() == [4] * 64
    with pytest.raises(RuntimeError, match=f"copy, {fault}, block 0, .* race: {says}"):
        run(f"copy, {fault}")


@watches_memory
@pytest.mark.parametrize(
    "fault, bytes_", [("read 16", 16), ("read 8", 8), ("read 4", 4), ("write 16", 16), ("write 8", 8), ("write 2", 2)]
)
def test_a_vector_at_an_address_that_is_not_aligned_to_its_size_is_caught(fault, bytes_):
    with pytest.raises(RuntimeError, match=f"misaligned: {fault.split()[0]}s .* not a multiple of {bytes_} bytes"):
        run(fault)


@pytest.mark.parametrize(
    "fault, says", [("copy to", "cp.async to"), ("copy from", "cp.async from"), ("ldmatrix", "ldmatrix of")]
)
def test_copies_and_matrices_must_be_aligned_to_16_bytes(fault, says):
    run("copy, aligned")
    with pytest.raises(RuntimeError, match=f"misaligned: {says} an address that is not a multiple of 16 bytes"):
        run(fault)


def test_a_barrier_that_some_threads_miss_is_caught():
    with pytest.raises(
        RuntimeError, match="barrier, block 0, .* waits forever at __syncthreads: not all threads reach it"
    ):
        run("barrier")


def test_a_shuffle_that_some_lanes_miss_is_caught():
    with pytest.raises(RuntimeError, match="shuffle, block 0, .*__shfl_xor_sync"):
        run("shuffle")


@pytest.mark.skipif(BACKEND != "sanitizers", reason="AddressSanitizer is in the build `sanitizers`")
@pytest.mark.parametrize("fault", ["shared", "global"])
def test_a_read_out_of_bounds_is_caught(fault):
    paths = [str(TESTS), str(TESTS / "support")]
    code = (
        f"import sys; sys.path[:0] = {paths!r}; import conftest, torch; "
        f"torch.ops.flexattn_faults.run({fault!r}, torch.zeros(64, dtype=torch.int32))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "ERROR: AddressSanitizer" in done.stderr


@pytest.mark.parametrize(
    "capability, kilobytes", [(60, 48), (70, 96), (75, 64), (80, 163), (86, 99), (89, 99), (90, 227)]
)
def test_shared_memory_ends_where_it_does_on_the_device(capability, kilobytes, monkeypatch):
    monkeypatch.setenv("FLEXATTN_CAPABILITY", str(capability))
    run("shared bytes", kilobytes * 1024)
    with pytest.raises(RuntimeError, match="shared bytes: invalid argument"):
        run("shared bytes", kilobytes * 1024 + 16)


@pytest.mark.parametrize(
    "fault, says",
    [
        ("no opt-in", "no opt-in cannot be launched: 49168 bytes of dynamic shared memory, of which it may have 49152"),
        ("threads", "threads cannot be launched: a block of 1056 x 1 x 1 threads"),
        ("grid x", "grid x cannot be launched: a grid of 2147483648 x 1 x 1 blocks"),
        ("grid y", "grid y cannot be launched: a grid of 1 x 65536 x 1 blocks"),
        ("grid z", "grid z cannot be launched: a grid of 1 x 1 x 65536 blocks"),
        ("blocks beyond 32 bits", "needs 4294967297 blocks, a launch has at most 2147483647: use smaller tensors"),
    ],
)
def test_a_launch_beyond_the_limits_is_refused(fault, says):
    with pytest.raises(RuntimeError, match=says):
        run(fault)


QUERIES, KEYS, POOL, SELECTED, MAP_SIZE = 32, 96, 10, 6, 4  # as in bad_values.cu
PASSES = {
    "one query": {"queries": 1, "of": "forward"},
    "many queries": {"queries": QUERIES, "of": "forward"},
    "many queries in float32": {"queries": QUERIES, "of": "forward in float32"},
    "gradients": {"queries": QUERIES, "of": "gradients"},
    "gradients of keys": {"queries": QUERIES, "of": "gradients of keys"},
}


def call_with(argument: str, index: int, value: int, listed: bool, queries: int, of: str) -> None:
    torch.ops.flexattn_faults.bad_value(argument, index, value, queries, listed, of)


@pytest.mark.parametrize("capability", [60, 70, 90])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("listed", [False, True])
def test_index_values_at_their_limits_pass_on_the_device(which, capability, listed, monkeypatch):
    monkeypatch.setenv("FLEXATTN_CAPABILITY", str(capability))
    call_with("", 0, 0, listed, **PASSES[which])


@pytest.mark.parametrize("capability", [60, 70, 90])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(
    "argument, index, value, says",
    [
        ("kv_start", 1, -1, f"kv_start is -1, it must lie in 0 to {KEYS}"),
        ("kv_start", 1, KEYS + 1, f"kv_start is {KEYS + 1}, it must lie in 0 to {KEYS}"),
        ("kv_len", 0, 0, f"kv_len is 0, it must lie in [0-9]+ to {KEYS}"),
        ("kv_len", 1, KEYS + 1, f"kv_len is {KEYS + 1}, it must lie in [0-9]+ to {KEYS}"),
        ("hr_count", 1, -1, f"hr_count is -1, it must lie in 0 to {SELECTED}"),
        ("hr_count", 1, SELECTED + 1, f"hr_count is {SELECTED + 1}, it must lie in 0 to {SELECTED}"),
        ("hr_slots", 2 * SELECTED - 1, -1, f"hr_slots is -1, it must lie in 0 to {POOL - 1}"),
        ("hr_slots", 2 * SELECTED - 1, 10**9, f"hr_slots is {10**9}, it must lie in 0 to {POOL - 1}"),
        ("hr_from", 1, -1, "hr_from is -1, it must lie in 0 to [0-9]+"),
        ("hr_from", 1, QUERIES + 1, f"hr_from is {QUERIES + 1}, it must lie in 0 to [0-9]+"),
        ("hr_rows", 5, -2, "hr_rows is -2, it must lie in -1 to [0-9]+"),
        ("hr_rows", 5, QUERIES, f"hr_rows is {QUERIES}, it must lie in -1 to [0-9]+"),
        ("bidirectional_ranges", 2, 11, "bidirectional_ranges is 11, it must lie in 12 to 24"),  # overlaps the first
        (
            "bidirectional_ranges",
            7,
            KEYS + 1,
            f"bidirectional_ranges is {KEYS + 1}, it must lie in {KEYS - 8} to {KEYS}",
        ),
        ("map_ranges", 0, -1, f"map_ranges is -1, it must lie in 0 to {KEYS}"),
        ("map_ranges", 7, KEYS + 1, f"map_ranges is {KEYS + 1}, it must lie in {KEYS - MAP_SIZE} to {KEYS}"),
        ("map_ranges", 1, 2 * MAP_SIZE, f"map_ranges is {2 * MAP_SIZE}, it must lie in 0 to {MAP_SIZE}"),
        ("map_ranges", 1, MAP_SIZE - 1, f"a length in map_ranges is {MAP_SIZE - 1}, it must lie in {MAP_SIZE} to"),
    ],
)
def test_a_bad_index_value_is_refused_on_the_device(
    argument, index, value, says, which, capability, monkeypatch, capfd
):
    if argument == "map_ranges" and which.startswith("gradients"):
        pytest.skip("the map has no gradient")
    monkeypatch.setenv("FLEXATTN_CAPABILITY", str(capability))
    for listed in {"hr_from": [False], "hr_rows": [True]}.get(argument, [False, True]):
        with pytest.raises(RuntimeError, match="hierarchical_attention.*: __trap"):
            call_with(argument, index, value, listed, **PASSES[which])
        ctypes.CDLL(None).fflush(None)  # what the kernel printed
        assert re.search(f"flexattn_cuda::hierarchical_attention: {says}", capfd.readouterr().out)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lr_grid", "lr_grid is 4, it must lie in 0 to 3"),
        ("hr_grid", "hr_grid is -1, it must lie in 0 to 9"),
        ("pool_grid", "pool_grid is 0, it must lie in 1 to 3"),
        ("valid_rect", "valid_rect is 4, it must lie in 0 to 3"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_on_the_device(argument, message, capfd):
    with pytest.raises(RuntimeError, match="select_tokens.*: __trap"):
        run(f"select {argument}")
    ctypes.CDLL(None).fflush(None)  # what the kernel printed
    assert f"select_tokens: {message}" in capfd.readouterr().out


# ---------------------------------------------------------------------------------------------------- counted accesses

counts_accesses = pytest.mark.skipif(BACKEND != "races", reason="accesses are counted in the build `races`")
UNITS = {"LDS": "wavefronts", "STS": "wavefronts", "LDG": "sectors", "STG": "sectors"}


@contextmanager
def counting():
    """(kind, bytes of a lane) -> (instructions, wavefronts or sectors, ideal) of what runs meanwhile."""
    found = defaultdict(Counter)
    torch.ops.flexattn_access_counts.start()
    yield found
    for entry in json.loads(torch.ops.flexattn_access_counts.json()):
        found[entry["kind"], entry["width"]].update(
            instructions=entry["instructions"], units=entry[UNITS[entry["kind"]]], ideal=entry["ideal"]
        )
    for key, total in found.items():
        found[key] = (total["instructions"], total["units"], total["ideal"])


def counts_of(pattern: str, stride: int = 0) -> dict:
    with counting() as found:
        torch.ops.flexattn_patterns.run(pattern, stride, torch.zeros(4096, dtype=torch.uint8))
    return found


@counts_accesses
@pytest.mark.parametrize("layout, wavefronts", [("swizzled", 4), ("padded", 8), ("plain", 32)])
def test_rows_of_keys_take_the_wavefronts_of_their_layout(layout, wavefronts):
    """The 16 chunks of a row, a chunk at a time: permuted as by mma_volta.cuh, rows padded by 8 halves, plain rows."""
    assert counts_of(layout)["LDS", 16] == (16, 16 * wavefronts, 16 * 4)


@counts_accesses
@pytest.mark.parametrize(
    "access, width, stride, wavefronts, ideal",
    [
        ("LDS.32", 4, 4, 1, 1),
        ("LDS.32", 4, 8, 2, 1),
        ("LDS.32", 4, 128, 32, 1),
        ("LDS.32", 4, 132, 1, 1),  # a word of padding for each row
        ("LDS.32", 4, 0, 1, 1),  # one word for all
        ("LDS.U16", 2, 2, 1, 1),  # two lanes to a word
        ("LDS.U16", 2, 64, 16, 1),
        ("LDS.64", 8, 8, 2, 2),
        ("LDS.64", 8, 16, 4, 2),
        ("LDS.128", 16, 16, 4, 4),
        ("LDS.128", 16, 32, 8, 4),
        ("STS.32", 4, 4, 1, 1),
        ("STS.32", 4, 128, 32, 1),
        ("STS.64", 8, 8, 2, 2),
        ("STS.128", 16, 16, 4, 4),
        ("STS.128", 16, 128, 32, 4),
    ],
)
def test_strides_in_shared_memory_take_the_wavefronts_of_their_banks(access, width, stride, wavefronts, ideal):
    assert counts_of(access, stride)[access[:3], width] == (1, wavefronts, ideal)


@counts_accesses
@pytest.mark.parametrize(
    "access, width, stride, sectors, ideal",
    [
        ("STG.32", 4, 4, 4, 4),
        ("STG.32", 4, 8, 8, 4),
        ("STG.32", 4, 128, 32, 4),
        ("STG.128", 16, 16, 16, 16),
        ("STG.128", 16, 32, 32, 16),
    ],
)
def test_strides_in_global_memory_take_their_sectors(access, width, stride, sectors, ideal):
    assert counts_of(access, stride) == {("STG", width): (1, sectors, ideal)}, (
        "arguments and threadIdx are no memory of the GPU"
    )


@counts_accesses
def test_lanes_are_together_at_their_nth_access_and_apart_across_a_collective():
    assert counts_of("triangle")["LDS", 4] == (31, 31, 31)
    assert counts_of("turns")["LDS", 4] == (2, 2, 2)


@counts_accesses
def test_nothing_is_counted_when_it_was_not_asked_for():
    torch.ops.flexattn_patterns.run("plain", 0, torch.zeros(4096, dtype=torch.uint8))
    with counting() as found:
        pass
    assert found == {}


@counts_accesses
@pytest.mark.parametrize("d", [64, 96, 128])
def test_tiles_of_the_volta_kernel_are_read_and_written_16_bytes_at_a_time_without_conflicts(d, monkeypatch):
    monkeypatch.setenv("FLEXATTN_CAPABILITY", "70")
    q, k, v = (torch.randn(1, 1, 64, d).half() for _ in range(3))
    with counting() as found:
        ops.hierarchical_attention(q, k, v)
    loads = 4 * 2 * d // 2  # 4 warps read d / 2 times 16 bytes of K and V
    stores = 3 * 64 * d // 8 // 32  # a tile of K and of V, and the last row of K in place of a tile after it
    assert found["LDS", 16] == (loads, 4 * loads, 4 * loads)
    assert found["STS", 16] == (stores, 4 * stores, 4 * stores)
    assert found["LDG", 16][1] == found["LDG", 16][2] + 4 * d // 8 * 8, "only the query's rows are read by half sectors"
    assert {kind for kind in found if kind[1] in (1, 2)} == set()
    # The interval of keys that each row sees: written once, read by the lanes that mask its only tile or clear it. And
    # where keys, values and slots lie: written by a thread, two of them read for each tile of keys or values.
    assert found["STS", 8][0] <= 2 + 3 and found["LDS", 8][0] <= 4 * (2 + 2 + 2 * 3)


@counts_accesses
@pytest.mark.parametrize("heads, kv_heads, d", [(32, 32, 128), (16, 16, 64)])
def test_decoding_reads_keys_and_values_16_bytes_at_a_time(heads, kv_heads, d, monkeypatch):
    """Batch 1, a prompt of 640 and a tenth of the HR tokens."""
    monkeypatch.setenv("FLEXATTN_CAPABILITY", "70")
    keys, M = 640, 518
    q, k, v = (torch.randn(1, h, n, d).half() for h, n in ((heads, 1), (kv_heads, keys), (kv_heads, keys)))
    pool = [torch.randn(M, kv_heads, d).half() for _ in "kv"]
    torch.ops.flexattn_access_counts.start()
    ops.hierarchical_attention(
        q, k, v, k_hr=pool[0], v_hr=pool[1], hr_slots=torch.arange(M, dtype=torch.int32)[None],
        hr_count=torch.tensor([M], dtype=torch.int32), hr_rows=torch.zeros(1, 1, dtype=torch.int32),
    )  # fmt: skip
    splits = [
        entry for entry in json.loads(torch.ops.flexattn_access_counts.json()) if entry["launch"].endswith("(decode)")
    ]
    wide = sum(entry["sectors"] for entry in splits if entry["kind"] == "LDG" and entry["width"] == 16)
    whole = (
        2 * kv_heads * (keys + M) * d * 2 // 32
    )  # K and V once; the rest are queries, and the last key of a chunk again
    assert whole <= wide <= 1.03 * whole


@counts_accesses
@pytest.mark.parametrize("dtype, d", [(torch.float32, 64), (torch.float32, 128), (torch.float16, 256)])
def test_tiles_without_tensor_cores_have_no_conflicts_and_read_a_fiftieth_of_the_generic_kernel(dtype, d, monkeypatch):
    q, k, v = (torch.randn(1, 1, 128, d).to(dtype) for _ in range(3))

    def cost(capability: str) -> dict:
        monkeypatch.setenv("FLEXATTN_CAPABILITY", capability)
        with counting() as found:
            ops.hierarchical_attention(q, k, v)
        return found

    generic, tiles = cost("60"), cost("70")
    for kind in ("LDS", "STS"):
        instructions, wavefronts, ideal = tiles[kind, 16]
        assert instructions > 0 and wavefronts <= 1.05 * ideal

    def sectors(found: dict) -> int:
        return sum(units for (kind, _), (_, units, _) in found.items() if kind == "LDG")

    assert sectors(generic) >= 50 * sectors(tiles)
