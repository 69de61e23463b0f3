"""What `flexattn bench` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from flexattn_cuda.tasks.bench import PreparedBench, Row

_COLUMNS = (
    "side", "positions", "selected", "tiles", "prompt ms", "token ms", "answers/s", "tokens/s", "peak MiB", "GFLOPs",
    "GFLOP/s",
)  # fmt: skip


def bench_title(prepared: PreparedBench) -> str:
    """Say what was measured, how often and on what."""
    options, dtype = prepared.options, str(prepared.cases[0].dtype).removeprefix("torch.")
    weights = "random weights" if prepared.random else "its weights"
    return (
        f"[bold]{escape(prepared.model)}[/bold] with {weights} in {dtype}, batches of {options.batch_size} prompts,"
        f" each of an image and {options.text_tokens} text tokens; {options.new_tokens} more tokens: medians of "
        f"{options.repetitions} answers; {escape(str(prepared.machine))}"
    )


def bench_table(rows: Sequence[Row]) -> Table:
    """Return a line for each system and resolution."""
    table = Table(box=None, pad_edge=False)
    table.add_column("system")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        shape = [row.system, str(row.side), str(row.positions)]
        if row.failure is not None:
            table.add_row(*shape, row.failure)
            continue
        counts = ["" if count is None else str(count) for count in (row.selected, row.tiles)]
        times = (row.prompt_s * 1e3, row.token_s * 1e3, row.answers_per_s, row.tokens_per_s)
        work = (row.prompt_tflops * 1e3, row.tflop_per_s * 1e3)
        table.add_row(*shape, *counts, *map(_digits, times), f"{row.peak_mib:.0f}", *map(_digits, work))
    return table


def _digits(value: float) -> str:
    """Format a number with three significant digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
