"""The tokenizers of all three checkpoint formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flexattn_cuda.checkpoints.files import read_json, refusing
from flexattn_cuda.errors import CheckpointError
from flexattn_cuda.inputs.sentencepiece import read_sentencepiece


def load_tokenizer(folder: Path, form: str) -> Any:
    """Return the tokenizer of a checkpoint, with padding on the left and a padding token.

    Args:
        folder: The checkpoint's folder.
        form: Its format. "flexattn": tokenizer.json as it is. "llava": what transformers makes of it. "released":
            tokenizer.model, as the released code reads it.

    Raises:
        CheckpointError: If there is no tokenizer, or it cannot be read.
    """
    has_json, has_model = ((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    if not has_json and not has_model:
        raise CheckpointError(f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model")
    with refusing(f"the tokenizer in {folder} cannot be read"):
        if has_model and (form == "released" or not has_json):
            tokenizer = _sentencepiece_tokenizer(folder)
        elif form == "llava":
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        _finish(tokenizer)
    return tokenizer


def _finish(tokenizer: Any) -> None:
    """Set up the padding, and try the tokenizer once."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    ids = tokenizer("a word")["input_ids"]
    if not ids or not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ValueError("it makes no token ids of text")
    if tokenizer.eos_token_id is None:
        raise ValueError("it has no end-of-sequence token")
    tokenizer.decode(ids, skip_special_tokens=True)
    tokenizer.convert_tokens_to_ids("a token that it does not have")  # recurses without end if <unk> has no id


def _sentencepiece_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    prefix_everywhere = settings.get("legacy") is not False
    backend = read_sentencepiece(folder / "tokenizer.model", prefix_everywhere)

    def token(name: str, default: str | None) -> str | None:
        value = settings.get(f"{name}_token", default)  # text, or an object around the text
        return value["content"] if isinstance(value, dict) else value

    added = sorted(read_json(folder / "added_tokens.json").items(), key=lambda item: item[1])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=token("bos", "<s>"),
        eos_token=token("eos", "</s>"),
        unk_token=token("unk", "<unk>"),
        pad_token=token("pad", None),
        add_bos_token=settings.get("add_bos_token", True),
        add_eos_token=settings.get("add_eos_token", False),
        clean_up_tokenization_spaces=False,
        model_max_length=settings.get("model_max_length") or 2048,
    )
    tokenizer.add_tokens([text for text, _ in added if text not in tokenizer.get_vocab()])
    return tokenizer
