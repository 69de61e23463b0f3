"""The processor of the model: its words, its prompt, and what it says of itself."""

from __future__ import annotations

from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
from flexattn_cuda.mechanism.config import FlexAttnConfig
from studies.default_model import phrases
from studies.default_model.encoder import SIZES
from studies.default_model.questions import ANSWERS, WORDS
from studies.small.small_model import build_image_processor, build_tokenizer

# The question ends in a token of its own: what predicts the answer does not depend on the question's last word.
TEMPLATE = (
    "{{ '<image>' }}{% for part in messages[0]['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ ' <answer>' }}"
)
ABOUT = (
    "it reads numbers, words and shapes on small signs that are red, green, blue, purple or black, and tells where they"
    " are and how many"
)


def build_processor(settings: FlexAttnConfig) -> FlexAttnLlavaProcessor:
    """Return the processor of a model with these settings, which refuses words that the model does not know."""
    tokenizer = build_tokenizer([*phrases.vocabulary(), *WORDS], "<image>", "<answer>", answers=ANSWERS)
    images = build_image_processor(settings, SIZES)
    return FlexAttnLlavaProcessor(images, tokenizer, chat_template=TEMPLATE, keywords=phrases.keywords(), about=ABOUT)
