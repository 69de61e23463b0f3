"""hierarchical_attention at the sizes that its fast kernels take, around the edges of their tiles of 64 rows and keys.

On the CPU's kernels, on the CUDA kernels in the executor (`make simt`), and on a GPU where there is one.
"""

import random

import pytest
import torch
from accuracy import assert_as_good_as_eager
from backend import BACKEND

from flexattn_cuda import ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = 25  # of each combination
SIDE = 3


def make_case(rng: random.Random, dtype: torch.dtype, queries: list[int]) -> tuple[dict, dict]:
    """(q, k, v and the pool; everything else). What no query may see is NaN: the tail of the keys, unused slots."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    B, Hkv = rng.choice([1, 1, 2]), rng.choice([1, 2])
    H = Hkv * rng.choice([1, 3, 4, 8] if B * Hkv == 1 else [1, 2])
    N = rng.choice(queries)
    Nk, d, M = (
        N + rng.choice([0, 3, 30, 70]),
        rng.choice([64, 80, 96, 128, 128]),
        rng.choice([0, 1, 33, 63, 64, 70, 150]),
    )

    def floats(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32)

    tensors = {
        "q": floats(B, N, H, d).transpose(1, 2),
        "k": floats(B, Nk, Hkv, d).transpose(1, 2),
        "v": floats(B, Hkv, Nk, d),
    }
    others = {
        "kv_len": ints(*(rng.randint(N, Nk) for _ in range(B))),
        "kv_start": ints(*(rng.randint(0, Nk // 2) for _ in range(B))),
    }
    for b in range(B):
        for name in "kv":
            tensors[name][b, :, others["kv_len"][b] :] = torch.nan
    if rng.random() < 0.3:
        others["key_mask"] = torch.rand(B, Nk, generator=generator) < 0.7
    kind = rng.choice(["from", "rows", "bits"])
    if M:
        slots = torch.stack([torch.randperm(B * M + 3, generator=generator)[:M] for _ in range(B)]).int()
        counts = ints(*(rng.choice([0, M, rng.randint(0, M)]) for _ in range(B)))
        pool = {"k_hr": floats(B * M + 3, Hkv, d), "v_hr": floats(B * M + 3, Hkv, d)}
        unused = torch.ones(B * M + 3, dtype=torch.bool)
        for b in range(B):
            unused[slots[b, : counts[b]].long()] = False
        for rows in pool.values():
            rows[unused] = torch.nan
        tensors |= pool
        others |= {"hr_slots": slots, "hr_count": counts}
        if rng.random() < 0.3:
            others["alpha"] = torch.rand(B, generator=generator)
    if kind == "from":
        others["hr_from"] = ints(*(rng.choice([0, N - 1, rng.randint(0, N)]) for _ in range(B)))
    else:
        R = rng.randint(1, min(N, 20))
        others["hr_rows"] = torch.stack([torch.randperm(N, generator=generator)[:R] for _ in range(B)]).int()
        if R > 1:
            others["hr_rows"][0, -1] = -1
        if kind == "bits" and M:
            others["hr_row_bits"] = ops.pack_bits(torch.rand(B, R, M, generator=generator) < rng.choice([0.5, 0.02]))
    if Nk >= 2 * SIDE**2 + 2:
        ranges = ints([2, 2 + SIDE**2], [Nk - SIDE**2, Nk]).expand(B, 2, 2).clone()
        others |= {"map_ranges": ranges, "map_size": SIDE**2, "map_over_all": rng.random() < 0.5}
    return tensors, others


def check(tensors: dict, others: dict, dtype: torch.dtype, twice: bool = True) -> None:
    def call(operator, dtype=None, device="cpu", hidden=None):
        values = {
            name: (value.to(dtype) if dtype else value).nan_to_num(hidden).to(device)
            if hidden is not None
            else value.to(device)
            for name, value in tensors.items()
        }
        keywords = {name: value.to(device) if torch.is_tensor(value) else value for name, value in others.items()}
        return operator(values.pop("q"), values.pop("k"), values.pop("v"), **values, **keywords)

    # The reference multiplies what it hides by 0, which NaN would survive.
    exact = call(reference.hierarchical_attention, torch.float64, hidden=0.0)
    eager = call(reference.hierarchical_attention, dtype, hidden=0.0)
    ours = call(ops.hierarchical_attention, device=DEVICE)
    again = call(ops.hierarchical_attention, device=DEVICE) if twice else ours
    for name in ("out", "lse", "lse_seq", "map"):
        assert_as_good_as_eager(getattr(ours, name).cpu(), getattr(eager, name), getattr(exact, name), dtype, name)
        assert torch.equal(getattr(ours, name), getattr(again, name)), f"{name} differs from run to run"


@pytest.mark.slow
@pytest.mark.parametrize("queries", [[1, 2, 16], [17, 63, 64, 65, 100]], ids=["few", "many"])
@pytest.mark.parametrize(
    "capability, dtype",
    [
        (70, torch.float16),
        (70, torch.bfloat16),
        (70, torch.float32),
        (90, torch.float16),
        (90, torch.bfloat16),
        (90, torch.float32),
    ],
)
def test_every_path_equals_the_reference(capability, dtype, queries, monkeypatch):
    if DEVICE == "cpu" and BACKEND == "cpu" and capability == 90:
        pytest.skip("the CPU has one path")
    monkeypatch.setenv("FLEXATTN_CAPABILITY", str(capability))
    rng = random.Random(f"{capability} {dtype} {queries}")
    for _ in range(CASES):
        tensors, others = make_case(rng, dtype, queries)
        check(tensors, others, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("capability, queries", [(70, 2925), (90, 2925), (70, 1)])
def test_a_long_sequence_with_all_of_a_photograph(capability, queries, monkeypatch):
    if DEVICE == "cpu" and BACKEND == "sanitizers":
        pytest.skip("under the sanitizers the small ones run")
    monkeypatch.setenv("FLEXATTN_CAPABILITY", str(capability))
    generator = torch.Generator().manual_seed(queries)
    d, keys, M = 128, 2925, 600
    tensors = {
        "q": torch.randn(1, 1, queries, d, generator=generator), "k": torch.randn(1, 1, keys, d, generator=generator),
        "v": torch.randn(1, 1, keys, d, generator=generator), "k_hr": torch.randn(M, 1, d, generator=generator),
        "v_hr": torch.randn(M, 1, d, generator=generator),
    }  # fmt: skip
    i32 = torch.int32
    others = {
        "kv_start": torch.tensor([3], dtype=i32), "kv_len": torch.tensor([keys], dtype=i32), "hr_slots": torch.randperm(M, generator=generator).int()[None],
        "hr_count": torch.tensor([M - 1], dtype=i32), "hr_from": torch.tensor([queries * 2 // 3], dtype=i32),
        "map_ranges": torch.tensor([[[35, 35 + 576]]], dtype=i32), "map_size": 576,
    }  # fmt: skip
    tensors["k_hr"][others["hr_slots"][0, -1]] = tensors["v_hr"][others["hr_slots"][0, -1]] = torch.nan
    check({name: value.half() for name, value in tensors.items()}, others, torch.float16, twice=False)
