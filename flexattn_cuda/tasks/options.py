"""The options of every task: at once its Python interface, its command line, its checks and its documentation.

See `flexattn_cuda.runs.options` for how they are declared. Imports nothing heavy.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from flexattn_cuda.errors import InputError
from flexattn_cuda.mechanism.config import PRESETS, SYSTEMS
from flexattn_cuda.runs.fingerprint import Fingerprint
from flexattn_cuda.runs.options import STREAM, Option, Options

MAX_NEW_TOKENS = 256
TOKEN_VARIABLE = "FLEXATTN_TOKEN"
QUANTIZATIONS = ("4bit", "8bit")
OWN_SYSTEM = "own"
CROP_SYSTEM = "crop"  # "llava", which is asked again with a crop of the image, see tasks/cropping.py
SCHEDULES = (  # those of transformers that need no arguments
    "linear",
    "cosine",
    "cosine_with_restarts",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")  # which do not depend on the length of a run

Model = Annotated[
    str | None,
    Option("Checkpoint folder or hub id; by default the small model that ships with this package.", fixed=True),
]
Device = Annotated[str, Option("Device to run on: auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str,
    Option("Data type of the model: auto (the checkpoint's own), float32, float16, bfloat16 or float64.", fixed=True),
]
Adapter = Annotated[
    str | None,
    Option("Folder or hub id of an adapter for the model, as save_adapter writes it.", metavar="DIR", fixed=True),
]
Quantize = Annotated[
    str | None,
    Option(
        f"Quantise the weights of the model by bitsandbytes: {' or '.join(QUANTIZATIONS)}.",
        choices=QUANTIZATIONS,
        fixed=True,
    ),
]
MaxNewTokens = Annotated[int, Option("Maximum length of an answer in tokens.", minimum=1, fixed=True)]


def names_in(text: str) -> list[str]:
    """Return names that are separated by commas, each of them once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


# --------------------------------------------------------------------------------------------------------- tuning


@dataclass(frozen=True, kw_only=True)
class TuneOptions(Options):
    """Options of `flexattn tune`."""

    questions: Annotated[
        Path,
        Option(
            'JSON lines with "image" (relative to the file), "question" and perhaps "box": [left, top, right, bottom].',
            positional=True,
            metavar="FILE",
        ),
    ]
    out: Annotated[Path, Option("Folder of the adapter to write.", metavar="DIR")]
    model: Annotated[str, Option("Checkpoint folder or hub id of a model of a known family.")]
    adapter: Adapter = None
    share: Annotated[float, Option("Share of the high-resolution tokens to select.", above=0, below=1)] = 0.1
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantize: Quantize = None


# --------------------------------------------------------------------------------------------------------- asking


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Options of the commands that load a model and answer with it."""

    model: Model = None
    adapter: Adapter = None
    quantize: Quantize = None
    system: Annotated[
        str | None,
        Option(
            f"Load the model as another system: {', '.join(SYSTEMS)}; or {CROP_SYSTEM}: llava, asked again with a crop "
            "of the image.",
            choices=(*SYSTEMS, CROP_SYSTEM),
        ),
    ] = None
    preset: Annotated[
        str | None, Option(f"Settings in place of the model's own: {' or '.join(PRESETS)}.", choices=tuple(PRESETS))
    ] = None
    threshold: Annotated[
        float | None, Option("Threshold of the attention map, above which a region is selected.", minimum=0)
    ] = None
    zoom: Annotated[
        int | None, Option("Side of the high-resolution image, in low-resolution ones.", minimum=1, metavar="Z")
    ] = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.changes and self.adapter is not None:
            changed = next(iter(self.changes))
            raise InputError(f"an adapter has settings of its own; leave one of --{changed} and --adapter out")
        if self.preset is not None and self.system is not None:
            raise InputError("--preset and --system exclude each other: a system has settings of its own")

    @property
    def crops(self) -> bool:
        """Whether the model is asked again with a crop of the image."""
        return self.system == CROP_SYSTEM

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that replace the model's own, by name."""
        changes = {"preset": self.preset, "threshold": self.threshold, "zoom": self.zoom}
        return {name: value for name, value in changes.items() if value is not None}

    def as_system(self, name: str) -> ModelOptions:
        """Return these options for another system, or for a preset; InputError if there is none of this name."""
        if name in PRESETS:
            return replace(self, preset=name, system=None)
        if name in SYSTEMS:
            return replace(self, preset=None, system=name)
        raise InputError(f"there is no system {name!r}; allowed: {', '.join((*SYSTEMS, *PRESETS))}")


