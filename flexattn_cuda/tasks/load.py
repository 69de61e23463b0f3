"""Load a model with its processor, or its configuration alone."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from flexattn_cuda import checkpoints
from flexattn_cuda.checkpoints import HubOptions, adapters
from flexattn_cuda.checkpoints.config import FORMATS, check_vision_feature_layer, read_config
from flexattn_cuda.checkpoints.files import first_line, refusing, within
from flexattn_cuda.checkpoints.generation import check_generation_config
from flexattn_cuda.devices import choose_device, choose_dtype
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.families.attach import attach, settings_for
from flexattn_cuda.families.attached import AttachedModel
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig, as_system
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.families.registry import FAMILIES, family_of
from flexattn_cuda.inputs.hr_processor import HRProcessor, processor_for
from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
from flexattn_cuda.mechanism.config import PRESETS, FlexAttnConfig
from flexattn_cuda.tasks import lora
from flexattn_cuda.tasks.models import HRModel, QuestionProcessor
from flexattn_cuda.tasks.options import QUANTIZATIONS, ModelOptions

_SECONDS = 10.0  # for a prompt, which takes milliseconds
DEFAULT_MODEL = Path(__file__).parents[1] / "assets" / "default"


def load(
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    flexattn: FlexAttnConfig | None = None,
    system: str | None = None,
    adapter: str | Path | None = None,
    quantize: str | None = None,
    **hub: Any,
) -> tuple[HRModel, QuestionProcessor]:
    """Load a model, ready to answer, and its processor.

    A checkpoint in one of this package's three formats becomes its own LLaVA. One of another known family (or, with
    `adapter`, of transformers' LLaVA) becomes transformers' own model, to which FlexAttention is attached: with the
    adapter that lies in its folder, or the preset "paper".

    Args:
        model: Checkpoint folder or hub id; by default the small model of this package.
        device: "cpu", "cuda" or "cuda:N"; None and "auto" are the GPU if it can be used, and the CPU otherwise.
        dtype: Data type of the weights by name or as torch's; None and "auto" keep the checkpoint's.
        flexattn: Settings of the mechanism that replace the checkpoint's or the preset.
        system: One of `mechanism.config.SYSTEMS`, to load this package's LLaVA as (`families.llava.config.as_system`).
        adapter: Folder or hub id of what `save_adapter` or `flexattn train --adapter-only` wrote, or the folder of what
            `flexattn train --lora` wrote; in place of `flexattn`.
        quantize: "4bit" or "8bit", to quantise the weights by bitsandbytes.
        hub: revision, token, cache_dir, local_files_only, force_download and subfolder of the checkpoint, as in
            transformers.

    Raises:
        CheckpointError: If there is no such checkpoint or adapter, it cannot be loaded, or they do not fit together.
        InputError: If an option is unknown or cannot be used here.
    """
    if not isinstance(flexattn, FlexAttnConfig | None):
        raise InputError(
            f"flexattn is a {type(flexattn).__name__}; it must be a FlexAttnConfig, such as FlexAttnConfig.released()"
        )
    options = HubOptions.pop_from(hub)
    if hub:
        raise TypeError(f"load takes no {', '.join(hub)}")
    wanted = _Wanted(choose_device(device), choose_dtype(dtype), flexattn, system, adapter, quantize)
    folder = checkpoint_folder(model, options)
    kind = _known_type(folder)
    if adapter is not None and kind in FORMATS and _is_of_llava(adapter):
        return _load_llava_with_lora(folder, Path(adapter), wanted)
    if kind in FAMILIES and (kind not in FORMATS or adapter is not None):
        return _load_attached(folder, wanted, str(model))
    _refuse_adapter(folder, adapter)
    return _load_llava(folder, wanted)


def load_chosen(options: ModelOptions) -> tuple[HRModel, QuestionProcessor]:
    """Load a model as the options of a command say; one that crops, as the LLaVA that it is.

    Raises:
        CheckpointError: As `load` does.
        InputError: As `load` and `changed_settings` do.
    """
    changes = options.changes
    system = "llava" if options.crops else options.system
    return load(
        options.model,
        options.device,
        options.dtype,
        flexattn=changed_settings(options.model, system, **changes) if changes else None,
        system=None if changes else system,
        adapter=options.adapter,
        quantize=options.quantize,
    )


def load_llava(
    model: str | Path | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    system: str | None = None,
) -> tuple[FlexAttnLlavaForConditionalGeneration, FlexAttnLlavaProcessor]:
    """Load this package's LLaVA and its processor; arguments as in `load`.

    Raises:
        CheckpointError: If there is no such checkpoint, it is of another family, or it cannot be loaded.
        InputError: If an option is unknown or cannot be used here.
    """
    wanted = _Wanted(choose_device(device), choose_dtype(dtype), None, system, None, None)
    folder = checkpoint_folder(model)
    kind = read_config(folder).get("model_type")
    if kind in FAMILIES and kind not in FORMATS:
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r}, of which only an adapter can be trained; pass --adapter-only"
        )
    return _load_llava(folder, wanted)


def load_attached(
    model: str | Path | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    adapter: str | Path | None = None,
) -> tuple[AttachedModel, HRProcessor]:
    """Load transformers' own model, with FlexAttention attached, and its processor; arguments as in `load`.

    Raises:
        CheckpointError: If there is no such checkpoint or adapter, it cannot be loaded, or they do not fit together.
        InputError: If the checkpoint is one that only this package loads.
    """
    folder = checkpoint_folder(model)
    if _known_type(folder) not in FAMILIES:
        raise InputError(
            f"{folder} is a checkpoint of this package, with HR projections of its own; train them with --train hr in "
            "place of --adapter-only"
        )
    wanted = _Wanted(choose_device(device), choose_dtype(dtype), None, None, adapter, None)
    return _load_attached(folder, wanted, str(model))


def _refuse_adapter(folder: Path, adapter: str | Path | None) -> None:
    if adapter is not None:
        raise InputError(f"{folder} is a checkpoint of this package, with HR projections of its own; leave out adapter")


def _known_type(folder: Path) -> str:
    """Return the type of a checkpoint's model; raise CheckpointError unless it can be loaded or attached to."""
    kind = read_config(folder).get("model_type")
    known = sorted({*FORMATS, *FAMILIES})
    if kind not in known:
        raise CheckpointError(f"{folder} holds a model of type {kind!r}; known: {', '.join(known)}")
    return str(kind)


