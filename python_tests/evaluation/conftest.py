"""Fixtures of the evaluation: a small checkpoint, and a folder in the format of V* Bench."""

from __future__ import annotations

import evaluation_data
import pytest
import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a small checkpoint, which no test changes."""
    return tiny_checkpoint.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def vstar(tmp_path, monkeypatch):
    """A folder in the format of V* Bench, where the tasks look for it."""
    monkeypatch.setenv("FLEXATTN_DATA", str(tmp_path))
    return evaluation_data.write_vstar(tmp_path / "vstar_bench")
