"""Whether attention is right: outputs and maps against the float64 reference, gradients against eager torch."""

from __future__ import annotations

import torch

from attention.case import AttentionCase
from attention.comparison import Errors, max_error
from attention.methods import OURS, Method
from flexattn_cuda import reference


class AttentionCheck:
    """Compares a method's output and map with the float64 reference, which is computed once, when it is needed."""

    def __init__(self, case: AttentionCase):
        self.case = case
        self.exact: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, method: str, call: Method) -> Errors:
        case = self.case
        self.exact = self.exact or exact_attention(case)
        exact_out, exact_map = self.exact
        out, attention_map = call()
        values = max(x.abs().max().item() for x in (case.v, case.v_hr) if x.numel())
        # Ours rounds probabilities and output; others round their logits, too, which are some times as large.
        ours = method in OURS
        error_out = max_error("the output", out, exact_out, values, 1 if ours else 4)
        if attention_map is None:
            return Errors(error_out)
        # A unit of the type in which others keep probabilities.
        unit = torch.finfo(case.dtype).eps / torch.finfo(attention_map.dtype).eps
        magnitude = max(1.0, exact_map.max().item())
        return Errors(error_out, max_error("the map", attention_map, exact_map, magnitude, 64 if ours else 4 * unit))


def exact_attention(case: AttentionCase, heads: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and map in float64, by sample and a few heads at a time: the reference holds the whole matrix."""
    outs, maps = [], []
    for b in range(case.batch):
        found = [exact_heads(case, slice(b, b + 1), slice(h, h + heads)) for h in range(0, case.heads, heads)]
        outs.append(torch.cat([part.out for part in found], 2))
        maps.append(sum(part.map for part in found))
    return torch.cat(outs), torch.cat(maps)


def exact_heads(case: AttentionCase, sample: slice, heads: slice):
    shared = ("k_hr", "v_hr", "map_size", "map_over_all")
    options = {name: value if name in shared else value[sample] for name, value in case.options.items()}
    pool = {name: case.options[name][:, heads].double() for name in ("k_hr", "v_hr") if case.M}
    q, k, v = (x[sample, heads].double() for x in (case.q, case.k, case.v))
    return reference.hierarchical_attention(q, k, v, **(options | pool))


def gradient_complaints(case: AttentionCase) -> list[str]:
    """Compare our gradients with eager torch's; return one sentence for each that is wrong."""
    said = []
    for leaf, ours, eager in zip(("q", "k", "v", "k_hr", "v_hr"), case.run("ours")(), case.run("eager")()):
        # A logit's gradient is a difference of sums over the channels, and eager torch rounds those sums.
        error, magnitude = (ours - eager).abs().max().item(), eager.abs().max().item()
        if not error <= 16 * torch.finfo(case.dtype).eps * magnitude * case.head_dim**0.5:
            said.append(
                f"gradient of {leaf} in {case.dtype}: it differs from eager torch by {error:.3g}, "
                f"where the maximum is {magnitude:.3g}"
            )
    return said
