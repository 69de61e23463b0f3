"""The processors of model families, small and made of transformers' own classes, with a tokenizer of a few words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from flexattn_cuda.inputs.hr_processor import HRProcessor, ProcessorParts, processor_for
from flexattn_cuda.inputs.image_families import FAMILIES

ZOOM = 2
SIDE = 56  # of the base view in pixels, where a family has a fixed one
SPECIAL = (
    "<image>",
    "<IMG_CONTEXT>",
    "<img>",
    "</img>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
_SQUARE = {"height": SIDE, "width": SIDE}
CLIP = {"size": {"shortest_edge": SIDE}, "crop_size": _SQUARE}


def tokenizer(mark: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose chat template writes `mark` for an image."""
    words = ["<unk>", "<s>", "</s>", "what", "is", "this", "USER:", "ASSISTANT:"]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    made.chat_template = chat_template(mark)
    return made


def chat_template(mark: str) -> str:
    """Return a chat template that writes `mark` for an image."""
    return (
        "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + f"{{{{ '{mark}' }}}}"
        + "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )


@dataclass(frozen=True)
class Case:
    """A family: its image processor, its configuration, and the image tokens of an image."""

    image_processor: Callable[[], Any]
    config: Callable[[], Any]
    tokens: int | None  # None: they follow from the size of the image


def made(name: str, **options: Any) -> Callable[[], Any]:
    """Return what makes an instance of a class of transformers; naming the class imports it."""
    return lambda: getattr(transformers, name)(**options)


_QWEN_IMAGES = made("Qwen2VLImageProcessor", size={"shortest_edge": 28**2 * 2, "longest_edge": 28**2 * 12})
_TOWER = {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 14}
CASES: dict[str, Case] = {
    "internvl": Case(made("GotOcr2ImageProcessor", size=_SQUARE), made("InternVLConfig"), 4),
    "qwen2_vl": Case(_QWEN_IMAGES, made("Qwen2VLConfig"), None),
    "qwen2_5_vl": Case(_QWEN_IMAGES, made("Qwen2_5_VLConfig"), None),
    "llava": Case(made("CLIPImageProcessor", **CLIP), made("LlavaConfig", vision_config=_TOWER), 16),
    "vipllava": Case(made("CLIPImageProcessor", **CLIP), made("VipLlavaConfig", vision_config=_TOWER), 16),
    "llava_next": Case(
        made("LlavaNextImageProcessor", **CLIP, image_grid_pinpoints=[[56, 112], [112, 112]]),
        made("LlavaNextConfig", vision_config=_TOWER),
        16,
    ),
    "llava_onevision": Case(
        made("LlavaOnevisionImageProcessor", size=_SQUARE, image_grid_pinpoints=[[56, 112], [112, 112]]),
        made("LlavaOnevisionConfig", vision_config=_TOWER),
        16,
    ),
    "idefics3": Case(
        made("Idefics3ImageProcessor", size={"longest_edge": 4 * 64}, max_image_size={"longest_edge": 64}),
        made("Idefics3Config", vision_config={"image_size": 64, "patch_size": 16}, scale_factor=2),
        4,
    ),
    "smolvlm": Case(
        made("SmolVLMImageProcessor", size={"longest_edge": 4 * 64}, max_image_size={"longest_edge": 64}),
        made("SmolVLMConfig", vision_config={"image_size": 64, "patch_size": 16}, scale_factor=2),
        4,
    ),
    "paligemma": Case(
        made("SiglipImageProcessor", size=_SQUARE),
        made("PaliGemmaConfig", vision_config={"model_type": "siglip_vision_model", "patch_size": 14}),
        16,
    ),
    "gemma3": Case(
        made("Gemma3ImageProcessor", size=_SQUARE),
        made("Gemma3Config", vision_config={"image_size": 56, "patch_size": 14}, mm_tokens_per_image=4),
        4,
    ),
}


class Model:
    """A model as far as `processor_for` looks at one."""

    def __init__(self, config: Any, zoom: int = ZOOM):
        self.config, self.flexattn_settings = config, SimpleNamespace(zoom=zoom)


def parts(name: str) -> ProcessorParts:
    """Return the image processor and the tokenizer of a family."""
    return ProcessorParts(CASES[name].image_processor(), tokenizer(FAMILIES[name].image_mark))


def model(name: str, own: Any) -> Model:
    """Return a model of a family whose image token is that of the processor `own`."""
    config = CASES[name].config()
    token = own.tokenizer.get_vocab()[FAMILIES[name].token]
    for field in ("image_token_id", "image_token_index"):
        if hasattr(config, field):
            setattr(config, field, token)
    of_family = AutoModelForImageTextToText._model_mapping[type(config)]
    return type(of_family.__name__, (Model,), {"forward": of_family.forward})(config)


def hr_processor(name: str) -> HRProcessor:
    """Return the HR processor of a family."""
    own = parts(name)
    return processor_for(model(name, own), own)
