"""Images and prompts to what the model takes.

image ─ upright RGB ─ padded to a square ─ highres_size² (bicubic) ─ mean, std ─► pixel_values_hr
                                           └─ lowres_size² (antialiased bilinear) ─► pixel_values
text  ─ tokenizer ─ every <image> becomes S*S image token ids (LLaVA-HD: S*S + h*h) ─► input_ids, attention_mask
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from flexattn_cuda.checkpoints import HubOptions, Part, checkpoint_format, load_config, resolve_folder
from flexattn_cuda.checkpoints.files import read_json, refusing
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.inputs.chat_template import VICUNA_TEMPLATE, read_chat_template, refuse_special_texts, special_texts
from flexattn_cuda.inputs.frames import Frame, padded_square
from flexattn_cuda.inputs.image_processor import FlexAttnLlavaImageProcessor, ImageSizes
from flexattn_cuda.inputs.images import flat_list
from flexattn_cuda.inputs.marks import check_marks, checked_texts
from flexattn_cuda.inputs.questions import IMAGE, check_question, user_message
from flexattn_cuda.inputs.tokenizers import load_tokenizer
from flexattn_cuda.inputs.vocabulary import Vocabulary

RELEASED_IMAGE_ID = -200
# Options that transformers' AutoProcessor passes on and that have no effect here.
_AUTO_OPTIONS = ("trust_remote_code", "use_fast", "backend", "code_revision")


class FlexAttnLlavaProcessor(ProcessorMixin):
    """Images and prompts for `FlexAttnLlavaForConditionalGeneration`.

    Args:
        image_processor: Makes pixels of images.
        tokenizer: Any tokenizer of transformers.
        image_token_id: The id that stands for an image token; None: the tokenizer's id of "<image>".
        split_at_images: Tokenize the text between two "<image>" as texts of their own, as the released code does (its
            tokenizer then puts a space before each). Otherwise "<image>" is a token of the tokenizer.
        chat_template: Jinja template of the prompt; None: that of Vicuna v1.
        keywords: For a model that knows few words: those that a typing error is mended to, see `Vocabulary`. A prompt
            with a word that the tokenizer does not have is then refused.
        about: With `keywords`: what the model can be asked, for that message.

    Raises:
        InputError: If the tokenizer has no "<image>" token and no `image_token_id` is given.
    """

    token_types: str | None = None  # the model takes no input that marks image tokens

    def __init__(
        self,
        image_processor: FlexAttnLlavaImageProcessor,
        tokenizer: Any,
        image_token_id: int | None = None,
        split_at_images: bool = False,
        chat_template: str | None = None,
        keywords: Sequence[str] | None = None,
        about: str = "",
    ):
        known = tokenizer.get_vocab().get(IMAGE)
        if image_token_id is None and known is None:
            raise InputError(f"the tokenizer has no token {IMAGE}; pass image_token_id, or add the token to it")
        self.image_token = IMAGE
        self.image_token_id = known if image_token_id is None else image_token_id
        self.split_at_images = split_at_images or known != self.image_token_id
        self.keywords, self.about = keywords, about
        super().__init__(image_processor, tokenizer, chat_template=chat_template or VICUNA_TEMPLATE)

    # -------------------------------------------------------------------------------------------------------- prompts

    @property
    def image_tokens(self) -> int:
        """Image tokens of one image in the sequence: S*S, with LLaVA-HD S*S + h*h."""
        return self.image_processor.image_tokens

    @property
    def cell(self) -> int:
        """Side in pixels of an LR cell of the low-resolution image."""
        return self.image_processor.lowres_size // self.image_processor.lr_side

    def image_tokens_of(self, width: int, height: int) -> int:
        """Return the image tokens of an image of width x height pixels: `image_tokens`, whatever its size."""
        return self.image_tokens

    @property
    def pad_id(self) -> int:
        """The id of the padding, where the attention mask is 0."""
        pad, unknown = self.tokenizer.pad_token_id, self.tokenizer.unk_token_id
        return (unknown or 0) if pad is None else pad

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the prompt of a conversation, as transformers documents it, or its tokens with `tokenize=True`.

        Raises:
            InputError: If a message contains the text of a special token, such as "</s>", which would become the token.
        """
        refuse_special_texts(conversation, special_texts(self.tokenizer), self.tokenizer.eos_token)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def conversation_text(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, see `apply_chat_template`."""
        text: str = self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        return text

    def prompt(self, question: str, images: int = 1) -> str:
        """Return the prompt that asks `question` about `images` images, up to where the answer begins.

        Raises:
            InputError: If the question is empty, or contains "<image>", the text of another special token, or a word
                that a model with `keywords` does not know.
            CheckpointError: If the checkpoint's chat template fails, or does not mark every image.
        """
        check_question(question)
        with refusing("the chat template of the checkpoint fails", InputError):
            prompt = self.apply_chat_template([user_message(question, images)], add_generation_prompt=True)
        if prompt.count(IMAGE) < images:
            raise CheckpointError(
                f"the chat template of the checkpoint writes {prompt.count(IMAGE)} {IMAGE} marks for {images} images"
            )
        return self._spelled(prompt)

    def prompt_length(self, question: str, image: Any = None) -> int:
        """Return how many positions of the sequence the prompt of `question` about one image takes, whatever it is."""
        return len(self.expand_image_tokens(self.tokenize(self.prompt(question))))

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of one prompt, with one id for each image.

        Raises:
            InputError: If the model has `keywords` and does not know a word.
        """
        text = self._spelled(text)
        if not self.split_at_images:
            return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        first, *rest = text.split(IMAGE)
        ids = list(self.tokenizer(first, add_special_tokens=add_special_tokens)["input_ids"])
        for part in rest:
            ids += [RELEASED_IMAGE_ID] + self.tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    def _spelled(self, text: str) -> str:
        if self.keywords is None:
            return text
        words = [word for word in self.tokenizer.get_vocab() if word.islower()]
        return Vocabulary(words, self.keywords, self.about).spelled(text)

    def conversation_ids(self, text: str, image_tokens: Sequence[int]) -> list[int]:
        """Return the ids of the text of a conversation, whose images all take `self.image_tokens` tokens each."""
        ids: list[int] = self.expand_image_tokens(self.tokenize(text))
        return ids

    def conversation_inputs(self, text: str, image_tokens: Sequence[int]) -> dict[str, list[int]]:
        """Return `conversation_ids` by the name that the model gives them; it takes nothing else of a position."""
        return {"input_ids": self.conversation_ids(text, image_tokens)}

    def expand_image_tokens(self, ids: Sequence[int] | torch.Tensor) -> Any:
        """Return the ids of one prompt with `image_tokens` ids for every image.

        Args:
            ids: [N]; an image stands as -200 (released format) or as one "<image>" id. One that is already expanded
                stays as it is.

        Returns:
            A tensor for a tensor, a list for a list.

        Raises:
            InputError: If the ids are those of a batch.
        """
        values = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        if values and not isinstance(values[0], int):
            raise InputError(
                "expand_image_tokens takes the ids of one prompt, [N]; expand the rows of a batch one by one"
            )
        expanded: list[int] = []
        for value, run in itertools.groupby(values):
            count = len(list(run))
            mark = value == RELEASED_IMAGE_ID or (value == self.image_token_id and count % self.image_tokens)
            expanded += [self.image_token_id] * (count * self.image_tokens) if mark else [value] * count
        if isinstance(ids, torch.Tensor):
            return torch.tensor(expanded, dtype=ids.dtype, device=ids.device)
        return expanded

    # --------------------------------------------------------------------------------------------------------- inputs

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Return what the model takes of images."""
        return dict(self.image_processor(images))

    def frame(self, width: int, height: int) -> Frame:
        """Return the square that an image of width x height pixels is padded to."""
        return padded_square(width, height)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        padding: bool = True,
        padding_side: str = "left",
        add_special_tokens: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return what the model takes. Special tokens in `text` are special: it is a prompt, not a question.

        Args:
            images: None, a PIL image, a list of them in the order of the "<image>" marks of all texts, or one list per
                text.
            text: One prompt or a list of prompts, each with one "<image>" per image; a prompt without one is fine.
            return_tensors: "pt", or None for lists.
            padding: Make all rows as long as the longest.
            padding_side: Where the padding goes: "left" (generation) or "right".
            add_special_tokens: Begin with the tokenizer's begin-of-sequence token.

        Returns:
            input_ids, attention_mask [B, N] int64, and for images what `FlexAttnLlavaImageProcessor` returns.

        Raises:
            InputError: If images and "<image>" marks do not match, or something is neither an image nor a text.
            CheckpointError: If the tokenizer does not make one image token of every mark.
        """
        if unknown := sorted(name for name, value in kwargs.items() if value is not None):
            raise TypeError(f"FlexAttnLlavaProcessor takes no {', '.join(unknown)}")
        if padding_side not in ("left", "right"):
            raise InputError(f"padding_side is {padding_side!r}; allowed: left, right")
        texts, flat = checked_texts(text, IMAGE), flat_list(images)
        check_marks(IMAGE, [one.count(IMAGE) for one in texts], images, len(flat))

        rows = [self._row(one, add_special_tokens) for one in texts]
        if return_tensors == "pt" and not padding and len({len(row) for row in rows}) > 1:
            raise InputError("texts of different lengths make no tensor without padding; pass padding=True")
        features = BatchFeature(self._padded(rows, padding, padding_side), tensor_type=return_tensors)
        if flat:
            features.update(self.image_processor(flat, return_tensors=return_tensors))
        return features

    def _row(self, text: str, add_special_tokens: bool) -> list[int]:
        row = self.expand_image_tokens(self.tokenize(text, add_special_tokens))
        marks, found = text.count(IMAGE), row.count(self.image_token_id)
        if found != marks * self.image_tokens:
            raise CheckpointError(
                f"the checkpoint's tokenizer makes {found} image tokens of {marks} {IMAGE} marks, "
                f"not {marks * self.image_tokens}"
            )
        return row

    def _padded(self, rows: list[list[int]], padding: bool, side: str) -> dict[str, list[list[int]]]:
        longest = max(len(row) for row in rows) if padding else 0
        ids, mask = [], []
        for row in rows:
            gap = max(0, longest - len(row))
            left, right = (gap, 0) if side == "left" else (0, gap)
            ids.append([self.pad_id] * left + row + [self.pad_id] * right)
            mask.append([0] * left + [1] * len(row) + [0] * right)
        return {"input_ids": ids, "attention_mask": mask}

    # ---------------------------------------------------------------------------------------------------- checkpoints

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, config: FlexAttnLlavaConfig | None = None, **kwargs: Any
    ) -> FlexAttnLlavaProcessor:
        """Return the processor of a checkpoint in any of the three formats.

        Args:
            name_or_path: A folder, or a hub id, of which no weights are downloaded.
            config: The configuration of the model that is to be fed, where its sizes differ from the checkpoint's.
            kwargs: As in transformers: revision, token, cache_dir, local_files_only, force_download, subfolder.

        Raises:
            CheckpointError: If the folder is missing, of an unknown format, without a tokenizer, or damaged.
            TypeError: If an option is unknown.
        """
        hub = HubOptions.pop_from(kwargs)
        if unknown := sorted(name for name in kwargs if name[0] != "_" and name not in _AUTO_OPTIONS):
            raise TypeError(f"FlexAttnLlavaProcessor.from_pretrained takes no {', '.join(unknown)}")
        folder = resolve_folder(name_or_path, hub, Part.CONFIG | Part.INPUTS)
        form = checkpoint_format(folder)
        tokenizer, template = load_tokenizer(folder, form), read_chat_template(folder)
        with refusing(f"the processor of {folder} cannot be made"):
            if form == "flexattn":
                return cls._from_own(folder, tokenizer, template, config)
            config = config or load_config(folder, hub)
            if form == "released" and len(tokenizer) == config.image_token_id:
                tokenizer.add_tokens([IMAGE], special_tokens=True)  # for decoding; the model never embeds it
            return cls(
                FlexAttnLlavaImageProcessor.from_config(folder, config, hub),
                tokenizer,
                image_token_id=config.image_token_id,
                split_at_images=form == "released",
                chat_template=template,
            )

    @classmethod
    def _from_own(
        cls, folder: Path, tokenizer: Any, template: str | None, config: FlexAttnLlavaConfig | None
    ) -> FlexAttnLlavaProcessor:
        path = folder / "processor_config.json"
        values = read_json(path)
        images = values.get("image_processor")
        if not isinstance(images, dict):
            raise CheckpointError(f"{folder} has no processor: save one there with save_pretrained")
        if config is not None:
            images = images | asdict(ImageSizes.of(config))
        image_id, split = values.get("image_token_id"), values.get("split_at_images", False)
        expected = image_id if config is None else config.image_token_id
        if not isinstance(split, bool) or (
            image_id is not None and (type(image_id) is not int or image_id != expected)
        ):
            raise CheckpointError(
                f"{path} has image_token_id = {image_id!r} and split_at_images = {split!r}; they must be the id that "
                "config.json names, and true or false"
            )
        keywords, about = values.get("keywords"), values.get("about", "")
        if not isinstance(about, str) or not (keywords is None or _is_texts(keywords)):
            raise CheckpointError(
                f"{path} has keywords = {keywords!r} and about = {about!r}; they must be a list of words, and a text"
            )
        return cls(FlexAttnLlavaImageProcessor(**images), tokenizer, image_id, split, template, keywords, about)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one for one in value)


AutoProcessor.register(FlexAttnLlavaConfig, FlexAttnLlavaProcessor)
