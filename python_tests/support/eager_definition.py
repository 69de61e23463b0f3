"""FlexAttention as it is defined, in plain torch on a model's own modules.

Nothing is written down here that a text model does itself: the model's own forward runs under an attention function of
ours, with transformers' own masks; rotary tables are those that its layers receive; and the keys and values of
high-resolution (HR) tokens are those that its self-attention hands to the attention function when it is given the HR
tokens as hidden states, with the HR projections in place of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tiny_families import Family
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from flexattn_cuda import FlexAttnConfig

_NAME = "flexattn_definition"
_SEQUENCE_ARGUMENTS = ("attention_mask", "position_ids", "token_type_ids")


class HRProjections(NamedTuple):
    """W'_K and W'_V of one layer."""

    k: nn.Module
    v: nn.Module


@dataclass(frozen=True)
class PlacedImage:
    """An image in a prompt.

    Attributes:
        start: Position of its first LR token.
        lr: Rows and columns of its LR tokens.
        hr: Rows and columns of its HR tokens.
        tokens: [HR cells, D], its HR tokens.
        valid_rect: (top, left, bottom, right) of the image inside its padding, in LR cells.
    """

    start: int
    lr: tuple[int, int]
    hr: tuple[int, int]
    tokens: torch.Tensor
    valid_rect: tuple[int, int, int, int]

    @property
    def span(self) -> slice:
        """Positions of its LR tokens."""
        return slice(self.start, self.start + self.lr[0] * self.lr[1])


@dataclass
class Outcome:
    """What one call computes.

    Attributes:
        logits: [B, N, V].
        owner: [B, N]: the row whose selection a row uses, -1 where a row sees no HR token.
        maps: maps[layer][prompt][image] is [N, LR rows, LR columns], of every row; layers from `first_layer` - 1.
        masks: masks[layer][prompt][image] is bool [N, HR rows, HR columns]: what that map selects, for the next layer.
        margin: Smallest distance to the threshold of any cell of a selection that is used, as a share of the map's
            range: selections may differ where rounding errors are as large.
    """

    logits: torch.Tensor
    owner: torch.Tensor
    maps: dict[int, list[list[torch.Tensor]]] = field(default_factory=dict)
    masks: dict[int, list[list[torch.Tensor]]] = field(default_factory=dict)
    margin: float = float("inf")


def hr_projections(text: PreTrainedModel, settings: FlexAttnConfig) -> dict[int, HRProjections]:
    """Return the HR projections of a language model, by layer: those attached to it, else its own."""
    attentions = {layer: text.layers[layer].self_attn for layer in range(settings.first_layer, len(text.layers))}
    return {
        layer: HRProjections(getattr(one, "k_proj_hd", one.k_proj), getattr(one, "v_proj_hd", one.v_proj))
        for layer, one in attentions.items()
    }


def definition(
    model: PreTrainedModel,
    family: Family,
    inputs: Mapping[str, Any],
    settings: FlexAttnConfig,
    projections: Mapping[int, HRProjections] | None = None,
    *,
    labels: torch.Tensor | None = None,
    prompt_length: int | None = None,
    alpha: float = 1.0,
) -> Outcome:
    """Compute one uncached call; differentiable in the weights of the language model and the HR projections.

    Args:
        model: A model of transformers' own class, to which nothing is attached.
        family: Its family.
        inputs: From `family.inputs`; `valid_rect` [n, 4] may be added.
        settings: Of the mechanism.
        projections: By layer; `hr_projections` of the model if None.
        labels: [B, N]; the rows that predict a label other than -100 see HR tokens, each with its own selection.
        prompt_length: Positions up to the end of the prompt, where answer tokens follow in this call.
        alpha: Weight of the attention with HR tokens.
    """
    text = family.text_model(model)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    is_image = inputs["input_ids"] == model.config.image_token_id
    if prompt_length is not None:
        is_image[:, prompt_length:] = False  # a token that the model wrote is no image
    if is_image.any():
        embeddings = embeddings.masked_scatter(is_image[..., None], family.lr_tokens(model, inputs))
    owner = row_owners(settings, embeddings.shape[:2], labels, prompt_length)
    call = _Call(text, settings, projections or hr_projections(text, settings), owner, alpha)
    call.images = place_images(model, family, inputs, settings.zoom, is_image)
    call.embeddings, call.position_ids = embeddings, inputs["position_ids"]
    arguments = {name: inputs[name] for name in _SEQUENCE_ARGUMENTS if name in inputs}
    with call.running():
        logits = model(inputs_embeds=embeddings, use_cache=False, **arguments).logits
    return Outcome(logits, owner, call.maps, call.masks, call.margin)


@torch.no_grad()  # no gradient flows through HR tokens
def place_images(
    model: PreTrainedModel, family: Family, inputs: Mapping[str, Any], zoom: int, is_image: torch.Tensor
) -> list[list[PlacedImage]]:
    """Return the images of every prompt, with their HR tokens; `is_image` [B, N] marks their LR tokens."""
    grids = family.grids_of(inputs)
    images = iter(zip(range(len(grids)), grids, inputs.get("pixel_values_hr", ())))
    placed: list[list[PlacedImage]] = []
    for row in is_image:
        placed.append([])
        positions = row.nonzero().flatten().tolist()
        while positions:
            number, lr, pixels = next(images)
            hr = (zoom * lr[0], zoom * lr[1])
            whole = (0, 0, *lr)
            rect = tuple(inputs["valid_rect"][number].tolist()) if "valid_rect" in inputs else whole
            placed[-1].append(PlacedImage(positions[0], lr, hr, family.hr_tokens(model, pixels, zoom), rect))
            positions = positions[lr[0] * lr[1] :]
    return placed


def row_owners(
    settings: FlexAttnConfig, shape: tuple[int, int], labels: torch.Tensor | None, prompt_length: int | None
) -> torch.Tensor:
    """Return [B, N]: the row whose selection each row uses, -1 where a row sees no HR token."""
    batch, length = shape
    order = torch.arange(length).expand(batch, -1)
    if labels is not None:
        predicts = functional.pad(labels[:, 1:] != -100, (0, 1))
    else:
        predicts = order >= (length if prompt_length is None else prompt_length) - 1
    if settings.hr_rows == "answer":
        return torch.where(predicts, order, -1)
    # A row before an answer uses the selection of the next row that predicts one; a row after the last, that row's.
    upcoming = torch.where(predicts, order, length).flip(-1).cummin(-1).values.flip(-1)
    last = torch.where(predicts, order, -1).amax(-1, keepdim=True)
    return torch.where(upcoming < length, upcoming, torch.where(last >= 0, last, order))


def select(settings: FlexAttnConfig, maps: torch.Tensor, image: PlacedImage) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what maps [N, rows, columns] select, bool [N, HR rows, HR columns], and each map's distance to choosing
    otherwise, [N]."""
    if settings.mask_padding:
        top, left, bottom, right = image.valid_rect
        inside = torch.zeros_like(maps)
        inside[:, top:bottom, left:right] = 1
        maps = maps * inside
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    distance = (maps - low) / (high - low) * settings.scale - settings.threshold
    chosen = (distance > 0).float()[:, None]
    if settings.pool:
        side = min(settings.pool, max(image.lr))
        chosen = functional.adaptive_max_pool2d(chosen, [max(1, round(side * s / max(image.lr))) for s in image.lr])
    mask = functional.interpolate(chosen, size=image.hr, mode="nearest")[:, 0] > 0
    return mask, distance.abs().amin((1, 2)) / settings.scale


