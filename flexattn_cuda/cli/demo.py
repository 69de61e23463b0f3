"""flexattn demo"""

from __future__ import annotations

import typer

from flexattn_cuda.cli.runner import silence_transformers
from flexattn_cuda.runs.files import make_writable_folder
from flexattn_cuda.tasks.examples import examples_folder, is_right, read_examples, write_examples
from flexattn_cuda.tasks.options import DemoOptions


def demo(options: DemoOptions) -> None:
    """Ask the example questions, save the overlays, and check the answers (exit code 1 if one is wrong).

    Beside the overlays lie the images, questions.jsonl and records.json, to try ask, ask-batch and train with.

    Examples:
        flexattn demo
        flexattn demo --output shown --model my-model
    """
    examples = read_examples(examples_folder(options.examples))
    make_writable_folder(options.output)
    write_examples(examples, options.output)
    silence_transformers()
    from flexattn_cuda.tasks import ask as answering
    from flexattn_cuda.tasks import load as loading

    model, processor = loading.load(options.model, options.device, options.dtype)
    wrong = 0
    for number, example in enumerate(examples, start=1):
        print(f"{example.file}: {example.question}", flush=True)
        answer = answering.ask(model, processor, example.image, example.question, options.max_new_tokens, trace=True)
        overlay = options.output / f"{number:02d}_{example.image.stem}.png"
        answer.draw(overlay)
        right = is_right(answer.text, example)
        wrong += not right
        print(f"  {answer.text}  {'right' if right else f'WRONG, expected {example.answer}'}  ({overlay})", flush=True)
    print(f"{len(examples) - wrong} of {len(examples)} answers are right")
    if wrong:
        raise typer.Exit(1)
