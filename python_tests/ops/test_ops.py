"""The operators against reference.py, in every dtype, and as citizens of torch: opcheck, gradcheck, compile, errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_as_good_as_eager
from backend import BACKEND
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_arguments import (
    assign_arguments,
    attention_arguments,
    in_schema_order,
    ints,
    project_arguments,
    selection_arguments,
    write_arguments,
)
from strategies import SIDE, AttentionCase, attention_cases, selection_cases, slot_cases, write_cases

from flexattn_cuda import ops, reference
from flexattn_cuda.mechanism.rotary import rotate

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
device_cases = pytest.mark.parametrize("device", DEVICES)
large = pytest.mark.skipif(BACKEND == "sanitizers", reason="under the sanitizers the small ones run")
# The executor runs a million products of both passes in about half a second.
MOST_WORK = math.inf if BACKEND == "cpu" else 1e7
GRID, HR_GRID = 24, 72  # of the large cases: the default model's
dtype_cases = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])


def rounded(case, dtype):
    """The exact answer is that for the inputs as they are after rounding to `dtype`."""
    q, keywords = case.like(dtype)
    return tuple(x.double() for x in q), {
        name: x.double() if isinstance(x, torch.Tensor) and x.dtype == dtype else x for name, x in keywords.items()
    }


@pytest.mark.slow
@device_cases
@dtype_cases
@settings(max_examples=40)
@given(case=attention_cases())
def test_attention(device, dtype, case):
    positional, keywords = case.like(dtype, device)
    ours = ops.hierarchical_attention(*positional, **keywords)
    positional, keywords = rounded(case, dtype)
    exact = reference.hierarchical_attention(*positional, **keywords)
    positional, keywords = case.like(dtype)
    eager = reference.hierarchical_attention(*positional, **keywords)
    for name in exact._fields:
        assert_as_good_as_eager(getattr(ours, name).cpu(), getattr(eager, name), getattr(exact, name), dtype, name)
    assert ours.out.dtype == dtype
    assert all(x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for x in ours[1:])


@pytest.mark.slow
@device_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@settings(max_examples=25)
@given(case=attention_cases(gradients=True, most_work=MOST_WORK))
def test_attention_gradients(device, dtype, case):
    check_gradients(device, dtype, case)


@pytest.mark.slow
@device_cases
@large
def test_gradients_of_a_long_prompt(device):
    """One head; the last rows see an HR pool."""
    N, M, d = 2925 if BACKEND == "cpu" else 900, 600, 64
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    floats = {
        "q": normal(1, 1, N, d),
        "k": normal(1, 1, N, d),
        "v": normal(1, 1, N, d),
        "k_hr": normal(M, 1, d),
        "v_hr": normal(M, 1, d),
    }
    others = {
        "hr_slots": torch.randperm(M, generator=generator).int()[None],
        "hr_count": ints([M - 1]),
        "hr_from": ints([N - 40]),
    }
    check_gradients(device, torch.float32, AttentionCase(floats, others))


def check_gradients(device, dtype, case):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.floats["q"].transpose(1, 2).shape, generator=generator, dtype=torch.float64)

    def gradients(function, to_dtype, device, source):
        positional, keywords = source
        leaves = {"q": positional[0], "k": positional[1], "v": positional[2]}
        leaves |= {name: value for name, value in keywords.items() if name.endswith("_hr")}
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        others = {name: value for name, value in keywords.items() if name not in leaves}
        hr = {name: leaf for name, leaf in leaves.items() if name.endswith("_hr")}
        out = function(leaves["q"], leaves["k"], leaves["v"], **others, **hr).out
        found = torch.autograd.grad(out, list(leaves.values()), weight.to(device, to_dtype), allow_unused=True)
        return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), found)}

    ours = gradients(ops.hierarchical_attention, dtype, device, case.like(dtype, device))
    eager = gradients(reference.hierarchical_attention, dtype, "cpu", case.like(dtype))
    exact = gradients(reference.hierarchical_attention, torch.float64, "cpu", rounded(case, dtype))
    for name in exact:
        # A logit's gradient is p (dp - E dp), and dp is a sum over d products: up to sqrt(d) times what is left.
        cancelled = case.floats["q"].shape[-1] ** 0.5
        assert_as_good_as_eager(ours[name].cpu(), eager[name], exact[name], dtype, f"gradient of {name}", cancelled)


@pytest.mark.slow
@device_cases
@settings(max_examples=12)
@given(case=attention_cases(gradients=True, small=True))
def test_gradcheck(device, case):
    positional, keywords = case.like(torch.float64, device, requires_grad=True)
    hr = [name for name in keywords if name.endswith("_hr")]

    def function(q, k, v, *pool):
        return ops.hierarchical_attention(q, k, v, **(keywords | dict(zip(hr, pool)))).out

    assert torch.autograd.gradcheck(function, (*positional, *(keywords[name] for name in hr)))


@pytest.mark.slow
@device_cases
@settings(max_examples=150)
@given(case=selection_cases())
def test_selection_is_exact(device, case):
    check_selection(device, case)


@device_cases
@large
def test_selection_of_several_images_is_exact(device):
    B, R, images = 2, 3, 4
    generator = torch.Generator().manual_seed(0)
    case = dict(
        attention_map=torch.rand(B, R, images, GRID**2, generator=generator) ** 8,
        lr_grid=ints([GRID, GRID]).expand(B, images, 2),
        hr_grid=ints([HR_GRID, HR_GRID]).expand(B, images, 2),
        hr_tokens=HR_GRID**2,
        scale=255.0,
        valid_rect=ints([0, 3, GRID, GRID - 2]).expand(B, images, 4),
    )
    check_selection(device, case | dict(threshold=48.0))
    check_selection(device, case | dict(threshold=128.0, pool_grid=ints([9, 9]).expand(B, images, 2)))


@device_cases
def test_every_image_is_selected_from_in_its_own_grids(device):
    """3 x 5 and 4 x 2 cells, 7 x 9 and 8 x 6 tokens, and an absent image; chosen by hand."""
    attention_map = torch.zeros(1, 2, 3, 15)
    attention_map[0, 0, 0, 1 * 5 + 4] = 1.0  # row 0: cell (1, 4) of 3 x 5
    attention_map[0, 1, 1, 3 * 2 + 0] = 1.0  # row 1: cell (3, 0) of 4 x 2
    selected = ops.select_tokens(
        attention_map.to(device),
        ints([[[3, 5], [4, 2], [0, 0]]]).to(device),
        ints([[[7, 9], [8, 6], [0, 0]]]).to(device),
        hr_tokens=63,
        scale=1.0,
        threshold=0.5,
    )
    # Token row y of 7 lies in cell row floor(3 y / 7): 1 for y = 3, 4; column x of 9 in floor(5 x / 9): 4 for x = 8.
    first = [3 * 9 + 8, 4 * 9 + 8]
    # Row y of 8 lies in y // 2: 3 for y = 6, 7; column x of 6 in x // 3: 0 for x = 0, 1, 2.
    second = [63 + y * 6 + x for y in (6, 7) for x in (0, 1, 2)]
    assert selected.count.tolist() == [8]
    assert selected.index[0].tolist() == first + second + [-1] * (3 * 63 - 8)
    assert selected.row_bits[0, :, 0].tolist() == [0b11, 0b11111100]
    mask = selected.mask(3).cpu()
    assert mask.shape == (1, 2, 3, 63)
    assert mask[0, 0].flatten().nonzero().flatten().tolist() == first
    assert mask[0, 1].flatten().nonzero().flatten().tolist() == second


def check_selection(device, case):
    placed = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    ours = ops.select_tokens(**placed)
    expected = reference.select_tokens(**case)
    for name in expected._fields:
        assert torch.equal(getattr(ours, name).cpu(), getattr(expected, name)), name
    again = reference.list_tokens(ours.mask(case["attention_map"].shape[2]).cpu())
    assert torch.equal(again.row_bits, expected.row_bits) and torch.equal(again.index, expected.index)


@device_cases
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "D", "M"),
    [(1, 1, 0), (7, 3, 5), (33, 24, 20), (65, 8, 65), (130, 64, 33), pytest.param(HR_GRID**2, 256, 2925, marks=large)],
)
def test_gather(device, dtype, T, D, M):
    generator = torch.Generator().manual_seed(T)
    table = torch.randn(2, T, 2 * D, generator=generator).to(dtype)[..., :D]  # a view: rows 2 * D apart
    index = torch.stack([torch.randperm(T, generator=generator)[:M] for _ in range(2)]).int()
    index[:, M // 2 :: 3] = -1
    tokens = table.to(device).detach().requires_grad_()
    rows = ops.gather_tokens(tokens, index.to(device))
    assert torch.equal(rows.cpu(), reference.gather_tokens(table, index))
    weight = torch.randn(rows.shape, generator=generator).to(dtype)
    (gradient,) = torch.autograd.grad(rows, tokens, weight.to(device))
    expected = torch.zeros(2, T, D, dtype=dtype)
    for b, m in (index >= 0).nonzero().tolist():
        expected[b, index[b, m]] = weight[b, m]
    assert torch.equal(gradient.cpu(), expected)


@device_cases
def test_gather_gradcheck(device):
    tokens = torch.randn(2, 6, 3, dtype=torch.float64, device=device, requires_grad=True)
    index = torch.tensor([[4, -1, 0], [5, 2, 1]], dtype=torch.int32, device=device)
    assert torch.autograd.gradcheck(lambda tokens: ops.gather_tokens(tokens, index), tokens)


@pytest.mark.slow
@device_cases
@settings(max_examples=100)
@given(case=slot_cases())
def test_slots(device, case):
    check_slots(device, case)


@pytest.mark.slow
@device_cases
@large
def test_slots_of_an_image(device):
    B, T, M = 2, HR_GRID**2, 2925
    generator = torch.Generator().manual_seed(0)
    selections = [
        (
            torch.stack([torch.randperm(T, generator=generator)[:M] for _ in range(B)]).int(),
            torch.tensor([M, M - 700], dtype=torch.int32),
        )
        for _ in range(3)
    ]
    check_slots(
        device, dict(selections=selections, table=torch.full((B, T), -1, dtype=torch.int32), capacity=B * T - 3000)
    )


def check_slots(device, case):
    """Exactly the reference's slots, over several calls of one pool; table and next_free are left the same."""
    capacity = case["capacity"]
    ours, theirs = (
        (copy_strided(case["table"], to), torch.zeros(1, dtype=torch.int32, device=to)) for to in (device, "cpu")
    )
    for index, count in case["selections"]:
        options = dict(capacity=capacity, width=case.get("width"))
        found = ops.assign_slots(index.to(device), count.to(device), *ours, **options)
        expected = reference.assign_slots(index, count, *theirs, **options)
        for name, one, two in zip((*expected._fields, "table", "next_free"), found + ours, expected + theirs):
            assert torch.equal(one.cpu(), two), name
        assert ours[1].item() <= capacity
    held = ours[0][ours[0] >= 0].sort().values  # every slot up to the first free one belongs to one token
    assert torch.equal(held.cpu(), torch.arange(ours[1].item(), dtype=torch.int32))


