"""FlexAttention on the language model of any vision-language model: projections for high-resolution (HR) tokens, and a
hook that builds the context of each forward call.

The hook runs before the language model, where embeddings, positions and the key/value cache are known. What the caller
asked for comes down to it as the keyword argument `flexattn_request`, an `HRRequest`; the context goes on to every
attention module as `flexattn`. What the mechanism must know of a model family is a `Family`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from flexattn_cuda import profiling
from flexattn_cuda.mechanism import attention
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT, rename_cache
from flexattn_cuda.mechanism.call import CallShape, HRRequest, NewImages, Span, can_rewind, check_keeps_all, rewind
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.context import ContextOptions, HRContext
from flexattn_cuda.mechanism.counts import ReadBack, read_counts
from flexattn_cuda.mechanism.grid import ABSENT, ImageGrids, cut_into_tiles
from flexattn_cuda.mechanism.keys import empty_projection
from flexattn_cuda.mechanism.layout import ImageLayout
from flexattn_cuda.mechanism.probe import token_forms
from flexattn_cuda.mechanism.rotary import RotaryTables, hr_positions, hr_rotary_tables
from flexattn_cuda.mechanism.rows import Rows
from flexattn_cuda.mechanism.tokens import HRTokens, Tile

_Hook = tuple[tuple[Any, ...], dict[str, Any]]


class Family(Protocol):
    """What the mechanism must know of a model and its family."""

    @property
    def settings(self) -> FlexAttnConfig:
        """Settings of the mechanism."""

    @property
    def text_model(self) -> PreTrainedModel:
        """The language model without its head: `layers` with a `self_attn` each, and `rotary_emb`."""

    @property
    def hr_layers(self) -> range:
        """Layers that attend to HR tokens."""

    @property
    def position_axes(self) -> int:
        """Coordinates of a position: 1, or 3 for time, row and column (multi-axis RoPE)."""

    def rotary(self, text: PreTrainedModel, sequence: torch.Tensor, positions: torch.Tensor) -> RotaryTables:
        """Return the rotary tables [n, r] at positions [axes, n], of the dtype and on the device of `sequence`."""

    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """Encode tiles [n, 3, height, width] into their tokens [n, tokens of a tile, D], without gradients."""


@dataclass(frozen=True)
class HRCall:
    """A forward call that sees images.

    Attributes:
        request: What its caller asks of the mechanism.
        shape: What the call is.
        prompt_length: Positions up to the end of the prompt.
        device: Of the hidden states.
        cache: The key/value cache, if any.
    """

    request: HRRequest
    shape: CallShape
    prompt_length: int
    device: torch.device
    cache: Cache | None


class Attachment:
    """FlexAttention attached to a model: `install` adds the projections and the hook."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.embedding_scale = 1.0

    def install(self) -> None:
        """Add what the mechanism needs to the language model, whose attention implementation is "flexattn" already.

        Raises:
            ValueError: If the language model's keys are made in a way that is not supported, or its weights are
                quantised in one; the model stays as it was.
        """
        self.add_modules(self.family.text_model)
        self.add_hooks()

    def add_hooks(self) -> None:
        """Build the context of every call of the language model from now on."""
        text = self.family.text_model
        text.register_forward_pre_hook(self._before_text_model, with_kwargs=True)
        text.register_forward_hook(self._after_text_model, with_kwargs=True)

    def add_modules(self, text: PreTrainedModel) -> None:
        """Add what the layers of a language model need, when the model is made."""
        self.add_projections(text)

    def add_projections(self, text: PreTrainedModel, device: torch.device | None = None) -> None:
        """Add the projections of HR tokens, beside those of self-attention, to the layers that lack them.

        Their values are not the model's own yet. On the meta device they have none.
        """
        forms = token_forms(text, self.family.hr_layers, self.family.rotary, self.family.position_axes)
        self.embedding_scale = forms.scale
        attentions = {layer: text.layers[layer].self_attn for layer in forms.keys}
        modules = {layer: module for layer, module in attentions.items() if not hasattr(module, "k_proj_hd")}
        added = {
            (layer, name): empty_projection(module, name, device)
            for layer, module in modules.items()
            for name in ("k_proj", "v_proj")
        }
        for layer, module in modules.items():
            module.hr_key_form = forms.keys[layer]
        for (layer, name), projection in added.items():
            setattr(modules[layer], f"{name}_hd", projection)

    def context(self, images: HRCache, call: HRCall) -> dict[str, Any]:
        """Return the keyword arguments that carry the context to the layers; none if no row sees HR tokens."""
        self._check_attention()
        rows = _rows(images.settings, call)
        if rows is None:
            return {}
        request = call.request
        options = ContextOptions(
            alpha=request.alpha,
            trace=request.trace,
            cached=request.cached,
            read_back=_read_back(images, call),
            read_counts=request.read_counts,
        )
        layers = self.family.text_model.config.num_hidden_layers
        return {"flexattn": HRContext(images, rows, layers, self._encode_tiles, options)}

    def _encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the tokens of tiles as they enter the first layer."""
        return self.family.encode_tiles(tiles) * self.embedding_scale

    def _before_text_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Hook:
        """Build the context of a call. Whatever can be refused is refused before anything kept is changed."""
        _check_not_bypassed(kwargs)
        self._check_outputs(kwargs)
        request: HRRequest = kwargs.pop("flexattn_request", None) or HRRequest()
        sequence = _sequence(args, kwargs)
        cache = rename_cache(kwargs)
        shape = request.shape or CallShape.of(sequence, cache, request.prompt_length, kwargs.get("cache_position"))
        kept = HRCache.beside(cache)
        if kept is not None and cache is not None and not shape.compiled:
            kept = kept.cropped_with(cache, shape.past)
        new = self._lay_out(request, shape.past, sequence, kwargs.get("position_ids"))
        images = kept or new
        if images is None:
            return args, kwargs
        images.check_batch(shape.batch, new)
        if not shape.compiled:
            check_keeps_all(cache, shape.past + shape.queries)
        call = HRCall(request, shape, _prompt_length(request, shape, images), sequence.device, cache)
        context = self.context(images, call)
        if not shape.compiled:
            if kept is not None and new is not None:
                kept.append(new)
            images.begin(cache, shape.batch, shape.past + shape.queries, call.prompt_length)
        return args, kwargs | context

    def _after_text_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """End a call; run it again, on what it was given, if a layer lacked what the host did not know of."""
        context: HRContext | None = kwargs.get("flexattn")
        cache = kwargs.get(CACHE_ARGUMENT)
        images = HRCache.beside(cache)
        if context is not None and not context.finish():
            assert images is not None
            rewind(cache, _sequence(args, kwargs).shape[1])
            context.start_again()
            output = module.forward(*args, **kwargs)
            context.finish()
        if images is not None and images.unfinished:
            images.unfinished = False
        return output

    def _check_outputs(self, arguments: dict[str, Any]) -> None:
        """Raise ValueError if attention weights are asked for, which a kernel never holds."""
        used = self.family.text_model.config._attn_implementation
        if arguments.get("output_attentions") and used == attention.NAME:
            raise ValueError(
                "output_attentions is True, but flexattn attention keeps no weights; pass flexattn_trace=Trace() for "
                "the maps, or leave it out"
            )

    @profiling.in_phase("lay_out_hr_tokens")
    def _lay_out(
        self, request: HRRequest, past: int, sequence: torch.Tensor, position_ids: torch.Tensor | None
    ) -> HRCache | None:
        """Lay out the HR tokens of the images that come with a call, prompt by prompt; None if there are none."""
        new = request.images
        if new is None:
            return None
        layout = _layout(new, past, sequence.device)
        room = layout.hr_tokens
        tokens = HRTokens(
            grids=layout.grids,
            features=sequence.new_zeros(layout.prompts, layout.images * room, sequence.shape[-1]),
            tables=self.rotary_tables(new, layout, past, sequence, position_ids),
        )
        for number, (prompt, image, _) in enumerate(new.placed()):
            grids = layout.grids[prompt][image]
            if new.features is not None:
                features, first = new.features[number].detach() * self.embedding_scale, image * room
                tokens.features[prompt, first : first + grids.hr.cells] = features.to(tokens.features)
            elif new.pixels is not None:
                pixels = new.pixels[number].clone()  # the caller may reuse the tensor
                tiles = cut_into_tiles(pixels, grids.tiles)
                tokens.waiting |= {Tile(prompt, image, tile): pixels for tile, pixels in enumerate(tiles)}
        if not request.on_demand:
            tokens.encode(range(tokens.tile_count), self._encode_tiles)
        return HRCache(self.family.settings, layout, tokens, request.capacity)

    def rotary_tables(
        self, new: NewImages, layout: ImageLayout, past: int, sequence: torch.Tensor, position_ids: torch.Tensor | None
    ) -> RotaryTables:
        """Return the rotary tables of the HR keys, [G, I*T, r] each."""
        text, room = self.family.text_model, layout.hr_tokens
        tables = None
        for prompt, image, span in new.placed():
            row = prompt * new.rows_per_prompt
            positions = _positions(position_ids, row, span, past, self.family.position_axes).to(sequence.device)
            grids, first = layout.grids[prompt][image], image * room
            of_image = self._tables_of_image(text, sequence, positions, grids)
            if tables is None:
                shape = (layout.prompts, layout.images * room, of_image.cos.shape[-1])
                tables = RotaryTables(sequence.new_zeros(shape), sequence.new_zeros(shape))
            for table, part in zip(tables, of_image):
                table[prompt, first : first + grids.hr.cells] = part
        assert tables is not None  # a call brings at least one image
        return tables

    def _tables_of_image(
        self, text: PreTrainedModel, sequence: torch.Tensor, positions: torch.Tensor, grids: ImageGrids
    ) -> RotaryTables:
        """Return the tables [h, r] of an image's HR tokens; its LR tokens are at positions [axes, S]."""
        if self.family.position_axes == 1:
            of_lr = self.family.rotary(text, sequence, positions)
            return hr_rotary_tables(of_lr, grids.lr, grids.hr, self.family.settings.hr_position)
        return self.family.rotary(text, sequence, hr_positions(positions, grids.lr, grids.hr))

    def _check_attention(self) -> None:
        used = self.family.text_model.config._attn_implementation
        if used != attention.NAME:
            raise ValueError(
                f"high-resolution tokens need attention implementation {attention.NAME!r} on the language model, but "
                f"it is {used!r}; call set_attn_implementation({attention.NAME!r}) on it"
            )


