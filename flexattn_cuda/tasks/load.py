"""A model and its processor, ready to answer."""

from __future__ import annotations

from pathlib import Path

import torch

from flexattn_cuda import checkpoints
from flexattn_cuda.devices import choose_device, choose_dtype
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.families.llava.config import as_system
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
    """A model, ready to answer, and its processor.

    Args:
        model: A checkpoint folder or hub id in any of the three formats; None: the small model of this package.
        device: "cpu", "cuda" or "cuda:N"; None or "auto": the GPU where it can be used, else the CPU.
        dtype: "float32", "float16" or "bfloat16"; None: that of the checkpoint.
        flexattn: Settings of the mechanism in place of the checkpoint's.
        system: One of `configuration.SYSTEMS` in place of the checkpoint's, as `configuration.as_system` makes it.
    Raises:
        CheckpointError: There is no such checkpoint, or it cannot be loaded.
        InputError: The device or dtype is unknown, or cannot be used here.
    """
    device, dtype = choose_device(device), choose_dtype(dtype)
    folder = checkpoints.resolve_folder(DEFAULT_MODEL if model is None else model)
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
    except (
        ValueError,
        RuntimeError,
    ) as error:  # what transformers says of parts that do not fit together
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder} cannot be loaded: {first_line}") from error
    processor = FlexAttnLlavaProcessor.from_pretrained(folder, config=loaded.config)
    ids = processor.tokenizer.get_vocab().values()
    highest, rows = (
        max(set(ids) - {processor.image_token_id}),
        loaded.get_input_embeddings().num_embeddings,
    )
    if highest >= rows:
        raise CheckpointError(
            f"{folder} has a tokenizer with ids up to {highest}, but its model embeds ids up to {rows - 1} only"
        )
    return loaded.eval().to(device), processor
