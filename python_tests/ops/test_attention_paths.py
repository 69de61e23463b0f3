"""hierarchical_attention at the sizes that its fast kernels take, around the edges of their tiles of 64 rows and keys.

On the CPU's kernels, on the CUDA kernels in the executor (`make simt`), and on a GPU where there is one.
"""

import os
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import pytest
import torch
from accuracy import assert_as_good_as_eager
from backend import BACKEND
from operator_arguments import AttentionSizes, RandomTensors, ints

from flexattn_cuda import ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = int(os.environ.get("FLEXATTN_CASES", "25"))  # of each combination
SIDE = 3


HEAD_DIMS = (64, 80, 96, 128, 128)


@dataclass
class CaseKinds:
    """What random cases are drawn from."""

    queries: Sequence[int]
    head_dims: Sequence[int] = HEAD_DIMS
    softcaps: Sequence[float] = (0.0, 0.0, 2.0, 30.0)


def choose_sizes(rng: random.Random, kinds: CaseKinds) -> AttentionSizes:
    B, Hkv = rng.choice([1, 1, 2]), rng.choice([1, 2])
    H = Hkv * rng.choice([1, 3, 4, 8] if B * Hkv == 1 else [1, 2])
    N = rng.choice(kinds.queries)
    Nk, d = N + rng.choice([0, 3, 30, 70]), rng.choice(kinds.head_dims)
    return AttentionSizes(B, H, Hkv, N, Nk, d, M=rng.choice([0, 1, 33, 63, 64, 70, 150]))


class CaseMaker(RandomTensors):
    """Makes the tensors of one call; what no query may see is NaN or infinite: hidden keys, unused slots."""

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
        if rng.random() < 0.3:
            others["key_mask"] = self.chances(x.B, x.Nk) < 0.7
        fill_hidden_keys(tensors, others, rng.choice([torch.nan, torch.inf]))
        return tensors, others

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
        R = rng.randint(1, min(x.N, rng.choice([20, 40, 70])))
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


def fill_hidden_keys(tensors: dict, others: dict, value: float) -> None:
    """Write `value` to the keys and values of the sequence that no query sees."""
    rules = {name: others.get(name) for name in ("kv_start", "kv_len", "key_mask", "bidirectional_ranges")}
    seen = reference.visible_keys(tensors["q"], tensors["k"], window=others.get("window", 0), **rules).any(1)  # [B, Nk]
    for name in "kv":
        tensors[name].transpose(1, 2)[~seen] = value


def make_case(rng: random.Random, dtype: torch.dtype, kinds: CaseKinds) -> tuple[dict, dict]:
    """Return q, k, v and the pool; and everything else."""
    maker = CaseMaker(rng, dtype, choose_sizes(rng, kinds))
    tensors, others = maker.sequence()
    others["softcap"] = rng.choice(kinds.softcaps)
    if maker.sizes.M:
        pool, slots = maker.pool()
        tensors |= pool
        others |= slots
    return tensors, others | maker.rows_that_see_hr_keys() | maker.maps()


def without_hidden(tensors: dict) -> dict:
    """Return the tensors with zeros for NaN and infinity: the reference multiplies what it hides by 0."""
    return {name: value.nan_to_num(0.0, 0.0, 0.0) for name, value in tensors.items()}


