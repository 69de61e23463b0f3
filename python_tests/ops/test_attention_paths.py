"""hierarchical_attention at the sizes that its fast kernels take, around the edges of their tiles of 64 rows and keys.

On the CPU's kernels, on the CUDA kernels in the executor (`make simt`), and on a GPU where there is one.
"""

import os
import random
from collections.abc import Callable, Collection

import pytest
import torch
from accuracy import assert_as_good_as_eager
from backend import BACKEND
from operator_arguments import AttentionSizes, RandomTensors, ints

from flexattn_cuda import ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = int(os.environ.get("FLEXATTN_CASES", "25"))  # of each combination
SIDE = 3


def choose_sizes(rng: random.Random, queries: list[int]) -> AttentionSizes:
    B, Hkv = rng.choice([1, 1, 2]), rng.choice([1, 2])
    H = Hkv * rng.choice([1, 3, 4, 8] if B * Hkv == 1 else [1, 2])
    N = rng.choice(queries)
    Nk, d = N + rng.choice([0, 3, 30, 70]), rng.choice([64, 80, 96, 128, 128])
    return AttentionSizes(B, H, Hkv, N, Nk, d, M=rng.choice([0, 1, 33, 63, 64, 70, 150]))


class CaseMaker(RandomTensors):
    """Makes the tensors of one call; what no query may see is NaN: keys out of reach, unused slots."""

    def __init__(self, rng: random.Random, dtype: torch.dtype, sizes: AttentionSizes):
        super().__init__(sizes, seed=rng.randrange(2**31))
        self.rng, self.dtype = rng, dtype

    def floats(self, *shape: int) -> torch.Tensor:
        return self.normal(*shape, dtype=torch.float32).to(self.dtype)

    def per_sample(self, choose: Callable[[], int]) -> torch.Tensor:
        return ints([choose() for _ in range(self.sizes.B)])

    def sequence(self) -> tuple[dict, dict]:
        rng, x = self.rng, self.sizes
        tensors = {
            "q": self.floats(x.B, x.N, x.H, x.d).transpose(1, 2),
            "k": self.floats(x.B, x.Nk, x.Hkv, x.d).transpose(1, 2),
            "v": self.floats(x.B, x.Hkv, x.Nk, x.d),
        }
        others = {
            "kv_len": self.per_sample(lambda: rng.randint(x.N, x.Nk)),
            "kv_start": self.per_sample(lambda: rng.randint(0, x.Nk // 2)),
        }
        if rng.random() < 0.5:
            others["window"] = rng.choice([1, 5, 40, 64, x.Nk // 2, x.Nk])
        if count := rng.choice([0, 0, 1, 3]):
            others["bidirectional_ranges"] = self.ranges(others["kv_len"].tolist(), count)
        seen = reference.visible_keys(tensors["q"], tensors["k"], key_mask=None, **others).any(1)  # [B, Nk]
        for name in "kv":
            tensors[name].transpose(1, 2)[~seen] = torch.nan
        if rng.random() < 0.3:
            others["key_mask"] = self.chances(x.B, x.Nk) < 0.7
        return tensors, others | {"softcap": rng.choice([0.0, 0.0, 2.0, 30.0])}

    def pool(self) -> tuple[dict, dict]:
        rng, x = self.rng, self.sizes
        tensors = {name: self.floats(x.slots, x.Hkv, x.d) for name in ("k_hr", "v_hr")}
        others = {
            "hr_slots": self.distinct(x.slots, x.M),
            "hr_count": self.per_sample(lambda: rng.choice([0, x.M, rng.randint(0, x.M)])),
        }
        unused = torch.ones(x.slots, dtype=torch.bool)
        for slots, count in zip(others["hr_slots"], others["hr_count"]):
            unused[slots[:count].long()] = False
        for rows in tensors.values():
            rows[unused] = torch.nan
        if rng.random() < 0.3:
            others["alpha"] = self.chances(x.B)
        return tensors, others

    def rows_that_see_hr_keys(self) -> dict:
        rng, x = self.rng, self.sizes
        kind = rng.choice(["from", "rows", "bits"])
        if kind == "from":
            return {"hr_from": self.per_sample(lambda: rng.choice([0, x.N - 1, rng.randint(0, x.N)]))}
        R = rng.randint(1, min(x.N, 20))
        others = {"hr_rows": self.distinct(x.N, R)}
        if R > 1:
            others["hr_rows"][0, -1] = -1
        if kind == "bits" and x.M:
            others["hr_row_bits"] = ops.pack_bits(self.chances(x.B, R, x.M) < rng.choice([0.5, 0.02]))
        return others

    def maps(self) -> dict:
        x = self.sizes
        if x.Nk < 2 * SIDE**2 + 2:
            return {}
        ranges = ints([[2, 2 + SIDE**2], [x.Nk - SIDE**2, x.Nk]]).expand(x.B, 2, 2).clone()
        return {"map_ranges": ranges, "map_size": SIDE**2, "map_over_all": self.rng.random() < 0.5}


def make_case(rng: random.Random, dtype: torch.dtype, queries: list[int]) -> tuple[dict, dict]:
    """Return q, k, v and the pool; and everything else."""
    maker = CaseMaker(rng, dtype, choose_sizes(rng, queries))
    tensors, others = maker.sequence()
    if maker.sizes.M:
        pool, slots = maker.pool()
        tensors |= pool
        others |= slots
    return tensors, others | maker.rows_that_see_hr_keys() | maker.maps()


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
@pytest.mark.parametrize("capability, queries", [(70, 640), (90, 640), (70, 1)])
def test_a_long_sequence_with_all_of_an_image(capability, queries, monkeypatch):
    if DEVICE == "cpu" and BACKEND == "sanitizers":
        pytest.skip("under the sanitizers the small ones run")
    monkeypatch.setenv("FLEXATTN_CAPABILITY", str(capability))
    generator = torch.Generator().manual_seed(queries)
    d, keys, M = 128, 2925, 600
    shapes = {"q": (1, 1, queries, d), "k": (1, 1, keys, d), "v": (1, 1, keys, d), "k_hr": (M, 1, d), "v_hr": (M, 1, d)}
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    others = {
        "kv_start": ints([3]),
        "kv_len": ints([keys]),
        "hr_slots": torch.randperm(M, generator=generator).int()[None],
        "hr_count": ints([M - 1]),
        "hr_from": ints([queries * 2 // 3]),
        "map_ranges": ints([[[35, 35 + 576]]]),
        "map_size": 576,
    }
    tensors["k_hr"][others["hr_slots"][0, -1]] = tensors["v_hr"][others["hr_slots"][0, -1]] = torch.nan
    check({name: value.half() for name, value in tensors.items()}, others, torch.float16, twice=False)


@pytest.mark.slow
@pytest.mark.parametrize("capability, queries", [(70, 300), (90, 300), (70, 1)])
def test_a_short_window_with_an_image_longer_than_it(capability, queries, monkeypatch):
    """The queries begin inside the image: the first tiles reach back to its start, the last ones only to the window."""
    monkeypatch.setenv("FLEXATTN_CAPABILITY", str(capability))
    generator = torch.Generator().manual_seed(queries)
    keys, image = 1300, (700, 1100)
    shapes = {"q": (1, 1, queries, 64), "k": (1, 1, keys, 64), "v": (1, 1, keys, 64)}
    tensors = {name: torch.randn(*shape, generator=generator).half() for name, shape in shapes.items()}
    others = {"kv_len": ints([keys]), "window": 128, "bidirectional_ranges": ints([[image]])}
    seen = reference.visible_keys(tensors["q"], tensors["k"], None, key_mask=None, **others).any(1)[0]
    assert seen.sum() == (keys - image[0] if queries > 1 else 128)
    tensors["k"][:, :, ~seen] = tensors["v"][:, :, ~seen] = torch.nan
    check(tensors, others, torch.float16, twice=False)
    if queries > 1:
        check_gradients(tensors, others, torch.float16, some=("q", "v"))


def gradients(
    operator, tensors: dict, others: dict, weight: torch.Tensor, asked: Collection[str]
) -> dict[str, torch.Tensor]:
    """Return the gradients of sum(weight * out) that are asked for, zeros for what `out` does not depend on."""
    values = {name: value.detach().requires_grad_(name in asked) for name, value in tensors.items()}
    leaves = {name: value for name, value in values.items() if name in asked}
    out = operator(values.pop("q"), values.pop("k"), values.pop("v"), **values, **others).out
    found = torch.autograd.grad(out, list(leaves.values()), weight, allow_unused=True)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), found)}


def check_gradients(tensors: dict, others: dict, dtype: torch.dtype, some: Collection[str]) -> None:
    """Compare all gradients with the reference, and with those of a second run that asks for `some` of them."""

    def call(operator, dtype, device="cpu", hidden=None, asked=tuple(tensors)):
        # The reference multiplies what it hides by 0, which NaN would survive.
        values = {
            name: (value if hidden is None else value.nan_to_num(hidden)).to(device, dtype)
            for name, value in tensors.items()
        }
        keywords = {name: value.to(device) if torch.is_tensor(value) else value for name, value in others.items()}
        return gradients(operator, values, keywords, weight.to(device, dtype), asked)

    B, H, N, d = tensors["q"].shape
    weight = torch.randn(B, N, H, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = call(reference.hierarchical_attention, torch.float64, hidden=0.0)
    eager = call(reference.hierarchical_attention, dtype, hidden=0.0)
    ours = call(ops.hierarchical_attention, dtype, DEVICE)
    again = call(ops.hierarchical_attention, dtype, DEVICE, asked=some)
    for name in some:
        assert torch.equal(ours[name], again[name]), f"gradient of {name} differs from run to run"
    for name in exact:
        # A logit's gradient is p (dp - D), and dp is a sum over d products: up to sqrt(d) times what is left.
        assert_as_good_as_eager(
            ours[name].cpu(), eager[name], exact[name], dtype, f"gradient of {name}", cancelled=d**0.5
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, dtype",
    [(70, torch.float16), (75, torch.float16), (90, torch.float16), (90, torch.bfloat16), (70, torch.float32)],
)
def test_gradients_on_every_path_equal_the_reference(capability, dtype, monkeypatch):
    if DEVICE == "cpu" and BACKEND == "cpu":
        pytest.skip("test_ops.py tests the gradients of the CPU's one path")
    monkeypatch.setenv("FLEXATTN_CAPABILITY", str(capability))
    rng = random.Random(f"gradients {capability} {dtype}")
    for _ in range(CASES // 2):  # the backward pass takes several times as long
        tensors, others = make_case(rng, dtype, [1, 2, 17, 63, 64, 65, 100, 140])
        some = rng.sample(sorted(tensors), rng.randint(1, len(tensors)))
        check_gradients(tensors, {name: x for name, x in others.items() if not name.startswith("map_")}, dtype, some)
