"""The low-resolution stages: the language model learns where to look, and to answer from the low resolution.

    localise    the attention map of the layer before `first_layer` is supervised to lie on the answer boxes
    answer      the whole language model learns to answer about large objects, and the maps of that layer and of all
                later ones are supervised

Large objects can be seen at low resolution, and the encoder writes them as it writes small ones at high resolution:
what is learned here serves every system, however it brings the tokens in. Localising comes first, since later layers
can learn to read a sign once a map lies on it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch.nn import functional

from flexattn_cuda.tasks.training_data import IGNORED
from studies.small.attention_maps import LayerMap, cross_entropy, mass_and_largest, record_maps
from studies.small.batches import PackedScenes, pack_scenes
from studies.small.encoded_scenes import EncodedScenes
from studies.small.optimizer import train_first_layers, train_only
from studies.small.presets import Preset
from studies.small.questions import TASKS
from studies.small.scenes import SIZES
from studies.small.stage import Stage, train_stage

_BATCH = 24  # images
_MAP_WEIGHT = 0.3  # of the maps' loss beside that of the answers


@dataclass(frozen=True)
class Predictions:
    """The R rows of a batch that predict an answer token.

    Attributes:
        logits: [R, V] float32.
        labels: [R] int64.
        maps: [layers, R, S*S] float32, attention over the image, from the layer before `first_layer` on.
        cells: [R, S*S] float32, 1 where what the token tells is; all 0 where there is nothing to look at.
        answer_cells: [R, S*S] float32, 1 where anything that the answer tells is.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    maps: torch.Tensor
    cells: torch.Tensor
    answer_cells: torch.Tensor

    def answer_loss(self) -> torch.Tensor:
        """Return the cross-entropy of the answer tokens."""
        return functional.cross_entropy(self.logits, self.labels)

    def map_loss(self) -> torch.Tensor:
        """Return how far the maps are from the cells, summed over the layers, in the rows that have cells."""
        looks = self.cells.any(-1)
        return cross_entropy(self.maps[:, looks], self.cells[looks]).mean(-1).sum()


@dataclass(frozen=True)
class HeldOutFigures:
    """Means over held-out questions.

    Attributes:
        mass: The first map's mass on the answer cells.
        largest: How often the map's largest cell is one of them.
        right: Share of exact answers.
    """

    mass: float
    largest: float
    right: float


class LowResolutionModel:
    """A plain LLaVA on packed scenes.

    Args:
        model: A LLaVA without high resolution, inside `masked_attention`.
        processor: Of the model.
        maps: Recorders of the layers from the one before `first_layer` on.
    """

    def __init__(self, model, processor, maps: Sequence[LayerMap]):
        self.model, self.processor, self._maps = model, processor, maps
        self.language = model.model.language_model

    def predict(self, images: EncodedScenes, numbers: Sequence[int], layers: int) -> Predictions:
        """Run the first layers of the language model on all questions about some scenes."""
        packed = pack_scenes(images, numbers, self.processor)
        image = packed.input_ids == self.processor.image_token_id
        embedded = self.model.get_input_embeddings()(packed.input_ids)
        embedded = embedded.masked_scatter(image.unsqueeze(-1), packed.image_features)
        hidden = self._run_layers(embedded, packed, layers)
        labels = packed.labels.roll(-1, 1)  # a row predicts the label after it
        rows = labels != IGNORED
        start, area = int(image[0].int().argmax()), packed.cells.shape[-1]
        first_map = len(self.language.layers) - len(self._maps)
        maps = [one.map(packed.visible, rows)[:, start : start + area] for one in self._maps[: layers - first_map]]
        cells, answer_cells = (part[rows].float() for part in (packed.cells, packed.answer_cells))
        return Predictions(self.model.lm_head(hidden[rows]), labels[rows], torch.stack(maps), cells, answer_cells)

    def _run_layers(self, embedded: torch.Tensor, packed: PackedScenes, layers: int) -> torch.Tensor:
        """Return the normalised hidden states after the first layers, [n, N, D]."""
        hidden = embedded
        rotary = self.language.rotary_emb(hidden, position_ids=packed.position_ids)
        for layer in self.language.layers[:layers]:
            hidden = layer(
                hidden,
                attention_mask=packed.visible,
                position_ids=packed.position_ids,
                position_embeddings=rotary,
                use_cache=False,
            )
        return self.language.norm(hidden)

    @torch.no_grad()
    def measure(self, held_out: EncodedScenes, layers: int) -> dict[str, HeldOutFigures]:
        """Return the figures of the evaluation's questions by task and size, after the first layers."""
        asked = replace(held_out, scenes=[replace(scene, questions=(scene.asked,)) for scene in held_out.scenes])
        figures = {}
        for task, size in itertools.product(TASKS, SIZES):
            chosen = [k for k, scene in enumerate(held_out.scenes) if (scene.asked.task, scene.size) == (task, size)]
            found = self.predict(asked, chosen, layers)
            right = (found.logits.argmax(-1) == found.labels).view(len(chosen), -1).all(1)
            values = (*mass_and_largest(found.maps[0], found.cells), right.float())
            figures[f"{task} {size}"] = HeldOutFigures(*(value.mean().item() for value in values))
        return figures


