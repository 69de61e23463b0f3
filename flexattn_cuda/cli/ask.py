"""flexattn ask"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flexattn_cuda.cli.answers import AnswerPrinter, open_named
from flexattn_cuda.cli.runner import print_error, silence_transformers
from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.questions import check_question
from flexattn_cuda.runs.files import check_image_path
from flexattn_cuda.runs.options import STREAM
from flexattn_cuda.tasks.options import AskOptions

if TYPE_CHECKING:
    from PIL import Image

    from flexattn_cuda.tasks.ask import Answer
    from flexattn_cuda.tasks.ask_batch.lines import Result
    from flexattn_cuda.tasks.models import HRModel, QuestionProcessor


def ask(options: AskOptions) -> None:
    """Answer a QUESTION about one or several IMAGEs, printed as it is generated, or about each image of a folder.

    Of a folder, an image that cannot be read costs no other its answer; the exit code is 1 if none was answered.

    Examples:
        flexattn ask image.jpg "What does the sign say?" --compare --map overlay.png
        flexattn ask before.jpg after.jpg "What has changed?" --json
        flexattn ask images/ "What does the sign say?" > answers.txt
    """
    # Everything that can be checked without the model is checked before it is loaded, or even imported.
    check_question(options.question)
    if options.folder is not None:
        _ask_folder(options, options.folder)
        return
    if options.map is not None:
        check_image_path(options.map)
    images = _read(options.images)
    silence_transformers()
    from flexattn_cuda.tasks import load as loading

    model, processor = loading.load_chosen(options)
    if options.map is not None or options.compare:
        _check_layers(options.layers_to_draw, model)
    if options.crops:
        _ask_cropping(model, processor, images, options)
        return
    low = _asked(model, processor, images, options, high_resolution=False) if options.compare else None
    answer = _asked(model, processor, images, options)
    if options.json:
        print(json.dumps(_described(options, answer, low), ensure_ascii=False))
    if options.map is not None:
        _draw(options, answer, low)
        print(f"wrote {options.map}", file=sys.stderr)


def _ask_folder(options: AskOptions, folder: Path) -> None:
    """Ask about every image of a folder; exit code 1 if no question was answered."""
    from flexattn_cuda.inputs.images import images_in
    from flexattn_cuda.runs.records import encode_json

    names = images_in(folder)
    silence_transformers()
    from flexattn_cuda.tasks import load as loading
    from flexattn_cuda.tasks.ask_batch import BatchModel, answer_folder

    model = BatchModel(*loading.load_chosen(options), folder, options.batch_size, options.max_new_tokens)

    def show(name: str, result: Result) -> None:
        if options.json:
            record = {"image": name, "question": options.question} | result.fields()
            print(encode_json(record).decode(), flush=True)
        elif result.error is None:
            print(f"{name}: {' '.join(result.answer.split())}", flush=True)
        else:
            print_error(result.error)

    # Lines of progress would stand between the answers on a terminal.
    if answer_folder(model, names, options.question, show, progress=not sys.stdout.isatty()).answers == 0:
        raise typer.Exit(1)


def _read(names: list[str]) -> list[Image.Image]:
    if names.count(str(STREAM)) > 1:
        raise InputError("standard input is named twice; it holds one image")
    return [_image(name) for name in names]


def _image(name: str) -> Image.Image:
    from flexattn_cuda.inputs.images import read_standard_input

    return read_standard_input() if name == str(STREAM) else open_named(name)


def _asked(
    model: HRModel,
    processor: QuestionProcessor,
    images: list[Image.Image],
    options: AskOptions,
    high_resolution: bool = True,
) -> Answer:
    """Ask, and print the answer as it comes, after which view it is from where two are compared."""
    from flexattn_cuda.tasks import ask as answering
    from flexattn_cuda.tasks.models import selects

    if options.compare and not options.json:
        print("high resolution: " if high_resolution else "low resolution:  ", end="", flush=True)
    answer = answering.ask(
        model,
        processor,
        images,
        options.question,
        options.max_new_tokens,
        on_text=None if options.json else AnswerPrinter(),
        trace=high_resolution and (options.map is not None or options.json) and selects(model),
        high_resolution=high_resolution,
    )
    if not options.json:
        print(flush=True)
    return answer


def _ask_cropping(model: HRModel, processor: QuestionProcessor, images: list[Image.Image], options: AskOptions) -> None:
    """Ask, find what the model looked at, and ask again with a crop of each image."""
    from flexattn_cuda.tasks.cropping import Cropper

    cropper = Cropper.of(options.model, model, processor)
    on_text = None if options.json else AnswerPrinter()
    answer = cropper.ask(images, options.question, max_new_tokens=options.max_new_tokens, on_text=on_text)
    print(json.dumps(_described(options, answer, None), ensure_ascii=False) if options.json else "", flush=True)


def _described(options: AskOptions, answer: Answer, low: Answer | None) -> dict[str, Any]:
    """Return what --json prints."""
    described: dict[str, Any] = {"question": options.question, "answer": answer.text}
    if low is not None:
        described["low_resolution_answer"] = low.text
    described |= {"tokens": answer.pieces, "seconds": round(answer.seconds, 3), "images": []}
    for number, (name, image) in enumerate(zip(options.images, answer.images)):
        entry: dict[str, Any] = {"image": name, "width": image.width, "height": image.height}
        if answer.trace is not None:
            found = answer.selection(number)
            entry |= {"selected_share": round(found.share, 4), "tiles": found.tiles, "regions": found.regions}
        described["images"].append(entry)
    return described


def _draw(options: AskOptions, answer: Answer, low: Answer | None) -> None:
    if low is None:
        answer.draw(options.map, options.tokens_to_draw, options.layers_to_draw)
    else:
        answer.draw_beside(low, options.map, options.tokens_to_draw, options.layers_to_draw)


def _check_layers(layers: list[int] | str | None, model: HRModel) -> None:
    from flexattn_cuda.tasks.models import selects

    if not selects(model):
        raise InputError("this model has no FlexAttention, so there is no map to draw; leave --map and --compare out")
    assert model.flexattn_settings is not None
    first, last = model.flexattn_settings.first_layer - 1, model.config.get_text_config().num_hidden_layers - 1
    if isinstance(layers, list) and not all(first <= layer <= last for layer in layers):
        raise InputError(f"--map-layers is {layers}; the layers of this model that select are {first} to {last}")
