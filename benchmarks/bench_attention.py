"""hierarchical_attention on a GPU against its peers, as ratios within one run; the other kernels against a plain copy.

    python benchmarks/bench_attention.py [--out build/gpu] [--seconds 90] [--all]

float16, 32 heads of 128 channels. Prefill: 640 query rows; the preset `released` (the last row sees the M high-resolution keys,
map over the sequence) and `paper` (all rows see them, map over all keys). Decode: one row, with keys and values of at least
400 MB in all, of one sample or of as many as that takes. Who computes what:

    ours            output and map, HR keys read through their slots; on this GPU's path and, for prefill, on the V100's
                    (FLEXATTN_CAPABILITY=70). Arguments that a model makes once are made ahead.
    eager           the same, as a model without these operators does it: matmul, mask, softmax, matmul, sum over heads
    sdpa ...        torch's scaled_dot_product_attention, by backend: the same output, and no map. Keys are in the order
                    HR, sequence, so that `paper` is a causal mask aligned at the lower right: flash and efficient take it as
                    torch's causal bias (half of the products are skipped, as in ours), cudnn and math as a tensor.
                    `released` is a causal call over the sequence and a call for the last row over all keys.
    flex_attention  torch.nn.attention.flex_attention, compiled, with that mask as a block mask, made ahead: the same output
                    and no map. Compiling takes seconds: at M = 2240 only, unless --all.

eager, sdpa and flex_attention have their keys concatenated ahead, outside of the time: in their favour.

Before it is timed, every method's output (and map) is compared with reference.py in float64. Whoever errs by more than the
rounding of probabilities, logits and output explains, or gives a NaN, is not timed; if that is one of ours, the exit code is 1.

Times are medians of calls that take turns, by CUDA events. Before each call a large buffer is read: the L2 cache is cold, and
the GPU is busy until the call is queued, so that launches are not timed. Decode also goes through samples in turn.
Bytes are those that must move once; the bandwidth of a large copy within the GPU, read and written, is measured beside.

Inputs are random, anew at every run; --seed repeats one. Into --out: attention.csv, with the machine in every row, and
prefill.png and decode.png where matplotlib is installed.
--check calls each kernel once on small sizes and compares it, and times nothing: for compute-sanitizer.
Exit 1: something of ours is wrong. Exit 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import measuring
import torch
from attention_case import AttentionCase
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flexattn_cuda import ops, reference

VOLTA = "ours, V100's kernels"
BACKENDS = {
    "sdpa flash": (SDPBackend.FLASH_ATTENTION, False),
    "sdpa efficient": (SDPBackend.EFFICIENT_ATTENTION, False),
    "sdpa cudnn": (SDPBackend.CUDNN_ATTENTION, True),
    "sdpa math": (SDPBackend.MATH, True),
}  # and whether it takes its mask as a tensor
OURS = ("ours", VOLTA)
METHODS = (*OURS, "eager", *BACKENDS, "flex_attention")


@dataclass(frozen=True)
class Sizes:
    queries: int = 640
    selected: tuple[int, ...] = (
        2240,
        512,
        5184,
        0,
    )  # the first is where flex_attention is compiled
    batches: tuple[int, ...] = (1, 8)
    heads: int = 32
    head_dim: int = 128
    side: int = 24
    first: int = 32
    hr_side: int = 72
    pool: int = 9
    decode_bytes: int = 400 * 10**6
    copy_bytes: int = 2**30
    seconds: float = 0.3  # of measuring for a case


QUICK = Sizes(queries=70, selected=(70, 0), batches=(1, 2), heads=2, head_dim=64, side=4, first=8, hr_side=12, pool=3,
              decode_bytes=2**19, copy_bytes=2**20, seconds=0.01)  # fmt: skip


@dataclass
class Run:
    """What is measured, and where.

    native: 10 * major + minor of the GPU, 0 for none.
    flex: The numbers of HR keys at which flex_attention, which is slow to make, takes part.
    """

    sizes: Sizes
    device: str
    native: int
    flex: tuple[int, ...]
    seed: int

    def __post_init__(self):
        self.seeds = itertools.count(self.seed)
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def attention(
        self, N: int, Nk: int, M: int, batch: int, rows: str = "last", map_over_all: bool = False
    ) -> AttentionCase:
        z = self.sizes
        return AttentionCase(N, Nk, M, rows, torch.float16, batch, z.heads, z.heads, z.head_dim, z.side, z.first, map_over_all, joined=True,
                             device=self.device, seed=next(self.seeds))  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- clocks


@dataclass
class Call:
    """A call, and what must be done before each time it is made."""

    function: Callable
    before: Callable = lambda: None

    def __call__(self):
        self.before()
        return self.function()


class EventClock:
    """Seconds of a call on the GPU's own clock, with a cold L2 cache and without the time in which it is queued."""

    MOST_READS = 64

    def __init__(self, bytes_read: int = 2**29):
        self.buffer = torch.zeros(
            bytes_read // 4, device="cuda"
        )  # read, not written: nothing is written back while a call runs

    def __call__(self, call: Callable) -> float:
        before, function = (call.before, call.function) if isinstance(call, Call) else (None, call)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        reads = 1
        while True:
            if before:
                before()
            for _ in range(reads):
                self.buffer.sum()
            start.record()
            function()
            end.record()
            waited = start.query()  # the GPU came to the call before all of it was queued
            end.synchronize()
            if not waited or reads == self.MOST_READS:
                return start.elapsed_time(end) * 1e-3
            reads *= 2