@dataclass(frozen=True, kw_only=True)
class AskOptions(ModelOptions):
    """Options of `flexattn ask`."""

    images: Annotated[
        list[str],
        Option(
            "Images of one prompt: files (PNG, JPEG, ...) or URLs, - for standard input; or a folder, each of whose "
            "images is asked about.",
            positional=True,
            metavar="IMAGE",
        ),
    ]
    question: Annotated[str, Option("Question about the images.", positional=True, metavar="QUESTION")]
    compare: Annotated[
        bool, Option("Answer from the low resolution alone too; --map draws both beside each other.")
    ] = False
    json: Annotated[
        bool,
        Option(
            "Print a JSON object: answer, tokens, seconds and, by image, what was selected; for a folder, one with the "
            "answer per line."
        ),
    ] = False
    map: Annotated[
        Path | None,
        Option("Save the image with the attention map and the selected regions drawn over it.", metavar="FILE"),
    ] = None
    map_tokens: Annotated[
        str | None, Option("Answer tokens to draw: first (the default), all, or numbers from 0, such as 0,2.")
    ] = None
    map_layers: Annotated[
        str | None, Option("Layers whose selection to draw: first (the default), all, or numbers from 0.")
    ] = None
    batch_size: Annotated[int, Option("Number of images of a folder per batch.", minimum=1)] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.images:
            raise InputError("the name of an image is empty; it must be a path or a URL")
        if self.map is not None and self.map.resolve() in [Path(image).resolve() for image in self.images]:
            raise InputError(f"--map {self.map} would overwrite the image; choose another name")
        for flag, chosen in (("--map-tokens", self.map_tokens), ("--map-layers", self.map_layers)):
            if _numbers(chosen, flag) is not None and self.map is None:
                raise InputError(f"{flag} needs --map FILE, the file to draw to")
        self._check_folders()

    def _check_folders(self) -> None:
        folders = [image for image in self.images if os.path.isdir(image)]
        if folders and self.crops:
            raise InputError(f"{folders[0]} is a folder; --system {CROP_SYSTEM} takes images, so name one")
        if folders and len(self.images) > 1:
            raise InputError(f"{folders[0]} is a folder, whose images are asked about one by one; name it alone")
        if folders and (self.map is not None or self.compare):
            raise InputError(
                f"{folders[0]} is a folder; --map and --compare take images, so name one, or leave them out"
            )

    @property
    def folder(self) -> Path | None:
        """The folder whose images are asked about, if one is."""
        return Path(self.images[0]) if os.path.isdir(self.images[0]) else None

    @property
    def tokens_to_draw(self) -> list[int] | str:
        """The argument `token` of `Answer.draw`."""
        chosen = _numbers(self.map_tokens, "--map-tokens")
        return [0] if chosen in (None, "first") else chosen

    @property
    def layers_to_draw(self) -> list[int] | str | None:
        """The argument `layer` of `Answer.draw`."""
        chosen = _numbers(self.map_layers, "--map-layers")
        return None if chosen == "first" else chosen


