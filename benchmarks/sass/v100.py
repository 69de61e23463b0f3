"""The limits of a V100's multiprocessor (SM)."""

from __future__ import annotations

REGISTERS, REGISTERS_PER_WARP_UNIT = 65536, 256
SHARED_BYTES, SHARED_UNIT = 96 * 1024, 256
THREADS, BLOCKS = 2048, 32
SUB_PARTITIONS, WARP = 4, 32


def warps_of(threads: int) -> int:
    return -(-threads // WARP)


def blocks_per_sm(registers: int, shared_bytes: int, threads: int) -> int:
    """Return how many blocks fit on an SM at a time."""
    warps = warps_of(threads)
    per_warp = -(-registers * WARP // REGISTERS_PER_WARP_UNIT) * REGISTERS_PER_WARP_UNIT
    # Each sub-partition has its own quarter of the registers.
    warps_by_registers = REGISTERS // SUB_PARTITIONS // per_warp * SUB_PARTITIONS
    shared = -(-shared_bytes // SHARED_UNIT) * SHARED_UNIT
    by_shared = SHARED_BYTES // shared if shared else BLOCKS
    return min(BLOCKS, THREADS // (warps * WARP), warps_by_registers // warps, by_shared)
