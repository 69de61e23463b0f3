"""What the code imports is declared in pyproject.toml."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = {"PIL": "pillow", "lmms_eval": "lmms-eval"}
OWN = {"flexattn_cuda", "studies"}


def declared(section: str, key: str) -> set[str]:
    """Return the names of the distributions in a list of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text().partition(f"[{section}]\n")[2]
    listed = re.search(rf"^{key} = \[(.*?)\]\s*(?:#.*)?$", text, re.MULTILINE | re.DOTALL).group(1)
    return set(re.findall(r'"([A-Za-z0-9_-]+)', listed))


def imports(folder: str) -> dict[str, set[str]]:
    """Return the distributions that are imported below a folder, and for each the files that import it at their top."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in {name.partition(".")[0] for name in names} - OWN - sys.stdlib_module_names:
                files = found.setdefault(DISTRIBUTIONS.get(name, name), set())
                if node in tree.body:
                    files.add(str(path.relative_to(ROOT)))
    return found


CORE = declared("project", "dependencies")
OPTIONAL = {
    name: declared("project.optional-dependencies", name)
    for name in ("train", "plot", "study", "serve", "chat", "eval")
}
# Those that import what their extra declares at their top, being imported late.
ROOMS = {
    "serve": "flexattn_cuda/serve/",
    "chat": "flexattn_cuda/cli/chat_terminal.py",
    "eval": "flexattn_cuda/evaluation/",
}


def test_the_lists_are_read():
    assert {"torch", "transformers", "pillow"} <= CORE and "matplotlib" in OPTIONAL["plot"]


@pytest.mark.parametrize("distribution", sorted(imports("flexattn_cuda")))
def test_every_package_that_is_imported_is_declared(distribution):
    if distribution in CORE:
        return
    extras = {name for name in ("train", "plot", "serve", "chat", "eval") if distribution in OPTIONAL[name]}
    assert extras, f"{distribution} is not declared in pyproject.toml"
    rooms = tuple(ROOMS[name] for name in extras & ROOMS.keys())
    at_the_top = [file for file in imports("flexattn_cuda")[distribution] if not file.startswith(rooms)]
    assert not at_the_top, f"{distribution} is optional; {at_the_top} import it before it is needed"


@pytest.mark.parametrize("distribution", sorted(imports("studies")))
def test_the_study_imports_what_its_extra_declares(distribution):
    assert distribution in CORE | OPTIONAL["study"]
