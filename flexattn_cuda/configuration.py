"""What a FlexAttention model is made of: the mechanism's own settings and the configuration of the whole model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, LlavaConfig

_CHOICES = {
    "hr_rows": ("answer", "all"),
    "map_softmax": ("sequence", "all"),
    "strategy": ("attention", "random", "center"),
    "hr_position": ("bicubic", "bilinear", "nearest"),
    "hr_init": ("copy", "random"),
}


@dataclass(frozen=True)
class FlexAttnConfig:
    """Settings of the mechanism. The defaults are the preset `released`; `FlexAttnConfig.paper()` is the paper's.

    Attributes:
        zoom: The high-resolution photo is cut into zoom x zoom tiles, each encoded like a photo of its own.
        lowres_size: Side in pixels of the photo that becomes the sequence's image tokens.
        highres_size: Side in pixels of the photo that is cut into tiles.
        first_layer: First layer (counted from 0) that attends to high-resolution (HR) tokens. The layer before it is
            plain and gives the first attention map. The paper calls it N_SA (section 4.1).
        hr_rows: Query rows that see HR keys. "answer": every row that predicts an answer token, each with its own
            selection (released code). "all": every row, prompt rows with the last prompt row's selection (eq. 3-6).
        map_softmax: Keys of the softmax behind the map: the N of the "sequence" (released), or "all" N+M (eq. 7).
        mask_padding: Zero the map in the margin that pads a non-square photo before it is normalised.
        scale, threshold: An LR cell is chosen where `a * scale > threshold`, a the min-max normalised map.
        pool: Side of the grid to which the chosen cells are max-pooled before they are resized; 0 for none.
        strategy: "attention" map; "random" or "center" cells instead (ablations, figure 4).
        ratio: Share of the LR cells (or pool cells) that "random" and "center" choose.
        hr_position: How the rotary tables of the LR positions are resized to the HR grid.
        warmup: In training the attention with HR is mixed in with weight alpha = min(1, epochs * warmup); None: 1.
        hr_init: Where a checkpoint has no HR projections they start as "copy" of k_proj and v_proj, or "random".
    """

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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), field.name
            if name in _CHOICES and value not in _CHOICES[name]:
                raise ValueError(f"flexattn {name} is {value!r}; allowed: {', '.join(_CHOICES[name])}")
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"flexattn {name} is {value!r}; it must be a whole number")
        for name in ("zoom", "lowres_size", "highres_size", "first_layer"):
            if getattr(self, name) < 1:
                raise ValueError(f"flexattn {name} is {getattr(self, name)}; it must be at least 1")
        if self.highres_size % self.zoom:
            raise ValueError(f"flexattn highres_size {self.highres_size} cannot be cut into {self.zoom}x{self.zoom} tiles")
        if self.pool < 0:
            raise ValueError(f"flexattn pool is {self.pool}; it must be a grid side, or 0 for no pooling")
        if not 0 < self.ratio < 1:
            raise ValueError(f"flexattn ratio is {self.ratio}; it must lie between 0 and 1, both excluded")

    @classmethod
    def released(cls, **changes: Any) -> FlexAttnConfig:
        """The behaviour of the released weights."""
        return cls(**changes)

    @classmethod
    def paper(cls, **changes: Any) -> FlexAttnConfig:
        """The mechanism as the paper writes it (section 4): 8 plain layers, all rows, N+M softmax, no pooling."""
        preset = dict(first_layer=8, hr_rows="all", map_softmax="all", scale=1.0, threshold=0.1875, pool=0, warmup=None)
        return cls(**(preset | changes))

    @property
    def tile_size(self) -> int:
        """Side in pixels of one HR tile."""
        return self.highres_size // self.zoom

    def alpha(self, epochs: float) -> float:
        """Weight of the attention with HR after `epochs` (fractional) of training."""
        return 1.0 if self.warmup is None else min(1.0, epochs * self.warmup)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FlexAttnConfig:
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"flexattn_config has unknown fields: {', '.join(unknown)}")
        return cls(**values)

    @classmethod
    def from_extra(cls, extra: Any) -> FlexAttnConfig:
        """From `extra` in the config.json of a checkpoint in the released format: a dict whose values are strings."""
        if not isinstance(extra, dict):
            raise ValueError(f"'extra' in config.json is {extra!r}; it must be an object of strings")
        known = ("zoom_ratio", "lowres_size", "highres_size", "threshold", "warmup", "special")
        if unknown := sorted(set(extra) - set(known)):
            raise ValueError(f"'extra' in config.json has unknown keys: {', '.join(unknown)}; known: {', '.join(known)}")

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


class FlexAttnLlavaConfig(LlavaConfig):
    """transformers' LLaVA configuration plus `flexattn_config`, a dict of `FlexAttnConfig`'s fields.

    `flexattn_config=None` is a plain LLaVA without HR tokens or HR projections.
    """

    model_type = "flexattn_llava"

    flexattn_config: dict | None = None

    @property
    def flexattn(self) -> FlexAttnConfig | None:
        """The mechanism's settings; None for a plain LLaVA."""
        return None if self.flexattn_config is None else FlexAttnConfig.from_dict(self.flexattn_config)

    @property
    def lr_side(self) -> int:
        """Side S of the square grid of low-resolution image tokens."""
        size = self.vision_config.image_size if self.flexattn is None else self.flexattn.lowres_size
        return size // self.vision_config.patch_size

    @property
    def hr_side(self) -> int:
        """Side h of the square grid of high-resolution tokens; 0 for a plain LLaVA."""
        return 0 if self.flexattn is None else self.flexattn.tile_size // self.vision_config.patch_size * self.flexattn.zoom

    @property
    def hr_layers(self) -> range:
        """Layers that attend to HR tokens and own k_proj_hd and v_proj_hd."""
        layers = self.text_config.num_hidden_layers
        return range(layers, layers) if self.flexattn is None else range(self.flexattn.first_layer, layers)

    def check(self) -> None:
        """Raises ValueError, in one sentence, where the parts do not fit together."""
        if self.flexattn is None:
            return
        layers, native = self.text_config.num_hidden_layers, self.vision_config.image_size
        if self.flexattn.first_layer >= layers:
            raise ValueError(
                f"flexattn first_layer is {self.flexattn.first_layer}, but the language model has layers 0 to {layers - 1}; "
                "choose a layer that exists"
            )
        for name, size in (("lowres_size", self.flexattn.lowres_size), ("tile size", self.flexattn.tile_size)):
            if not self.vision_config.patch_size <= size <= native:
                raise ValueError(
                    f"flexattn {name} is {size} pixels; the vision tower takes {self.vision_config.patch_size} to {native}"
                )
        if self.flexattn.pool > self.lr_side:
            raise ValueError(f"flexattn pool is {self.flexattn.pool}, larger than the LR grid's side {self.lr_side}")


AutoConfig.register(FlexAttnLlavaConfig.model_type, FlexAttnLlavaConfig)