def changed_settings(
    model: str | Path | None,
    system: str | None = None,
    preset: str | None = None,
    threshold: float | None = None,
    zoom: int | None = None,
) -> FlexAttnConfig:
    """Return the settings of a checkpoint with some of them changed: the argument `flexattn` of `load`.

    Args:
        model: As in `load`.
        system: Settings of the checkpoint as another system, as in `load`.
        preset: "paper" or "released", in place of the checkpoint's own.
        threshold: Of the attention map; None keeps it.
        zoom: Of the high-resolution image; None keeps it.

    Raises:
        CheckpointError: If there is no such checkpoint, or its configuration cannot be used.
        InputError: If it has no FlexAttention, or the changes do not fit.
    """
    changes = {name: value for name, value in (("threshold", threshold), ("zoom", zoom)) if value is not None}
    try:
        if preset is not None:
            return PRESETS[preset](**changes)
        found = describe(DEFAULT_MODEL if model is None else model)
        settings = found.settings if isinstance(found, AttachableInfo) else _as(found.config, system).flexattn
        if settings is None or settings.system != "flexattn":
            raise InputError(f"{found.folder} is loaded without FlexAttention, so there are no settings to change")
        size = (zoom or settings.zoom) * settings.tile_size
        return replace(settings, highres_size=size, **changes)
    except ValueError as error:
        raise InputError(str(error)) from None


def _as(config: FlexAttnLlavaConfig, system: str | None) -> FlexAttnLlavaConfig:
    return config if system is None else as_system(config, system)


@dataclass(frozen=True)
class _Wanted:
    """What `load` was asked for beside the checkpoint."""

    device: torch.device
    dtype: torch.dtype | None
    flexattn: FlexAttnConfig | None
    system: str | None
    adapter: str | Path | None
    quantize: str | None

    def options(self) -> dict[str, Any]:
        """Return the arguments of transformers' `from_pretrained`."""
        options: dict[str, Any] = {"dtype": self.dtype or "auto"}
        if self.quantize is not None:
            options |= {"quantization_config": quantization(self.quantize, self.dtype), "device_map": self.device}
        return options

    def placed(self, model: Any, folder: Path) -> Any:
        """Return a loaded model on the device, where a quantised one is already, ready to answer.

        Raises:
            CheckpointError: If a weight is NaN or infinite.
        """
        placed = model.eval() if self.quantize is not None else model.eval().to(self.device)
        checkpoints.check_finite(folder, placed)
        return placed


