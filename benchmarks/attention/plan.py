"""What is measured: attention as in a prompt and as in a generated token, at the sizes of a 7B model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attention import methods
from attention.case import AttentionCase
from attention.check import AttentionCheck
from attention.comparison import About, Comparison, Planned, reason
from attention.methods import METHODS, methods_of


@dataclass(frozen=True)
class Sizes:
    queries: int = 640
    selected: tuple[int, ...] = (2240, 512, 5184, 0)  # flex_attention is compiled at the first
    batches: tuple[int, ...] = (1, 8)
    heads: int = 32
    head_dim: int = 128
    side: int = 24
    first: int = 32
    hr_side: int = 72
    pool: int = 9
    decode_bytes: int = 400 * 10**6
    copy_bytes: int = 2**30
    seconds: float = 0.3  # of measuring for a comparison


QUICK = Sizes(
    queries=70,
    selected=(70, 0),
    batches=(1, 2),
    heads=2,
    head_dim=64,
    side=4,
    first=8,
    hr_side=12,
    pool=3,
    decode_bytes=2**19,
    copy_bytes=2**20,
    seconds=0.01,
)
# Rows that see HR keys, and whether the map is that over all keys.
PRESETS = {"released": ("last", False), "paper": ("all", True)}


@dataclass
class Plan:
    """Sizes, the device, and where random inputs come from.

    native: 10 * major + minor of the GPU's capability, 0 for none.
    flex: Numbers of HR keys at which flex_attention, which takes long to compile, takes part.
    """

    sizes: Sizes
    device: str
    native: int
    flex: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        self.seeds = itertools.count(self.seed)
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def case(self, N: int, Nk: int, M: int, batch: int, preset: str = "released", **options) -> AttentionCase:
        sizes, (rows, over_all) = self.sizes, PRESETS[preset]
        fields = dict(
            dtype=torch.float16,
            batch=batch,
            heads=sizes.heads,
            kv_heads=sizes.heads,
            head_dim=sizes.head_dim,
            side=sizes.side,
            first=sizes.first,
            map_over_all=over_all,
            joined=True,
            device=self.device,
            seed=next(self.seeds),
        )
        return AttentionCase(N, Nk, M, rows, **(fields | options))


def prefill(plan: Plan) -> Iterator[Planned]:
    N = plan.sizes.queries
    for batch, M, preset in itertools.product(plan.sizes.batches, plan.sizes.selected, PRESETS):
        if not M and preset == "paper":  # without HR keys the presets are the same
            continue
        name = f"prefill {preset} B={batch} M={M}"

        def build(name=name, batch=batch, M=M, preset=preset) -> Comparison:
            case = plan.case(N, N, M, batch, preset)
            return compare_attention([case], attention_about(name, [case], preset), plan.native, flex=M in plan.flex)

        yield Planned(name, build)


def decode(plan: Plan) -> Iterator[Planned]:
    """One sample of many sets of inputs, and two sets of many samples: more bytes than a cache holds."""
    sizes, keys = plan.sizes, plan.sizes.queries + 16
    for M in sizes.selected:
        sample = 2 * (keys + M) * sizes.heads * sizes.head_dim * torch.float16.itemsize
        many = -(-sizes.decode_bytes // sample)
        for batch, count in ((1, many), (many, 2)):
            name = f"decode B={batch} M={M}"

            def build(name=name, batch=batch, M=M, count=count) -> Comparison:
                sets = [plan.case(1, keys, M, batch) for _ in range(count)]
                return compare_attention(sets, attention_about(name, sets), plan.native, flex=False)

            yield Planned(name, build)


def attention_about(name: str, sets: list[AttentionCase], preset: str = "") -> About:
    case = sets[0]
    return About(
        name,
        "decode" if case.N == 1 else "prefill",
        preset,
        batch=case.batch,
        queries=case.N,
        keys=case.Nk,
        selected=case.M,
        heads=case.heads,
        head_dim=case.head_dim,
        dtype=str(case.dtype).removeprefix("torch."),
        input_sets=len(sets),
    )


def compare_attention(sets: list[AttentionCase], about: About, native: int, flex: bool) -> Comparison:
    """Compare every method on all sets, and flex_attention, which is made for one, on the first."""
    first, calls, unavailable = sets[0], methods_of(sets, native), {}
    if flex:
        try:
            calls["flex_attention"] = [methods.compiled_flex_attention(first, compiled=native > 0)]
        except Exception as error:  # a compiler may raise anything
            unavailable["flex_attention"] = reason(error)
    calls = {method: calls[method] for method in METHODS if method in calls}
    row = first.batch * first.heads * first.head_dim
    moved = row * first.q.element_size() * 2 * (first.N + first.Nk + first.M)  # q, out; k, v of both kinds
    in_sequence = first.N * (first.Nk - first.N) + first.N * (first.N + 1) // 2
    seen = in_sequence + (first.N if first.rows == "all" else 1) * first.M
    return Comparison(about, calls, AttentionCheck(first), moved, 4 * row * seen, unavailable)
