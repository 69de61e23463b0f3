"""Reads `tokenizer.model`, the sentencepiece file of LLaMA tokenizers, without the sentencepiece package.

The file is one protobuf message; of its fields (sentencepiece_model.proto) these are read:

    ModelProto        1 pieces (repeated)   2 trainer_spec   3 normalizer_spec
    SentencePiece     1 piece   2 score   3 type
    TrainerSpec       3 model_type   35 byte_fallback
    NormalizerSpec    2 precompiled_charsmap   3 add_dummy_prefix   4 remove_extra_whitespaces
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE_MODEL = 2
_SPACE = "\u2581"  # sentencepiece writes a space as this block character


def read_sentencepiece(path: str | Path, prefix_everywhere: bool = False) -> Tokenizer:
    """Return the tokenizer of a sentencepiece BPE model as LLaMA uses it: byte fallback, and a space before the text.

    Args:
        path: The file, usually named tokenizer.model.
        prefix_everywhere: Put the space also before text that follows a special token; transformers calls such a
            tokenizer "legacy".

    Raises:
        ValueError: If the file is damaged, or holds a model of another kind.
    """
    try:
        pieces, trainer, normalizer = _parse(Path(path).read_bytes())
    except (IndexError, struct.error, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a sentencepiece model, or is damaged") from error
    if not pieces:
        raise ValueError(f"{path} is not a sentencepiece model, or is damaged: it holds no pieces")
    reasons = []
    if trainer.get(3, 1) != _BPE_MODEL:
        reasons.append("its model type is not BPE")
    if not trainer.get(35, 0):
        reasons.append("it has no byte fallback")
    if normalizer.get(2):
        reasons.append("it rewrites characters before it splits the text")
    if not normalizer.get(3, 1):
        reasons.append("it puts no space before the text")
    if normalizer.get(4, 1):
        reasons.append("it removes repeated spaces")
    if reasons:
        raise ValueError(f"{path} is not a LLaMA tokenizer: {'; '.join(reasons)}")
    return _build(pieces, prefix_everywhere)


def _build(pieces: list[tuple[str, float, int]], prefix_everywhere: bool) -> Tokenizer:
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    merges = []
    for piece, score, kind in pieces:
        if kind == _NORMAL:
            halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
            merges += [(score, pair) for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
    merges.sort(key=lambda merge: merge[0], reverse=True)  # the best score is merged first; stable among equals

    unknown = next((piece for piece, _, kind in pieces if kind == _UNKNOWN), None)
    model = BPE(
        vocab=vocabulary, merges=[pair for _, pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    if prefix_everywhere:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    else:
        # Metaspace puts no space before text that begins with one; sentencepiece does.
        tokenizer.normalizer = normalizers.Replace(Regex(rf"\A[ {_SPACE}]"), 2 * _SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    for piece, _, kind in pieces:
        if kind in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.replace(_SPACE, " "), normalized=False)])
    return tokenizer


def _parse(data: bytes) -> tuple[list[tuple[str, float, int]], dict[int, object], dict[int, object]]:
    """Return the pieces (text, score, type), and trainer_spec and normalizer_spec by field number."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, object] = {}
    normalizer: dict[int, object] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), piece.get(2, 0.0), piece.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    return pieces, trainer, normalizer


def _fields(message: bytes) -> Iterator[tuple[int, object]]:
    """Yield (number, value) of each field: int for varints, float for 32-bit, bytes for all other fields."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 1:
            value, at = message[at : at + 8], at + 8
        elif kind == 2:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise IndexError("a field reaches beyond the end")
            value, at = message[at : at + length], at + length
        elif kind == 5:
            (value,), at = struct.unpack_from("<f", message, at), at + 4
        else:
            raise TypeError(f"wire type {kind}")
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
