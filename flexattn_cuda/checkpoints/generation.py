"""Check generation_config.json: `generate` follows it, and fails deep inside, or never ends, on an impossible value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from flexattn_cuda.checkpoints.config import is_whole
from flexattn_cuda.checkpoints.files import read_json
from flexattn_cuda.errors import CheckpointError

_MAX_WHOLE = (1 << 31) - 1


@dataclass(frozen=True)
class _Rule:
    """What the value of a field must be; null stands for the default and is always allowed."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole_from(low: int) -> _Rule:
    return _Rule(f"a whole number of at least {low}", lambda value: is_whole(value, low, _MAX_WHOLE))


def _one_of(*choices: Any) -> _Rule:
    return _Rule(
        "one of " + ", ".join(map(repr, choices)), lambda value: any(value is one or value == one for one in choices)
    )


_FLAG = _Rule("true or false", lambda value: isinstance(value, bool))
_POSITIVE = _Rule("a positive number", lambda value: _is_number(value) and value > 0)
_NUMBER = _Rule("a number", _is_number)
_SHARE = _Rule("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_RULES = {
    **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"), _FLAG),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), _FLAG),
    **dict.fromkeys(("return_dict_in_generate", "disable_compile", "is_assistant"), _FLAG),
    **dict.fromkeys(("max_length", "max_new_tokens", "num_beams"), _whole_from(1)),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"), _whole_from(0)),
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"), _NUMBER),
    **dict.fromkeys(("max_time", "repetition_penalty"), _POSITIVE),
    "pad_token_id": _whole_from(-1),  # -1: none, as the first LLaMA checkpoints have it
    "length_penalty": _NUMBER,
    "assistant_confidence_threshold": _SHARE,
    "num_return_sequences": _one_of(1),
    "num_beam_groups": _one_of(1),
    "early_stopping": _one_of(True, False, "never"),
    "cache_implementation": _one_of("dynamic", "static"),
}
_TOKENS = ("bos_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id")
_LISTS_OF_TOKENS = ("suppress_tokens", "begin_suppress_tokens")
# Without effect on the answers of this model, or overridden in every call.
_IGNORED = (
    "_from_model_config", "assistant_lookbehind", "decoder_start_token_id", "diversity_penalty", "low_memory",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "target_lookbehind", "transformers_version",
)  # fmt: skip


def check_generation_config(folder: Path, vocabulary: int, supported_alone: bool = True) -> None:
    """Raise CheckpointError if generation_config.json has a field that is impossible or not supported.

    Args:
        folder: The checkpoint.
        vocabulary: Number of token ids that its model embeds.
        supported_alone: Refuse what this package's own model does not support. Models of transformers, to which
            FlexAttention is attached, may support more.
    """
    path = folder / "generation_config.json"
    known = vars(GenerationConfig())
    rules = _RULES | _rules_of_tokens(vocabulary)
    if not supported_alone:
        del rules["cache_implementation"]
    for name, value in read_json(path).items():
        if value is None or name in _IGNORED:
            continue
        if name not in rules:
            if value is False or not supported_alone or not (name in known or hasattr(GenerationConfig, name)):
                continue
            raise CheckpointError(f"{path} sets {name}, which this package does not support; remove it from the file")
        if not rules[name].holds(value):
            raise CheckpointError(f"{path} has {name} = {value!r}; it must be {rules[name].words}")


def _rules_of_tokens(vocabulary: int) -> dict[str, _Rule]:
    def is_token(value: Any) -> bool:
        return is_whole(value, 0, vocabulary - 1)

    def are_tokens(value: Any) -> bool:
        return isinstance(value, list) and all(map(is_token, value))

    words = f"a token id from 0 to {vocabulary - 1}"
    one_or_more = _Rule(
        f"{words}, or a list of them", lambda value: is_token(value) or (are_tokens(value) and value != [])
    )
    lists = _Rule(
        f"a list of lists, each {words}",
        lambda value: isinstance(value, list) and all(are_tokens(one) and one for one in value),
    )
    return {
        **dict.fromkeys(_TOKENS, one_or_more),
        **dict.fromkeys(_LISTS_OF_TOKENS, _Rule(f"a list, each {words}", are_tokens)),
        "bad_words_ids": lists,
    }
