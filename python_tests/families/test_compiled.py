"""torch.compile on an attached model: the ordinary forward breaks where the original does, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES

import flexattn_cuda

FAMILY = FAMILIES["llava"]


def breaks(model: torch.nn.Module, inputs: dict[str, Any]) -> int:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch._dynamo.explain(model)(**inputs).graph_break_count


@pytest.mark.slow  # it is traced twice
@pytest.mark.parametrize("prompt", ["image", "text"])
def test_attaching_adds_no_graph_break_to_the_ordinary_forward(prompt):
    plain = FAMILY.model()
    attached = flexattn_cuda.attach(copy.deepcopy(plain), "paper")
    inputs = FAMILY.plain_inputs((1,) if prompt == "image" else (0,)) | {"use_cache": False}
    assert breaks(attached, inputs) == breaks(plain, inputs)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_forward_with_hr_images_computes_what_the_plain_one_does():
    model = flexattn_cuda.attach(FAMILY.model(), FAMILY.settings("paper"))
    inputs = FAMILY.inputs((1, 1)) | {"use_cache": False}
    expected = model(**inputs).logits
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager")(**inputs).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
