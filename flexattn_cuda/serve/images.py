"""Images as the model takes them. Those that were asked about before are kept, and not encoded again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

from flexattn_cuda.inputs.frames import Frame
from flexattn_cuda.tasks.encoded import encoded
from flexattn_cuda.tasks.models import HRModel


@dataclass(frozen=True)
class ServedImage:
    """An image as the model takes it.

    Attributes:
        digest: Hash of its file.
        width: In pixels, upright.
        height: In pixels, upright.
        frame: The part of it that the model sees.
        inputs: Arguments of the model's forward.
        encoded: Whether the inputs are those that `encode` returns.
    """

    digest: str
    width: int
    height: int
    frame: Frame
    inputs: dict[str, Any]
    encoded: bool = False

    @property
    def size(self) -> int:
        """Bytes that the inputs take."""
        tensors = [one for value in self.inputs.values() for one in (value if isinstance(value, list) else [value])]
        return sum(tensor.nbytes for tensor in tensors)


def encode(model: HRModel, image: ServedImage) -> ServedImage:
    """Return an image with what the model can reuse, see `tasks.encoded`."""
    return replace(image, inputs=encoded(model, image.inputs), encoded=True)


class ImageCache:
    """Encoded images by their hash, those that were used last, up to so many bytes.

    Args:
        capacity: In bytes.
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._images: OrderedDict[str, ServedImage] = OrderedDict()
        self._lock = threading.Lock()
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return self._size

    def __len__(self) -> int:
        return len(self._images)

    def find(self, digest: str) -> ServedImage | None:
        """Return an image, which becomes the one that was used last."""
        with self._lock:
            found = self._images.get(digest)
            if found is not None:
                self._images.move_to_end(digest)
        return found

    def keep(self, image: ServedImage) -> None:
        """Keep an encoded image, and drop those that were used longest ago to make room for it."""
        if image.size > self._capacity:
            return
        with self._lock:
            if image.digest in self._images:
                return
            self._images[image.digest] = image
            self._size += image.size
            while self._size > self._capacity:
                _, dropped = self._images.popitem(last=False)
                self._size -= dropped.size