def copy_strided(x: torch.Tensor, device: str) -> torch.Tensor:
    """A copy that has the same strides; what lies between the elements is not initialised."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


@device_cases
@dtype_cases
@pytest.mark.parametrize("tables", ["same", "float32"])
@settings(max_examples=40)
@given(case=write_cases())
def test_write_hr_kv(device, dtype, tables, case):
    check_write(device, dtype, torch.float32 if tables == "float32" else dtype, case)


@device_cases
@large
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_write_of_an_image(device, dtype):
    M, heads, d = HR_GRID**2, 1, 128
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    angles, slots = 7 * normal(M, d), torch.randperm(M + 5, generator=generator)[:M].int()
    slots[::9] = -1
    rows = {name: normal(M, heads, d) for name in ("k", "v")}
    pools = {name: normal(M + 5, heads, d) for name in ("k_pool", "v_pool")}
    check_write(device, dtype, dtype, rows | dict(cos=angles.cos(), sin=angles.sin(), slots=slots) | pools)


def check_write(device, dtype, table_dtype, case):
    types = {
        name: table_dtype if name in ("cos", "sin") else torch.int32 if name == "slots" else dtype for name in case
    }
    given = {name: torch.empty_strided(x.shape, x.stride(), dtype=types[name]).copy_(x) for name, x in case.items()}
    ours = {name: copy_strided(x, device) for name, x in given.items()}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    ops.write_hr_kv(**ours)
    reference.write_hr_kv(**exact)
    assert torch.equal(ours["v_pool"].cpu(), exact["v_pool"].to(dtype))
    error = (ours["k_pool"].cpu().double() - exact["k_pool"]).abs()
    # Half a unit of the storage type for the one rounding; two products and a sum before it, each within half a unit.
    sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    largest = 2 * case["k"].abs().amax().item() if case["k"].numel() else 0.0
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (error <= exact["k_pool"].abs() * torch.finfo(dtype).eps / 2 + 2 * largest * sums + smallest).all()
    untouched = torch.ones(len(given["k_pool"]), dtype=torch.bool)
    untouched[given["slots"][given["slots"] >= 0].long()] = False
    assert torch.equal(ours["k_pool"].cpu()[untouched], given["k_pool"][untouched])


def project(index, count, features, weight, table, next_free, k_pool, v_pool):
    """One layer's way from a selection to the pool, as a cache of HR keys and values takes it."""
    B, T, _ = features.shape
    assigned = ops.assign_slots(index, count, table, next_free, capacity=k_pool.shape[0])
    rows = ops.gather_tokens(features.view(1, B * T, -1), assigned.new_tokens[None])[0]
    keys = (rows @ weight).unflatten(-1, k_pool.shape[1:])
    angles = assigned.new_tokens[:, None].float().expand(-1, k_pool.shape[2])
    ops.write_hr_kv(keys, -keys, angles.cos(), angles.sin(), assigned.new_slots, k_pool, v_pool)
    return assigned.slots