class _LowResolutionStage(Stage):
    """What the two stages share: the first `layers` layers, trained on scenes that `rng` draws."""

    def __init__(self, model: LowResolutionModel, images: EncodedScenes, held_out: EncodedScenes, rng: random.Random):
        self.model, self.images, self.held_out, self.rng = model, images, held_out, rng
        self.layers = len(model.language.layers)

    def predict(self, numbers: Sequence[int]) -> Predictions:
        """Predict the answers about a random batch of these scenes."""
        return self.model.predict(self.images, self.rng.sample(numbers, _BATCH), self.layers)

    def summary(self) -> str:
        """Return the held-out figures as a line."""
        rows = (
            f"{kind} {one.mass:.2f} {one.largest:.2f} {one.right:.2f}"
            for kind, one in self.model.measure(self.held_out, self.layers).items()
        )
        return "held-out mass, largest cell, right: " + "; ".join(rows)


class LocaliseStage(_LowResolutionStage):
    """Trains the layers before `first_layer`, by the map of the last of them."""

    name = "localise"

    def __init__(
        self,
        model: LowResolutionModel,
        images: EncodedScenes,
        held_out: EncodedScenes,
        rng: random.Random,
        first_layer: int,
    ):
        super().__init__(model, images, held_out, rng)
        self.layers = first_layer  # the map needs no later one
        train_only(self.model.model, lambda name: False)
        self.parameters = train_first_layers(self.model.language, first_layer)

    def loss(self, step: int) -> torch.Tensor:
        """Return the map's loss on scenes of any size."""
        return self.predict(range(len(self.images.scenes))).map_loss()


class AnswerStage(_LowResolutionStage):
    """Trains the whole language model on large objects."""

    name = "answer"

    def __init__(self, model: LowResolutionModel, images: EncodedScenes, held_out: EncodedScenes, rng: random.Random):
        super().__init__(model, images, held_out, rng)
        self.parameters = train_only(self.model.model, lambda name: "language_model" in name or "lm_head" in name)
        self._large = self.images.of_size("large")

    def loss(self, step: int) -> torch.Tensor:
        """Return the loss of the answers and of the maps."""
        predictions = self.predict(self._large)
        return predictions.answer_loss() + _MAP_WEIGHT * predictions.map_loss()


def train_low_resolution(
    model, processor, images: EncodedScenes, held_out: EncodedScenes, preset: Preset, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Train both stages.

    Args:
        model: A plain LLaVA, without high resolution.
        processor: Of the model.
        images: Scenes to train on.
        held_out: Scenes that are measured.
        preset: The number of steps, and the first layer with high resolution.
        seed: Of the order of the scenes.

    Returns:
        The fields of HeldOutFigures by task and size, for start.json.
    """
    first_layer = preset.sizes.first_layer
    count = len(model.model.language_model.layers)
    with masked_attention(model), record_maps(model, range(first_layer - 1, count)) as maps:
        low = LowResolutionModel(model, processor, maps)
        rng = random.Random(f"low resolution {seed}")
        train_stage(LocaliseStage(low, images, held_out, rng, first_layer), preset.localise_steps)
        train_stage(AnswerStage(low, images, held_out, rng), preset.answer_steps)
        return {kind: asdict(figures) for kind, figures in low.measure(held_out, count).items()}


@contextmanager
def masked_attention(model) -> Iterator[None]:
    """Run the language model with sdpa inside the block, whose attention takes the mask of packed questions."""
    language = model.model.language_model
    before = language.config._attn_implementation
    language.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        language.set_attn_implementation(before)
