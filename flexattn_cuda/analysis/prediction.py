"""How long answers and training take on GPUs that are not here, and in how much memory: predicted by counting.

FLOPs are those that torch counts (`analysis.flops`), bytes follow from the configuration (`analysis.memory`), and what
a GPU makes of them is assumed in `analysis.gpus`. docs/costs.md lists the assumptions.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass

import torch

from flexattn_cuda.analysis import flops, memory
from flexattn_cuda.analysis.gpus import Gpu
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig

HALF = torch.float16

# Training: passes in units of the forward pass, by part. A gradient is one pass for the input and one for the weights;
# the tower has neither, nor have HR features one. Attention computes its probabilities again (ops.py).
_PASSES = {"vision": 1.0, "projector": 3.0, "language model": 3.0, "HR projection": 2.0, "attention": 3.5, "head": 3.0}
_REPEATED = ("language model", "HR projection", "attention")  # once more with gradient checkpointing
_BYTES_TRAINED = 16  # float32: a weight, its gradient, and AdamW's two moments
_BYTES_FROZEN = 4
_BYTES_GATHERED = 6  # of a layer's weight where it computes: float32 and the half of autocast
MAX_GPUS = 1024


@dataclass(frozen=True)
class Workload:
    """Questions of a benchmark.

    Attributes:
        images: Number of different images, each of which is encoded once.
        prompts: Number of prompts: questions, or the options that are scored.
        text_tokens: Tokens of a prompt besides the image's.
        steps: Calls of the language model after the prompt, the one that ends the answer included.
    """

    images: int
    prompts: int
    text_tokens: int
    steps: int


@dataclass(frozen=True)
class Prediction:
    """What a workload takes.

    Attributes:
        prompt_flops: FLOPs of a prompt without its image.
        image_flops: FLOPs of encoding an image.
        seconds: Of everything, by the GPU's name.
        memory: Peak in bytes.
    """

    prompt_flops: int
    image_flops: int
    seconds: dict[str, float]
    memory: int


def selected_tokens(config: FlexAttnLlavaConfig) -> int | None:
    """Return the number of HR tokens that a layer is taken to select; None for systems that select none."""
    return memory.expected_tokens(config) if config.system == "flexattn" else None


def predict_answers(
    config: FlexAttnLlavaConfig, work: Workload, batch_size: int, kept_images: int, gpus: tuple[Gpu, ...]
) -> Prediction:
    """Predict how a model in half precision answers.

    Args:
        config: Of the model, as any system.
        work: The questions.
        batch_size: Questions per batch.
        kept_images: Encoded images that are kept at a time.
        gpus: One at a time.
    """
    counted = _count(config, work.text_tokens)
    image = counted["vision"] + counted["projector"]
    prompt = sum(counted.values()) - image
    held = memory.estimate(config, HALF, work.text_tokens + work.steps + 1)
    per_row = held.sequence_cache + held.hr_cache_selected
    read = held.weights["language model"] / batch_size + per_row
    text = config.text_config
    encoded = held.hr_features + config.lr_grid.cells * text.hidden_size * HALF.itemsize
    widest = 3 * text.intermediate_size * held.positions * HALF.itemsize
    return Prediction(
        prompt,
        image,
        {
            gpu.name: gpu.compute_seconds(work.images * image + work.prompts * prompt)
            + gpu.read_seconds(work.prompts * work.steps * read)
            for gpu in gpus
        },
        held.all_weights + batch_size * (per_row + widest) + kept_images * encoded,
    )


def _count(config: FlexAttnLlavaConfig, text_tokens: int, published: bool = False) -> dict[str, int]:
    """Return `flops.count` of a prompt whose layers select `selected_tokens`, counted once."""
    return _count_once(json.dumps(config.to_dict(), sort_keys=True), text_tokens, published)


@functools.lru_cache(maxsize=64)
def _count_once(config: str, text_tokens: int, published: bool) -> dict[str, int]:
    model = FlexAttnLlavaConfig.from_dict(json.loads(config))
    return flops.count(model, text_tokens, selected_tokens(model), published=published)


@dataclass(frozen=True)
class TrainingRun:
    """A run of training.

    Attributes:
        records: Number of records, each taken to have an image.
        text_tokens: Tokens of a record besides the image's.
        batch_size: Records per batch and GPU.
        checkpointing: Whether activations are computed again in the backward pass.
    """

    records: int
    text_tokens: int
    batch_size: int
    checkpointing: bool = True


@dataclass(frozen=True)
class TrainingPrediction:
    """What training takes on one kind of GPU.

    Attributes:
        flops: Of a record, forward and backward.
        gpu_hours: Of one epoch on all GPUs together.
        gpus: The smallest power of two over which weights, gradients and AdamW's moments can be spread; None if
            `MAX_GPUS` are too few.
        memory: Bytes on each of these.
    """

    flops: float
    gpu_hours: float
    gpus: int | None
    memory: float | None

    @property
    def hours(self) -> float | None:
        """Hours on so many GPUs."""
        return None if self.gpus is None else self.gpu_hours / self.gpus


def predict_training(config: FlexAttnLlavaConfig, run: TrainingRun, gpu: Gpu) -> TrainingPrediction:
    """Predict one epoch of training everything but the vision tower, in mixed precision on float32 weights.

    Args:
        config: Of the model, as any system.
        run: What is trained.
        gpu: The kind of GPU; states are spread over all of them (FSDP, or ZeRO-3).
    """
    spent = training_flops(config, run)
    hours = gpu.compute_seconds(run.records * spent) / 3600
    state, own = _state_bytes(config), run.batch_size * _activation_bytes(config, run) + _gathered_bytes(config)
    counts = [2**power for power in range(int(math.log2(MAX_GPUS)) + 1)]
    gpus = next((count for count in counts if gpu.has_room(state / count + own)), None)
    return TrainingPrediction(spent, hours, gpus, None if gpus is None else state / gpus + own)


def training_flops(config: FlexAttnLlavaConfig, run: TrainingRun) -> float:
    """Return the FLOPs of one record, forward and backward; every row is taken to see HR tokens and to give logits."""
    counted = _count(config, run.text_tokens, published=True)
    return sum(count * (_PASSES[part] + (run.checkpointing and part in _REPEATED)) for part, count in counted.items())


def _state_bytes(config: FlexAttnLlavaConfig) -> int:
    """Return the bytes of weights, gradients and moments."""
    parts = {part: size // 4 for part, size in memory.estimate(config, torch.float32).weights.items()}
    return sum(count * (_BYTES_FROZEN if part == "vision tower" else _BYTES_TRAINED) for part, count in parts.items())


def _gathered_bytes(config: FlexAttnLlavaConfig) -> float:
    """Return the bytes of one layer's weights where they are put together to compute."""
    layers = memory.estimate(config, torch.float32).weights["language model"] / 4 / config.text_config.num_hidden_layers
    return layers * _BYTES_GATHERED


def _activation_bytes(config: FlexAttnLlavaConfig, run: TrainingRun) -> float:
    """Return the bytes that a record's forward pass leaves for the backward pass.

    Of a layer: nine tensors as wide as the hidden state, four as wide as the MLP, and the keys and values of the HR
    tokens, in half precision. With checkpointing, of all layers their inputs in float32, and of one layer the rest.
    """
    text, positions = config.text_config, config.image_tokens + run.text_tokens
    own, hr = 9 * text.hidden_size + 4 * text.intermediate_size, 2 * text.hidden_size
    layer = HALF.itemsize * (positions * own + memory.expected_tokens(config) * hr)
    inputs = 4 * positions * text.hidden_size
    layers = text.num_hidden_layers * inputs + layer if run.checkpointing else text.num_hidden_layers * (layer + inputs)
    hr_features = HALF.itemsize * config.hr_side**2 * text.hidden_size
    logits = 2 * HALF.itemsize * positions * text.vocab_size  # and their gradient
    return layers + hr_features + logits
