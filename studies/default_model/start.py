"""The weights that the language model starts from: it looks for what a question names, and copies what it finds there.

Drawn at random, it has to find a chain of layers that pays only as a whole: an answer's row attends to the colour in
the question, the next layer to tokens of this colour, a later one to a glyph, and the head knows 41 glyphs one by one.
Each link starts in place here: queries equal keys and outputs undo values (Trockman and Kolter, "Mimetic initialization
of self-attention layers", ICML 2023), and words start as what the encoder says of them.
"""

from __future__ import annotations

import torch
from torch import nn

from studies.default_model.encoder import CLASSES, HALVES, SIZES, token_labels
from studies.default_model.questions import PARTS, part_of
from studies.small.encoded_scenes import EncodedScenes
from studies.small.painter import SIDE
from studies.small.small_model import draw_weights

_SCENES = 500  # that the means of tokens are taken from
_WORD = 4.5  # norm of a colour's embedding: one and a half times that of other words
_SHARED = 3.0  # norm of the part that colours and answers share
_LIKENESS = 1.6  # product of the norms of a query's and a key's map


@torch.no_grad()
def start_language(model, processor, large: EncodedScenes) -> None:
    """Draw the weights of the language model from torch's generator.

    Args:
        model: With a trained encoder.
        processor: Of the model.
        large: Images with signs that can be read at low resolution.
    """
    language = model.model.language_model
    draw_weights(nn.ModuleDict({"language_model": language}), SIZES)
    nn.init.normal_(model.lm_head.weight, std=0.06)
    for layer in language.layers:
        attention = layer.self_attn
        nn.init.orthogonal_(attention.q_proj.weight, _LIKENESS**0.5)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    _start_words(model, processor.tokenizer, large)


def _start_words(model, tokenizer, large: EncodedScenes) -> None:
    """Start colours as what tokens of their signs have in common, and the head's answers as what tokens of these have.

    Answers share a part with colours: the row of an answer attends to the colour in its question.
    """
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    shared = nn.functional.normalize(torch.randn(SIZES.width), dim=0) * _SHARED
    for color, mean in token_means(large, "colour").items():
        embeddings[tokenizer.convert_tokens_to_ids(color)] = nn.functional.normalize(mean, dim=0) * _WORD + shared
    embeddings[tokenizer.convert_tokens_to_ids("<answer>")] += shared
    answers = {**token_means(large, "glyph"), **part_means(large)}
    for answer, mean in answers.items():
        token = tokenizer.convert_tokens_to_ids(answer)
        head[token] = nn.functional.normalize(mean, dim=0)
        embeddings[token] += shared


def token_means(scenes: EncodedScenes, kind: str) -> dict[str, torch.Tensor]:
    """Return by class what tokens that show it differ in from all tokens, [D], summed over the halves of a token.

    Args:
        scenes: Images with signs that can be read at low resolution.
        kind: One of CLASSES.
    """
    tokens, halves = _tokens(scenes), _labels(scenes, kind)
    return {
        name: sum(_mean_of(tokens, half == number) for half in halves if (half == number).any())
        for number, name in enumerate(CLASSES[kind])
        if any((half == number).any() for half in halves)
    }


def part_means(scenes: EncodedScenes) -> dict[str, torch.Tensor]:
    """Return for each of PARTS what tokens of signs there differ in from all tokens of signs, [D]."""
    steps = [(step + 0.5) / SIZES.lr_side for step in range(SIZES.lr_side)]
    parts = [part_of(x, y) for y in steps for x in steps] * len(scenes.scenes[:_SCENES])
    shown = _labels(scenes, "colour")[0]
    on_sign = (shown >= 0) & (shown < len(CLASSES["colour"]))
    tokens = _tokens(scenes)[on_sign]
    inside = {name: torch.tensor([part == name for part in parts])[on_sign] for name in PARTS}
    return {name: _mean_of(tokens, there) for name, there in inside.items() if there.any()}


def _tokens(scenes: EncodedScenes) -> torch.Tensor:
    return scenes.low[:_SCENES].float().flatten(0, 1)


def _mean_of(tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return tokens[chosen].mean(0) - tokens.mean(0)


def _labels(scenes: EncodedScenes, kind: str) -> list[torch.Tensor]:
    """Return the number in CLASSES of what all tokens show, for each half of a token."""
    first, ratio = HALVES * list(CLASSES).index(kind), SIZES.lowres / SIDE
    labels = [
        token_labels([sign.moved(0, 0, ratio) for sign in scene.signs], True)[first : first + HALVES]
        for scene in scenes.scenes[:_SCENES]
    ]
    return [torch.cat(half) for half in zip(*labels)]
