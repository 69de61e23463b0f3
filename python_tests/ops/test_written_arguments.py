"""Operators that write their arguments: version counters, memory that is shared, and negative views."""

from __future__ import annotations

import pytest
import torch
from operator_arguments import assign_arguments, ints, write_arguments

from flexattn_cuda import ops, reference

RAW_ASSIGN, RAW_WRITE = torch.ops.flexattn_cuda.assign_slots, torch.ops.flexattn_cuda.write_hr_kv


def raw_assign(*, index, count, table, next_free, capacity):
    return RAW_ASSIGN(index, count, table, next_free, capacity, index.shape[1])


@pytest.mark.parametrize("operator", [ops.write_hr_kv, RAW_WRITE])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_pool_that_is_overwritten_before_its_backward_pass_is_noticed(operator, compiled):
    arguments = write_arguments()
    weight = torch.ones(arguments["k_pool"].shape, requires_grad=True)
    products = [(weight * arguments[name]).sum() for name in ("k_pool", "v_pool")]

    def write() -> None:
        operator(**arguments)

    (torch.compile(write, backend="aot_eager", fullgraph=True) if compiled else write)()
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("operator", [ops.assign_slots, raw_assign])
def test_every_written_tensor_of_assign_slots_gets_a_new_version(operator):
    arguments = assign_arguments()
    before = {name: arguments[name]._version for name in ("table", "next_free")}
    operator(**arguments)
    assert {name for name in before if arguments[name]._version > before[name]} == set(before)
    assert all(arguments[name]._version == 0 for name in ("index", "count"))


@pytest.mark.parametrize("operator", [ops.write_hr_kv, RAW_WRITE])
@pytest.mark.parametrize("inside", [False, True], ids=["tensors from outside", "tensors from inside"])
def test_inference_mode_writes_too(operator, inside):
    outside = write_arguments()
    with torch.inference_mode():
        arguments = write_arguments() if inside else outside
        operator(**arguments)
        assert torch.equal(arguments["v_pool"][arguments["slots"].long()], arguments["v"])


def test_a_write_that_is_refused_leaves_the_version():
    arguments = write_arguments(v=torch.ones(2, 1, 4))
    with pytest.raises(ValueError, match="v has shape"):
        ops.write_hr_kv(**arguments)
    assert arguments["k_pool"]._version == 0


def pool_of(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def table_of(*values: int) -> torch.Tensor:
    return ints([values])


BUFFER, COMPLEX = pool_of(9, 4, 4), torch.zeros(6, 3, 4, dtype=torch.cfloat).conj()
POOL = pool_of(6, 3, 4)
ROW, COUNTER = table_of(4, 2, -1, -1, -1, -1, -1, 3), ints([2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(k_pool=POOL, v_pool=POOL), "k_pool is written but shares memory with v_pool"),
        (dict(k_pool=BUFFER[:6, :3], v_pool=BUFFER[3:, :3]), "k_pool is written but shares memory with v_pool"),
        (dict(k_pool=BUFFER[:6, :3], v_pool=BUFFER[:6, 1:]), "k_pool is written but shares memory with v_pool"),
        (dict(k_pool=pool_of(1, 3, 4).expand(6, 3, 4)), "k_pool is written but several of its elements share memory"),
        (dict(v_pool=pool_of(6, 1, 4).expand(6, 3, 4)), "v_pool is written but several of its elements share memory"),
        (dict(k_pool=POOL, k=POOL[:2]), "k_pool is written but shares memory with k;"),
        (dict(k_pool=POOL, v=POOL[4:]), "k_pool is written but shares memory with v;"),
        (dict(k_pool=torch._neg_view(POOL)), "k_pool is written but is a negative view"),
        (dict(v_pool=torch._neg_view(POOL)), "v_pool is written but is a negative view"),
        (dict(k_pool=COMPLEX), "k_pool has dtype ComplexFloat, expected Float"),
    ],
)
@pytest.mark.parametrize("operator", [ops.write_hr_kv, RAW_WRITE])
def test_pools_that_cannot_be_written_are_refused(operator, changes, message):
    with pytest.raises(ValueError, match=message):
        operator(**write_arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(table=table_of(-1).expand(1, 7)), "table is written but several of its elements share memory"),
        (dict(table=ROW, next_free=ROW[0, 7:]), "table is written but shares memory with next_free"),
        (dict(table=ROW, index=ROW[:, :2]), "table is written but shares memory with index"),
        (dict(next_free=COUNTER, count=COUNTER), "next_free is written but shares memory with count"),
        (dict(table=torch._neg_view(table_of(*[1] * 7))), "table is written but is a negative view"),
        (dict(next_free=torch._neg_view(ints([-3]))), "next_free is written but is a negative view"),
    ],
)
@pytest.mark.parametrize("operator", [ops.assign_slots, raw_assign])
def test_tables_that_cannot_be_written_are_refused(operator, changes, message):
    with pytest.raises(ValueError, match=message):
        operator(**assign_arguments(**changes))


@pytest.mark.parametrize("pools", ["halves", "interleaved", "heads apart", "transposed", "channels apart"])
def test_pools_in_one_buffer_that_do_not_overlap_are_written(pools):
    k_pool, v_pool = {
        "halves": lambda: pool_of(12, 3, 4).split(6),
        "interleaved": lambda: pool_of(6, 2, 3, 4).unbind(1),
        "heads apart": lambda: pool_of(6, 6, 4).split(3, dim=1),
        "transposed": lambda: pool_of(3, 12, 4).transpose(0, 1).split(6),
        "channels apart": lambda: pool_of(6, 3, 8).split(4, dim=2),
    }[pools]()
    arguments = write_arguments(k_pool=k_pool, v_pool=v_pool)
    ops.write_hr_kv(**arguments)
    expected = {name: torch.zeros(6, 3, 4) for name in ("k_pool", "v_pool")}
    reference.write_hr_kv(**arguments | expected)
    assert torch.equal(v_pool, expected["v_pool"])
    torch.testing.assert_close(k_pool, expected["k_pool"])


def test_negative_views_that_are_read_are_resolved():
    arguments = write_arguments()
    plain, negative = ({name: arguments[name].clone() for name in ("k_pool", "v_pool")} for _ in range(2))
    ops.write_hr_kv(**arguments | plain)
    read = {name: torch._neg_view(-arguments[name]) for name in ("k", "v", "cos", "sin", "slots")}
    ops.write_hr_kv(**arguments | negative | read)
    assert all(torch.equal(plain[name], negative[name]) for name in plain)
    arguments = assign_arguments()
    expected = ops.assign_slots(**assign_arguments())
    index, count = (torch._neg_view(-arguments[name]) for name in ("index", "count"))
    assert all(map(torch.equal, ops.assign_slots(**arguments | dict(index=index, count=count)), expected))