def _check_not_bypassed(arguments: dict[str, Any]) -> None:
    """Raise ValueError if HR images come down as they are: they would be ignored without a word."""
    if arguments.get("pixel_values_hr") is not None:
        raise ValueError(
            "pixel_values_hr reached the language model past the forward of the model, which alone puts HR images to "
            "use; trainers of TRL do so for a loss of their own: see flexattn_cuda.tasks.trl.with_model_loss"
        )


def _positions(position_ids: torch.Tensor | None, row: int, span: Span, past: int, axes: int) -> torch.Tensor:
    """Return the positions [axes, S] of an image's LR tokens, from what the language model is given."""
    if position_ids is None:
        return torch.arange(past + span.start, past + span.end).expand(axes, -1)
    if axes == 1:
        return position_ids[row if len(position_ids) > 1 else 0, None, span.start : span.end]
    # [axes, B, N], in front of which some models have the positions of the mask.
    return position_ids[-axes:, row if position_ids.shape[1] > 1 else 0, span.start : span.end]


def _read_back(images: HRCache, call: HRCall) -> ReadBack:
    """Return when the host learns how much a call selects."""
    request, shape = call.request, call.shape
    if not (request.cached and shape.decoding and request.images is None and request.read_counts is read_counts):
        return ReadBack.EACH_LAYER
    if images.capacity is not None:
        return ReadBack.NEVER if shape.queries == 1 else ReadBack.EACH_LAYER
    may_repeat = not shape.compiled and can_rewind(call.cache)
    return ReadBack.AFTER_CALL if may_repeat and images.is_settled else ReadBack.EACH_LAYER


