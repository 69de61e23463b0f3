"""Rectangular grids, another one for every image of a batch, on a plain LLaMA: the mechanism knows no family.

What a batch gives is compared with plain torch in float64, which computes one prompt at a time, holds whole matrices,
and selects from one image at a time.
"""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from torch.nn import functional
from transformers import DynamicCache, LlamaModel

from flexattn_cuda import FlexAttnConfig, Trace, reference
from flexattn_cuda.mechanism.attach import Attachment
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT
from flexattn_cuda.mechanism.call import HRRequest, NewImages, Span
from flexattn_cuda.mechanism.grid import ABSENT, Grid, ImageGrids
from flexattn_cuda.mechanism.layout import ImageLayout
from flexattn_cuda.mechanism.rotary import RotaryTables
from flexattn_cuda.mechanism.selection import select

WIDTH, LENGTH, LAYERS = 32, 30, 4
SETTINGS = FlexAttnConfig(first_layer=1, pool=3, threshold=200.0)
WIDE = ImageGrids(lr=Grid(3, 5), hr=Grid(7, 9), tiles=Grid(7, 3))
TALL = ImageGrids(lr=Grid(4, 2), hr=Grid(8, 6), tiles=Grid(2, 3))
SMALL = ImageGrids(lr=Grid(2, 2), hr=Grid(2, 4), tiles=Grid(1, 2))
LARGE = ImageGrids(lr=Grid(2, 7), hr=Grid(10, 14), tiles=Grid(5, 2))  # more tokens than any other


def pooled(grid: Grid, side: int) -> Grid:
    """Return the grid of the same shape with a longer side of at most `side` cells; 0 for no limit."""
    longer = max(grid)
    return Grid(*(max(1, round(cells * side / longer)) for cells in grid)) if 0 < side < longer else grid


class PlainFamily:
    """A `Family` (mechanism/attach.py) whose tower averages 2 x 2 pixels and projects them."""

    def __init__(self, settings: FlexAttnConfig) -> None:
        torch.manual_seed(0)
        self.settings, self.hr_layers = settings, range(settings.first_layer, LAYERS)
        config = tiny.text_config(4, 2, LAYERS, tiny.VOCABULARY)
        config._attn_implementation = "flexattn"
        self.text_model = LlamaModel(config)
        self.projector = torch.nn.Linear(3, WIDTH).double()
        self.tiles_encoded = 0

    position_axes = 1

    def rotary(self, text: LlamaModel, sequence: torch.Tensor, positions: torch.Tensor) -> RotaryTables:
        cos, sin = text.rotary_emb(sequence, position_ids=positions)
        return RotaryTables(cos[0], sin[0])

    @torch.no_grad()
    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        self.tiles_encoded += len(tiles)
        return self.projector(functional.avg_pool2d(tiles, 2).flatten(2).transpose(1, 2))


def attached(settings: FlexAttnConfig) -> PlainFamily:
    """Return a family with FlexAttention attached to its model, in float64, with maps that are not flat."""
    family = PlainFamily(settings)
    Attachment(family).install()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in family.text_model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) if parameter.ndim > 1 else parameter)
    family.text_model.double().eval()
    return family


@dataclasses.dataclass
class Picture:
    """An image of a prompt: where its LR tokens start, its grids, and its pixels."""

    start: int
    grids: ImageGrids
    valid_rect: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.start)
        rows, cols = self.grids.hr
        self.pixels = torch.randn(3, 2 * rows, 2 * cols, generator=generator, dtype=torch.float64)

    @property
    def span(self) -> Span:
        return Span(self.start, self.start + self.grids.lr.cells)

    @property
    def rect(self) -> list[int]:
        return list(self.valid_rect or (0, 0, *self.grids.lr))


# The last image ends with the sequence, so that no keys follow it by which its range could be widened.
BATCH = [[Picture(2, WIDE, (0, 1, 3, 5))], [Picture(1, SMALL), Picture(LENGTH - 8, TALL)], []]


def request(batch: list[list[Picture]], past: int = 0, **changes) -> HRRequest:
    pictures = [picture for prompt in batch for picture in prompt]
    spans = [[Span(p.span.start - past, p.span.end - past) for p in prompt] for prompt in batch]
    new = NewImages(
        spans,
        [picture.grids for picture in pictures],
        pixels=[picture.pixels for picture in pictures],
        valid_rect=torch.tensor([picture.rect for picture in pictures]),
    )
    return HRRequest(images=new, **changes)


