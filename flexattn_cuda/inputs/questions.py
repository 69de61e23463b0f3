"""What a question may be. Imports nothing heavy, so that a command can refuse one at once."""

from __future__ import annotations

from typing import Any

from flexattn_cuda.errors import InputError

IMAGE = "<image>"


def check_question(question: str) -> None:
    """InputError where a question cannot be asked."""
    if not isinstance(question, str) or not question.strip():
        raise InputError("the question is empty")
    if IMAGE in question:
        raise InputError(f"the question contains {IMAGE}, the mark of an image's place; leave it out")


def user_message(question: str, images: int = 1) -> dict[str, Any]:
    """What a chat template is told of a question about so many images."""
    return {
        "role": "user",
        "content": [{"type": "image"}] * images + [{"type": "text", "text": question}],
    }
