"""Lines of JSON, each with a checksum: a damaged line is noticed and costs itself alone.

{"line": 3, "answer": "42"}<tab>1c291ca3
"""

from __future__ import annotations

import json
import zlib
from typing import Any


def encode_json(record: dict[str, Any]) -> bytes:
    """Encode an object without a line break; half a surrogate pair, which UTF-8 lacks, becomes its JSON escape."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")


def to_line(record: dict[str, Any], key: int = 0) -> bytes:
    """Return a line that `from_line` reads with the same key, such as the checksum of the file's header."""
    text = encode_json(record)
    return text + _ending(text, key)


def from_line(line: bytes, key: int = 0) -> dict[str, Any] | None:
    """Return the object of a line; None if the line is damaged, cut off, or was written with another key."""
    text, _, checksum = line.rpartition(b"\t")
    if not text or b"\t" + checksum != _ending(text, key):
        return None
    record: dict[str, Any] = json.loads(text)
    return record


def _ending(text: bytes, key: int) -> bytes:
    return b"\t%08x\n" % zlib.crc32(text, key)