# --------------------------------------------------------------------------------------------------------------- cases


@dataclass
class Case:
    """Methods that do the same, on several sets of inputs that they go through in turn."""

    name: str
    columns: dict
    methods: dict[str, list[Callable]]  # a call for each set of inputs
    errors: Callable[[Callable], dict[str, float]]  # of a method's call on the first set; raises Wrong
    bytes: int
    flop: int = 0
    unavailable: dict[str, str] = field(default_factory=dict)


class Wrong(Exception):
    """A result that rounding does not explain."""


def compared(name: str, found: torch.Tensor, exact: torch.Tensor, magnitude: float, roundings: float) -> float:
    """Largest absolute error. A value of size `magnitude` is rounded `roundings` times by half a unit on either side."""
    error = (found.double() - exact).abs().max().item()
    allowed = roundings * torch.finfo(found.dtype).eps * magnitude
    if not error <= allowed:  # a NaN is not
        raise Wrong(f"{name} is wrong: error {error:.3g}, allowed {allowed:.3g}")
    return error


def exact_attention(case: AttentionCase, heads: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and map in float64, by sample and a few heads at a time: the reference holds the whole matrix."""
    outs, maps = [], []
    for b in range(case.batch):
        parts = []
        shared = ("k_hr", "v_hr", "map_size", "map_over_all")
        options = {name: value if name in shared else value[b : b + 1] for name, value in case.options.items()}
        for h in range(0, case.heads, heads):
            q, k, v = (x[b : b + 1, h : h + heads].double() for x in (case.q, case.k, case.v))
            pool = {name: case.options[name][:, h : h + heads].double() for name in ("k_hr", "v_hr") if case.M}
            parts.append(reference.hierarchical_attention(q, k, v, **(options | pool)))
        outs.append(torch.cat([part.out for part in parts], 2))
        maps.append(sum(part.map for part in parts))
    return torch.cat(outs), torch.cat(maps)


@contextmanager
def capability(value: str) -> Iterator[None]:
    """The launches inside choose their kernels as on a GPU of this capability."""
    before = os.environ.get("FLEXATTN_CAPABILITY")
    os.environ["FLEXATTN_CAPABILITY"] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ["FLEXATTN_CAPABILITY"]
        else:
            os.environ["FLEXATTN_CAPABILITY"] = before


def in_context(context: Callable, function: Callable) -> Callable:
    def call():
        with context():
            return function()

    return call


def compiled_flex_attention(case: AttentionCase, compile: bool) -> Callable:
    """The mask over the keys in the order HR, sequence."""
    M, past, last, all_rows = case.M, case.Nk - case.N, case.N - 1, case.rows == "all"

    def visible(b, h, q, key):
        in_sequence = (key >= M) & (key - M <= q + past)
        return in_sequence | (key < M if all_rows else (key < M) & (q == last))

    mask = create_block_mask(visible, None, None, case.N, M + case.Nk, device=case.device)
    torch.compiler.reset()  # every case is compiled for its own sizes
    attention = torch.compile(flex_attention, dynamic=False) if compile else flex_attention
    k, v = case.all_keys() if M else (case.k, case.v)
    return lambda: (attention(case.q, k, v, block_mask=mask).transpose(1, 2), None)


def attention(sets: list[AttentionCase], name: str, columns: dict, native: int, flex: bool) -> Case:
    """Every method on all sets; flex_attention, which is made for one, on the first."""
    methods = {"ours": [case.ours for case in sets], "eager": [case.eager for case in sets]}
    if sets[0].N > 16 and native != 70:
        methods[VOLTA] = [in_context(lambda: capability("70"), case.ours) for case in sets]
    for backend, (which, as_tensor) in BACKENDS.items():
        methods[backend] = [
            in_context(
                lambda which=which: sdpa_kernel(which),
                lambda case=case, t=as_tensor: case.sdpa(mask_as_tensor=t),
            )
            for case in sets
        ]
    unavailable = {}
    if flex:
        try:
            methods["flex_attention"] = [compiled_flex_attention(sets[0], compile=native > 0)]
        except Exception as error:  # whatever a compiler may raise
            unavailable["flex_attention"] = reason(error)

    first = sets[0]
    exact: list[torch.Tensor] = []

    def errors(call: Callable) -> dict[str, float]:
        if not exact:
            exact.extend(exact_attention(first))
        out, map = call()
        values = max(x.abs().max().item() for x in (first.v, first.v_hr) if x.numel())
        # Ours rounds probabilities and output; others round their logits, too, which are some times as large.
        ours = call in methods["ours"] + methods.get(VOLTA, [])
        found = {"error_out": compared("the output", out, exact[0], values, 1 if ours else 4)}
        if map is not None:
            unit = (
                torch.finfo(first.dtype).eps / torch.finfo(map.dtype).eps
            )  # of the type in which others keep probabilities
            found["error_map"] = compared(
                "the map", map, exact[1], max(1.0, exact[1].max().item()), 64 if ours else 4 * unit
            )
        return found

    row = first.batch * first.heads * first.head_dim
    moved = row * first.q.element_size() * 2 * (first.N + first.Nk + first.M)  # q, out; k, v of both kinds
    seen = (
        first.N * (first.Nk - first.N)
        + first.N * (first.N + 1) // 2
        + (first.N if first.rows == "all" else 1) * first.M
    )
    columns = columns | {"batch": first.batch, "queries": first.N, "keys": first.Nk, "selected": first.M, "heads": first.heads,
                         "head_dim": first.head_dim, "dtype": str(first.dtype)[6:], "input_sets": len(sets)}  # fmt: skip
    ordered = {method: methods[method] for method in METHODS if method in methods}
    return Case(name, columns, ordered, errors, moved, 4 * row * seen, unavailable)


Named = tuple[str, Callable[[], Case]]  # inputs are made when it is called


def prefill(run: Run) -> Iterator[Named]:
    N = run.sizes.queries
    presets = {"released": ("last", False), "paper": ("all", True)}
    for batch, M, (preset, form) in itertools.product(run.sizes.batches, run.sizes.selected, presets.items()):
        if not M and preset == "paper":  # without HR keys they are the same
            continue
        name, columns = f"prefill {preset} B={batch} M={M}", {"case": "prefill", "preset": preset}
        yield (
            name,
            lambda name=name, columns=columns, batch=batch, M=M, form=form: attention(
                [run.attention(N, N, M, batch, *form)], name, columns, run.native, M in run.flex
            ),
        )


def decode(run: Run) -> Iterator[Named]:
    keys = run.sizes.queries + 16
    for M in run.sizes.selected:
        sample = 2 * (keys + M) * run.sizes.heads * run.sizes.head_dim * torch.float16.itemsize
        many = -(-run.sizes.decode_bytes // sample)
        for batch, sets in ((1, many), (many, 2)):
            name = f"decode B={batch} M={M}"
            yield (
                name,
                lambda name=name, M=M, batch=batch, sets=sets: attention(
                    [run.attention(1, keys, M, batch) for _ in range(sets)],
                    name,
                    {"case": "decode"},
                    run.native,
                    False,
                ),
            )


def operators(run: Run) -> Iterator[Named]:
    sizes, device, generator = run.sizes, run.device, run.generator
    B, T, D = sizes.batches[-1], sizes.hr_side**2, sizes.heads * sizes.head_dim
    M, capacity = sizes.selected[0], B * T
    i32 = dict(dtype=torch.int32, device=device)

    def selected() -> torch.Tensor:
        chosen = [torch.randperm(T, generator=generator, device=device)[:M].sort().values for _ in range(B)]
        return torch.stack(chosen).int()

    def equal(expected: Callable) -> Callable[[Callable], dict[str, float]]:
        def errors(call: Callable) -> dict[str, float]:
            for found, wanted in zip(call(), expected()):
                if not torch.equal(found.cpu(), wanted.cpu()):
                    raise Wrong("it is not what the reference gives")
            return {"error_out": 0.0}

        return errors

    def case(name: str, call: Callable, errors: Callable, moved: int) -> Case:
        return Case(name, {"case": name, "batch": B, "selected": M}, {"ours": [call]}, errors, moved)

    def size(*tensors: torch.Tensor) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    def select() -> Case:
        map = torch.rand(B, 1, 1, sizes.side**2, generator=generator, device=device) ** 27  # few cells stand out
        live = torch.tensor([0, 0, sizes.side, sizes.side], **i32).expand(B, 1, 4).contiguous()
        options = dict(hr_side=sizes.hr_side, scale=255.0, threshold=48.0, pool_side=sizes.pool)
        call = lambda: ops.select_tokens(map, live, **options)  # noqa: E731
        expected = lambda: reference.select_tokens(map.cpu(), live.cpu(), **options)  # noqa: E731
        return case("select_tokens", call, equal(expected), size(map, live, *call()))

    def gather() -> Case:
        tokens = torch.randn(B, T, D, generator=generator, device=device).half()
        index = selected()
        expected = lambda: [reference.gather_tokens(tokens, index)]  # noqa: E731
        return case(
            "gather_tokens",
            lambda: [ops.gather_tokens(tokens, index)],
            equal(expected),
            2 * B * M * D * 2 + size(index),
        )

    def assign() -> Case:
        index, count = selected(), torch.full((B,), M, **i32)
        table, free = torch.full((B, T), -1, **i32), torch.zeros(1, **i32)

        def empty():
            table.fill_(-1)
            free.zero_()

        call = Call(
            lambda: [*ops.assign_slots(index, count, table, free, capacity=capacity), table, free],
            empty,
        )

        def expected():
            table, free = (
                torch.full((B, T), -1, dtype=torch.int32),
                torch.zeros(1, dtype=torch.int32),
            )
            return [
                *reference.assign_slots(index.cpu(), count.cpu(), table, free, capacity=capacity),
                table,
                free,
            ]

        return case("assign_slots", call, equal(expected), 6 * size(index))  # index, table twice, three lists

    def write() -> Case:
        rows = B * M
        k, v = (
            torch.randn(rows, sizes.heads, sizes.head_dim, generator=generator, device=device).half() for _ in range(2)
        )
        angle = torch.rand(rows, sizes.head_dim, generator=generator, device=device)
        cos, sin, slots = (
            angle.cos(),
            angle.sin(),
            torch.randperm(capacity, generator=generator, device=device)[:rows].int(),
        )
        pools = [
            torch.zeros(capacity, sizes.heads, sizes.head_dim, device=device, dtype=torch.float16) for _ in range(2)
        ]

        def errors(call: Callable) -> dict[str, float]:
            call()
            exact = [torch.zeros_like(pool, dtype=torch.float64) for pool in pools]
            reference.write_hr_kv(k.double(), v.double(), cos.double(), sin.double(), slots, *exact)
            return {
                "error_out": max(
                    compared("a pool", pool, wanted, wanted.abs().max().item(), 1) for pool, wanted in zip(pools, exact)
                )
            }

        call = lambda: ops.write_hr_kv(k, v, cos, sin, slots, *pools)  # noqa: E731
        return case("write_hr_kv", call, errors, 2 * size(k, v) + size(cos, sin, slots))

    yield from (
        ("select_tokens", select),
        ("gather_tokens", gather),
        ("assign_slots", assign),
        ("write_hr_kv", write),
    )


# ------------------------------------------------------------------------------------------------------------- measure


def reason(error: BaseException) -> str:
    """Its first line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:200]


