"""project_hr_kv is two linear layers, a rotation and a store of exactly the new rows."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_good_as_eager
from operator_arguments import ints, project_arguments

from flexattn_cuda import ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def layer_arguments(count: int, channels: int, dtype: torch.dtype, bias: bool = False, tables=None) -> dict:
    """One layer's new tokens; every slot's neighbour and what lies behind `count` are not to be touched or read."""
    generator = torch.Generator().manual_seed(count + channels)
    tokens, heads, d, room = 50, 3, 16, count + 4

    def normal(*shape, kind=dtype):
        return torch.randn(*shape, generator=generator).to(kind)

    def distinct(values):
        return torch.cat([torch.randperm(values, generator=generator)[:count].int(), torch.full((4,), 1 << 30).int()])

    weights = dict(k_weight=normal(heads * d, channels), v_weight=normal(heads * d, channels))
    if bias:
        weights |= dict(k_bias=normal(heads * d), v_bias=normal(heads * d))
    rotary = {name: normal(2, tokens // 2, d, kind=tables or dtype) for name in ("cos", "sin")}
    pools = {name: normal(room + 3, heads, d) for name in ("k_pool", "v_pool")}
    features = normal(2, tokens // 2, channels)
    new = dict(tokens=distinct(tokens), slots=distinct(room + 3), count=ints([count]))
    return dict(features=features) | rotary | weights | new | pools


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "channels"), [(0, 8), (1, 8), (7, 40), (8, 1024), (9, 264), (27, 13)])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_new_tokens_are_projected(dtype, count, channels, bias):
    given = layer_arguments(count, channels, dtype, bias, tables=torch.float32 if bias else None)
    ours = {name: x.clone().to(DEVICE) for name, x in given.items()}
    eager = {name: x.clone() for name, x in given.items()}
    exact = {name: x.clone().double() if x.is_floating_point() else x.clone() for name, x in given.items()}
    ops.project_hr_kv(**ours)
    reference.project_hr_kv(**eager)
    reference.project_hr_kv(**exact)
    terms = channels**0.5  # a product of two normal rows is about that large, before it cancels
    for name in ("k_pool", "v_pool"):
        assert_as_good_as_eager(ours[name].cpu(), eager[name], exact[name], dtype, name, cancelled=terms)
        written = torch.zeros(len(given[name]), dtype=torch.bool)
        written[given["slots"][:count].long()] = True
        assert torch.equal(ours[name].cpu()[~written], given[name][~written])
        assert not count or not torch.equal(ours[name].cpu()[written], given[name][written])


def test_pools_with_any_strides_are_written():
    arguments = project_arguments()
    k_pool, v_pool = torch.zeros(7, 2, 2, 4).unbind(1)
    ops.project_hr_kv(**arguments | dict(k_pool=k_pool, v_pool=v_pool))
    ops.project_hr_kv(**arguments)
    torch.testing.assert_close(k_pool, arguments["k_pool"])
    torch.testing.assert_close(v_pool, arguments["v_pool"])
    assert v_pool.any()
