"""What `flexattn flops` prints."""

from __future__ import annotations

from rich.table import Table

from flexattn_cuda.analysis.flops import PARTS
from flexattn_cuda.tasks.count_flops import FlopsReport, ImpliedSelection


def flops_table(report: FlopsReport) -> Table:
    """Return costs by system and part, as published and as run here, and the paper's figures if it has any."""
    large = max(cost.published_tflops for cost in report.costs.values()) >= 1
    unit, unit_name = (1e12, "TFLOPs") if large else (1e9, "GFLOPs")
    table = Table(box=None, pad_edge=False, title=f"{unit_name} of a prompt with one image", title_justify="left")
    table.add_column("system")
    table.add_column("")
    for name in (*PARTS, "all", *(["paper"] if report.paper else [])):
        table.add_column(name, justify="right")
    for system, cost in report.costs.items():
        papers = [str(report.paper[system])] if system in report.paper else []
        table.add_row(system, "as published", *_figures(cost.published, unit), *papers)
        table.add_row("", "here", *_figures(cost.here, unit))
    return table


def _figures(parts: dict[str, int], unit: float) -> list[str]:
    return [f"{count / unit:.2f}" for count in (*parts.values(), sum(parts.values()))]


def implied_sentence(implied: ImpliedSelection) -> str:
    """Say what the paper's figure for FlexAttention implies."""
    return (
        f"The paper's {implied.tflops} TFLOPs are those of {implied.selected} selected tokens, "
        f"{implied.selected / implied.tokens:.0%} of {implied.tokens}."
    )