def _layout(new: NewImages, past: int, device: torch.device) -> ImageLayout:
    """Return where new images stand in the sequence, `past` positions of which lie before the call."""
    shape = (len(new.spans), max([1, *map(len, new.spans)]))
    grids = [[ABSENT] * shape[1] for _ in new.spans]
    ranges, valid_rect = (torch.zeros(*shape, values, dtype=torch.int32) for values in (2, 4))
    last_end = 0
    for number, (prompt, image, span) in enumerate(new.placed()):
        grids[prompt][image] = new.grids[number]
        ranges[prompt, image] = torch.tensor([past + span.start, past + span.end])
        whole = torch.tensor([0, 0, *new.grids[number].lr])
        valid_rect[prompt, image] = whole if new.valid_rect is None else new.valid_rect[number]
        last_end = max(last_end, past + span.end)
    return ImageLayout(grids, ranges.to(device), valid_rect.to(device), last_end)


def _prompt_length(request: HRRequest, shape: CallShape, images: HRCache) -> int:
    if request.prompt_length is not None:
        return request.prompt_length
    return shape.past + shape.queries if shape.queries > 1 or shape.past == 0 else images.prompt_length


def _rows(settings: FlexAttnConfig, call: HRCall) -> Rows | None:
    """Return the rows of the call that see HR tokens, None where there are none."""
    shape, labels = call.shape, call.request.labels
    if shape.compiled:
        return Rows.of_a_token(shape.batch, call.device)
    if labels is None:
        return Rows.of_generation(settings, shape.batch, shape.past, shape.queries, call.prompt_length, call.device)
    rows = Rows.of_answers(settings, labels)
    return rows if rows.listed is not None and rows.listed.shape[1] else None


def _sequence(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the embeddings of a call of the language model, or its token ids."""
    embeddings = kwargs.get("inputs_embeds")
    sequence: torch.Tensor = embeddings if embeddings is not None else args[0] if args else kwargs["input_ids"]
    return sequence
