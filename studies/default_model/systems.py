"""The systems that a default model is compared with: they differ in the HR tokens that they select."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flexattn_cuda.checkpoints.projections import is_projection, start_projections
from studies.small.encoded_scenes import EncodedScenes
from studies.small.finetuning import FineTuning, fine_tune
from studies.small.optimizer import train_only
from studies.small.stage import console


@contextmanager
def selecting(model, system: str, share: float) -> Iterator[None]:
    """Select tokens as a system does inside the block.

    Args:
        model: The model.
        system: "random" and "center" select a share of the HR tokens, any other as the model does.
        share: That share.
    """
    before = model.config.flexattn_config
    if system in ("random", "center"):
        model.config.flexattn_config = before | {"strategy": system, "ratio": share}
    try:
        yield
    finally:
        model.config.flexattn_config = before


def fine_tune_late_layers(model, processor, images: EncodedScenes, system: str, share: float, plan: FineTuning) -> None:
    """Train the layers that attend to HR tokens, and the head, as a system; "none" sees the low resolution alone."""
    projections = [name for name, _ in model.named_parameters() if is_projection(name)]
    start_projections(model, projections, model.config)
    layers = range(model.flexattn_settings.first_layer, model.config.text_config.num_hidden_layers)
    late = tuple(f"model.language_model.layers.{number}." for number in layers)
    train_only(model, lambda name: name.startswith((*late, "model.language_model.norm", "lm_head")))
    with selecting(model, system, share):
        settings = None if system == "none" else model.config.flexattn
        fine_tune(model, processor, images, settings, plan, lambda text: console.log(f"{system}: {text}"))
