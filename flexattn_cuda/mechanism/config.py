"""Settings of the mechanism, and of the systems that the paper compares."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

_CHOICES = {
    "system": ("flexattn", "hd", "xattn"),
    "hr_rows": ("answer", "all"),
    "map_softmax": ("sequence", "all"),
    "strategy": ("attention", "random", "center"),
    "hr_position": ("bicubic", "bilinear", "nearest"),
    "hr_init": ("copy", "random"),
}
# What a preset leaves to the model that it is given to, unless it is chosen, and the model that it was made for.
_MODELS_OWN = ("first_layer", "lowres_size", "highres_size", "pool")
_PAPER_LAYERS, _PAPER_SIDE = 32, 24  # LLaVA-7B


@dataclass(frozen=True)
class FlexAttnConfig:
    """Settings of the mechanism. The defaults are the preset `released`; `FlexAttnConfig.paper()` is the paper's.

    A preset (`released`, `paper`, `hd`, `xattn`) holds the numbers of LLaVA-7B. A model that it is given to replaces
    first layer, sizes in pixels and pool by its own, except those that were passed to the preset (`fitted_to`).
    Settings that are made in any other way stay as they are.

    The systems that the paper compares differ in what they do with the high-resolution (HR) tokens; the fields from
    `first_layer` on, except `hr_init`, apply to FlexAttention only.

    Attributes:
        system: "flexattn": selected HR tokens join the keys of the later layers. "hd": all of them follow the image's
            LR tokens in the sequence (LLaVA-HD, section 5.1). "xattn": every layer adds cross-attention to all of them
            (CogAgent's operator, LLaVA-XAttn, section 5.1).
        zoom: The high-resolution image is cut into zoom x zoom tiles, each encoded as a separate image.
        lowres_size: Side in pixels of the image that becomes the sequence's image tokens.
        highres_size: Side in pixels of the image that is cut into tiles.
        first_layer: First layer (counted from 0) that attends to HR tokens. The layer before it is plain and yields the
            first attention map. The paper calls it N_SA (section 4.1).
        hr_rows: Query rows that see HR keys. "answer": every row that predicts an answer token, each with its own
            selection (released code). "all": every row, prompt rows with the last prompt row's selection (eq. 3-6).
        map_softmax: Keys of the softmax behind the map: the N of the "sequence" (released), or "all" N+M (eq. 7).
        mask_padding: Zero the map in the margin that pads a non-square image before it is normalised.
        scale: An LR cell is chosen where `a * scale > threshold`, with a the min-max normalised map.
        threshold: See `scale`.
        pool: The chosen cells are max-pooled, before they are resized, to a grid of the LR grid's shape whose longer
            side has this many cells; not where it has fewer, and 0 for no pooling.
        strategy: "attention" map; "random" or "center" cells instead (ablations, figure 4).
        ratio: Share of the LR cells (or pool cells) that "random" and "center" choose.
        hr_position: How the rotary tables of the LR positions are resized to the HR grid.
        warmup: In training, attention with HR tokens is mixed in with weight alpha = min(1, epochs * warmup); None for
            1.
        hr_init: How HR projections start where a checkpoint has none: as a "copy" of those of self-attention, or
            "random". The output projection of "xattn" starts at zero either way, so that training starts as plain
            LLaVA.
    """

    system: str = "flexattn"
    zoom: int = 3
    lowres_size: int = 336
    highres_size: int = 1008
    first_layer: int = 9
    hr_rows: str = "answer"
    map_softmax: str = "sequence"
    mask_padding: bool = True
    scale: float = 255.0
    threshold: float = 48.0
    pool: int = 9
    strategy: str = "attention"
    ratio: float = 0.1
    hr_position: str = "bicubic"
    warmup: float | None = 3.0
    hr_init: str = "copy"

    _open = frozenset[str]()  # fields that a preset leaves to the model; no field, and not kept by dataclasses.replace

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), field.name
            if name in _CHOICES and value not in _CHOICES[name]:
                raise ValueError(f"flexattn {name} is {value!r}; allowed: {', '.join(_CHOICES[name])}")
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"flexattn {name} is {value!r}; it must be a whole number")
            if field.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"flexattn {name} is {value!r}; it must be true or false")
            optional = field.type == "float | None" and value is None
            if field.type.startswith("float") and not optional and not _is_number(value):
                raise ValueError(f"flexattn {name} is {value!r}; it must be a number")
        for name in ("zoom", "lowres_size", "highres_size", "first_layer"):
            if getattr(self, name) < 1:
                raise ValueError(f"flexattn {name} is {getattr(self, name)}; it must be at least 1")
        if self.highres_size % self.zoom:
            raise ValueError(
                f"flexattn highres_size {self.highres_size} cannot be cut into {self.zoom}x{self.zoom} tiles"
            )
        if self.pool < 0:
            raise ValueError(f"flexattn pool is {self.pool}; it must be a grid side, or 0 for no pooling")
        if not 0 < self.ratio < 1:
            raise ValueError(f"flexattn ratio is {self.ratio}; it must lie between 0 and 1, both excluded")
        if self.warmup is not None and self.warmup < 0:
            raise ValueError(f"flexattn warmup is {self.warmup}; it must be at least 0, or None for no warmup")

    @classmethod
    def released(cls, **changes: Any) -> FlexAttnConfig:
        """Return the preset of the released weights."""
        return cls._preset(changes)

    @classmethod
    def paper(cls, **changes: Any) -> FlexAttnConfig:
        """Return the mechanism as in the paper (section 4): 8 plain layers, all rows, N+M softmax, no pooling."""
        return cls._preset(
            changes, first_layer=8, hr_rows="all", map_softmax="all", scale=1.0, threshold=0.1875, pool=0, warmup=None
        )

    @classmethod
    def hd(cls, **changes: Any) -> FlexAttnConfig:
        """Return LLaVA-HD 448: the sequence holds the 1024 tokens of four 224-pixel tiles after the 576 LR ones."""
        return cls._preset(changes, system="hd", zoom=2, highres_size=448)

    @classmethod
    def xattn(cls, **changes: Any) -> FlexAttnConfig:
        """Return LLaVA-XAttn 1008: cross-attention to all 5184 HR tokens in every layer."""
        return cls._preset(changes, system="xattn")

    @classmethod
    def _preset(cls, changes: dict[str, Any], **preset: Any) -> FlexAttnConfig:
        settings = cls(**(preset | changes))
        object.__setattr__(settings, "_open", frozenset(_MODELS_OWN) - changes.keys())
        return settings

    def fitted_to(self, layers: int, lr_size: int | None, lr_side: int | None) -> FlexAttnConfig:
        """Return a preset with what it leaves open at the measures of a model, other settings as they are.

        The first layer lies at the same share of the depth, the pool has the same share of the LR grid's side. A tile
        has the size of the LR image; in LLaVA-HD 2/3 of it, in whole patches.

        Args:
            layers: Of the language model.
            lr_size: Side in pixels of the image that the model sees; None if that follows from the image.
            lr_side: Side of its LR grid, or None.
        """
        fit: dict[str, Any] = {"first_layer": max(1, min(round(self.first_layer * layers / _PAPER_LAYERS), layers - 1))}
        if lr_size is not None and lr_side is not None:
            patch = lr_size // lr_side
            lowres = lr_size if "lowres_size" in self._open else self.lowres_size
            tile = lowres if self.system != "hd" else lowres * 2 // 3 // patch * patch
            pool = max(1, round(self.pool * (lowres // patch) / _PAPER_SIDE)) if self.pool else 0
            fit |= {"lowres_size": lowres, "highres_size": self.zoom * tile, "pool": pool}
        return dataclasses.replace(self, **{name: value for name, value in fit.items() if name in self._open})

    @property
    def tile_size(self) -> int:
        """Side in pixels of one HR tile."""
        return self.highres_size // self.zoom

    def alpha(self, epochs: float) -> float:
        """Return the weight of attention with HR tokens after so many `epochs` (fractional) of training."""
        return 1.0 if self.warmup is None else min(1.0, epochs * self.warmup)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FlexAttnConfig:
        """Return the settings with these fields; ValueError if one is unknown or out of range."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"flexattn_config has unknown fields: {', '.join(unknown)}")
        return cls(**values)

    @classmethod
    def from_extra(cls, extra: Any) -> FlexAttnConfig:
        """Return the settings in `extra`, a dict of strings, from the config.json of the released format."""
        if not isinstance(extra, dict):
            raise ValueError(f"'extra' in config.json is {extra!r}; it must be an object of strings")
        known = ("zoom_ratio", "lowres_size", "highres_size", "threshold", "warmup", "special")
        if unknown := sorted(set(extra) - set(known)):
            raise ValueError(
                f"'extra' in config.json has unknown keys: {', '.join(unknown)}; known: {', '.join(known)}"
            )

        def number(key: str, kind: type, default: Any) -> Any:
            if key not in extra:
                return default
            try:
                return kind(extra[key])
            except (TypeError, ValueError):
                what = "a whole number" if kind is int else "a number"
                raise ValueError(f"'extra' in config.json has {key} = {extra[key]!r}; it must be {what}") from None

        special = extra.get("special") or "attention"
        if special not in _CHOICES["strategy"]:
            raise ValueError(f"'extra' in config.json has special = {special!r}; allowed: random")
        zoom = number("zoom_ratio", int, 3)
        return cls(
            zoom=zoom,
            lowres_size=number("lowres_size", int, 336),
            highres_size=number("highres_size", int, 336 * zoom),
            threshold=number("threshold", float, 64.0),
            warmup=number("warmup", float, 3.0),
            strategy=special,
        )


PRESETS = {"paper": FlexAttnConfig.paper, "released": FlexAttnConfig.released}
"""Those of FlexAttention itself, by name."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


SYSTEMS = ("llava", "hd", "xattn", "flexattn", "flexattn-paper", "random", "center")


def settings_of(system: str, lowres_size: int = 336, zoom: int = 3) -> FlexAttnConfig | None:
    """Return the settings of a system of the paper's tables, at any size.

    Args:
        system: One of SYSTEMS. "llava" is low resolution only, "flexattn" the released preset, "random" and "center"
            that preset with the selection replaced (figure 4).
        lowres_size: Side of the low-resolution image in pixels. LLaVA-HD's high-resolution image has 4/3 of it, cut
            into 2 x 2 tiles.
        zoom: Of the high-resolution image of the other systems.

    Returns:
        The settings, or None for "llava".

    Raises:
        ValueError: If there is no such system.
    """
    sizes = dict(lowres_size=lowres_size, zoom=zoom, highres_size=zoom * lowres_size)
    match system:
        case "llava":
            return None
        case "hd":
            return FlexAttnConfig.hd(lowres_size=lowres_size, highres_size=2 * (lowres_size * 2 // 3))
        case "xattn":
            return FlexAttnConfig.xattn(**sizes)
        case "flexattn":
            return FlexAttnConfig.released(**sizes)
        case "flexattn-paper":
            return FlexAttnConfig.paper(**sizes)
        case "random" | "center":
            return FlexAttnConfig.released(**sizes, strategy=system)
    raise ValueError(f"there is no system {system!r}; allowed: {', '.join(SYSTEMS)}")
