"""Write the tables of options into the documentation, from the classes that declare them.

A page asks for the table of a class in `flexattn_cuda.tasks.options` with a line such as `{{ options: TrainOptions }}`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from flexattn_cuda.runs.options import DeclaredOption, declared_options
from flexattn_cuda.tasks import options

_MARK = re.compile(r"^\{\{ options: (\w+) \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put a table in place of each mark; called by mkdocs."""
    return _MARK.sub(lambda found: _table(getattr(options, found[1])), markdown)


def _table(of: type) -> str:
    return "\n".join(["| field | default | |", "|---|---|---|", *map(_row, declared_options(of))])


def _row(declared: DeclaredOption) -> str:
    default = "required" if declared.default is dataclasses.MISSING else f"`{_shown(declared.default)}`"
    return f"| `{declared.name}` | {default} | {declared.option.help} |"


def _shown(default: Any) -> str:
    return str(default) if isinstance(default, int | float | None) else f'"{default}"'
