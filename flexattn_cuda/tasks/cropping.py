"""Ask again with a crop of the image, cut where the model looked: the system "crop", see `baselines.cropping`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flexattn_cuda.baselines.cropping import MapRecorder, crop_window
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.inputs.frames import Region
from flexattn_cuda.inputs.image_sources import read_images
from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.tasks.ask import Answer, Recording, end_ids, generate_greedily, room, until_end
from flexattn_cuda.tasks.encoded import EncodedImage, encode_image, prompt_inputs
from flexattn_cuda.tasks.load import checkpoint_folder, read_checkpoint_info
from flexattn_cuda.tasks.models import HRModel, QuestionProcessor, TrainingProcessor
from flexattn_cuda.tasks.options import MAX_NEW_TOKENS
from flexattn_cuda.tasks.training_data.dataset import joined


class PairProcessor(FlexAttnLlavaProcessor):
    """A processor to which an image and its crop are one image with twice the tokens, those of the crop last.

    So a model whose chat template takes one image can be asked too.
    """

    @classmethod
    def of(cls, one: FlexAttnLlavaProcessor) -> PairProcessor:
        """Return the processor of pairs for that of single images."""
        parts = (one.image_processor, one.tokenizer, one.image_token_id, one.split_at_images, one.chat_template)
        return cls(*parts, one.keywords, one.about)

    @property
    def image_tokens(self) -> int:
        """Image tokens of an image and its crop in the sequence: 2*S*S."""
        return 2 * super().image_tokens


@dataclass(frozen=True)
class Cropper:
    """A plain LLaVA that crops.

    Attributes:
        model: The model, without HR tokens.
        processor: Of its images.
        pairs: Of its images and their crops.
        layer: Whose map says where to crop, counted from 0.
    """

    model: FlexAttnLlavaForConditionalGeneration
    processor: FlexAttnLlavaProcessor
    pairs: PairProcessor
    layer: int

    @classmethod
    def of(cls, name: str | Path | None, model: HRModel, processor: QuestionProcessor) -> Cropper:
        """Return one for a checkpoint that was loaded as "llava".

        The map is that of the layer before the first one that attends to HR tokens by the checkpoint's settings, or by
        those of the released weights: FlexAttention's first map.
        """
        assert isinstance(model, FlexAttnLlavaForConditionalGeneration)
        assert isinstance(processor, FlexAttnLlavaProcessor)
        config = read_checkpoint_info(checkpoint_folder(name)).config
        if config.system != "flexattn":
            config = config.with_settings(FlexAttnConfig.released())
        assert config.flexattn is not None
        return cls(model, processor, PairProcessor.of(processor), config.flexattn.first_layer - 1)

    def windows(self, images: Sequence[EncodedImage], question: str) -> list[Region]:
        """Return the window of each image, after asking the question once.

        Raises:
            InputError: If the question cannot be asked, or its prompt is too long for the model.
        """
        maps = low_resolution_maps(self.model, self.processor, images, question, range(self.layer, self.layer + 1))
        windows = []
        for image, attention in zip(images, maps[self.layer].numpy()):
            size, side = (image.width, image.height), len(attention) * self.processor.cell
            windows.append(crop_window(attention, self.processor.frame(*size), size, side))
        return windows

    def with_crop(self, encoded: EncodedImage, image: Image.Image, window: Region) -> EncodedImage:
        """Return an encoded image with its crop, as `pairs` has them."""
        crop = encode_image(self.model, self.processor, image.crop(window))
        both = {name: joined([values, crop.inputs[name]]) for name, values in encoded.inputs.items()}
        return replace(encoded, inputs=both)

    def ask(
        self,
        image: Any,
        question: str,
        max_new_tokens: int = MAX_NEW_TOKENS,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question about one or several images and a crop of each; arguments as in `tasks.ask.ask`.

        Raises:
            InputError: If an image or the question cannot be used, or the prompt is too long for the model.
        """
        recording, images = Recording(self.processor, on_text, trace=False), read_images(image)
        encoded = [encode_image(self.model, self.processor, one) for one in images]
        windows = self.windows(encoded, question)
        pairs = [self.with_crop(*one) for one in zip(encoded, images, windows)]
        inputs = prompt_of(self.model, self.pairs, pairs, question)
        limit = min(max_new_tokens, room(self.model, inputs["input_ids"].shape[1]))
        ids = generate_greedily(self.model, self.pairs, inputs, limit, streamer=recording.streamer)
        return recording.answer(question, images, until_end(ids[0].tolist(), end_ids(self.model, self.pairs)))


@torch.inference_mode()
def low_resolution_maps(
    model: FlexAttnLlavaForConditionalGeneration,
    processor: TrainingProcessor,
    images: Sequence[EncodedImage],
    question: str,
    layers: range | None = None,
) -> dict[int, torch.Tensor]:
    """Return maps of a plain LLaVA at the last row of a question's prompt, by layer: [I, rows, cols] float32.

    Args:
        model: The model, without HR tokens.
        processor: Its processor.
        images: What the question is about.
        question: The question.
        layers: Whose maps to return; by default all.

    Raises:
        InputError: If the question cannot be asked, or its prompt is too long for the model.
    """
    inputs = prompt_of(model, processor, images, question)
    room(model, inputs["input_ids"].shape[1])
    layers = range(model.config.text_config.num_hidden_layers) if layers is None else layers
    grid = model.config.lr_grid
    recorder = MapRecorder(layers, inputs["input_ids"].cpu(), processor.image_token_id, grid.cells)
    model(**inputs, use_cache=False, logits_to_keep=1, flexattn=recorder)
    return {layer: found.cpu().view(-1, *grid) for layer, found in recorder.maps.items()}


def prompt_of(
    model: HRModel, processor: TrainingProcessor, images: Sequence[EncodedImage], question: str
) -> dict[str, Any]:
    """Return what the model takes of a question about encoded images."""
    tokens = [processor.image_tokens_of(image.width, image.height) for image in images]
    prompt = processor.conversation_inputs(processor.prompt(question, len(images)), tokens)
    return prompt_inputs([prompt], [image.inputs for image in images], processor.pad_id, model.device)