def check(case: Case) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Errors of the methods that can be timed, and why the others cannot."""
    good, bad = {}, dict(case.unavailable)
    for method, calls in case.methods.items():
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                good[method] = case.errors(calls[0])
        except Wrong as error:
            bad[method] = str(error)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError) and method in OURS:  # or in the reference
                raise
            first = next(
                (str(w.message).split(" (Triggered")[0] for w in said if "attention" in str(w.message).lower()),
                "",
            )
            bad[method] = reason(error) + (f" {first}"[:200] if first else "")
        except Exception as error:
            if method != "flex_attention":  # compiled at its first call
                raise
            bad[method] = reason(error)
    return good, bad


def in_turn(calls: list[Callable]) -> Callable:
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def copy_bandwidth(bytes_copied: int, device: str, clock: Callable, seconds: float) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.zeros(bytes_copied // 4, device=device)
    target = torch.empty_like(source)
    median, _ = measuring.medians({"copy": lambda: target.copy_(source)}, seconds, time_of=clock)["copy"]
    return 2 * bytes_copied / median


def measure(case: Case, where: dict, clock: Callable, bandwidth: float, seconds: float) -> list[dict]:
    """A row for each method; whoever cannot be timed has the reason in its row."""
    good, bad = check(case)
    found = (
        measuring.medians({method: in_turn(case.methods[method]) for method in good}, seconds, time_of=clock)
        if good
        else {}
    )
    rows = []
    for method in METHODS:
        if method in good:
            median, runs = found[method]
            row = {"method": method, "median_us": median * 1e6, "runs": runs, **good[method], "bytes": case.bytes,
                   "gb_per_s": case.bytes / median * 1e-9, "share_of_copy": case.bytes / median / bandwidth,
                   "tflop_per_s": case.flop / median * 1e-12}  # fmt: skip
            if "ours" in found:
                row["over_ours"] = median / found["ours"][0]
            rows.append(where | {"name": case.name} | case.columns | row)
        elif method in bad:
            rows.append(where | {"name": case.name} | case.columns | {"method": method, "note": bad[method]})
    return rows


def wrong(rows: list[dict]) -> list[str]:
    """What of ours is not right, a sentence each."""
    return [
        f"{row['name']}, {row['method']}: {row['note']}" for row in rows if row["method"] in OURS and row.get("note")
    ]


def notes(rows: list[dict]) -> list[str]:
    """Who was not timed and why, a sentence for each reason with the cases that it holds for."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.get("note"):
            cases.setdefault((row["method"], row["note"]), []).append(row["name"])
    return [f"not timed: {method} on {'; '.join(names)}: {note}" for (method, note), names in cases.items()]


