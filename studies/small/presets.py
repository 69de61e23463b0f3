"""The systems that the study compares, and how much is done for each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from flexattn_cuda.mechanism.config import FlexAttnConfig, settings_of
from studies.small.small_model import ModelSizes

SYSTEMS = ("llava", "flexattn", "hd", "random", "center", "xattn", "flexattn-paper", "flexattn-zoom2", "flexattn-zoom4")

_SELECTING = ("llava", "flexattn", "random", "center")
_INTERNVL = ModelSizes(backbone="internvl", patch=4, shuffle=2, vision_width=48, vision_heads=2)


@dataclass(frozen=True)
class Preset:
    """How much is done.

    Attributes:
        images: Number of images to train on, in the low-resolution stages and in fine-tuning.
        questions: Number of questions in the evaluation, half of them about large objects.
        encoder_steps: Steps of the encoder stage.
        localise_steps: Steps of the localise stage.
        answer_steps: Steps of the answer stage.
        steps: Steps of each system's fine-tuning.
        batch: Questions per step of fine-tuning.
        rate: Muon's peak learning rate in fine-tuning.
        systems: That can be compared.
        sizes: Of the model.
    """

    images: int
    questions: int
    encoder_steps: int
    localise_steps: int
    answer_steps: int
    steps: int
    batch: int
    rate: float
    systems: tuple[str, ...] = SYSTEMS
    sizes: ModelSizes = field(default_factory=ModelSizes)

    @property
    def zooms(self) -> list[int]:
        """Zooms of the systems that see tiles of the low-resolution size."""
        settings = (settings_for(system, self.sizes) for system in self.systems)
        return sorted({one.zoom for one in settings if one is not None and one.system != "hd"})


PRESETS = {
    "tiny": Preset(
        images=60, questions=20, encoder_steps=4, localise_steps=3, answer_steps=3, steps=16, batch=4, rate=3.5e-3
    ),
    "small": Preset(
        images=9600,
        questions=1600,
        encoder_steps=4500,
        localise_steps=150,
        answer_steps=1500,
        steps=1500,
        batch=32,
        rate=3.5e-3,
    ),
}
PRESETS |= {
    # There are tiles of one zoom only: as many of them are seen in fewer steps.
    "internvl": dataclasses.replace(PRESETS["small"], encoder_steps=3000, systems=_SELECTING, sizes=_INTERNVL),
    "internvl-tiny": dataclasses.replace(PRESETS["tiny"], systems=_SELECTING, sizes=_INTERNVL),
}


def settings_for(system: str, sizes: ModelSizes, share: float = 0.1) -> FlexAttnConfig | None:
    """Return a system's settings at the study's sizes; None for plain LLaVA.

    The LR grid is small: selections are not pooled, and the first layer with HR tokens is the model's own.

    Args:
        system: One of SYSTEMS; "flexattn-zoom2" is FlexAttention at that zoom.
        sizes: Of the model.
        share: Share of the LR cells that "random" and "center" select.
    """
    name, zoom = name_and_zoom(system)
    settings = settings_of(name, sizes.lowres, zoom)
    if settings is None or settings.system != "flexattn":
        return settings
    return dataclasses.replace(settings, first_layer=sizes.first_layer, pool=0, warmup=None, ratio=share)


def name_and_zoom(system: str) -> tuple[str, int]:
    """Split the name of a system from its zoom, 3 by default."""
    name, _, zoom = system.partition("-zoom")
    return name, int(zoom or 3)