def check(tensors: dict, others: dict, dtype: torch.dtype, twice: bool = True) -> None:
    def call(operator, tensors: dict, dtype: torch.dtype, device: str = "cpu"):
        values = {name: value.to(device, dtype) for name, value in tensors.items()}
        keywords = {name: value.to(device) if torch.is_tensor(value) else value for name, value in others.items()}
        return operator(values.pop("q"), values.pop("k"), values.pop("v"), **values, **keywords)

    exact = call(reference.hierarchical_attention, without_hidden(tensors), torch.float64)
    eager = call(reference.hierarchical_attention, without_hidden(tensors), dtype)
    ours = call(ops.hierarchical_attention, tensors, dtype, DEVICE)
    again = call(ops.hierarchical_attention, tensors, dtype, DEVICE) if twice else ours
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
        tensors, others = make_case(rng, dtype, CaseKinds(queries))
        check(tensors, others, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("head_dims", [(8, 24, 40, 112), (136, 160, 192, 256, 256)], ids=["small", "large"])
@pytest.mark.parametrize(
    "capability, dtype",
    [(70, torch.float16), (70, torch.bfloat16), (70, torch.float32), (90, torch.bfloat16), (90, torch.float32)],
)
def test_head_sizes_without_tensor_cores(capability, dtype, head_dims, monkeypatch):
    tensor_cores = dtype == torch.float16 or (dtype == torch.bfloat16 and capability >= 80)
    if tensor_cores and head_dims[0] < 128:
        pytest.skip("these run on tensor cores")
    monkeypatch.setenv("FLEXATTN_CAPABILITY", str(capability))
    rng = random.Random(f"{capability} {dtype} {head_dims}")
    for _ in range(CASES):
        tensors, others = make_case(rng, dtype, CaseKinds([17, 63, 64, 65, 100], head_dims))
        path = ops.attention_path(*(tensors[name] for name in "qkv"), capability=divmod(capability, 10)).path
        assert path == "fma"
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

    def call(operator, tensors: dict, dtype: torch.dtype, device: str = "cpu", asked=tuple(tensors)):
        values = {name: value.to(device, dtype) for name, value in tensors.items()}
        keywords = {name: value.to(device) if torch.is_tensor(value) else value for name, value in others.items()}
        return gradients(operator, values, keywords, weight.to(device, dtype), asked)

    B, H, N, d = tensors["q"].shape
    weight = torch.randn(B, N, H, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = call(reference.hierarchical_attention, without_hidden(tensors), torch.float64)
    eager = call(reference.hierarchical_attention, without_hidden(tensors), dtype)
    ours = call(ops.hierarchical_attention, tensors, dtype, DEVICE)
    again = call(ops.hierarchical_attention, tensors, dtype, DEVICE, asked=some)
    for name in some:
        assert torch.equal(ours[name], again[name]), f"gradient of {name} differs from run to run"
    for name in exact:
        # A logit's gradient is p (dp - D), and dp is a sum over d products: up to sqrt(d) times what is left.
        assert_as_good_as_eager(
            ours[name].cpu(), eager[name], exact[name], dtype, f"gradient of {name}", cancelled=d**0.5
        )


def check_random_gradients(seed: str, dtype: torch.dtype, kinds: CaseKinds, expected_path: str) -> None:
    if DEVICE == "cpu" and BACKEND == "cpu":
        pytest.skip("test_ops.py tests the gradients of the CPU's one path")
    capability = divmod(int(os.environ["FLEXATTN_CAPABILITY"]), 10)
    rng = random.Random(seed)
    for _ in range(CASES):
        tensors, others = make_case(rng, dtype, kinds)
        path = ops.attention_backward_path(**tensors, softcap=others["softcap"], capability=capability).path
        assert path == expected_path
        some = rng.sample(sorted(tensors), rng.randint(1, len(tensors)))
        check_gradients(tensors, {name: x for name, x in others.items() if not name.startswith("map_")}, dtype, some)


@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, dtype, path",
    [
        (70, torch.float16, "volta"),
        (75, torch.float16, "volta"),
        (90, torch.float16, "ampere"),
        (90, torch.bfloat16, "ampere"),
        (70, torch.float32, "fma"),
        (70, torch.bfloat16, "fma"),
    ],
)
def test_gradients_on_every_path_equal_the_reference(capability, dtype, path, monkeypatch):
    monkeypatch.setenv("FLEXATTN_CAPABILITY", str(capability))
    kinds = CaseKinds([1, 2, 17, 63, 64, 65, 100, 140], softcaps=[0.0])
    check_random_gradients(f"gradients {capability} {dtype}", dtype, kinds, path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_with_a_softcap_equal_the_reference(dtype, monkeypatch):
    monkeypatch.setenv("FLEXATTN_CAPABILITY", "90")
    kinds = CaseKinds([1, 2, 17, 63, 64, 65], softcaps=[2.0, 30.0])
    check_random_gradients(f"softcap {dtype}", dtype, kinds, "generic")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_of_head_sizes_without_tensor_cores(dtype, monkeypatch):
    monkeypatch.setenv("FLEXATTN_CAPABILITY", "70")
    kinds = CaseKinds([17, 63, 64, 65], (160, 256), softcaps=[0.0])
    check_random_gradients(f"large heads {dtype}", dtype, kinds, "fma")


def make_hidden_case(queries: int, value: float, dtype: torch.dtype = torch.float16) -> tuple[dict, dict]:
    """Return a call whose hidden keys and values are `value`: some of each kind that can be hidden."""
    x = AttentionSizes(B=2, H=2, Hkv=1, N=queries, Nk=queries + 70, d=64, M=70)
    maker = CaseMaker(random.Random(queries), dtype, x)
    tensors, _ = maker.sequence()
    pool, _ = maker.pool()
    tensors = {name: maker.floats(*tensor.shape) for name, tensor in (tensors | pool).items()}
    others = {
        "kv_start": ints([3, 0]),
        "kv_len": ints([x.Nk, x.Nk - 5]),
        "key_mask": maker.chances(x.B, x.Nk) < 0.7,
        "hr_slots": torch.arange(x.B * x.M, dtype=torch.int32).view(x.B, x.M),
        "hr_count": ints([x.M, x.M - 1]),
        "hr_rows": ints([[queries - 1], [0]]),
        "alpha": torch.tensor([0.5, 1.0]),
    }
    others["key_mask"][0, -1] = False  # the last of the keys is read in place of those past it
    fill_hidden_keys(tensors, others, value)
    bits = maker.chances(x.B, 1, x.M) < 0.5
    others["hr_row_bits"] = ops.pack_bits(bits)
    for name in ("k_hr", "v_hr"):
        tensors[name][: x.B * x.M][~bits.flatten()] = value
    return tensors, others


paths = pytest.mark.parametrize(
    "capability, queries, dtype",
    [
        (60, 1, torch.float16),
        (60, 40, torch.float16),
        (70, 40, torch.float16),
        (70, 100, torch.float16),
        (70, 40, torch.float32),
        (70, 100, torch.float32),
        (90, 40, torch.float16),
        (90, 100, torch.float16),
    ],
)  # decode, generic, Volta, without tensor cores, Ampere; on the CPU one


@paths
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_hidden_keys_and_values_may_hold_anything(capability, queries, dtype, value, monkeypatch):
    if DEVICE == "cpu" and BACKEND == "cpu" and capability == 90:
        pytest.skip("the CPU has one path")
    monkeypatch.setenv("FLEXATTN_CAPABILITY", str(capability))
    tensors, others = make_hidden_case(queries, value, dtype)
    maps = {"map_ranges": ints([[[2, 2 + SIDE**2]], [[5, 5 + SIDE**2]]]), "map_size": SIDE**2}
    check(tensors, others | maps, dtype, twice=False)
    check_gradients(tensors, others, dtype, some=("q", "k_hr"))


@pytest.mark.parametrize("queries", [4, 40])
def test_a_nan_reaches_no_query_before_its_key(queries, monkeypatch):
    """Except in tiles, where it reaches the 64 queries of a block."""
    monkeypatch.setenv("FLEXATTN_CAPABILITY", "60")
    tensors, others = make_hidden_case(queries, 0.0)
    before = queries // 2
    weight = torch.zeros(2, queries, 2, 64, dtype=torch.float16)
    weight[:, :before] = 1

    def outcome() -> tuple[torch.Tensor, torch.Tensor]:
        values = {name: value.to(DEVICE) for name, value in tensors.items()}
        keywords = {name: value.to(DEVICE) for name, value in others.items()}
        out = ops.hierarchical_attention(
            values["q"], values["k"], values["v"], k_hr=values["k_hr"], v_hr=values["v_hr"], **keywords
        ).out
        grad_q = gradients(ops.hierarchical_attention, values, keywords, weight.to(DEVICE), asked=("q",))["q"]
        return out[:, :before].cpu(), grad_q[:, :, :before].cpu()

    clean = outcome()
    for b, length in enumerate(others["kv_len"].tolist()):
        others["key_mask"][b, length - queries + before] = True
        for name in "kv":
            tensors[name][b, :, length - queries + before] = torch.nan
    for ours, expected in zip(outcome(), clean):
        torch.testing.assert_close(ours, expected)  # tiles may be smaller: sums in another order