# -------------------------------------------------------------------------------------------------------------- report


def show(rows: list[dict], bandwidth: float) -> None:
    by_case: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_case.setdefault(row["name"], {})[row["method"]] = row

    def ratio(row: dict | None) -> str:
        return f"{row['over_ours']:.2f}" if row and "over_ours" in row else "-"

    timed = {name: methods for name, methods in by_case.items() if "median_us" in methods.get("ours", {})}
    attentions = {name: methods for name, methods in timed.items() if methods["ours"]["case"] in ("prefill", "decode")}
    others = METHODS[1:]
    measuring.print_table(
        "Attention: microseconds of ours, and the time of the others over it (output alone but for eager and ours)",
        ("case", "ours us", *others),
        [[name, f"{methods['ours']['median_us']:.1f}", *(ratio(methods.get(other)) for other in others)]
         for name, methods in attentions.items()],
    )  # fmt: skip
    measuring.print_table(
        f"Bytes that must move once, over time; a large copy moves {bandwidth * 1e-9:.0f} GB/s",
        ("case", "us", "MB", "GB/s", "share of the copy"),
        [[name, f"{ours['median_us']:.1f}", f"{ours['bytes'] * 1e-6:.2f}", f"{ours['gb_per_s']:.1f}", f"{ours['share_of_copy']:.1%}"]
         for name, ours in ((name, methods["ours"]) for name, methods in timed.items()) if ours["case"] != "prefill"],
    )  # fmt: skip


