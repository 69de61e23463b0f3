"""flexattn ask"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from flexattn_cuda.cli.runner import silence_transformers
from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.questions import check_question
from flexattn_cuda.runs.files import check_image_path
from flexattn_cuda.runs.options import STREAM
from flexattn_cuda.tasks.options import AskOptions

if TYPE_CHECKING:
    from flexattn_cuda.tasks.models import HRModel


def ask(options: AskOptions) -> None:
    """Answer a QUESTION about an IMAGE; the answer is printed as it is generated."""
    # Everything that can be checked without the model is checked before it is loaded, or even imported.
    check_question(options.question)
    if options.map is not None:
        check_image_path(options.map)
    from flexattn_cuda.inputs.images import open_image, read_standard_input

    image = read_standard_input() if options.image == STREAM else open_image(options.image)
    silence_transformers()
    from flexattn_cuda.tasks import ask as answering
    from flexattn_cuda.tasks import load as loading

    model, processor = loading.load(
        options.model, options.device, options.dtype, adapter=options.adapter, quantize=options.quantize
    )
    if options.map is not None:
        _check_layers(options.layers_to_draw, model)
    answer = answering.ask(
        model,
        processor,
        image,
        options.question,
        options.max_new_tokens,
        on_text=_Printer(),
        trace=options.map is not None,
    )
    print(flush=True)
    if options.map is not None:
        answer.draw(options.map, options.tokens_to_draw, options.layers_to_draw)
        print(f"wrote {options.map}", file=sys.stderr)


def _check_layers(layers: list[int] | str | None, model: HRModel) -> None:
    settings = model.flexattn_settings
    if settings is None or settings.system != "flexattn":
        raise InputError("this model has no FlexAttention, so there is no map to draw; leave --map out")
    first, last = settings.first_layer - 1, model.config.get_text_config().num_hidden_layers - 1
    if isinstance(layers, list) and not all(first <= layer <= last for layer in layers):
        raise InputError(f"--map-layers is {layers}; the layers of this model that select are {first} to {last}")


class _Printer:
    """Prints pieces of text as they come, without the space that many tokenizers begin with."""

    _started = False

    def __call__(self, text: str) -> None:
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        print(text, end="", flush=True)
