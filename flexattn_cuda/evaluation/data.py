"""Where the data sets of this package's tasks come from: a local folder, or the hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from flexattn_cuda.errors import InputError

DATA_VARIABLE = "FLEXATTN_DATA"


def dataset_folder(repository: str) -> Path:
    """Return the folder of a data set.

    Args:
        repository: Its id on the hub, such as "craigwu/vstar_bench". Where the environment variable FLEXATTN_DATA names
            a folder, the data set is in its subfolder of the last part of that id, and nothing is downloaded.

    Raises:
        InputError: If the folder is missing, or the data set can neither be downloaded nor was before.
    """
    root, name = os.environ.get(DATA_VARIABLE), repository.rpartition("/")[2]
    if root:
        folder = Path(root, name)
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}; {DATA_VARIABLE} must name the folder that {name} is in")
        return folder
    try:
        return Path(snapshot_download(repository, repo_type="dataset"))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"the data set {repository} cannot be downloaded ({type(error).__name__}); copy it to DIR/{name} and set "
            f"{DATA_VARIABLE}=DIR"
        ) from error
