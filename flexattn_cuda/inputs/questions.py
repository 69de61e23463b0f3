"""What may be asked. Imports nothing heavy, so that a command can refuse a question at once."""

from __future__ import annotations

from typing import Any

from flexattn_cuda.errors import InputError

IMAGE = "<image>"


def check_question(question: str) -> None:
    """Raise InputError if a question is not text, is empty, or contains <image>."""
    if not isinstance(question, str):
        raise InputError(f"the question is {question!r}; it must be text")
    if not question.strip():
        raise InputError("the question is empty")
    try:
        question.encode()
    except UnicodeEncodeError:  # an argument in another encoding, or "\ud800" in JSON
        raise InputError("the question contains half of a surrogate pair, which is not a character") from None
    if IMAGE in question:
        raise InputError(f"the question contains {IMAGE}, which marks where an image goes; leave it out")


def user_message(question: str, images: int = 1) -> dict[str, Any]:
    """Return the chat message that asks a question about a number of images, as chat templates take it."""
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}