@pytest.mark.slow
@device_cases
@pytest.mark.parametrize("compiled", [False, True])
def test_a_pool_holds_every_token_that_was_ever_selected(device, compiled):
    B, T, D, heads, d = 2, 30, 12, 2, 8
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(B, T, D, generator=generator).to(device)
    weight = torch.randn(D, heads * d, generator=generator).to(device)
    table = torch.full((B, T), -1, dtype=torch.int32, device=device)
    next_free = torch.zeros(1, dtype=torch.int32, device=device)
    k_pool, v_pool = torch.full((2, B * T, heads, d), torch.nan, device=device)
    count = torch.tensor([9, 5], dtype=torch.int32, device=device)
    step = torch.compile(project, fullgraph=True, backend="aot_eager") if compiled else project
    seen = torch.zeros(B, T, dtype=torch.bool)
    for _ in range(4):
        index = torch.stack([torch.randperm(T, generator=generator)[:9] for _ in range(B)]).int().to(device)
        slots = step(index, count, features, weight, table, next_free, k_pool, v_pool)
        for b, n in enumerate(count.tolist()):
            chosen = index[b, :n].long()
            seen[b, chosen.cpu()] = True
            expected = (features[b, chosen] @ weight).unflatten(-1, (heads, d))
            torch.testing.assert_close(v_pool[slots[b, :n].long()], -expected)
            angles = (b * T + chosen).float()[:, None, None]
            torch.testing.assert_close(k_pool[slots[b, :n].long()], rotate(expected, angles.cos(), angles.sin()))
            assert (slots[b, n:] == -1).all()
    assert next_free.item() == seen.sum() and torch.equal(table.cpu() >= 0, seen)
    assert k_pool[next_free.item() :].isnan().all()


