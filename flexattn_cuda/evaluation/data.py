"""Where the data sets of this package's tasks come from: a local folder, or the hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from flexattn_cuda.errors import InputError

DATA_VARIABLE = "FLEXATTN_DATA"
SHORT_ANSWER = "Answer the question using a single word or phrase."


def dataset_folder(repository: str) -> Path:
    """Return the folder of a data set.

    Args:
        repository: Its id on the hub, such as "craigwu/vstar_bench". Where the environment variable FLEXATTN_DATA names
            a folder, the data set is in its subfolder of the last part of that id, and nothing is downloaded.

    Raises:
        InputError: If the folder is missing, or the data set can neither be downloaded nor was before.
    """
    name = repository.rpartition("/")[2]
    if os.environ.get(DATA_VARIABLE):
        return _local_folder(name)
    try:
        return Path(snapshot_download(repository, repo_type="dataset"))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"the data set {repository} cannot be downloaded ({type(error).__name__}); copy it to DIR/{name} and set "
            f"{DATA_VARIABLE}=DIR"
        ) from error


def unpacked_folder(name: str, source: str) -> Path:
    """Return the folder of a data set that is not on the hub.

    Args:
        name: Of the subfolder of the folder that the environment variable FLEXATTN_DATA names.
        source: Where to get the data set.

    Raises:
        InputError: If there is no such folder.
    """
    if not os.environ.get(DATA_VARIABLE):
        raise InputError(
            f"the data set {name} is not on the hub; unpack {source} to DIR/{name}, and set {DATA_VARIABLE}=DIR"
        )
    return _local_folder(name)


def _local_folder(name: str) -> Path:
    folder = Path(os.environ[DATA_VARIABLE], name)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; {DATA_VARIABLE} must name the folder that {name} is in")
    return folder


def read_json(file: Path) -> Any:
    """Return what a JSON file holds; raise InputError if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from None


def field(record: Any, name: str, kind: type, where: str) -> Any:
    """Return a field of a record; raise InputError if it is missing or of another type.

    Args:
        record: What should be an object.
        name: Of the field.
        kind: Type of its value.
        where: What the record is, for the message.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f'{where} has no "{name}" that is {_KINDS[kind]}')
    return value


_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}