def _numbers(text: str | None, flag: str) -> list[int] | str | None:
    """Return None, "first" and "all" as they are, and "0,2" as [0, 2]."""
    if text in (None, "first", "all"):
        return text
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise InputError(f"{flag} is {text!r}; allowed: first, all, or numbers from 0, such as 0,2")
    return numbers


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ModelOptions):
    """Options of `flexattn chat`."""

    image: Annotated[
        str | None,
        Option("Image to ask about: a file or a URL; /image names another.", positional=True, metavar="IMAGE"),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image == "":
            raise InputError("the name of the image is empty; it must be a path or a URL")
        if self.image == str(STREAM):
            raise InputError("the image is '-', but standard input holds the questions; name a file")
        if self.crops:
            raise InputError(f"--system {CROP_SYSTEM} answers single questions; use `flexattn ask`")


@dataclass(frozen=True, kw_only=True)
class BatchOptions(Options):
    """Options of `flexattn ask-batch` and `flexattn_cuda.answer_file`."""

    input: Annotated[
        Path,
        Option(
            "JSON Lines file with an image, a question and an optional id per line.",
            positional=True,
            metavar="INPUT.jsonl",
        ),
    ]
    output: Annotated[
        Path, Option("JSON Lines file to write the answers to.", flags=("--output", "-o"), metavar="OUT.jsonl")
    ]
    model: Model = None
    adapter: Adapter = None
    quantize: Quantize = None
    batch_size: Annotated[int, Option("Number of questions per batch.", minimum=1)] = 8
    device: Device = "auto"
    dtype: Dtype = "auto"
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS
    restart: Annotated[bool, Option("Discard the answers of an earlier run.")] = False


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """Options of `flexattn serve`."""

    model: Model = None
    adapter: Adapter = None
    quantize: Quantize = None
    name: Annotated[
        str | None, Option("Name of the model in the API; by default its folder's or hub id, or flexattn-default.")
    ] = None
    host: Annotated[str, Option("Address to listen on; any but a loopback address needs a token.")] = "127.0.0.1"
    port: Annotated[int, Option("Port to listen on; 0 for any free one.", minimum=0, below=65_536)] = 8000
    token: Annotated[
        str | None, Option(f"Token that clients must send; better set {TOKEN_VARIABLE}, which other users cannot see.")
    ] = None
    files: Annotated[
        Path | None, Option("Folder whose image files requests may name, as file: URLs; by default none.")
    ] = None
    allow_urls: Annotated[bool, Option("Let requests name images by http(s) URLs of public addresses.")] = False
    allow_private_urls: Annotated[bool, Option("Let those URLs lead to private addresses too.")] = False
    batch_size: Annotated[int, Option("Maximum number of requests to answer together.", minimum=1)] = 8
    queue: Annotated[int, Option("Maximum number of requests that wait; more are refused.", minimum=0)] = 128
    timeout: Annotated[float, Option("Seconds that a request may take in all.", above=0)] = 120.0
    max_request: Annotated[float, Option("Maximum size of a request in MiB.", above=0)] = 32.0
    max_pending: Annotated[float, Option("Maximum size of all requests at a time in MiB.", above=0)] = 512.0
    max_megapixels: Annotated[float, Option("Maximum size of an image in millions of pixels.", above=0)] = 64.0
    image_cache: Annotated[float, Option("Memory for encoded images in MiB; 0 keeps none.", minimum=0)] = 512.0
    device: Device = "auto"
    dtype: Dtype = "auto"
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allow_private_urls and not self.allow_urls:
            raise InputError("--allow-private-urls needs --allow-urls, which lets requests name URLs at all")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise InputError("the token is empty or holds characters other than printable ASCII; choose another")
        if self.files is not None and not self.files.is_dir():
            raise InputError(f"--files {self.files} is not a folder")


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Options of `flexattn demo`."""

    output: Annotated[Path, Option("Folder to write the overlays to.", metavar="DIR")] = Path("flexattn-demo")
    examples: Annotated[
        Path | None, Option("Folder with questions.json and its images; by default the examples.", metavar="DIR")
    ] = None
    model: Model = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    max_new_tokens: MaxNewTokens = 64


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """Options of `flexattn convert`."""

    model: Annotated[str, Option("Checkpoint folder or hub id with .bin weights.", positional=True, metavar="MODEL")]
    output: Annotated[Path, Option("New folder to write the checkpoint to.", flags=("--output", "-o"), metavar="DIR")]


# ----------------------------------------------------------------------------------------------------- evaluating


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Options):
    """Options of `flexattn eval`."""

    output: Annotated[Path, Option("Folder to write results to.", flags=("--output", "-o"), metavar="DIR")]
    model: Model = None
    adapter: Adapter = None
    quantize: Quantize = None
    systems: Annotated[
        str, Option(f"Comma-separated systems: {', '.join((*SYSTEMS, CROP_SYSTEM))}, or own for the model as it is.")
    ] = ",".join((*SYSTEMS, CROP_SYSTEM))
    tasks: Annotated[
        str, Option("Comma-separated tasks of lmms-eval or of this package; paper stands for those of its tables.")
    ] = "paper"
    data: Annotated[
        Path | None, Option("Folder of the data sets; by default they come from the hub.", metavar="DIR")
    ] = None
    limit: Annotated[int | None, Option("Number of documents of each task; by default all.", minimum=1, fixed=True)] = (
        None
    )
    batch_size: Annotated[int, Option("Number of questions per batch.", minimum=1, fixed=True)] = 8
    pictures: Annotated[
        int, Option("Number of right and of wrong answers of each system and task to draw.", minimum=0)
    ] = 2
    device: Device = "auto"
    dtype: Dtype = "auto"
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS
    restart: Annotated[bool, Option("Discard the answers of an earlier run.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (*SYSTEMS, CROP_SYSTEM, OWN_SYSTEM)
        if unknown := [name for name in self.system_names if name not in known]:
            raise InputError(f"there is no system {unknown[0]!r}; allowed: {', '.join(known)}")
        if not all(self.task_names):
            raise InputError(f"tasks is {self.tasks!r}; it must be names of tasks, separated by commas")
        if self.data is not None and not self.data.is_dir():
            raise InputError(f"there is no folder {self.data}; --data must name the folder of the data sets")

    @property
    def system_names(self) -> list[str]:
        """The systems."""
        return names_in(self.systems)

    @property
    def task_names(self) -> list[str]:
        """The tasks, "paper" as it was given."""
        return names_in(self.tasks)


# ------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Recipe:
    """How a published model was trained. The vision tower is frozen.

    Attributes:
        source: Where it is published.
        epochs: Passes through the data.
        records_per_step: Of all processes together, in all batches that a step accumulates.
        learning_rate: The maximum.
        schedule: Of the learning rate.
        train: What is trained.
        records: Number of records of the published data.
        text_tokens: Tokens of such a record besides the image's, on average.
    """

    source: str
    epochs: float
    records_per_step: int
    learning_rate: float
    schedule: str
    train: str
    records: int
    text_tokens: int


RECIPES = {
    # 665,298 records in 1.03 GB of JSON are about 900 letters of text each.
    "paper": Recipe("section 5.2", 1.0, 1152, 2e-5, "cosine", "all", records=665_298, text_tokens=250)
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """Options of `flexattn train` and `flexattn_cuda.tasks.train.train`."""

    data: Annotated[Path, Option("Records in LLaVA's format: a JSON list, or JSON Lines.", metavar="FILE")]
    images: Annotated[Path, Option("Folder that the paths of the images are relative to.", metavar="DIR", fixed=True)]
    output: Annotated[
        Path, Option("Folder to write checkpoints and the model to.", flags=("--output", "-o"), metavar="DIR")
    ]
    model: Model = None
    adapter_only: Annotated[
        bool,
        Option(
            "Train an adapter for a model of any known family: its HR projections, or with --lora LoRA.", fixed=True
        ),
    ] = False
    adapter: Annotated[
        str | None,
        Option(
            "Adapter to start from, with --adapter-only; by default the paper's settings.", metavar="DIR", fixed=True
        ),
    ] = None
    system: Annotated[
        str | None, Option(f"Train the checkpoint as another system: {', '.join(SYSTEMS)}.", fixed=True)
    ] = None
    recipe: Annotated[
        str | None,
        Option(
            "Train as published: paper stands for one epoch, 1152 records per step, 2e-5, cosine, all but the tower. "
            "Options that say otherwise are refused.",
            choices=tuple(RECIPES),
            fixed=True,
        ),
    ] = None
    epochs: Annotated[float | None, Option("Number of passes through the data; by default 1.", above=0, fixed=True)] = (
        None
    )
    steps: Annotated[int | None, Option("Number of optimizer steps, instead of --epochs.", minimum=1, fixed=True)] = (
        None
    )
    batch_size: Annotated[int, Option("Number of records per batch and process.", minimum=1, fixed=True)] = 4
    accumulate: Annotated[
        int | None,
        Option("Number of batches per optimizer step; by default 1, or what --recipe needs.", minimum=1, fixed=True),
    ] = None
    learning_rate: Annotated[float, Option("Maximum learning rate.", minimum=0, fixed=True)] = 2e-5
    optimizer: Annotated[str, Option("Optimizer: adamw, sgd or another name of transformers.", fixed=True)] = "adamw"
    schedule: Annotated[
        str, Option(f"Learning-rate schedule: {', '.join(SCHEDULES)}.", choices=SCHEDULES, fixed=True)
    ] = "cosine"
    warmup_steps: Annotated[int, Option("Number of steps that the learning rate rises for.", minimum=0, fixed=True)] = 0
    weight_decay: Annotated[float, Option("Weight decay.", minimum=0, fixed=True)] = 0.0
    clip: Annotated[float, Option("Maximum norm of the gradients; 0 for no limit.", minimum=0, fixed=True)] = 1.0
    train: Annotated[
        str,
        Option(
            "Weights to train: all (except the vision tower), projector, or hr (the HR projections).",
            choices=("all", "projector", "hr"),
            fixed=True,
        ),
    ] = "all"
    lora: Annotated[
        int | None,
        Option(
            "Rank of a LoRA adapter to train in place of the weights, on queries, keys, values and HR projections.",
            minimum=1,
            metavar="R",
            fixed=True,
        ),
    ] = None
    precision: Annotated[
        str,
        Option(
            "Arithmetic: float32, float64, or mixed precision on float32 weights in float16 (with loss scaling; V100) "
            "or bfloat16; auto is float32 on the CPU and the GPU's fastest.",
            choices=("auto", "float32", "float16", "bfloat16", "float64"),
            fixed=True,
        ),
    ] = "auto"
    gradient_checkpointing: Annotated[bool, Option("Recompute activations to save memory.")] = False
    max_length: Annotated[
        int | None, Option("Maximum sequence length in tokens; by default the model's.", minimum=1, fixed=True)
    ] = None
    broken: Annotated[
        str,
        Option("Whether to skip bad records, or to refuse to train on data that has any.", choices=("skip", "refuse")),
    ] = "skip"
    check_only: Annotated[bool, Option("Check the data and exit.")] = False
    save_every: Annotated[int, Option("Number of steps between checkpoints; a multiple of --log-every.", minimum=1)] = (
        500
    )
    keep: Annotated[int, Option("Number of checkpoints to keep; at least 2, so that one is complete.", minimum=2)] = 2
    log_every: Annotated[int, Option("Number of steps between entries of the loss.", minimum=1)] = 1
    seed: Annotated[int, Option("Seed of all random numbers.", minimum=0, below=2**32, fixed=True)] = 0
    workers: Annotated[int, Option("Number of processes that load data; 0 loads in the main process.", minimum=0)] = 0
    device: Annotated[str, Option("Device to train on: auto, cpu or cuda.")] = "auto"
    tensorboard: Annotated[bool, Option("Write TensorBoard logs to the output folder.")] = False
    restart: Annotated[bool, Option("Discard the checkpoints of an earlier run.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.steps is not None:
            raise InputError("--epochs and --steps exclude each other; leave one of them out")
        if self.lora is not None and self.train == "projector":
            raise InputError(
                "--lora adapts attention, not the projector; leave one of --lora and --train projector out"
            )
        self._check_adapter_only()
        self._check_recipe()
        if self.save_every % self.log_every:
            raise InputError(
                f"save every is {self.save_every} and log every is {self.log_every}; "
                "a checkpoint must fall on an entry of the loss, so make the first a multiple of the second"
            )

    def fingerprint(self) -> Fingerprint:
        """Return the values that must stay when a run is resumed: not its length, unless the schedule does."""
        found = super().fingerprint()
        return found.without("steps", "epochs") if self.schedule in ENDLESS_SCHEDULES else found

    def accumulated_batches(self, processes: int) -> int:
        """Return the number of batches that a step accumulates.

        Raises:
            InputError: If the batches of so many processes do not make up the recipe's step.
        """
        if self.recipe is None:
            return 1 if self.accumulate is None else self.accumulate
        wanted, together = RECIPES[self.recipe].records_per_step, self.batch_size * processes
        batches = wanted // together if self.accumulate is None else self.accumulate
        if batches * together != wanted:
            times = "" if self.accumulate is None else f" and --accumulate {self.accumulate}"
            raise InputError(
                f"--recipe {self.recipe} takes {wanted} records per step, which --batch-size {self.batch_size} on "
                f"{processes} processes{times} cannot make up; choose a batch size that divides it, and leave "
                "--accumulate out"
            )
        return batches

    def _check_recipe(self) -> None:
        if self.recipe is None:
            return
        recipe = RECIPES[self.recipe]
        for name in ("lora", "steps"):
            if getattr(self, name) is not None:
                raise InputError(f"--recipe {self.recipe} has no {name}; leave one of --recipe and --{name} out")
        if self.adapter_only:
            raise InputError(f"--recipe {self.recipe} trains the model; leave one of --recipe and --adapter-only out")
        for name in ("epochs", "learning_rate", "schedule", "train"):
            given, own = getattr(self, name), getattr(recipe, name)
            if given not in (None, own):
                flag = name.replace("_", "-")
                raise InputError(
                    f"--recipe {self.recipe} says --{flag} {own}, not {given}; leave one of --recipe and --{flag} out"
                )

    def _check_adapter_only(self) -> None:
        if self.adapter is not None and not self.adapter_only:
            raise InputError("--adapter is where training an adapter starts from; pass --adapter-only, or leave it out")
        if self.adapter_only and self.model is None:
            raise InputError("--adapter-only needs --model, the model that the adapter is for")
        if self.adapter_only and self.system is not None:
            raise InputError("--system is for models of this package; leave one of --system and --adapter-only out")
        if self.adapter_only and self.train == "projector":
            raise InputError("an adapter has no projector; leave one of --train projector and --adapter-only out")


# ----------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, kw_only=True)
class InfoOptions(Options):
    """Options of `flexattn info`."""

    model: Annotated[str | None, Option("Checkpoint folder or hub id to describe, and its memory.")] = None
    adapter: Adapter = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter is not None and self.model is None:
            raise InputError("--adapter needs --model, the model that the adapter is for")


CountedModel = Annotated[str | None, Option("Checkpoint folder or hub id, instead of --shape.")]
CountedShape = Annotated[str | None, Option("Size of LLaVA-1.5: 7b (the default) or 13b.")]
CountedSystems = Annotated[
    str | None, Option(f"Comma-separated systems: {', '.join(SYSTEMS)}; by default those of the paper's table 5.")
]
TextTokens = Annotated[int, Option("Number of prompt tokens besides the image's.", minimum=1, metavar="T")]
Tiles = Annotated[int | None, Option("Number of tiles with a selected token; by default all.", metavar="K")]


def check_model_or_shape(model: str | None, shape: str | None) -> None:
    """Raise InputError if both are given."""
    if model is not None and shape is not None:
        raise InputError("--model and --shape exclude each other; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class FlopsOptions(Options):
    """Options of `flexattn flops`."""

    model: CountedModel = None
    shape: CountedShape = None
    systems: CountedSystems = None
    text_tokens: TextTokens = 80
    selected: Annotated[
        int | None, Option("Number of HR tokens that a layer selects; by default 43 % of them.", metavar="M")
    ] = None
    tiles: Tiles = None
    zoom: Annotated[
        int | None,
        Option("Number of tiles per side of the HR image; by default the model's own, or 3.", minimum=1, metavar="Z"),
    ] = None
    json_file: Annotated[
        Path | None,
        Option(
            "Write a JSON file: per system published_tflops, here_tflops, parts and here_parts; - prints it alone.",
            flags=("--json",),
            metavar="FILE",
            stream=True,
        ),
    ] = None
    plot: Annotated[
        Path | None, Option("Plot TFLOPs against the resolution, zoom 1 to 4 (needs matplotlib).", metavar="FILE")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_model_or_shape(self.model, self.shape)


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Options):
    """Options of `flexattn bench`."""

    model: Annotated[
        str | None,
        Option(
            "Checkpoint folder or hub id, or a folder with a config.json alone for random weights; by default the "
            "small model that ships with this package."
        ),
    ] = None
    shape: Annotated[str | None, Option("Size of LLaVA-1.5, with random weights: 7b or 13b.")] = None
    systems: Annotated[str, Option(f"Comma-separated systems: {', '.join(SYSTEMS)}.")] = ",".join(SYSTEMS)
    zooms: Annotated[
        str | None,
        Option(
            "Comma-separated sides of the high-resolution image, in low-resolution ones, such as 2,3,4; by default the "
            "model's own. llava and hd have one resolution each.",
            metavar="Z",
        ),
    ] = None
    text_tokens: TextTokens = 80
    selected: Annotated[
        int | None,
        Option(
            "Number of HR tokens that a layer selects, whatever its map says; by default the share that flexattn info "
            "assumes. random and center select their own.",
            minimum=0,
            metavar="M",
        ),
    ] = None
    tiles: Tiles = None
    new_tokens: Annotated[int, Option("Number of tokens to generate after the prompt.", minimum=1)] = 16
    batch_size: Annotated[int, Option("Number of prompts at a time, each with an image of its own.", minimum=1)] = 1
    repetitions: Annotated[int, Option("Number of answers to measure, after one to warm up.", minimum=1)] = 5
    threads: Annotated[int | None, Option("Number of CPU threads; by default torch's choice.", minimum=1)] = None
    device: Device = "auto"
    dtype: Annotated[
        str,
        Option(
            "Data type of the model: auto (the checkpoint's own, of a shape float16 on a GPU and float32 on the CPU), "
            "float32, float16, bfloat16 or float64."
        ),
    ] = "auto"
    csv: Annotated[Path | None, Option("Write a CSV file, with a row per system and resolution.", metavar="FILE")] = (
        None
    )
    plot: Annotated[
        Path | None, Option("Plot latencies and memory against the resolution (needs matplotlib).", metavar="FILE")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_model_or_shape(self.model, self.shape)
        if self.zooms is not None and not all(one.strip().isdecimal() for one in self.zooms.split(",")):
            raise InputError(f"zooms is {self.zooms!r}; it must be whole numbers, separated by commas, such as 2,3,4")

    @property
    def system_names(self) -> list[str]:
        """The systems."""
        return names_in(self.systems)

    @property
    def zoom_numbers(self) -> list[int] | None:
        """The zooms in order; None for the model's own."""
        return None if self.zooms is None else sorted({int(one) for one in self.zooms.split(",")})


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Options):
    """Options of `flexattn predict`."""

    model: CountedModel = None
    shape: CountedShape = None
    systems: CountedSystems = None
    records: Annotated[
        int | None, Option("Number of records to train on; by default those of LLaVA-1.5's second stage.", minimum=1)
    ] = None
    train_batch_size: Annotated[int, Option("Number of records per batch and GPU in training.", minimum=1)] = 4
    eval_batch_size: Annotated[int, Option("Number of questions per batch in evaluation.", minimum=1)] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_model_or_shape(self.model, self.shape)