class Values:
    """Tensors on a device, the same in every run."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device).requires_grad_(grad)

    def integers(self, values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def calls(device: str) -> dict[str, tuple]:
    """Return a call of every operator, by its name; what follows a colon tells calls of one operator apart."""
    values = Values(device)
    normal, integers = values.normal, values.integers
    table, index = normal(2, 7, 4), integers([[3, 0, -1], [6, -1, 1]])
    attention_map = torch.rand(2, 3, 1, 81, generator=values.generator).to(device)
    return attention_calls(values) | {
        "select_tokens": selection_call(attention_map, integers),
        "select_tokens:plain": selection_call(attention_map, integers)[:-2],
        "gather_tokens": (table, index),
        "gather_tokens_backward": (normal(2, 3, 4, grad=False), index, 7),
        "assign_slots": (index, integers([2, 3]), integers([[-1] * 7, [-1, 2, 0] + [-1] * 4]), integers([3]), 6, 2),
        "project_hr_kv": projection_call(values),
        "write_hr_kv": (
            *(normal(3, 2, 8, grad=False) for _ in "kv"),
            *(normal(3, 8, grad=False) for _ in range(2)),
            integers([4, -1, 0]),
            *(normal(6, 2, 8, grad=False) for _ in "kv"),
        ),
    }


def projection_call(values: Values) -> tuple:
    """Three new tokens of two prompts, one of which is not counted."""
    new = project_arguments()
    for name, x in new.items():
        new[name] = values.normal(*x.shape, grad=False) if x.is_floating_point() else x.to(values.device)
    return in_schema_order("project_hr_kv", **new, k_bias=values.normal(8, grad=False))


def selection_call(attention_map: torch.Tensor, integers: Callable[..., torch.Tensor]) -> tuple:
    """Two samples with a map of 9 x 9 and one of 7 x 3 cells."""
    return in_schema_order(
        "select_tokens",
        attention_map=attention_map,
        lr_grid=integers([[[9, 9]], [[7, 3]]]),
        hr_grid=integers([[[18, 18]], [[14, 10]]]),
        hr_tokens=18**2,
        scale=255.0,
        threshold=128.0,
        pool_grid=integers([[[3, 3]], [[4, 2]]]),
        valid_rect=integers([[[0, 0, 9, 9]], [[2, 0, 7, 3]]]),
    )


def attention_calls(values: Values) -> dict[str, tuple]:
    normal, integers = values.normal, values.integers
    sequence = dict(q=normal(2, 4, 5, 8), k=normal(2, 2, 11, 8), v=normal(2, 2, 11, 8), scale=0.35)
    sequence |= dict(kv_start=integers([0, 2]), kv_len=integers([11, 9]), window=0, softcap=0.0)
    pool = dict(k_hr=normal(9, 2, 8), v_hr=normal(9, 2, 8))
    pool |= dict(hr_slots=integers([[0, 1, 2, 3], [8, 6, 5, 7]]), hr_count=integers([4, 2]))
    listed_rows = dict(hr_rows=integers([[4, 1], [3, -1]]), hr_row_bits=integers([[[5], [15]], [[2], [0]]]))
    key_mask = ops.pack_bits(torch.ones(2, 11, dtype=torch.bool, device=values.device))
    no_map, one_map = dict(map_size=0), dict(map_ranges=integers([[[1, 10]], [[0, 0]]]), map_size=SIDE**2)

    def call(map_over_all: bool = False, **arguments) -> tuple:
        return in_schema_order("hierarchical_attention", map_over_all=map_over_all, **arguments)

    released = sequence | pool | listed_rows | dict(alpha=torch.tensor([0.3, 1.0]).to(values.device))
    with torch.no_grad():
        out, lse, lse_seq, _ = torch.ops.flexattn_cuda.hierarchical_attention(*call(**released, **no_map))
    saved = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in released.items()}
    saved |= dict(grad_out=normal(*out.shape, grad=False), lse=lse, lse_seq=lse_seq)
    saved |= dict(query_gradient=True, key_gradients=True, hr_gradients=True)
    with torch.no_grad():
        out, lse, lse_seq, _ = torch.ops.flexattn_cuda.hierarchical_attention(*call(**sequence, **no_map))
    of_keys = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in sequence.items()}
    of_keys |= dict(grad_out=normal(*out.shape, grad=False), out=out, lse=lse, lse_seq=lse_seq)
    of_keys |= dict(query_gradient=False, key_gradients=True, hr_gradients=False)
    paper = sequence | pool | one_map | dict(hr_from=integers([0, 2]), key_mask=key_mask)
    windowed = sequence | dict(window=4, bidirectional_ranges=integers([[[2, 8]], [[0, 0]]]), softcap=5.0)
    return {
        "hierarchical_attention": call(**released, **one_map),
        "hierarchical_attention:plain": call(**sequence, **no_map),
        "hierarchical_attention:paper": call(**paper, map_over_all=True),
        "hierarchical_attention:windowed": call(**windowed, **no_map),
        "hierarchical_attention_backward": in_schema_order("hierarchical_attention_backward", **saved),
        "hierarchical_attention_backward:keys": in_schema_order("hierarchical_attention_backward", **of_keys),
    }


@pytest.mark.slow
@device_cases
@pytest.mark.parametrize("name", calls("cpu"))
def test_opcheck(device, name):
    operator = getattr(torch.ops.flexattn_cuda, name.partition(":")[0])
    torch.library.opcheck(operator, calls(device)[name])


def test_every_operator_is_checked():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("flexattn_cuda::")
    }
    assert registered == {name.partition(":")[0] for name in calls("cpu")}


def test_the_stable_abi_of_torch_2_10_can_pass_every_argument_and_result():
    """It converts one by one; a SymInt passes as an int."""
    schemas = [getattr(torch.ops.flexattn_cuda, name.partition(":")[0]).default._schema for name in calls("cpu")]
    types = {str(value.real_type) for schema in schemas for value in (*schema.arguments, *schema.returns)}
    assert types == {"Tensor", "Optional[Tensor]", "int", "float", "bool"}


@device_cases
def test_results_do_not_change_from_run_to_run(device):
    def outcome(name):
        """What the operator returns, and its arguments afterwards, some of which it writes."""
        arguments, operator = (calls(device)[name], getattr(torch.ops.flexattn_cuda, name.partition(":")[0]))
        returned = operator(*arguments)
        results = returned if isinstance(returned, tuple) else (returned,)
        return [x for x in (*results, *arguments) if isinstance(x, torch.Tensor)]

    for name in calls(device):
        for one, two in zip(outcome(name), outcome(name)):
            assert torch.equal(one, two), name


@pytest.mark.skipif(BACKEND != "cpu", reason="the executor has threads of its own")
@pytest.mark.parametrize("queries", [1, 130])
def test_results_do_not_depend_on_the_number_of_threads(queries):
    """To the last bit, the map's sums over heads included."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 8, rows, 64, generator=generator) for rows in (queries, 140, 140))
    arguments = dict(
        k_hr=torch.randn(60, 8, 64, generator=generator),
        v_hr=torch.randn(60, 8, 64, generator=generator),
        hr_slots=torch.arange(60).int().view(2, 30),
        hr_count=ints([30, 17]),
        hr_rows=torch.arange(queries).int().expand(2, -1).contiguous(),
        map_ranges=ints([[[1, 101]], [[40, 140]]]),
        map_size=100,
    )
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found.append(ops.hierarchical_attention(q, k, v, **arguments))
    assert all(map(torch.equal, sum(found[1:], ()), 3 * found[0]))


