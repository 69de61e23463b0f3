"""The tools that keep the house in order see what they are there to see."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str):
    """Import a script of tools/."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


house, boundaries = tool("house"), tool("boundaries")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout with one function, one kernel, and a README, all within the limits."""
    (tmp_path / "csrc" / "kernels").mkdir(parents=True)
    (tmp_path / "csrc" / "torch").mkdir()
    (tmp_path / "README.md").write_text("# Name\n\nTwo words.\n")
    (tmp_path / "code.py").write_text(
        "class Layer:\n"
        "    def forward(self, x, *, y):\n"
        '        """Say\n\n        much.\n        """\n'
        "        z = x\n"
        "        return z + y\n"
    )
    (tmp_path / "csrc" / "kernels" / "scale.cu").write_text(
        "// __global__ void not_a_kernel() {\n"
        "template <int kN>\n"
        "__global__ void __launch_bounds__(128) scale(float* x) {\n"
        '  const char* text = "}";\n'
        "  if (kN) { x[0] = 1; }\n"
        "}\n"
        "__global__ void declared(float* x);\n"
    )
    return tmp_path


def test_lines_are_counted_without_signature_and_docstring(checkout):
    (forward,) = house.measure(checkout).functions
    assert (forward.name, forward.lines, forward.parameters) == ("Layer.forward", 2, 2)


def test_kernels_are_found_and_their_bodies_counted(checkout):
    (kernel,) = house.measure(checkout).kernels
    assert (kernel.name, kernel.lines) == ("scale", 2)


def test_a_house_within_the_limits_has_no_excess(checkout):
    assert house.excesses(house.measure(checkout)) == []


def test_each_limit_is_watched(checkout):
    (checkout / "README.md").write_text("line\n" * (house.MAX_README_LINES + 1))
    (checkout / "long.py").write_text("def long():\n" + "    pass\n" * (house.MAX_LINES + 1))
    parameters = [f"p{number}" for number in range(house.MAX_PARAMETERS + 1)]
    (checkout / "wide.py").write_text(f"def wide({', '.join(parameters)}):\n    pass\n")
    body = "  x[0] = 1;\n" * (house.MAX_KERNEL_LINES + 1)
    (checkout / "csrc" / "kernels" / "big.cuh").write_text(f"__global__ void big(float* x) {{\n{body}}}\n")
    found = "\n".join(house.excesses(house.measure(checkout)))
    assert found.count("\n") == 3
    assert all(name in found for name in ("README.md has", " long has", " wide takes", " big has"))


def test_a_signature_that_an_interface_dictates_is_exempt_and_keeps_its_reason(checkout):
    parameters = ", ".join(f"p{number}" for number in range(house.MAX_PARAMETERS + 1))
    (checkout / "wide.py").write_text(
        f"def wide({parameters}):  # noqa: PLR0913 - the operator's arguments\n    pass\n"
    )
    measured = house.measure(checkout)
    assert house.excesses(measured) == []
    assert [one.exemption for one in measured.functions if one.name == "wide"] == ["the operator's arguments"]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("csrc/kernels/new.cu", "#include <torch/extension.h>"),
        ("csrc/kernels/new.cuh", "#include <ATen/ATen.h>"),
        ("csrc/torch/new.cpp", "kernel<<<1, 1>>>();"),
    ],
)
def test_a_crossed_boundary_is_found(checkout, path, line):
    assert boundaries.violations(checkout) == []
    (checkout / path).write_text(f"{line}\n")
    assert len(boundaries.violations(checkout)) == 1


def test_the_native_boundaries_hold_here():
    assert boundaries.violations(ROOT) == []
