"""What the commands that ask about images share: how they name an image, and how they print an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def open_named(name: str) -> Image.Image:
    """Return the image with a file's name or a URL; InputError if it cannot be read."""
    from flexattn_cuda.inputs.images import is_url, open_image

    if is_url(name):
        from flexattn_cuda.inputs.image_sources import read_image

        return read_image(name)
    return open_image(name)


class AnswerPrinter:
    """Prints pieces of text as they come, without the space that many tokenizers begin with."""

    _started = False

    def __call__(self, text: str) -> None:
        """Print a piece."""
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        print(text, end="", flush=True)
