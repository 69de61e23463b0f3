"""Read `tokenizer.model`, the sentencepiece file of LLaMA tokenizers, without the sentencepiece package.

The file is a protobuf message (sentencepiece_model.proto). These fields are read:

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
    """Return the tokenizer of a sentencepiece BPE model of the LLaMA kind: byte fallback, a space before the text.

    Args:
        path: The file, usually named tokenizer.model.
        prefix_everywhere: Also put a space before text that follows a special token, as transformers' "legacy"
            tokenizers do.

    Raises:
        ValueError: If the file is damaged or holds another kind of model.
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
    merges.sort(key=lambda merge: merge[0], reverse=True)  # the highest score is merged first

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
    """Yield (number, value) of each field: int for varints, float for 32-bit fields, bytes for all others."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        wire_type = key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
        elif wire_type == 5:
            (value,), position = struct.unpack_from("<f", message, position), position + 4
        elif wire_type in (1, 2):
            length, position = (8, position) if wire_type == 1 else _varint(message, position)
            if position + length > len(message):
                raise IndexError("a field extends beyond the end")
            value, position = message[position : position + length], position + length
        else:
            raise TypeError(f"wire type {wire_type}")
        yield key >> 3, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Return a number of 7 bits per byte, the lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