def _load_llava(folder: Path, wanted: _Wanted) -> tuple[FlexAttnLlavaForConditionalGeneration, FlexAttnLlavaProcessor]:
    """Load a checkpoint in one of the three formats as this package's LLaVA."""
    config = checkpoints.load_config(folder)
    if wanted.system is not None:
        try:
            config = as_system(config, wanted.system)
        except ValueError as error:
            raise InputError(str(error)) from None
    options = wanted.options()
    try:
        loaded = FlexAttnLlavaForConditionalGeneration.from_pretrained(
            folder, config=config, flexattn=wanted.flexattn, **options
        )
    except CheckpointError:
        raise
    except (ValueError, RuntimeError) as error:  # transformers: the parts of the checkpoint do not fit together
        raise CheckpointError(f"{folder} cannot be loaded: {first_line(error)}") from error
    processor = FlexAttnLlavaProcessor.from_pretrained(folder, config=loaded.config)
    _check_vocabulary(folder, loaded, processor)
    _check_prompt(folder, processor)
    return wanted.placed(loaded, folder), processor


def _is_of_llava(adapter: str | Path) -> bool:
    """Return whether an adapter is one that `flexattn train --lora` wrote, for this package's LLaVA."""
    folder = Path(adapter)
    return adapters.is_in(folder) and adapters.read(folder).base.model_type == FlexAttnLlavaConfig.model_type


def _load_llava_with_lora(folder: Path, adapter: Path, wanted: _Wanted) -> tuple[HRModel, QuestionProcessor]:
    if wanted.flexattn is not None or wanted.system is not None or wanted.quantize is not None:
        raise InputError("an adapter that was trained with --lora takes no flexattn, system and quantize beside it")
    found, config = adapters.read(adapter), checkpoints.load_config(folder)
    found.check_base(adapters.BaseModel.of_config(config, config.text_config))
    model, processor = _load_llava(folder, replace(wanted, flexattn=found.settings))
    found.load_into(model.model.language_model, model.config.hr_layers)
    return (lora.merge(model, adapter) if lora.is_in(adapter) else model), processor


def _load_attached(folder: Path, wanted: _Wanted, name: str) -> tuple[AttachedModel, HRProcessor]:
    """Load transformers' own model, which the user knows by `name`, and attach FlexAttention to it."""
    if wanted.system is not None:
        raise InputError(f"system is {wanted.system!r}, but {folder} is no LLaVA of this package; leave system out")
    if wanted.adapter is not None and wanted.flexattn is not None:
        raise InputError("flexattn and adapter exclude each other: an adapter has settings of its own")
    with refusing(f"{folder} cannot be loaded", InputError):
        model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, **wanted.options())
    found = folder if adapters.is_in(folder) else "paper"
    settings = wanted.adapter or wanted.flexattn or found
    try:
        attach(model, settings)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"FlexAttention cannot be attached to {folder}: {first_line(error)}") from error
    if hasattr(model.config, "vision_feature_layer") and hasattr(model.config.vision_config, "num_hidden_layers"):
        with refusing(str(folder / "config.json")):
            check_vision_feature_layer(model.config)
    check_generation_config(folder, model.get_input_embeddings().num_embeddings, supported_alone=False)
    processor = processor_for(model)
    _check_prompt(folder, processor)
    if wanted.adapter is not None and lora.is_in(Path(wanted.adapter)):
        model = lora.merge(model, Path(wanted.adapter))
    model.config._name_or_path = name  # an adapter names its base: a hub id, not a folder of the cache
    return wanted.placed(model, folder), processor


def quantization(kind: str, dtype: torch.dtype | None = None) -> BitsAndBytesConfig:
    """Return transformers' description of a quantisation.

    Args:
        kind: One of `QUANTIZATIONS`: "4bit" (NF4, double quantisation) or "8bit".
        dtype: Of the arithmetic in 4 bits; by default bfloat16.

    Raises:
        InputError: If there is no such quantisation, or bitsandbytes or accelerate is missing.
    """
    if kind not in QUANTIZATIONS:
        raise InputError(f"quantize is {kind!r}; allowed: {', '.join(QUANTIZATIONS)}")
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"quantize is {kind!r}, but {missing[0]} is missing; run pip install {' '.join(missing)}")
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
    )


