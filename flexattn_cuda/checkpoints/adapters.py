"""Adapters: what FlexAttention adds to a model, its settings and the projections of high-resolution tokens, alone.

flexattn_adapter.json           settings, and the base model that they were made for
flexattn_adapter.safetensors    layers.N.self_attn.{k,v}_proj_hd.{weight,bias}
README.md                       a model card, where the adapter is alone
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

from flexattn_cuda.checkpoints.files import read_json, refuse_foreign_files, refusing
from flexattn_cuda.checkpoints.locate import HubOptions, is_hub_id, resolve_files
from flexattn_cuda.errors import CheckpointError
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.dequantise import is_changed_by_peft, is_quantised, unknown_codes

SETTINGS_FILE, WEIGHTS_FILE = "flexattn_adapter.json", "flexattn_adapter.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class BaseModel:
    """What an adapter needs of the model that it is for.

    Attributes:
        name: Where the model was loaded from, a hub id or a folder; for people.
        model_type: Of the model.
        text_type: Of its language model.
        hidden_size: Of the language model.
        layers: Number of its layers.
    """

    name: str
    model_type: str
    text_type: str
    hidden_size: int
    layers: int

    @classmethod
    def of(cls, model: PreTrainedModel, text: PreTrainedModel) -> BaseModel:
        """Describe a model and its language model."""
        return cls.of_config(model.config, text.config)

    @classmethod
    def of_config(cls, config: PreTrainedConfig, text: PreTrainedConfig) -> BaseModel:
        """Describe a model by its configuration and that of its language model."""
        return cls(
            name=str(getattr(config, "_name_or_path", "")),
            model_type=config.model_type,
            text_type=text.model_type,
            hidden_size=text.hidden_size,
            layers=text.num_hidden_layers,
        )

    def __str__(self) -> str:
        name = f" ({self.name})" if self.name else ""
        return f"{self.model_type}{name} with {self.layers} layers of {self.text_type}, {self.hidden_size} wide"


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read: weights [out, in] and biases [out] by name, on the CPU."""

    settings: FlexAttnConfig
    base: BaseModel
    weights: dict[str, torch.Tensor]

    def check_base(self, base: BaseModel) -> None:
        """Raise CheckpointError if the adapter was made for another model than this, whatever its name."""
        if asdict(self.base) | {"name": ""} != asdict(base) | {"name": ""}:
            raise CheckpointError(f"the adapter is for {self.base}, but this model is {base}; load the model it is for")

    @torch.no_grad()
    def load_into(self, text: PreTrainedModel, layers: Iterable[int]) -> None:
        """Copy the weights into the projections of a language model's layers.

        Raises:
            CheckpointError: If it has others, or of other shapes.
        """
        parameters = projections(text, layers)
        if wrong := sorted(set(parameters) ^ set(self.weights)):
            raise CheckpointError(f"{wrong[0]} is in the adapter or in the model alone; load the model that it is for")
        for name, parameter in parameters.items():
            weight = self.weights[name]
            if weight.shape != parameter.shape:
                raise CheckpointError(
                    f"the adapter's {name} has shape {list(weight.shape)}, the model's {list(parameter.shape)}; load "
                    "the model that the adapter is for"
                )
        for name, parameter in parameters.items():
            parameter.copy_(self.weights[name])


def write(folder: Path, settings: FlexAttnConfig, base: BaseModel, weights: dict[str, torch.Tensor]) -> None:
    """Write an adapter: settings, and weights by the names that `projections` gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(kept, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    content = {"format": _FORMAT, "base": asdict(base), "settings": settings.to_dict()}
    (folder / SETTINGS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, settings: FlexAttnConfig, base: BaseModel) -> None:
    """Write the model card of an adapter that is alone in its folder."""
    (folder / "README.md").write_text(_card(settings, base), encoding="utf-8")


def is_in(folder: Path) -> bool:
    """Return whether a folder holds an adapter."""
    return (folder / SETTINGS_FILE).is_file()


def find(name_or_path: str | Path, hub: HubOptions | None = None) -> Path:
    """Return the local folder of an adapter's folder or hub id.

    Raises:
        CheckpointError: If there is no such folder, and the hub has no such adapter or cannot be reached.
    """
    if not Path(name_or_path).is_dir() and not is_hub_id(str(name_or_path)):
        raise CheckpointError(
            f"no adapter {str(name_or_path)!r}: it is neither a local folder nor a hub id, owner/name; the presets are "
            "paper and released"
        )
    return resolve_files(name_or_path, (SETTINGS_FILE, WEIGHTS_FILE), hub)


def read(name_or_path: str | Path, hub: HubOptions | None = None) -> Adapter:
    """Read an adapter from a folder or the hub.

    Raises:
        CheckpointError: If there is none, or it cannot be read.
    """
    folder = find(name_or_path, hub)
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {SETTINGS_FILE}; pass the folder of an adapter, or paper or released")
    refuse_foreign_files(folder)
    content = read_json(path)
    if content.get("format") != _FORMAT:
        raise CheckpointError(f"{path} has format {content.get('format')!r}; this version reads format {_FORMAT}")
    with refusing(f"{path} cannot be used"):
        settings, base = FlexAttnConfig.from_dict(content["settings"]), BaseModel(**content["base"])
    with refusing(f"{folder / WEIGHTS_FILE} cannot be read"):
        weights = load_file(folder / WEIGHTS_FILE)
    return Adapter(settings, base, weights)


def projections(text: PreTrainedModel, layers: Iterable[int]) -> dict[str, torch.Tensor]:
    """Return the parameters of the HR projections by the names that an adapter gives them."""
    found: dict[str, Any] = {}
    for layer in layers:
        for name in ("k_proj_hd", "v_proj_hd"):
            linear, path = getattr(text.layers[layer].self_attn, name), f"layers.{layer}.self_attn.{name}"
            if is_changed_by_peft(linear):
                raise CheckpointError(
                    f"{path} has an adapter of PEFT; merge it first (merge_and_unload), or save it with PEFT's "
                    "save_pretrained"
                )
            if unknown_codes(linear) or is_quantised(linear):
                raise CheckpointError(f"{path} is quantised; quantise the model before FlexAttention is attached to it")
            found |= {f"{path}.{kind}": parameter for kind, parameter in linear.named_parameters()}
    return found


def of_state_dict(names: Iterable[str], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of an adapter out of those of the whole model, as a sharded model gathers them."""
    by_name = {key[key.rindex("layers.") :]: weight for key, weight in state.items() if "_proj_hd." in key}
    return {name: by_name[name] for name in names}


def _card(settings: FlexAttnConfig, base: BaseModel) -> str:
    header = {"library_name": "flexattn_cuda", "tags": ["flexattn", "image-text-to-text"]}
    if base.name and not Path(base.name).exists():
        header["base_model"] = base.name
    lines = [f"{key}: {json.dumps(value)}" for key, value in header.items()]
    return "\n".join(
        [
            "---",
            *lines,
            "---",
            "",
            f"# FlexAttention for {base.name or base.model_type}",
            "",
            f"High-resolution image tokens for a {base}, selected by attention maps and seen from layer "
            f"{settings.first_layer} on (Li et al., ECCV 2024). The folder holds the settings and the projections of "
            "these tokens alone.",
            "",
            "```python",
            "import flexattn_cuda",
            "from transformers import AutoModelForImageTextToText",
            "",
            f'model = AutoModelForImageTextToText.from_pretrained("{base.name or "BASE_MODEL"}")',
            'flexattn_cuda.attach(model, "THIS_FOLDER")',
            "```",
            "",
        ]
    )
