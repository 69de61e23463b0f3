"""Fixtures of the model's tests."""

from __future__ import annotations

import pytest
import tiny

from flexattn_cuda import FlexAttnLlavaForConditionalGeneration


@pytest.fixture(params=tiny.PRESETS, ids=str)
def model(request: pytest.FixtureRequest) -> FlexAttnLlavaForConditionalGeneration:
    """The tiny model, with each preset."""
    return tiny.flex(tiny.PRESETS[request.param])