def _check_vocabulary(
    folder: Path, model: FlexAttnLlavaForConditionalGeneration, processor: FlexAttnLlavaProcessor
) -> None:
    max_id = max(set(processor.tokenizer.get_vocab().values()) - {processor.image_token_id})
    embedded = model.get_input_embeddings().num_embeddings
    if max_id >= embedded:
        raise CheckpointError(
            f"{folder} has a tokenizer with ids up to {max_id}, but its model embeds ids up to {embedded - 1} only; "
            "use the tokenizer that belongs to the model"
        )


def _check_prompt(folder: Path, processor: QuestionProcessor) -> None:
    """Raise CheckpointError if the checkpoint's chat template or tokenizer fails, or takes too long.

    What they say in one sentence, such as that there is no template, is for those who ask a question.
    """

    def ask_for_length() -> None:
        with refusing(f"the chat template or the tokenizer in {folder} fails", InputError):
            processor.prompt_length("?", Image.new("RGB", (32, 32)))

    with suppress(InputError):
        within(_SECONDS, f"the chat template or the tokenizer in {folder} cannot be used", ask_for_length)


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint of this package's LLaVA, as far as its configuration describes it.

    Attributes:
        folder: Where it is.
        format: "flexattn", "llava" or "released".
        config: The model's configuration.
    """

    folder: Path
    format: str
    config: FlexAttnLlavaConfig


@dataclass(frozen=True)
class AttachableInfo:
    """A checkpoint of another family, as far as its configuration describes it.

    Attributes:
        folder: Where it is.
        family: Of the model.
        base: Its parts in words.
        settings: Of the adapter, or else the preset "paper" fitted to the model.
        adapter: Whether there is an adapter.
        lr_side: Side of the LR grid; None where it follows from the image.
        layers: Layers that attend to HR tokens.
        parameters: Of the model, without HR projections.
    """

    folder: Path
    family: str
    base: str
    settings: FlexAttnConfig
    adapter: bool
    lr_side: int | None
    layers: range
    parameters: int


def describe(model: str | Path, adapter: str | Path | None = None) -> CheckpointInfo | AttachableInfo:
    """Read the configuration of a checkpoint folder or hub id, and of an adapter for it, without weights.

    Raises:
        CheckpointError: If there is no such checkpoint or adapter, its configuration cannot be used, or they do not
            fit together.
        InputError: If the checkpoint takes no adapter.
    """
    folder = checkpoints.resolve_folder(model, parts=checkpoints.Part.CONFIG)
    kind = _known_type(folder)
    if kind in FORMATS and adapter is None:
        return read_checkpoint_info(folder)
    if kind not in FAMILIES:
        _refuse_adapter(folder, adapter)
    if adapter is None and adapters.is_in(folder):
        adapter = folder
    return _attachable(folder, None if adapter is None else adapters.read(adapter))


def read_checkpoint_info(model: str | Path) -> CheckpointInfo:
    """Read the configuration of a checkpoint of this package's LLaVA, a folder or hub id, without its weights.

    Raises:
        CheckpointError: If there is no such checkpoint, or its configuration cannot be used.
    """
    folder = checkpoints.resolve_folder(model, parts=checkpoints.Part.CONFIG)
    return CheckpointInfo(folder, checkpoints.checkpoint_format(folder), checkpoints.load_config(folder))


def _attachable(folder: Path, adapter: adapters.Adapter | None) -> AttachableInfo:
    with refusing(f"{folder} cannot be used", InputError):
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        settings = settings_for(model) if adapter is None else adapter.settings
        family = family_of(model)(model, settings)
    base = adapters.BaseModel.of(model, family.text_model)
    if adapter is not None:
        adapter.check_base(base)
    return AttachableInfo(
        folder=folder,
        family=config.model_type,
        base=str(base),
        settings=settings,
        adapter=adapter is not None,
        lr_side=family.lr_side,
        layers=family.hr_layers,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def checkpoint_folder(model: str | Path | None, hub: HubOptions | None = None) -> Path:
    """Return the folder of a checkpoint folder or hub id; None is the small model of this package.

    Raises:
        CheckpointError: If there is no such checkpoint.
    """
    return checkpoints.resolve_folder(DEFAULT_MODEL if model is None else model, hub)