@device_cases
def test_compiles_without_graph_breaks(device):
    arguments = calls(device)["hierarchical_attention"]
    differentiable = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.requires_grad]
    leaves = [arguments[i] for i in differentiable]

    def loss(*leaves):
        given = list(arguments)
        for position, leaf in zip(differentiable, leaves):
            given[position] = leaf
        out, _, _, attention_map = torch.ops.flexattn_cuda.hierarchical_attention(*given)
        q = leaves[0]
        lr_grid = torch.tensor([SIDE, SIDE], dtype=torch.int32, device=q.device).expand(2, 1, 2)
        selected = ops.select_tokens(attention_map, lr_grid, 2 * lr_grid, hr_tokens=36, scale=255.0, threshold=48.0)
        rows = ops.gather_tokens(q.flatten(0, 1).repeat(1, 8, 1)[:2], selected.index[:, :36])
        return out.square().sum() + rows.sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    # The backend runs the traced graphs, forward and backward, as they are: what is tested is that they can be traced.
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for one, two in zip(actual, expected):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.randn(2, 3, 11, 8)}, "q has 4 heads, expected at least 1, a multiple of k's 3"),
        ({"q": torch.randn(2, 0, 5, 8)}, "q has 0 heads, expected at least 1, a multiple of k's 2"),
        ({"k": torch.randn(2, 2, 11, 7)}, r"k has shape \[2, 2, 11, 7\], expected \[2, \*, \*, 8\]"),
        ({"v": torch.randn(2, 2, 11, 8).double()}, "v has dtype Double, expected Float"),
        ({"q": torch.randn(4, 5, 8)}, r"q has shape \[4, 5, 8\], expected \[\*, \*, \*, \*\]"),
        (
            {"q": torch.ones(2, 4, 5, 8, dtype=torch.int64)},
            "q has dtype Long, expected Float or Double or Half or BFloat16",
        ),
        ({"q": torch.randn(2, 4, 12, 8)}, "q has 12 queries, expected at most the 11 of k's keys"),
        ({"k_hr": None}, "3 of k_hr, v_hr, hr_slots and hr_count are given, expected all or none"),
        ({"hr_rows": None}, "k_hr is given without hr_from or hr_rows"),
        ({"hr_from": torch.zeros(2, dtype=torch.int32)}, "hr_from and hr_rows are both given, expected one of them"),
        ({"hr_slots": torch.full((2, 1), 9, dtype=torch.int32)}, "hr_slots has values from 9 to 9, expected 0 to 8"),
        ({"hr_count": torch.full((2,), 2, dtype=torch.int32)}, "hr_count has values from 2 to 2, expected 0 to 1"),
        ({"hr_rows": torch.tensor([[5], [4]], dtype=torch.int32)}, "hr_rows has values from 4 to 5, expected -1 to 4"),
        ({"hr_rows": torch.tensor([[4, 4], [4, 3]], dtype=torch.int32)}, "hr_rows holds 4 twice in row 0"),
        ({"kv_len": torch.tensor([11, 4], dtype=torch.int32)}, "kv_len has values from 4 to 11, expected 5 to 11"),
        ({"kv_len": torch.tensor([11, 11])}, "kv_len has dtype Long, expected Int"),
        ({"window": -1}, "window is -1, expected a number of keys, or 0 for no limit"),
        ({"softcap": -1.0}, "softcap is -1, expected a positive number, or 0 for none"),
        ({"softcap": math.inf}, "softcap is inf, expected a positive number, or 0 for none"),
        ({"bidirectional_ranges": ints([[0, 1], [0, 1]])}, r"has shape \[2, 2\], expected \[2, \*, 2\]"),
        (
            {"bidirectional_ranges": ints([[[2, 5]], [[5, 4]]])},
            r"has the range \[5, 4\) in sample 1, expected 0 <= begin <= end <= kv_len, which is 11",
        ),
        (
            {"bidirectional_ranges": ints([[[0, 5]], [[0, 9]]]), "kv_len": ints([11, 8])},
            r"has the range \[0, 9\) in sample 1, expected 0 <= begin <= end <= kv_len, which is 8",
        ),
        (
            {"bidirectional_ranges": ints([[[4, 7], [0, 0], [6, 9]], [[0, 1], [1, 2], [0, 0]]])},
            "begins at 6 after one that ends at 7 in sample 0, expected ascending ranges that do not overlap",
        ),
        ({"alpha": torch.ones(3)}, r"alpha has shape \[3\], expected \[2\]"),
        ({"alpha": torch.tensor([0.5, 1.5])}, "alpha holds 1.5, expected values from 0 to 1"),
        ({"alpha": torch.tensor([-0.5, 1.0])}, "alpha holds -0.5, expected values from 0 to 1"),
        ({"alpha": torch.tensor([torch.nan, 1.0])}, "alpha holds -?nan, expected values from 0 to 1"),
        ({"map_ranges": torch.tensor([[[0, 4]], [[0, 9]]], dtype=torch.int32), "map_size": 9}, "a range of 4 keys"),
        ({"q": torch.randn(2, 4, 8, 5).transpose(2, 3)}, "q has stride 5 in its last dimension, expected 1"),
    ],
)
def test_bad_attention_arguments(changes, message):
    arguments = attention_arguments(**changes)
    with pytest.raises(ValueError, match=message):
        ops.hierarchical_attention(**arguments)


