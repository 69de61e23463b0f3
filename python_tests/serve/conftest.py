"""Servers that the tests of a file share."""

from __future__ import annotations

import pytest
import served
import tiny_checkpoint


@pytest.fixture(scope="module")
def signs():
    """The default model, which reads signs."""
    with served.in_this_process() as server:
        yield server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small checkpoint with the chat template of LLaVA, which answers anything with letters."""
    return tiny_checkpoint.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chatting(checkpoint):
    """The small checkpoint, which takes text, several images and conversations."""
    with served.in_this_process(checkpoint) as server:
        yield server
