"""Load a model with its processor, or its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from flexattn_cuda import checkpoints
from flexattn_cuda.checkpoints.files import first_line
from flexattn_cuda.devices import choose_device, choose_dtype
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig, as_system
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
from flexattn_cuda.mechanism.config import FlexAttnConfig

DEFAULT_MODEL = Path(__file__).parents[1] / "assets" / "default"


def load(
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    flexattn: FlexAttnConfig | None = None,
    system: str | None = None,
) -> tuple[FlexAttnLlavaForConditionalGeneration, FlexAttnLlavaProcessor]:
    """Load a model, ready to answer, and its processor.

    Args:
        model: Checkpoint folder or hub id in any of the three formats; by default the small model of this package.
        device: "cpu", "cuda" or "cuda:N"; None and "auto" are the GPU if it can be used, and the CPU otherwise.
        dtype: Data type of the weights by name or as torch's; None and "auto" keep the checkpoint's.
        flexattn: Settings of the mechanism that replace the checkpoint's.
        system: One of `mechanism.config.SYSTEMS`, to load the checkpoint as (`families.llava.config.as_system`).

    Raises:
        CheckpointError: If there is no such checkpoint, or it cannot be loaded.
        InputError: If the device, the dtype or the system is unknown or cannot be used here, or `flexattn` is not a
            FlexAttnConfig.
    """
    if not isinstance(flexattn, FlexAttnConfig | None):
        raise InputError(
            f"flexattn is a {type(flexattn).__name__}; it must be a FlexAttnConfig, such as FlexAttnConfig.released()"
        )
    device, dtype = choose_device(device), choose_dtype(dtype)
    folder = checkpoint_folder(model)
    config = checkpoints.load_config(folder)
    if system is not None:
        try:
            config = as_system(config, system)
        except ValueError as error:
            raise InputError(str(error)) from None
    try:
        loaded = FlexAttnLlavaForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=dtype or "auto", flexattn=flexattn
        )
    except CheckpointError:
        raise
    except (ValueError, RuntimeError) as error:  # transformers: the parts of the checkpoint do not fit together
        raise CheckpointError(f"{folder} cannot be loaded: {first_line(error)}") from error
    processor = FlexAttnLlavaProcessor.from_pretrained(folder, config=loaded.config)
    _check_vocabulary(folder, loaded, processor)
    return loaded.eval().to(device), processor


def _check_vocabulary(
    folder: Path, model: FlexAttnLlavaForConditionalGeneration, processor: FlexAttnLlavaProcessor
) -> None:
    max_id = max(set(processor.tokenizer.get_vocab().values()) - {processor.image_token_id})
    embedded = model.get_input_embeddings().num_embeddings
    if max_id >= embedded:
        raise CheckpointError(
            f"{folder} has a tokenizer with ids up to {max_id}, but its model embeds ids up to {embedded - 1} only; "
            "use the tokenizer that belongs to the model"
        )


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as far as its configuration describes it.

    Attributes:
        folder: Where it is.
        format: "flexattn", "llava" or "released".
        config: The model's configuration.
    """

    folder: Path
    format: str
    config: FlexAttnLlavaConfig


def read_checkpoint_info(model: str | Path) -> CheckpointInfo:
    """Read the configuration of a checkpoint folder or hub id, without its weights.

    Raises:
        CheckpointError: If there is no such checkpoint, or its configuration cannot be used.
    """
    folder = checkpoints.resolve_folder(model, parts=checkpoints.Part.CONFIG)
    return CheckpointInfo(folder, checkpoints.checkpoint_format(folder), checkpoints.load_config(folder))


def checkpoint_folder(model: str | Path | None) -> Path:
    """Return the folder of a checkpoint folder or hub id; None is the small model of this package.

    Raises:
        CheckpointError: If there is no such checkpoint.
    """
    return checkpoints.resolve_folder(DEFAULT_MODEL if model is None else model)
