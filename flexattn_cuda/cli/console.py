"""Tables and text on stdout."""

from __future__ import annotations

import sys

from rich.console import Console, RenderableType


def print_all(*parts: RenderableType) -> None:
    """Print tables and text, without wrapping lines where stdout is not a terminal."""
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    for part in parts:
        console.print(part)
