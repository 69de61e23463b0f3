"""The texts of a batch of prompts, and whether the images that came with them match their marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.images import flat_list


def checked_texts(text: Any, mark: str) -> list[str]:
    """Return prompts, in which `mark` stands for an image, as a list; InputError unless they are one string or more."""
    if text is None:
        raise InputError(f"there is no text; every image needs a prompt with an {mark} mark")
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(one, str) for one in texts):
        raise InputError(f"text must be a string or a list of strings, not {text!r}")
    return list(texts)


def check_marks(mark: str, marks: Sequence[int], images: Any, count: int) -> None:
    """Raise InputError if images do not match the marks, in all or text by text.

    Args:
        mark: What stands for an image.
        marks: How many of them each text has.
        images: As the caller gave them; a list of lists is one list per text.
        count: How many images that are.
    """
    if sum(marks) != count:
        raise InputError(
            f"the text has {sum(marks)} {mark} marks, but {count} images came with it; "
            "put one mark into the text for every image"
        )
    if isinstance(images, (list, tuple)) and images and all(isinstance(part, (list, tuple)) for part in images):
        given = [len(flat_list(part)) for part in images]
        if given != list(marks):
            raise InputError(
                f"the texts have {list(marks)} {mark} marks, but {given} images came with them, text by text"
            )
