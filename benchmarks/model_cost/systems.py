"""The ways of running the backbone that are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from flexattn_cuda.analysis.forced import ForcedSelection, random_selections
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT
from model_cost.backbone import Backbone


@dataclass(frozen=True)
class System:
    """One way of running the backbone.

    share: Share of the HR tokens that is selected; None for no HR tokens at all.
    churn: Share of the selection that is new at every step.
    hr_cache: If False, all selected tokens are projected again in every call.
    prompt: "low" or "hd".
    transformers: Run transformers' own model.
    """

    name: str
    share: float | None = None
    churn: float = 0.0
    hr_cache: bool = True
    prompt: str = "low"
    transformers: bool = False

    def selection(self, backbone: Backbone, steps: int) -> ForcedSelection | None:
        """Return what stands in for the selection during a prefill and `steps` tokens."""
        if self.share is None:
            return None
        chosen = random_selections(self.share, self.churn, backbone.hr_tokens, steps + 1, backbone.device)
        return ForcedSelection(chosen, len(backbone.config.hr_layers))

    def call(self, backbone: Backbone, cache: DynamicCache, token: torch.Tensor | None = None) -> torch.Tensor:
        """Run the prompt, or one token after it; return the last row's logits."""
        common = {CACHE_ARGUMENT: cache, "use_cache": True, "logits_to_keep": 1}
        if self.transformers or self.prompt == "hd":
            model = backbone.twin if self.transformers else backbone.model
            given = {"inputs_embeds": backbone.embeds[self.prompt]} if token is None else {"input_ids": token}
            return model(**given, **common).logits
        given = {"input_ids": backbone.ids if token is None else token}
        if token is None:
            given["image_features"] = backbone.features
            if self.share is not None:
                given["hr_features"] = backbone.hr_features
        return backbone.model(**given, **common, hr_cache=self.hr_cache).logits


SYSTEMS = (
    System("transformers, sdpa", transformers=True),
    System("LLaVA"),
    System("M = 0", share=0.0),
    System("M = 10 %", share=0.1),
    System("M = 43 %", share=0.43),
    System("M = 100 %", share=1.0),
    System("M = 10 %, churn", share=0.1, churn=0.1),
    System("M = 10 %, off", share=0.1, hr_cache=False),
    System("M = 43 %, off", share=0.43, hr_cache=False),
    System("M = 100 %, off", share=1.0, hr_cache=False),
    System("LLaVA-HD", prompt="hd"),
)
BY_ZOOM = tuple(
    system for system in SYSTEMS if system.name in ("LLaVA", "M = 10 %", "M = 43 %", "M = 100 %", "M = 10 %, off")
)