@device_cases
@pytest.mark.parametrize("queries", [3, 20])
def test_a_window_over_everything_and_empty_ranges_change_nothing(device, queries):
    shapes = {"q": (2, 2, queries, 64), "k": (2, 2, 40, 64), "v": (2, 2, 40, 64)}
    tensors = {name: torch.randn(*shape, device=device) for name, shape in shapes.items()}
    expected = ops.hierarchical_attention(**tensors)
    empty = ints([[[0, 0], [40, 40]], [[7, 7], [3, 3]]]).to(device)
    found = ops.hierarchical_attention(**tensors, window=40, bidirectional_ranges=empty, softcap=0.0)
    narrow = ops.hierarchical_attention(**tensors, window=39)
    assert torch.equal(found.out, expected.out) and torch.equal(found.lse, expected.lse)
    assert not torch.equal(narrow.lse[:, :, -1], expected.lse[:, :, -1])  # the last query no longer sees key 0
    torch.testing.assert_close(narrow.lse[:, :, :-1], expected.lse[:, :, :-1])


def test_an_error_lists_every_reason():
    arguments = attention_arguments(alpha=torch.ones(3), hr_from=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="alpha has shape") as error:
        ops.hierarchical_attention(**arguments)
    assert "are both given" in str(error.value)


def index_of(*rows):
    return torch.tensor(rows, dtype=torch.int32)


def bad(operator, message, arguments):
    return pytest.param(operator, arguments, message, id=f"{operator.__name__}: {message}")


def bad_gather(message, tokens=(2, 5, 3), **changes):
    return bad(ops.gather_tokens, message, dict(tokens=torch.randn(tokens)) | changes)


def bad_assignment(message, **changes):
    return bad(ops.assign_slots, message, assign_arguments(**changes))


def bad_write(message, **changes):
    return bad(ops.write_hr_kv, message, write_arguments(**changes))


def bad_scatter(message, **changes):
    arguments = dict(grad=torch.randn(1, 2, 3), index=index_of([2, 0]), num_tokens=4)
    return bad(torch.ops.flexattn_cuda.gather_tokens_backward, message, arguments | changes)


ONE_POOL = torch.zeros(7, 2, 4)


