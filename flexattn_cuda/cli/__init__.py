"""The command line: flexattn ask, ask-batch, demo, info, flops, train."""

from __future__ import annotations

import json
import platform
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import flexattn_cuda
from flexattn_cuda import build, checkpoints
from flexattn_cuda.analysis import flops as costs
from flexattn_cuda.analysis import memory
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.inputs.images import open_image
from flexattn_cuda.inputs.questions import check_question
from flexattn_cuda.mechanism.config import SYSTEMS
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks import ask_batch as batch
from flexattn_cuda.tasks import load as loading

app = typer.Typer(
    help="Ask questions about large photographs: a vision-language model with FlexAttention (Li et al., ECCV 2024).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str | None,
    typer.Option(help="Checkpoint folder or hub id; without it the small model of this package."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, float16 or bfloat16.")]
Tokens = Annotated[int, typer.Option(help="The answer's greatest length.")]


def main() -> None:
    """Run `flexattn`."""
    run_app(app, "flexattn")


def run_app(command_line: typer.Typer, name: str) -> None:
    """Run a command line; an input that cannot be used ends it with one sentence on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
    try:
        command_line(prog_name=name)
    except (InputError, CheckpointError) as error:
        _fail(str(error))
    except torch.OutOfMemoryError:
        _fail("the GPU's memory is too small for this; `flexattn info --model DIR` tells what a model needs")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"flexattn: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"flexattn {flexattn_cuda.__version__}")
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


# ----------------------------------------------------------------------------------------------------------------- ask


@app.command()
def ask(
    image: Annotated[str, typer.Argument(help="An image file: PNG, JPEG, ...", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask about it.", show_default=False)],
    model: Model = None,
    map: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write the image with attention map and selected regions drawn over it.",
        ),
    ] = None,
    map_tokens: Annotated[
        str,
        typer.Option(help="Answer tokens to draw: first, all, or numbers counted from 0, such as 0,2."),
    ] = "first",
    map_layers: Annotated[
        str,
        typer.Option(help="Layers whose selection to draw: first (that selects), all, or numbers counted from 0."),
    ] = "first",
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: Tokens = 256,
) -> None:
    """Answer a QUESTION about a IMAGE; the answer is printed as it is generated."""
    # Everything that can be checked without the model is checked before it is loaded.
    check_question(question)
    _check_length(max_new_tokens)
    tokens, layers = _numbers(map_tokens, "--map-tokens"), _numbers(map_layers, "--map-layers")
    if map is not None:
        answering.check_image_path(map)
        if Path(map).resolve() == Path(image).resolve():
            raise InputError(f"--map {map} would overwrite the image; choose another name")
    opened = open_image(image)
    loaded, processor = loading.load(model, device, dtype)
    if map is not None:
        _check_layers(layers, loaded.config)

    answer = answering.ask(
        loaded,
        processor,
        opened,
        question,
        max_new_tokens,
        on_text=_Printer(),
        trace=map is not None,
    )
    print(flush=True)
    if map is not None:
        answer.draw(map, token=0 if tokens is None else tokens, layer=layers)
        print(f"wrote {map}", file=sys.stderr)


def _check_length(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is {max_new_tokens}; it must be at least 1")


class _Printer:
    """Prints pieces of text as they come, without the space that many tokenizers begin with."""

    begun = False

    def __call__(self, text: str) -> None:
        if not self.begun:
            text = text.lstrip()
            self.begun = bool(text)
        print(text, end="", flush=True)


def _numbers(text: str, option: str) -> list[int] | str | None:
    """ "first" -> None, "all" -> "all", "0,2" -> [0, 2]."""
    if text in ("first", "all"):
        return None if text == "first" else text
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise InputError(f"{option} is {text!r}; allowed: first, all, or numbers counted from 0, such as 0,2")
    return numbers


def _check_layers(layers: list[int] | str | None, config: FlexAttnLlavaConfig) -> None:
    if config.system != "flexattn":
        raise InputError("this model has no FlexAttention, so there is no map to draw; leave --map out")
    first, last = config.flexattn.first_layer - 1, config.text_config.num_hidden_layers - 1
    if isinstance(layers, list) and not all(first <= layer <= last for layer in layers):
        raise InputError(f"--map-layers is {layers}; the layers of this model that select are {first} to {last}")


# ----------------------------------------------------------------------------------------------------------- ask-batch


@app.command()
def ask_batch(
    questions: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT.jsonl",
            help="A JSON object a line: image, question, id (optional).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT.jsonl",
            help="Where the answers are written.",
            show_default=False,
        ),
    ],
    model: Model = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at a time.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: Tokens = 256,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an earlier run has answered.")] = False,
) -> None:
    """Answer the questions of a file; called again after an interruption, it goes on.

    On several GPUs: torchrun --nproc-per-node N -m flexattn_cuda.cli ask-batch ..., or the same with accelerate launch.
    """
    batch.answer_file(
        questions,
        output,
        model,
        device,
        dtype,
        max_new_tokens,
        batch_size=batch_size,
        restart=restart,
        progress=True,
    )


# --------------------------------------------------------------------------------------------------------------- train


@app.command()
def train(
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", help="LLaVA-format records: a JSON list, or JSONL.", show_default=False),
    ],
    images: Annotated[
        Path,
        typer.Option(metavar="DIR", help="What the images' paths are relative to.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Checkpoints, and the model.", show_default=False),
    ],
    model: Model = None,
    system: Annotated[str | None, typer.Option(help=f"Train it as another system: {', '.join(SYSTEMS)}.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes through the data.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Records at a time, in each process.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Such batches in a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The greatest.")] = 2e-5,
    optimizer: Annotated[str, typer.Option(help="adamw, sgd, or another name of transformers.")] = "adamw",
    schedule: Annotated[str, typer.Option(help="Of the learning rate: cosine, linear, constant, ...")] = "cosine",
    warmup_steps: Annotated[int, typer.Option(help="Steps in which the learning rate rises.")] = 0,
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    clip: Annotated[float, typer.Option(help="Greatest norm of the gradients, 0 for no limit.")] = 1.0,
    train: Annotated[
        str, typer.Option(help="all (but the vision tower), projector, or hr: the HR projections.")
    ] = "all",
    precision: Annotated[str, typer.Option(help="auto, float32, float64; mixed: float16 (V100), bfloat16.")] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more computation.")
    ] = False,
    max_length: Annotated[int | None, typer.Option(help="Positions that a record may take.")] = None,
    broken: Annotated[str, typer.Option(help="What to do where records are broken: skip, or refuse.")] = "skip",
    check_only: Annotated[bool, typer.Option("--check-only", help="Check the data, and end.")] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    keep: Annotated[int, typer.Option(help="Checkpoints that stay, at least 2.")] = 2,
    log_every: Annotated[int, typer.Option(help="Steps between entries of the loss.")] = 1,
    seed: Annotated[int, typer.Option()] = 0,
    workers: Annotated[int, typer.Option(help="Processes that prepare the records; 0: none beside this one.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard logs into the output.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an earlier run has left.")] = False,
) -> None:
    """Train a model on LLaVA-format data; called again after an interruption, it goes on.

    On several GPUs: torchrun --nproc-per-node N -m flexattn_cuda.cli train ..., or accelerate launch, whose configuration
    may ask for FSDP or DeepSpeed.
    """
    from flexattn_cuda.tasks import train as training  # the Trainer takes seconds to import

    training.train(
        data,
        images,
        output,
        model,
        system,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        learning_rate=learning_rate,
        optimizer=optimizer,
        schedule=schedule,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        clip=clip,
        part=train,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        max_length=max_length,
        broken=broken,
        check_only=check_only,
        save_every=save_every,
        keep=keep,
        log_every=log_every,
        seed=seed,
        workers=workers,
        device=device,
        tensorboard=tensorboard,
        restart=restart,
        progress=True,
    )


# ---------------------------------------------------------------------------------------------------------------- demo


@app.command()
def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the overlays are written.")] = Path(
        "flexattn-demo"
    ),
    examples: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with questions.json and its photographs."),
    ] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: Tokens = 64,
) -> None:
    """Ask the example questions, write the overlays, and check the answers (exit code 1 where one is wrong)."""
    _check_length(max_new_tokens)
    folder = _examples_folder(examples)
    questions = _read_questions(folder)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output} cannot be made a folder: {error.strerror}") from None
    loaded, processor = loading.load(model, device, dtype)

    wrong = 0
    for number, example in enumerate(questions, start=1):
        image = _example_image(folder, example["file"])
        print(f"{example['file']}: {example['question']}", flush=True)
        answer = answering.ask(loaded, processor, image, example["question"], max_new_tokens, trace=True)
        overlay = output / f"{number:02d}_{image.stem}.png"
        answer.draw(overlay)
        right = _plain(answer.text) == _plain(example["answer"])
        wrong += not right
        print(
            f"  {answer.text}  {'right' if right else 'WRONG, expected ' + example['answer']}  ({overlay})",
            flush=True,
        )
    print(f"{len(questions) - wrong} of {len(questions)} answers are right")
    if wrong:
        raise typer.Exit(1)


def _examples_folder(given: Path | None) -> Path:
    package = Path(flexattn_cuda.__file__).parent
    places = (
        [given]
        if given is not None
        else [Path("examples"), package.parent / "examples", package / "assets" / "examples"]
    )
    for place in places:
        if (place / "questions.json").is_file():
            return place
    raise InputError(f"there is no questions.json in {places[0]}; pass the folder of the examples with --examples")


def _read_questions(folder: Path) -> list[dict[str, Any]]:
    path = folder / "questions.json"
    try:
        questions = json.loads(path.read_text(encoding="utf-8"))
        complete = all(isinstance(one[key], str) for one in questions for key in ("file", "question", "answer"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise InputError(f"{path} cannot be read as a list of file, question and answer: {error}") from None
    if not questions or not complete:
        raise InputError(f"{path} holds no questions")
    return questions


def _example_image(folder: Path, name: str) -> Path:
    beside = folder / name
    return beside if beside.exists() else folder / "photographs" / name


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()


# ---------------------------------------------------------------------------------------------------------------- info


@app.command()
def info(model: Model = None) -> None:
    """Versions, build, GPUs, and why a path cannot be used; with --model, the memory that the model needs."""
    folder = None if model is None else checkpoints.resolve_folder(model, parts=checkpoints.Part.CONFIG)
    tables = [_facts()] if folder is None else [_facts(), "", *_memory_report(folder)]
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    for table in tables:
        console.print(table)


def _facts() -> Table:
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("flexattn_cuda", flexattn_cuda.__version__)
    facts.add_row("Python", platform.python_version())
    facts.add_row("torch", torch.__version__)
    facts.add_row("transformers", transformers.__version__)
    built = build.build_info()
    toolkit, reason = built["cuda_toolkit"], built["no_cuda_reason"]
    facts.add_row("built with", f"compiler {built['compiler']}, torch {built['torch']}")
    facts.add_row("CUDA kernels", f"CUDA {toolkit}" if toolkit else f"none: {reason}")
    facts.add_row("compiled for", ", ".join(built["architectures"]) or "the CPU only")
    facts.add_row(
        "GPUs seen",
        "; ".join(_gpu(number) for number in range(torch.cuda.device_count())) or "none",
    )
    facts.add_row("CPU path", "available")
    facts.add_row("CUDA path", build.cuda_unavailable_reason() or "available")
    return facts


def _gpu(number: int) -> str:
    facts = torch.cuda.get_device_properties(number)
    return f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / memory.GIB:.1f} GiB"


def _memory_report(folder: Path) -> list[str | Table]:
    config = checkpoints.load_config(folder)
    try:
        halves, floats = (memory.estimate(config, dtype) for dtype in (torch.float16, torch.float32))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    both, settings = (halves, floats), config.flexattn
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("float16, bfloat16", justify="right")
    table.add_column("float32", justify="right")

    def row(name: str, amounts: list[int], style: str | None = None) -> None:
        table.add_row(name, *(_size(amount) for amount in amounts), style=style)

    for part in halves.weights:
        row(f"weights: {part}", [one.weights[part] for one in both])
    row("all weights", [one.all_weights for one in both], style="bold")
    row(
        f"per image: sequence cache, {halves.positions} positions",
        [one.sequence_cache for one in both],
    )
    form = checkpoints.checkpoint_format(folder)
    report: list[str | Table] = [f"[bold]Memory[/bold] of {escape(str(folder))}, {form} format"]
    if config.hr_layers:
        share = f"{halves.selected_share:.0%}"
        row("per image: HR features", [one.hr_features for one in both])
        row(
            f"per image: HR cache, {share} of the HR tokens",
            [one.hr_cache_selected for one in both],
        )
        row("per image: HR cache, all HR tokens", [one.hr_cache_all for one in both])
        row(
            f"weights and one image, {share} of the HR tokens",
            [one.total for one in both],
            style="bold",
        )
        row("weights and one image, all HR tokens", [one.total_all for one in both], style="bold")
        report.append(
            f"An image gives {config.lr_side} x {config.lr_side} low-resolution tokens and, from "
            f"{settings.highres_size} x {settings.highres_size} pixels, {config.hr_side} x {config.hr_side} "
            f"high-resolution (HR) tokens, which layers {config.hr_layers[0]} to {config.hr_layers[-1]} attend to."
        )
    else:
        row("weights and one image", [one.total for one in both], style="bold")
    verdicts = [
        f"16 GiB (the smaller V100) in {name}: {_verdict(one)}"
        for name, one in (("float16 or bfloat16", halves), ("float32", floats))
    ]
    return [*report, table, *verdicts]


def _verdict(estimate: memory.MemoryEstimate) -> str:
    left = memory.V100 - estimate.total
    if left < 0:
        return f"not enough, {_size(-left)} short"
    rest = f"{_size(left)} left for activations and the CUDA context"
    return f"barely enough, {rest}" if left < memory.GIB else f"enough, {rest}"


def _size(amount: int) -> str:
    for unit, name in ((memory.GIB, "GiB"), (2**20, "MiB")):
        if amount >= unit:
            return f"{amount / unit:.2f} {name}"
    return f"{amount / 1024:.0f} KiB"


# --------------------------------------------------------------------------------------------------------------- flops


@app.command()
def flops(
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or hub id, instead of --shape.")] = None,
    shape: Annotated[str | None, typer.Option(help="Of LLaVA-1.5: 7b (the default) or 13b.")] = None,
    systems: Annotated[
        str,
        typer.Option(help="llava, hd, xattn, flexattn, flexattn-paper, random or center, comma-separated."),
    ] = ",".join(costs.COMPARED),
    text_tokens: Annotated[int, typer.Option(metavar="T", help="Tokens of the prompt besides the image's.")] = 80,
    selected: Annotated[
        int | None,
        typer.Option(metavar="M", help="HR tokens that a layer selects; by default 43 % (2250 of 5184)."),
    ] = None,
    tiles: Annotated[
        int | None,
        typer.Option(metavar="K", help="Tiles with a selected token; by default all of them."),
    ] = None,
    zoom: Annotated[
        int | None,
        typer.Option(metavar="Z", help="High resolution in tiles a side; by default the model's own, or 3."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write published_tflops, here_tflops and the parts of each (parts, here_parts) by system.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plot TFLOPs against the resolution, zoom 1 to 4 (matplotlib)."),
    ] = None,
) -> None:
    """Count what the prompt of one image costs in TFLOPs, by system and part; nothing is loaded or computed."""
    names = list(dict.fromkeys(name.strip() for name in systems.split(",")))
    if model is not None and shape is not None:
        raise InputError("--model and --shape exclude each other")
    if plot is not None:
        costs.check_plot(plot)
    shape = shape or "7b"
    config = costs.llava_shape(shape) if model is None else checkpoints.fetch_config(model)
    configs = {name: costs.as_system(config, name, zoom) for name in names}
    with Console(stderr=True).status("counting"):
        found = {name: costs.cost(one, text_tokens, selected, tiles) for name, one in configs.items()}
    paper = costs.PAPER.get(text_tokens, {}) if model is None and shape == "7b" and zoom in (None, 3) else {}
    result: dict[str, Any] = {
        "model": model or shape,
        "text_tokens": text_tokens,
        "systems": {
            name: {
                "published_tflops": one.published_tflops,
                "here_tflops": one.here_tflops,
                "parts": {part: flop / 1e12 for part, flop in one.published.items()},
                "here_parts": {part: flop / 1e12 for part, flop in one.here.items()},
            }
            for name, one in found.items()
        },
    }
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    console.print(_flops_table(found, paper))
    if "flexattn" in found and "flexattn" in paper:
        one, budget = configs["flexattn"], paper["flexattn"]
        implied, tokens = costs.selected_for(one, budget, text_tokens), one.hr_side**2
        result["implied"] = {"published_tflops": budget, "selected": implied}
        console.print(
            f"The paper's {budget} TFLOPs are those of {implied} selected tokens, {implied / tokens:.0%} of {tokens}."
        )
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"{json_file} cannot be written: {error.strerror}") from error
    if plot is not None:
        one = next((one for one in configs.values() if one.system == "flexattn"), None)  # the others select nothing
        share = costs.SHARE if selected is None or one is None else selected / one.hr_side**2
        tile_share = 1.0 if tiles is None or one is None else tiles / one.flexattn.zoom**2
        with Console(stderr=True).status("counting for the plot"):
            points = costs.by_resolution(config, names, range(1, 5), text_tokens, share, tile_share)
        costs.plot(points, plot)
        print(f"wrote {plot}", file=sys.stderr)


def _flops_table(found: dict[str, costs.Cost], paper: dict[str, float]) -> Table:
    largest = max(one.published_tflops for one in found.values())
    unit, name = (1e12, "TFLOPs") if largest >= 1 else (1e9, "GFLOPs")
    table = Table(box=None, pad_edge=False, title=f"{name} of a prompt with one image", title_justify="left")
    table.add_column("system")
    table.add_column("")
    for name in (*costs.PARTS, "all", *(["paper"] if paper else [])):
        table.add_column(name, justify="right")
    for name, one in found.items():
        for way, parts in (("as published", one.published), ("here", one.here)):
            figures = [*parts.values(), sum(parts.values())]
            said = [str(paper[name])] if way == "as published" and name in paper else []
            table.add_row(
                name if way == "as published" else "",
                way,
                *(f"{figure / unit:.2f}" for figure in figures),
                *said,
            )
    return table


if __name__ == "__main__":
    main()
