"""The configuration of LLaVA with FlexAttention, and of the same model as another system."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AutoConfig, LlavaConfig

from flexattn_cuda.mechanism.config import FlexAttnConfig, settings_of
from flexattn_cuda.mechanism.grid import Grid, ImageGrids


class FlexAttnLlavaConfig(LlavaConfig):
    """transformers' LLaVA configuration plus `flexattn_config`, a dict of `FlexAttnConfig`'s fields.

    `flexattn_config=None` is a plain LLaVA without HR tokens or HR projections.
    """

    model_type = "flexattn_llava"

    flexattn_config: dict[str, Any] | None = None

    @property
    def flexattn(self) -> FlexAttnConfig | None:
        """Settings of the mechanism; None for a plain LLaVA."""
        return None if self.flexattn_config is None else FlexAttnConfig.from_dict(self.flexattn_config)

    def set_settings(self, settings: FlexAttnConfig) -> None:
        """Replace the settings of the mechanism; a preset is fitted to the model."""
        size = self.vision_config.image_size
        layers, side = self.text_config.num_hidden_layers, size // self.vision_config.patch_size
        self.flexattn_config = settings.fitted_to(layers, size, side).to_dict()

    def with_settings(self, settings: FlexAttnConfig | None) -> FlexAttnLlavaConfig:
        """Return a copy with other settings of the mechanism, None for a plain LLaVA; ValueError if they do not fit."""
        changed: FlexAttnLlavaConfig = type(self).from_dict(self.to_dict())
        changed.flexattn_config = None
        if settings is not None:
            changed.set_settings(settings)
        changed.check()
        return changed

    @property
    def lr_grid(self) -> Grid:
        """Grid of the low-resolution tokens of an image. LLaVA's images are padded to squares."""
        size = self.vision_config.image_size if self.flexattn is None else self.flexattn.lowres_size
        return _square(size // self.vision_config.patch_size)

    @property
    def hr_grid(self) -> Grid:
        """Grid of the high-resolution tokens of an image; 0 x 0 for a plain LLaVA."""
        if self.flexattn is None:
            return _square(0)
        return _square(self.flexattn.tile_size // self.vision_config.patch_size * self.flexattn.zoom)

    @property
    def image_grids(self) -> ImageGrids:
        """The grids of every image of a model with HR tokens: LR tokens, HR tokens and tiles."""
        assert self.flexattn is not None
        return ImageGrids(self.lr_grid, self.hr_grid, _square(self.flexattn.zoom))

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
        """Layers that attend to HR tokens: with k_proj_hd and v_proj_hd in FlexAttention, cross_attn in LLaVA-XAttn."""
        layers = self.text_config.num_hidden_layers
        if self.flexattn is None or self.flexattn.system == "hd":
            return range(0)
        return range(self.flexattn.first_layer if self.flexattn.system == "flexattn" else 0, layers)

    def check(self) -> None:
        """Raise ValueError if the parts do not fit together."""
        settings = self.flexattn
        if settings is None:
            return
        self._check_language_model(settings)
        self._check_sizes(settings)

    def _check_language_model(self, settings: FlexAttnConfig) -> None:
        text, layers = self.text_config.model_type, self.text_config.num_hidden_layers
        if settings.system == "xattn" and text != "llama":
            raise ValueError(
                f"flexattn system 'xattn' adds cross-attention to the layers of a LLaMA, not of a {text!r}"
            )
        if settings.system == "flexattn" and settings.first_layer >= layers:
            raise ValueError(
                f"flexattn first_layer is {settings.first_layer}, but the language model has layers 0 to {layers - 1}; "
                "choose a layer that exists"
            )

    def _check_sizes(self, settings: FlexAttnConfig) -> None:
        patch, native = self.vision_config.patch_size, self.vision_config.image_size
        for name, size in (("lowres_size", settings.lowres_size), ("tile size", settings.tile_size)):
            if not patch <= size <= native:
                raise ValueError(f"flexattn {name} is {size} pixels; the vision tower takes {patch} to {native}")
        if settings.tile_size % patch:
            raise ValueError(
                f"flexattn tiles have {settings.tile_size} pixels a side, which is not a multiple of the {patch}-pixel "
                "patches"
            )
        if settings.system == "flexattn" and settings.pool > min(self.lr_grid):
            raise ValueError(
                f"flexattn pool is {settings.pool}, but the LR grid is {self.lr_grid}; choose a smaller pool"
            )


def _square(side: int) -> Grid:
    return Grid(side, side)


def as_system(config: FlexAttnLlavaConfig, system: str, zoom: int | None = None) -> FlexAttnLlavaConfig:
    """Return the configuration of the same language model and vision tower as another system.

    The model keeps its own settings, except for those that make the system: name, sizes and strategy. "flexattn-paper"
    is the paper's preset throughout.

    Args:
        config: Of the model, as any system.
        system: One of SYSTEMS.
        zoom: Of the high-resolution image; by default the model's own, or 3. LLaVA-HD ignores it: 448 pixels for 336.

    Raises:
        ValueError: If there is no such system, or it does not fit the model.
    """
    own, patch = config.flexattn, config.vision_config.patch_size
    whole_tiles = own is not None and own.system != "hd"
    if zoom is None:
        zoom = own.zoom if own is not None and whole_tiles else 3
    if zoom < 1:
        raise ValueError(f"the zoom is {zoom}; it must be at least 1")
    settings = settings_of(system, config.vision_config.image_size if own is None else own.lowres_size, zoom)
    if settings is not None and settings.system == "hd":  # tiles of whole patches
        settings = dataclasses.replace(settings, highres_size=2 * (settings.tile_size // patch * patch))
    if settings is not None and own is not None and system != "flexattn-paper":
        highres_size = settings.highres_size if settings.system == "hd" or not whole_tiles else zoom * own.tile_size
        settings = dataclasses.replace(
            own, system=settings.system, zoom=settings.zoom, highres_size=highres_size, strategy=settings.strategy
        )
    return config.with_settings(settings)


AutoConfig.register(FlexAttnLlavaConfig.model_type, FlexAttnLlavaConfig)
