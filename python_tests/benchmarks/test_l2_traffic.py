"""The simulation of the L2 cache, and the order of blocks that it plays."""

from __future__ import annotations

import l2_traffic
import pytest
from l2_traffic import MB, Call, Gpu, simulate

from flexattn_cuda.native import compiled

CALL = Call(batch=2, heads=8, kv_heads=4, queries=500, hr=130, head_dim=64)


@pytest.mark.parametrize("cache, together", [(0, 1), (1200, 3), (1599, 3), (2**62, 7)])
def test_every_tile_has_one_block_and_a_group_of_heads_starts_before_the_next(cache, together):
    """A group streams at most a quarter of the cache; the last one may be smaller."""
    places = compiled.block_order(7, 5, 100, cache)
    assert sorted(places) == [(head, tile) for head in range(7) for tile in range(5)]
    groups = [head // together for head, _ in places]
    assert groups == sorted(groups)
    for first in range(0, 7, together):
        tiles = [tile for head, tile in places if head // together == first // together]
        assert tiles == sorted(tiles), "within a group the first tile of every head starts first"


@pytest.mark.parametrize("kernel", l2_traffic.RESIDENT)
def test_a_cache_that_holds_everything_misses_every_tile_once(kernel):
    assert simulate(CALL, kernel, Gpu("large", 64 * MB, 4), grouped=True)[0] == 1


@pytest.mark.parametrize("grouped", [True, False])
def test_without_a_cache_every_read_is_traffic(grouped):
    """One running block and room for one tile: as many misses as reads and writes."""
    call = Call(batch=1, heads=2, kv_heads=2, queries=256, hr=64, head_dim=64)
    tiles, owned = 4, 2 * 4 * 2  # of a head; queries and outputs of both
    reads = 2 * sum(2 * (tile + 1 + 1) for tile in range(tiles))
    once = owned + 2 * 2 * (tiles + 1)
    found, _ = simulate(call, "forward", Gpu("none", call.tile_bytes, 1), grouped)
    assert found == pytest.approx((owned + reads) / once)


def test_heads_that_run_together_read_less_where_the_cache_is_small():
    call = Call(batch=2, heads=16, kv_heads=16, queries=1024, hr=0, head_dim=64)
    gpu = Gpu("small", 2 * MB, 8)
    for kernel in l2_traffic.RESIDENT:
        (before, _), (now, steps) = (simulate(call, kernel, gpu, grouped) for grouped in (False, True))
        assert before > 3 and now < 1.1 and steps < 1.2, kernel


def test_the_table_is_printed_and_written(tmp_path, capsys):
    file = tmp_path / "traffic.csv"
    assert (
        l2_traffic.main(["--batch", "1", "--heads", "2", "--kv-heads", "1", "--queries", "200", "--csv", str(file)])
        == 0
    )
    assert "Simulated" in capsys.readouterr().out
    assert file.read_text().splitlines()[0] == "kernel,GPU,L2 MB,traffic before,traffic,steps before,steps"
    assert len(file.read_text().splitlines()) == 7
