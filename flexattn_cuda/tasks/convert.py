"""Turn the pickled weights of a checkpoint (.bin) into safetensors, which cannot run code and load faster.

pytorch_model.bin                     ─►  model.safetensors
pytorch_model-00001-of-00002.bin ...  ─►  model-00001-of-00002.safetensors ..., and their index
everything else                       ─►  copied
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flexattn_cuda.checkpoints import resolve_folder
from flexattn_cuda.checkpoints.files import first_line
from flexattn_cuda.checkpoints.locate import weight_files
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.runs.files import make_writable_folder, os_errors_as_input_errors
from flexattn_cuda.tasks.options import ConvertOptions

_INDEX = "model.safetensors.index.json"


def convert(options: ConvertOptions) -> list[Path]:
    """Write a checkpoint with safetensors in place of pickled weights; pickles are read as tensors alone.

    Args:
        options: Which checkpoint, and where to.

    Returns:
        The files of weights that were written, one for each that was read.

    Raises:
        CheckpointError: If there is no such checkpoint, its weights are no pickles, or they hold more than tensors.
        InputError: If the output is the checkpoint itself, or is not empty, or cannot be written.
    """
    folder = resolve_folder(options.model)
    files = weight_files(folder)
    if pickled := [file for file in files if file.suffix != ".bin"]:
        raise CheckpointError(f"{folder} has {pickled[0].name}, so there is nothing to convert")
    make_writable_folder(options.output)
    if any(options.output.iterdir()):
        raise InputError(f"{options.output} is not empty; choose a new folder")
    try:
        with os_errors_as_input_errors(options.output):
            written = _convert_weights(files, options.output)
            for path in folder.iterdir():
                if path.is_file() and path.suffix != ".bin" and not path.name.endswith(".bin.index.json"):
                    shutil.copy(path, options.output)
    except BaseException:
        shutil.rmtree(options.output)  # it was new, or empty
        raise
    return written


def _convert_weights(files: list[Path], output: Path) -> list[Path]:
    written: list[Path] = []
    homes: dict[str, str] = {}
    size = 0
    for file in files:
        weights = _read(file)
        name = file.name.replace("pytorch_model", "model", 1).removesuffix(".bin") + ".safetensors"
        save_file(weights, output / name, metadata={"format": "pt"})
        written.append(output / name)
        homes |= dict.fromkeys(weights, name)
        size += sum(weight.nbytes for weight in weights.values())
    if len(files) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": dict(sorted(homes.items()))}
        (output / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return written


def _read(file: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a pickle, each with memory of its own, as safetensors wants them."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} is damaged, or holds more than tensors: {first_line(error)}") from None
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise CheckpointError(f"{file} does not hold weights by name")
    seen: set[int] = set()
    separate = {}
    for name, weight in weights.items():
        memory = weight.untyped_storage().data_ptr()
        separate[name] = weight.clone() if memory in seen else weight.contiguous()
        seen.add(memory)
    return separate