def pools_of(*shape):
    return {name: torch.zeros(shape) for name in ("k_pool", "v_pool")}


def bad_projection(message, **changes):
    return bad(ops.project_hr_kv, message, project_arguments(**changes))


def bad_selection(message, **changes):
    return bad(ops.select_tokens, message, selection_arguments(**changes))


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        bad_gather("index has values from 0 to 5", index=index_of([5], [0])),
        bad_gather("index holds 2 twice in row 0", index=index_of([2, 2], [0, 1])),
        bad_gather("index has dtype Long, expected Int", index=torch.tensor([[2], [0]])),
        bad_gather("tokens has shape", tokens=(5, 3), index=index_of([2])),
        bad_scatter("index holds 2 twice in row 0", index=index_of([2, 2])),
        bad_scatter("index has values from 0 to 4, expected -1 to 3", index=index_of([4, 0])),
        bad_scatter("num_tokens is -1, expected 0 to 2", num_tokens=-1),
        bad_scatter("num_tokens is 4611686018427387904, expected 0 to 2", num_tokens=2**62),
        bad_assignment("index holds 4 twice in row 0", index=index_of([4, 4])),
        bad_assignment("index has values from 0 to 7, expected -1 to 6", index=index_of([0, 7])),
        bad_assignment("count has values from 3 to 3, expected 0 to 2", count=index_of(3)),
        bad_assignment("next_free has values from 3 to 3, expected 0 to 2", capacity=2),
        bad_assignment("width is 3, expected 0 to the 2 columns of index", width=3),
        bad_projection("count has values from 4 to 4, expected 0 to 3", count=index_of(4)),
        bad_projection("tokens has values from 0 to 6, expected 0 to 5", tokens=index_of(6, 0, 0)),
        bad_projection("slots has values from 1 to 7, expected 0 to 6", slots=index_of(1, 7, 0)),
        bad_projection("slots holds 5 twice in row 0", slots=index_of(5, 5, 0)),
        bad_projection("features has shape", features=torch.randn(6, 6)),
        bad_projection("k_weight has shape", k_weight=torch.randn(6, 8)),
        bad_projection("v_weight has strides", v_weight=torch.randn(8, 12)[:, :6]),
        bad_projection("v_bias has shape", v_bias=torch.randn(4)),
        bad_projection("k_pool has head_dim 3, expected an even number", **pools_of(7, 2, 3)),
        bad_projection("k_pool is written but shares memory with v_pool", k_pool=ONE_POOL, v_pool=ONE_POOL),
        bad_assignment("capacity is -1, expected 0", capacity=-1),
        bad_assignment("table has dtype Long, expected Int", table=torch.full((1, 7), -1)),
        bad_assignment(
            "table has 2 rows, expected a divisor of the 1 rows of index", table=index_of([-1] * 7, [-1] * 7)
        ),
        bad_write("k has head_dim 5, expected an even number", k=torch.ones(2, 3, 5)),
        bad_write(r"v has shape \[2, 1, 4\], expected \[2, 3, 4\]", v=torch.ones(2, 1, 4)),
        bad_write("cos has dtype Half, expected Float", cos=torch.ones(2, 4).half()),
        bad_write("v_pool has dtype Double, expected Float", v_pool=torch.ones(6, 3, 4).double()),
        bad_write("slots has values from 0 to 6, expected -1 to 5", slots=index_of(6, 0)),
        bad_write("slots holds 1 twice", slots=index_of(1, 1)),
        bad_selection(
            "attention_map has dtype Half, expected Float or Double", attention_map=torch.rand(1, 1, 1, 9).half()
        ),
        bad_selection(
            "lr_grid holds 3 x 3, expected at most the cells of attention_map, which is 8",
            attention_map=torch.rand(1, 1, 1, 8),
        ),
        bad_selection("lr_grid holds -1 x 3", lr_grid=index_of([[-1, 3]])),
        bad_selection(r"lr_grid has shape \[1, 1, 3\], expected \[1, 1, 2\]", lr_grid=index_of([[3, 3, 3]])),
        bad_selection("hr_grid holds 65536 x 65536", hr_grid=index_of([[65536, 65536]])),
        bad_selection("hr_grid holds 7 x 6, expected at most hr_tokens, which is 36", hr_grid=index_of([[7, 6]])),
        bad_selection("hr_tokens is -1, expected 0 to 2147483647", hr_tokens=-1),
        bad_selection("hr_tokens is 2147483648, expected 0 to 2147483647", hr_tokens=2**31),
        bad_selection("hr_tokens is 4611686018427387904, expected", hr_tokens=2**62),
        bad_selection("pool_grid holds 3 x 4, expected 1 x 1 to lr_grid's 3 x 3", pool_grid=index_of([[3, 4]])),
        bad_selection("pool_grid holds 0 x 1, expected 1 x 1", pool_grid=index_of([[0, 1]])),
        bad_selection("valid_rect holds 0, 0, 4, 3, expected to lie", valid_rect=index_of([[0, 0, 4, 3]])),
        bad_selection("valid_rect holds 0, 0, 3, 4, expected to lie", valid_rect=index_of([[0, 0, 3, 4]])),
    ],
)
def test_bad_arguments(operator, arguments, message):
    with pytest.raises(ValueError, match=message):
        operator(**arguments)


