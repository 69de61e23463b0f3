"""What lmms-eval learns of this package, by the entry point `flexattn` of the group `lmms_eval.models`."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Return the entry of this package's models in lmms-eval's registry."""
    return ModelManifest("flexattn", simple_class_path="flexattn_cuda.evaluation.model.FlexAttn")
