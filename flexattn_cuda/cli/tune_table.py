"""What `flexattn tune` prints."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from flexattn_cuda.tasks.tune import Tuning


def scores_table(tuning: Tuning) -> list[RenderableType]:
    """Return the score of every layer's map, and what was chosen."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("area under ROC curve" if tuning.measure == "boxes" else "1 - relative entropy", justify="right")
    for layer, score in tuning.scores.items():
        table.add_row(str(layer), f"{score:.3f}", style="bold" if layer == tuning.map_layer else None)
    settings = tuning.settings
    chosen = (
        f"The map of layer {tuning.map_layer} localises best, so layers from {settings.first_layer} on attend to "
        f"high-resolution tokens; at threshold {settings.threshold:.4g} (of {settings.scale:g}) the maps select "
        f"{tuning.share:.1%} of them."
    )
    return [table, "", chosen]
