"""Photographs for the study's tests."""

from __future__ import annotations

import pytest
from small_study import photograph


@pytest.fixture(scope="session")
def photographs():
    return [photograph(seed) for seed in range(3)]


@pytest.fixture(scope="session")
def photograph_folder(tmp_path_factory):
    """A folder of as few photographs as a study takes."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(8):
        photograph(number).save(folder / f"{number}.jpg")
    return folder
