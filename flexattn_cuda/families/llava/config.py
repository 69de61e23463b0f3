"""The configuration of LLaVA with FlexAttention, and of the same model as another system."""

from __future__ import annotations

import dataclasses

from transformers import AutoConfig, LlavaConfig

from flexattn_cuda.mechanism.config import FlexAttnConfig, settings_of
from flexattn_cuda.mechanism.grid import Grid


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

    def with_settings(self, settings: FlexAttnConfig | None) -> FlexAttnLlavaConfig:
        """A copy with other settings of the mechanism, checked; None for a plain LLaVA."""
        changed = type(self).from_dict(self.to_dict())
        changed.flexattn_config = None if settings is None else settings.to_dict()
        changed.check()
        return changed

    @property
    def lr_grid(self) -> Grid:
        """Grid of the low-resolution tokens of an image. LLaVA's images are padded to squares."""
        size = self.vision_config.image_size if self.flexattn is None else self.flexattn.lowres_size
        return Grid(*2 * [size // self.vision_config.patch_size])

    @property
    def hr_grid(self) -> Grid:
        """Grid of the high-resolution tokens of an image; 0 x 0 for a plain LLaVA."""
        if self.flexattn is None:
            return Grid(0, 0)
        return Grid(*2 * [self.flexattn.tile_size // self.vision_config.patch_size * self.flexattn.zoom])

    @property
    def lr_side(self) -> int:
        """Side S of `lr_grid`."""
        return self.lr_grid.rows

    @property
    def hr_side(self) -> int:
        """Side h of `hr_grid`."""
        return self.hr_grid.rows

    @property
    def system(self) -> str:
        """ "llava" (plain), "flexattn", "hd" or "xattn"."""
        return "llava" if self.flexattn is None else self.flexattn.system

    @property
    def image_tokens(self) -> int:
        """Positions of the sequence that an image with both resolutions takes: S*S, with LLaVA-HD S*S + h*h."""
        return self.lr_grid.cells + (self.hr_grid.cells if self.system == "hd" else 0)

    @property
    def hr_layers(self) -> range:
        """Layers with projections for HR tokens: FlexAttention's k_proj_hd and v_proj_hd, LLaVA-XAttn's cross_attn."""
        layers = self.text_config.num_hidden_layers
        match self.system:
            case "flexattn":
                return range(self.flexattn.first_layer, layers)
            case "xattn":
                return range(layers)
        return range(0)

    def check(self) -> None:
        """Raises ValueError, in one sentence, where the parts do not fit together."""
        if self.flexattn is None:
            return
        layers, native = self.text_config.num_hidden_layers, self.vision_config.image_size
        selects = self.system == "flexattn"
        if selects and self.flexattn.first_layer >= layers:
            raise ValueError(
                f"flexattn first_layer is {self.flexattn.first_layer}, but the language model has layers 0 to {layers - 1}; "
                "choose a layer that exists"
            )
        for name, size in (
            ("lowres_size", self.flexattn.lowres_size),
            ("tile size", self.flexattn.tile_size),
        ):
            if not self.vision_config.patch_size <= size <= native:
                raise ValueError(
                    f"flexattn {name} is {size} pixels; the vision tower takes {self.vision_config.patch_size} to {native}"
                )
        tile, patch = self.flexattn.tile_size, self.vision_config.patch_size
        if tile % patch:
            raise ValueError(f"flexattn tiles have {tile} pixels a side, which are no whole patches of {patch}")
        if self.system == "xattn" and self.text_config.model_type != "llama":
            raise ValueError(
                f"flexattn system 'xattn' adds cross-attention to the layers of a LLaMA, not of a {self.text_config.model_type!r}"
            )
        if selects and self.flexattn.pool > self.lr_side:
            raise ValueError(f"flexattn pool is {self.flexattn.pool}, larger than the LR grid's side {self.lr_side}")


def as_system(config: FlexAttnLlavaConfig, system: str, zoom: int | None = None) -> FlexAttnLlavaConfig:
    """The same language model and vision tower as one of SYSTEMS.

    Settings that the model has of its own stay, but for what makes the system: its name, sizes and strategy. "flexattn-paper"
    is the paper's preset throughout.

    Args:
        zoom: Of the high resolution; by default the model's own, or 3. LLaVA-HD has 448 pixels for 336, whatever the zoom.
    Raises:
        ValueError: There is no such system, or it does not fit the model.
    """
    own, patch = config.flexattn, config.vision_config.patch_size
    whole_tiles = own is not None and own.system != "hd"
    if zoom is None:
        zoom = own.zoom if whole_tiles else 3
    if zoom < 1:
        raise ValueError(f"the zoom is {zoom}; it must be at least 1")
    settings = settings_of(system, config.vision_config.image_size if own is None else own.lowres_size, zoom)
    if settings is not None and settings.system == "hd":  # tiles of whole patches
        settings = dataclasses.replace(settings, highres_size=2 * (settings.tile_size // patch * patch))
    if settings is not None and own is not None and system != "flexattn-paper":
        highres_size = settings.highres_size if settings.system == "hd" or not whole_tiles else zoom * own.tile_size
        settings = dataclasses.replace(
            own,
            system=settings.system,
            zoom=settings.zoom,
            highres_size=highres_size,
            strategy=settings.strategy,
        )
    return config.with_settings(settings)


AutoConfig.register(FlexAttnLlavaConfig.model_type, FlexAttnLlavaConfig)