class _Call:
    """One call on its way through the layers."""

    images: list[list[PlacedImage]]
    embeddings: torch.Tensor
    position_ids: torch.Tensor

    def __init__(
        self,
        text: PreTrainedModel,
        settings: FlexAttnConfig,
        projections: Mapping[int, HRProjections],
        owner: torch.Tensor,
        alpha: float,
    ) -> None:
        self.text, self.settings, self.projections = text, settings, projections
        self.owner, self.alpha = owner, alpha
        self.maps: dict[int, list[list[torch.Tensor]]] = {}
        self.masks: dict[int, list[list[torch.Tensor]]] = {}
        self.margin = float("inf")
        self._tables: dict[int, Any] = {}  # rotary tables that a layer receives
        self._scale = 1.0  # of embeddings, by the text model
        self._recorded: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let the text model run under `_attend`."""
        AttentionInterface.register(_NAME, self._attend)
        AttentionMaskInterface.register(_NAME, eager_mask)
        before = self.text.config._attn_implementation
        hooks = [self.text.layers[0].register_forward_pre_hook(self._see_scale, with_kwargs=True)]
        for layer in self.text.layers:
            hooks.append(layer.self_attn.register_forward_pre_hook(self._see_tables, with_kwargs=True))
        self.text.set_attn_implementation(_NAME)
        try:
            yield
        finally:
            self.text.set_attn_implementation(before)
            for hook in hooks:
                hook.remove()

    def _see_scale(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._scale = (hidden.norm() / self.embeddings.norm()).item()
        assert torch.allclose(hidden, self._scale * self.embeddings), "the text model does not only scale embeddings"

    def _see_tables(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tables[module.layer_idx] = kwargs["position_embeddings"]

    # ---------------------------------------------------------------------------------------------------- attention

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        if self._recorded is not None:
            self._recorded.append((key[0], value[0]))
            return query.transpose(1, 2), None
        assert s_aux is None and attention_mask is not None
        groups = query.shape[1] // key.shape[1]
        logits = _logits(query, key, groups, scaling, softcap) + attention_mask
        plain = logits.softmax(-1)
        probabilities, out = plain.clone(), plain @ value.repeat_interleave(groups, 1)
        for row, images in enumerate(self.images):
            if module.layer_idx < self.settings.first_layer or not images:
                continue
            k_hr, v_hr = self._hr_keys(module, row)
            hidden = ~self._visible(module.layer_idx, row)
            hr_logits = _logits(query[row], k_hr, groups, scaling, softcap).masked_fill(hidden, -torch.inf)
            joint = torch.cat([logits[row], hr_logits], -1).softmax(-1)
            with_hr = joint @ torch.cat([value[row], v_hr], 1).repeat_interleave(groups, 0)
            out[row] = (1 - self.alpha) * out[row] + self.alpha * with_hr
            if self.settings.map_softmax == "all":
                probabilities[row] = joint[..., : key.shape[2]]
        if module.layer_idx >= self.settings.first_layer - 1:
            self._select(module.layer_idx, probabilities.sum(1))
        return out.transpose(1, 2).contiguous(), None

    def _visible(self, layer: int, row: int) -> torch.Tensor:
        """Return [N, HR tokens of the prompt] bool: what the map of the layer before opens to each row."""
        selected = torch.cat([mask.flatten(1) for mask in self.masks[layer - 1][row]], -1)
        owner = self.owner[row]
        return selected[owner.clamp(min=0)] & (owner >= 0)[:, None]

    @torch.no_grad()
    def _select(self, layer: int, probabilities: torch.Tensor) -> None:
        """Turn a layer's probabilities [B, N, keys], summed over the heads, into selections."""
        self.maps[layer], self.masks[layer] = [], []
        for row, images in enumerate(self.images):
            maps = [probabilities[row][:, image.span].unflatten(1, image.lr) for image in images]
            selections = [select(self.settings, of_image, image) for of_image, image in zip(maps, images)]
            self.maps[layer].append(maps)
            self.masks[layer].append([mask for mask, _ in selections])
            used = self.owner[row][self.owner[row] >= 0].unique()
            for _, distance in selections if layer < len(self.text.layers) - 1 else ():
                self.margin = min([self.margin, *distance[used].tolist()])

    # ------------------------------------------------------------------------------------------------------ HR keys

    def _hr_keys(self, module: nn.Module, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [Hkv, HR tokens of the prompt, d] as the layer makes them."""
        self._recorded = []
        with _replaced(module, self.projections[module.layer_idx]):
            for image in self.images[row]:
                tokens = self._scale * image.tokens[None]
                tables = self._hr_tables(module.layer_idx, row, image)
                module.forward(hidden_states=tokens, position_embeddings=tables, attention_mask=None)
        recorded, self._recorded = self._recorded, None
        keys, values = zip(*recorded)
        return torch.cat(keys, 1), torch.cat(values, 1)

    def _hr_tables(self, layer: int, row: int, image: PlacedImage) -> Any:
        """Return the rotary tables of an image's HR tokens, as the layer receives those of a sequence."""
        if self.position_ids.ndim == 3:
            positions = hr_coordinates(self.position_ids[-3:, row, image.span].unflatten(1, image.lr), image.hr)
            return self.text.rotary_emb(self.embeddings, position_ids=positions.flatten(1)[:, None])
        if self._tables[layer] is None:
            return None
        mode, resized = self.settings.hr_position, []
        for table in self._tables[layer]:
            grid = table[row if len(table) > 1 else 0, image.span].T.unflatten(1, image.lr)[None]
            align = None if mode == "nearest" else False
            grid = functional.interpolate(grid, size=image.hr, mode=mode, align_corners=align)
            resized.append(grid[0].flatten(1).T[None])
        return tuple(resized)


def hr_coordinates(positions: torch.Tensor, hr: tuple[int, int]) -> torch.Tensor:
    """Return the real position [axes, HR rows, HR columns] of HR cells, from that of LR cells, which grow evenly."""
    _, rows, cols = positions.shape
    positions = positions.double()
    down = (positions[:, -1, 0] - positions[:, 0, 0]) / max(rows - 1, 1)
    right = (positions[:, 0, -1] - positions[:, 0, 0]) / max(cols - 1, 1)
    y, x = ((torch.arange(h) + 0.5) * s / h - 0.5 for h, s in zip(hr, (rows, cols)))
    return positions[:, :1, :1] + down[:, None, None] * y[:, None] + right[:, None, None] * x


def _logits(
    query: torch.Tensor, key: torch.Tensor, groups: int, scaling: float | None, softcap: float | None
) -> torch.Tensor:
    """Return [..., H, N, keys] of queries [..., H, N, d] and keys [..., Hkv, keys, d]."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query @ key.repeat_interleave(groups, -3).mT * scaling
    return logits if softcap is None else softcap * (logits / softcap).tanh()


@contextlib.contextmanager
def _replaced(module: nn.Module, projections: HRProjections) -> Iterator[None]:
    own = module.k_proj, module.v_proj
    module.k_proj, module.v_proj = projections
    try:
        yield
    finally:
        module.k_proj, module.v_proj = own
