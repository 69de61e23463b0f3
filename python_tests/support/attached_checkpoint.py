"""Small checkpoints of model families in folders, as transformers saves them: model, processor, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import family_processors
import tiny_families
import transformers as hf
from family_processors import made
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

_FRAME = "<|vision_start|>{}<|vision_end|>"


@dataclass(frozen=True)
class Checkpoint:
    """A family's tiny model, and the parts of its processor that fit it.

    Attributes:
        model: Name in `tiny_families.FAMILIES`.
        image_token: Of the tokenizer; its id is that of the model's image token.
        image_processor: Makes base views of the model's size.
        mark: What the chat template writes for an image.
    """

    model: str
    image_token: str
    image_processor: Any
    mark: str

    def save(self, folder: Path) -> Path:
        """Save model, image processor and tokenizer."""
        model = tiny_families.FAMILIES[self.model].model()
        model.save_pretrained(folder)
        self.image_processor().save_pretrained(folder)
        tokenizer(self.image_token, self.mark).save_pretrained(folder)
        return folder


def tokenizer(image_token: str, mark: str) -> hf.PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are those of the tiny models: words, then the tokens of images."""
    words = ["<unk>", "<s>", "</s>", "what", "is", "this", "USER:", "ASSISTANT:"]
    words += [f"w{number}" for number in range(len(words), tiny_families.IMAGE)]
    start = mark if mark.startswith("<start") else "<|vision_start|>"
    special = (image_token, "<|video_pad|>", start, "<|vision_end|>")  # the order of their ids
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    found = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    found.chat_template = family_processors.chat_template(mark)
    return found


def _square(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}}


def _clip(side: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


_QWEN_IMAGES = made("Qwen2VLImageProcessor", patch_size=4, size={"shortest_edge": 4 * 8**2, "longest_edge": 40 * 8**2})
_QWEN = ("<|image_pad|>", _QWEN_IMAGES, _FRAME.format("<|image_pad|>"))


def _idefics(kind: str, side: int) -> Checkpoint:
    sizes = {"size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}
    return Checkpoint(kind.lower(), "<image>", made(f"{kind}ImageProcessor", **sizes), "<image>")


_CLIP = made("CLIPImageProcessor", **_clip(24))
_PINPOINTS = {"image_grid_pinpoints": [[24, 48], [48, 24]]}

CHECKPOINTS = {
    checkpoint.model: checkpoint
    for checkpoint in (
        Checkpoint("llava", "<image>", made("CLIPImageProcessor", **_clip(30)), "<image>"),
        Checkpoint("llava_siglip", "<image>", made("SiglipImageProcessor", **_square(27)), "<image>"),
        Checkpoint("vipllava", "<image>", _CLIP, "<image>"),
        Checkpoint("llava_next", "<image>", made("LlavaNextImageProcessor", **_clip(24), **_PINPOINTS), "<image>"),
        Checkpoint(
            "llava_onevision",
            "<image>",
            made("LlavaOnevisionImageProcessor", **_square(27), image_grid_pinpoints=[[27, 54], [54, 27]]),
            "<image>",
        ),
        Checkpoint("internvl_qwen2", "<IMG_CONTEXT>", made("GotOcr2ImageProcessor", **_square(32)), "<IMG_CONTEXT>"),
        _idefics("Idefics3", 32),
        _idefics("SmolVLM", 30),
        Checkpoint("qwen2_vl", *_QWEN),
        Checkpoint("qwen2_5_vl", *_QWEN),
        Checkpoint("paligemma", "<image>", made("SiglipImageProcessor", **_square(24)), "<image>"),
        Checkpoint("gemma3", "<image_soft_token>", made("Gemma3ImageProcessor", **_square(32)), "<start_of_image>"),
    )
}
