"""Where plots go."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.files import check_writable


def check_plot(path: str | Path) -> None:
    """Raise InputError if matplotlib is missing or no plot can be written at `path`."""
    if find_spec("matplotlib") is None:
        raise InputError("a plot needs matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise InputError(f"{path} is not the name of a plot; it must end in {', '.join(sorted(formats))}")
    check_writable(Path(path))