@settings(max_examples=20)
@given(n=st.integers(1, 70), seed=st.integers(0, 99))
def test_bits_round_trip(n, seed):
    mask = torch.rand(3, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(ops.unpack_bits(ops.pack_bits(mask), n), mask)


def first_words(path: ops.AttentionPath) -> tuple[str, list[str]]:
    return path.path, [reason.partition(" ")[0] for reason in path.reasons]


def test_attention_path_tells_the_kernel_and_every_reason_against_a_faster_one():
    def tensors(dtype, d=128, cut=0):
        q, k, v = (torch.zeros(2, h, 17, d + cut, dtype=dtype)[..., cut:] for h in (4, 2, 2))
        return q, k, v

    assert ops.attention_path(*tensors(torch.float16)).path == "cpu"
    assert ops.attention_path(*tensors(torch.float16), capability=(7, 0)) == ("volta", ())
    assert ops.attention_path(*tensors(torch.float16), capability=(9, 0)) == ("ampere", ())
    assert ops.attention_path(*tensors(torch.bfloat16), capability=(8, 6)) == ("ampere", ())
    q, k, v = tensors(torch.float32)
    assert ops.attention_path(q[:, :, :16], k, v, capability=(7, 0)) == ("decode", ())
    assert first_words(ops.attention_path(*tensors(torch.float16), capability=(6, 0))) == (
        "generic",
        ["tensor", "tiles"],
    )
    path = ops.attention_path(*tensors(torch.bfloat16, d=36, cut=1), scale=-1.0, capability=(7, 0))
    assert first_words(path) == ("generic", ["bfloat16", "head_dim", "head_dim", "the", "q", "k", "v"])
    pool = torch.zeros(3, 2, 132, dtype=torch.float16)[..., 4:]
    path, reasons = ops.attention_path(*tensors(torch.float16), k_hr=pool, v_hr=pool.contiguous(), capability=(7, 0))
    assert path == "generic" and reasons == ("k_hr is not aligned to 16 bytes in every row",)
    far = torch.empty(2**30 + 256, dtype=torch.float16).as_strided((2, 2, 128), (2**30, 128, 1))  # never touched
    path, reasons = ops.attention_path(*tensors(torch.float16), k_hr=far, v_hr=pool.contiguous()[:2], capability=(7, 0))
    assert path == "generic" and reasons == ("rows of k_hr are 2 GiB or more apart",)


def test_attention_backward_path_tells_the_kernels_of_the_gradients():
    tensors = [torch.zeros(1, 2, 3, 64, dtype=torch.float16) for _ in "qkv"]
    assert ops.attention_backward_path(*tensors).path == "cpu"
    assert ops.attention_backward_path(*tensors, capability=(7, 0)) == ("volta", ())
    assert ops.attention_backward_path(*(x.float() for x in tensors), capability=(7, 0)).path == "fma"
    path, reasons = ops.attention_backward_path(*tensors, softcap=30.0, capability=(9, 0))
    assert path == "generic" and [reason.partition(",")[0] for reason in reasons] == ["the logits have a softcap"]


@pytest.mark.parametrize(
    "dtype, d, capability, reasons",
    [
        (torch.float32, 128, (7, 0), ["the"]),
        (torch.float32, 8, (9, 0), ["the"]),
        (torch.bfloat16, 128, (7, 5), ["bfloat16"]),
        (torch.float16, 256, (7, 0), ["head_dim"]),
        (torch.bfloat16, 136, (9, 0), ["head_dim"]),
    ],
)
def test_what_tensor_cores_do_not_take_runs_in_tiles_without_them(dtype, d, capability, reasons):
    path = ops.attention_path(*(torch.zeros(1, 2, 17, d, dtype=dtype) for _ in "qkv"), capability=capability)
    assert first_words(path) == ("fma", reasons)


@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["q", "k", "v", "k_hr", "v_hr"])
def test_a_nan_shows_in_the_rows_that_see_it(name, dtype, queries):
    heads, keys, d = 2, 9, 8
    sequence, pool = (1, heads, keys, d), (3, heads, d)
    shapes = {"q": (1, heads, queries, d), "k": sequence, "v": sequence, "k_hr": pool, "v_hr": pool}
    tensors = {key: torch.randn(*shape).to(dtype) for key, shape in shapes.items()}
    tensors[name].select(1, 0).select(-2, -1)[..., 0] = float("nan")  # head 0: the last query, sequence key or slot
    if name.endswith("hr"):
        tensors[name][-1, 0, 0] = float("nan")
    hr_keys = dict(hr_slots=ints([[0, 1, 2]]), hr_count=ints([3]), hr_from=ints([queries - 1]))
    result = ops.hierarchical_attention(**tensors, kv_start=ints([0]), kv_len=ints([keys]), **hr_keys)
    assert result.out[0, -1, 0].isnan().any()
    assert not result.out[0, :, 1].isnan().any()
    assert result.lse[0, 0, -1].isnan() == (name in ("q", "k", "k_hr"))
    if queries > 1 and name in ("q", "k"):  # only the last row sees the last key
        assert not result.out[0, :-1, 0].isnan().any()