def plot(rows: list[dict], out: Path) -> None:
    """prefill.png: time over ours by M, a panel for each preset and batch. decode.png: share of the copy's bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "over_ours" in row]
    title = ", ".join(f"{name} {rows[0][name]}" for name in ("device", "driver", "torch", "cuda"))

    panels = sorted({(row["preset"], row["batch"]) for row in timed if row["case"] == "prefill"})
    figure, axes = pyplot.subplots(
        1,
        max(1, len(panels)),
        figsize=(4.5 * max(1, len(panels)), 4),
        layout="constrained",
        squeeze=False,
    )
    for panel, axis in zip(panels, axes[0]):
        for method in METHODS:
            points = sorted((row["selected"], row["over_ours"]) for row in timed
                            if row["case"] == "prefill" and (row["preset"], row["batch"], row["method"]) == (*panel, method))  # fmt: skip
            if points:
                axis.plot(*zip(*points), marker="o", label=method)
        axis.set(
            title="{}, batch {}".format(*panel),
            xlabel="selected HR tokens",
            ylabel="time over ours",
            yscale="log",
        )
        axis.grid(alpha=0.3)
    if panels:
        axes[0][0].legend(fontsize="small")
    figure.suptitle(f"prefill: {title}")
    figure.savefig(out / "prefill.png", dpi=120)

    bars = [row for row in timed if row["case"] == "decode"]
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.18 * len(bars)), layout="constrained")
    axis.barh([f"B={row['batch']} M={row['selected']} {row['method']}" for row in bars], [row["share_of_copy"] for row in bars],
              color=["tab:blue" if row["method"] in OURS else "tab:gray" for row in bars])  # fmt: skip
    axis.set(xlabel="share of the bandwidth of a large copy")
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize="x-small")
    figure.suptitle(f"decode: {title}")
    figure.savefig(out / "decode.png", dpi=120)


# ---------------------------------------------------------------------------------------------------------------- main


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/gpu"),
        help="folder for the results (default: build/gpu)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=90,
        help="cases that have not begun by then are left out (default: 90)",
    )
    parser.add_argument("--all", action="store_true", help="flex_attention at every size, however long it takes")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--seed", type=int, help="of the inputs; a fresh one by default")
    parser.add_argument("--check", action="store_true", help="call and compare, time nothing")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS
    )  # cpu: for the tests
    args = parser.parse_args(arguments)

    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench_attention: torch sees no GPU on this machine.", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    sizes = QUICK if args.quick else Sizes()
    native = 0
    if args.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        native = 10 * major + minor
    flex = () if args.check else sizes.selected if args.all else sizes.selected[:1]
    run = Run(
        sizes,
        args.device,
        native,
        flex,
        secrets.randbelow(2**31) if args.seed is None else args.seed,
    )
    if args.check:
        return check_kernels(run)

    where = measuring.machine(args.device) | {"seed": run.seed}
    clock = EventClock() if args.device == "cuda" else measuring.wall_clock
    bandwidth = copy_bandwidth(sizes.copy_bytes, args.device, clock, sizes.seconds)
    rows = [
        where
        | {
            "name": "copy",
            "case": "copy",
            "method": "torch",
            "bytes": 2 * sizes.copy_bytes,
            "gb_per_s": bandwidth * 1e-9,
        }
    ]
    limit = float("inf") if args.all else args.seconds
    # In turn, so that a limit leaves some of each.
    for name, build in filter(
        None,
        itertools.chain.from_iterable(itertools.zip_longest(prefill(run), decode(run), operators(run))),
    ):
        if time.perf_counter() - begin > limit:
            rows.append(where | {"name": name, "method": "all", "note": f"left out, {limit:.0f} s are over"})
            continue
        try:
            rows += measure(build(), where, clock, bandwidth, sizes.seconds)
        except torch.OutOfMemoryError:
            rows.append(where | {"name": name, "method": "all", "note": "left out, the GPU's memory is too small"})
        except RuntimeError as error:
            rows.append(where | {"name": name, "method": "ours", "note": reason(error)})
        print(".", end="", flush=True)
    print()

    args.out.mkdir(parents=True, exist_ok=True)
    measuring.write_csv(args.out / "attention.csv", rows)
    try:
        plot(rows, args.out)
    except ImportError:
        print("matplotlib is not installed: there is no plot")
    for sentence in notes(rows):
        print(sentence)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    show(rows, bandwidth)
    said = wrong(rows)
    print(f"{len(rows)} rows in {args.out / 'attention.csv'}, {len(said)} of ours wrong")
    return 1 if said else 0


def check_kernels(run: Run) -> int:
    """Ours alone, each case once, and prefill also in float32 and backwards."""
    said, count, z = [], 0, run.sizes
    for name, build in itertools.chain(prefill(run), decode(run), operators(run)):
        case = build()
        case.methods = {method: calls for method, calls in case.methods.items() if method in OURS}
        _, bad = check(case)
        said += [f"{name}, {method}: {why}" for method, why in bad.items()]
        count += len(case.methods)
    for dtype in (torch.float32, torch.float16):
        case = AttentionCase(z.queries, z.queries, z.selected[0], "all", dtype, z.batches[-1], z.heads, z.heads, z.head_dim, z.side,
                             z.first, backward=True, device=run.device, seed=next(run.seeds))  # fmt: skip
        for leaf, mine, theirs in zip(("q", "k", "v", "k_hr", "v_hr"), case.run("ours")(), case.run("eager")()):
            # A logit's gradient is a difference of sums over the channels, and eager torch rounds those sums.
            error, largest = (mine - theirs).abs().max().item(), theirs.abs().max().item()
            if not error <= 16 * torch.finfo(dtype).eps * largest * case.head_dim**0.5:
                said.append(
                    f"gradient of {leaf} in {dtype}: {error:.3g} from eager torch, the largest is {largest:.3g}"
                )
        count += 1
    for sentence in said:
        print(sentence, file=sys.stderr)
    print(f"seed {run.seed}: {count} calls compared, {len(said)} wrong")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