def embeddings(prompts: int, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(prompts, length, WIDTH, generator=generator, dtype=torch.float64)


class Expected:
    """One prompt. `seen[row]` are the images that a row sees, by the selection of its own map; other rows see none.

    Attributes:
        out: [N, D] hidden states.
        masks: By layer, what its map selects for each row: [HR tokens of the row's images] bool.
    """

    def __init__(self, family: PlainFamily, x: torch.Tensor, seen: dict[int, list[Picture]]) -> None:
        self.family, self.seen = family, seen
        self.masks: list[dict[int, torch.Tensor]] = []
        text = family.text_model
        self.cos, self.sin = (table[0] for table in text.rotary_emb(x[None], torch.arange(len(x))[None]))
        for layer in text.layers:
            x = x + layer.self_attn.o_proj(self._attend(layer.self_attn, layer.input_layernorm(x)))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.out = text.norm(x)

    def _attend(self, module, x: torch.Tensor) -> torch.Tensor:
        d = module.head_dim
        q, k, v = (p(x).view(len(x), -1, d).transpose(0, 1) for p in (module.q_proj, module.k_proj, module.v_proj))
        q, k = (reference.rotate(part, self.cos, self.sin) for part in (q, k))
        k, v = (part.repeat_interleave(2, 0) for part in (k, v))
        causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        logits = (q @ k.transpose(1, 2) * d**-0.5).masked_fill(~causal, -torch.inf)
        plain = logits.softmax(-1)
        out = plain @ v
        if module.layer_idx >= self.family.settings.first_layer:
            for row, pictures in self.seen.items():
                hr_k, hr_v = self._hr_keys(module, pictures)
                hr_logits = (q[:, row, None] @ hr_k.transpose(1, 2) * d**-0.5)[:, 0]
                hr_logits = hr_logits.masked_fill(~self.masks[-1][row], -torch.inf)
                both = torch.cat([logits[:, row], hr_logits], -1).softmax(-1)
                out[:, row] = (both[:, None] @ torch.cat([v, hr_v], 1))[:, 0]
        maps = plain.sum(0)
        self.masks.append(
            {row: torch.cat([self._mask(maps[row], p) for p in pictures]) for row, pictures in self.seen.items()}
        )
        return out.transpose(0, 1).flatten(1)

    def _mask(self, probabilities: torch.Tensor, picture: Picture) -> torch.Tensor:
        settings, grids = self.family.settings, picture.grids

        def ints(*values: int) -> torch.Tensor:
            return torch.tensor([[values]], dtype=torch.int32)

        selected = reference.select_tokens(
            probabilities[slice(*picture.span)][None, None, None],
            ints(*grids.lr),
            ints(*grids.hr),
            hr_tokens=grids.hr.cells,
            scale=settings.scale,
            threshold=settings.threshold,
            pool_grid=ints(*pooled(grids.lr, settings.pool)),
            valid_rect=ints(*picture.rect),
        )
        return selected.mask(1)[0, 0, 0]

    def _hr_keys(self, module, pictures: list[Picture]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [H, HR tokens of the images, d]."""
        keys, values = [], []
        for picture in pictures:
            features = self.family.projector(
                functional.avg_pool2d(picture.pixels, 2).flatten(1).T
            )  # of the whole image at once
            tables = []
            for table in (self.cos, self.sin):
                image = table[slice(*picture.span)].T.view(1, -1, *picture.grids.lr)
                image = functional.interpolate(image, size=tuple(picture.grids.hr), mode="bicubic", align_corners=False)
                tables.append(image[0].flatten(1).T)
            k, v = (p(features).view(len(features), -1, module.head_dim) for p in (module.k_proj_hd, module.v_proj_hd))
            keys.append(reference.rotate(k.transpose(0, 1), *tables))
            values.append(v.transpose(0, 1))
        return tuple(torch.cat(part, 1).repeat_interleave(2, 0) for part in (keys, values))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Both are float64; what differs is the order of sums."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("batch", [BATCH, BATCH[1:], BATCH[::-1]], ids=["three", "two", "reversed"])
def test_every_image_of_a_batch_is_seen_in_its_own_grids(batch):
    family, trace = attached(SETTINGS), Trace()
    x = embeddings(len(batch))
    out = family.text_model(inputs_embeds=x, flexattn_request=request(batch, trace=trace)).last_hidden_state
    for row, pictures in enumerate(batch):
        expected = Expected(family, x[row], {LENGTH - 1: pictures} if pictures else {})
        assert_close(out[row], expected.out)
        for layer, mask in enumerate(masks[LENGTH - 1] for masks in expected.masks if pictures):
            assert mask.any() and not mask.all()
            ours = [trace.steps[0][layer].of_image(row, -1, image)[1] for image in range(len(pictures))]
            assert [part.shape for part in ours] == [picture.grids.hr for picture in pictures]
            assert torch.equal(torch.cat([part.flatten() for part in ours]), mask)
    tiles = sum(picture.grids.tiles.cells for prompt in batch for picture in prompt)
    assert 0 < family.tiles_encoded < tiles  # those alone that a selection reached


def layout_of(batch: list[list[Picture]]) -> ImageLayout:
    slots = max(map(len, batch))
    of_slots = [prompt + [None] * (slots - len(prompt)) for prompt in batch]
    return ImageLayout(
        [[picture.grids if picture else ABSENT for picture in prompt] for prompt in of_slots],
        torch.tensor([[picture.span if picture else (0, 0) for picture in prompt] for prompt in of_slots]).int(),
        torch.tensor([[picture.rect if picture else [0] * 4 for picture in prompt] for prompt in of_slots]).int(),
        last_end=max(picture.span.end for prompt in batch for picture in prompt),
    )


@pytest.mark.parametrize("pool", [0, 2])
@pytest.mark.parametrize("strategy", ["center", "random"])
def test_the_ablations_choose_the_same_share_of_every_grid(strategy, pool):
    settings = dataclasses.replace(SETTINGS, strategy=strategy, pool=pool, ratio=0.3)
    layout = layout_of(BATCH).on(torch.device("cpu"), 1, pool)
    mask = select(settings, torch.rand(3, 2, 2, WIDE.lr.cells), layout, WIDE.hr.cells).mask(2)
    for row, prompt in enumerate(BATCH):
        for image in range(2):
            tokens = mask[row, :, image]
            if image >= len(prompt):
                assert not tokens.any()
                continue
            grids = prompt[image].grids
            of_image = tokens[:, : grids.hr.cells].view(2, *grids.hr)
            assert not tokens[:, grids.hr.cells :].any()
            cells_grid = pooled(grids.lr, pool)
            # A cell of the grid is seen at the first token of its rows and columns, rounded up.
            first = [[-(-i * hr // side) for i in range(side)] for side, hr in zip(cells_grid, grids.hr)]
            cells = of_image[:, first[0]][:, :, first[1]]
            assert cells.flatten(1).sum(-1).tolist() == [max(1, round(0.3 * cells_grid.cells))] * 2
            if strategy == "center" and min(cells_grid) > 2:
                assert cells[:, cells_grid.rows // 2, cells_grid.cols // 2].all()


def test_a_crop_leaves_the_ranges_of_what_remains_inside_the_sequence():
    """Without the widest image, the others' ranges are as long as the next one's."""
    layout = layout_of(BATCH)
    rows = layout.on(torch.device("cpu"), 1, pool=3)
    assert rows.map_ranges.tolist() == [[[2, 17], [0, 0]], [[1, 16], [15, 30]], [[0, 0], [0, 0]]]
    assert rows.skipped.tolist() == [[0, 0], [0, 7], [0, 0]]
    layout.crop(16)
    rows = layout.on(torch.device("cpu"), 2, pool=3)
    assert layout.grids == [[ABSENT, ABSENT], [SMALL, ABSENT], [ABSENT, ABSENT]]
    assert rows.map_ranges[2].tolist() == [[1, 5], [0, 0]] and rows.lr_grid.sum() == 2 * 4 and rows.skipped is None
    layout.crop(0)
    assert layout.cells == 0 and not layout.on(torch.device("cpu"), 1, pool=3).map_ranges.any()


@torch.no_grad()
def test_a_later_turn_may_bring_a_larger_image_than_any_before():
    """The tokens are numbered anew then: keys that were projected before must still be found."""
    family, cache, batch = attached(SETTINGS), DynamicCache(), BATCH[:2]
    later = [[Picture(LENGTH + 3, LARGE)], [Picture(LENGTH + 1, SMALL)]]
    end = LENGTH + 20
    x = embeddings(2, end + 1)
    text = family.text_model
    text(inputs_embeds=x[:, :LENGTH], flexattn_request=request(batch), **{CACHE_ARGUMENT: cache})
    before = HRCache.beside(cache).counters.projected
    turn = text(inputs_embeds=x[:, LENGTH:end], flexattn_request=request(later, LENGTH), **{CACHE_ARGUMENT: cache})
    token = text(inputs_embeds=x[:, end:], **{CACHE_ARGUMENT: cache})
    assert HRCache.beside(cache).tokens.room == LARGE.hr.cells
    assert HRCache.beside(cache).counters.projected > before > 0
    for row in range(2):
        both = batch[row] + later[row]
        expected = Expected(family, x[row], {LENGTH - 1: batch[row]} | {end - 1: both, end: both})
        assert_close(turn.last_hidden_state[row], expected.out[LENGTH:end])
        assert_close(token.last_hidden_state[row], expected.out[end:])
