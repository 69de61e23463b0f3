"""Whatever a user calls an image, as an upright RGB image of Pillow."""

from __future__ import annotations

import base64
import binascii
import os
import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import load_image as download

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.images import as_image, decode_image, flat_list, is_url, open_image, upright_rgb

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


def read_image(source: Any) -> Image.Image:
    """Return an image upright and in RGB, see `upright_rgb`.

    Args:
        source: A path, an http(s) URL, a data URI, base64 text, the bytes of an image file, a PIL image, or an array or
            tensor: [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, uint8, or floating point in 0..1. A shape
            that can be read both ways is channels-first for a tensor and channels-last for an array.

    Raises:
        InputError: If it is something else, or cannot be read.
    """
    if isinstance(source, str) and is_url(source):
        return _downloaded(source)
    if isinstance(source, str) and (encoded := _base64_text(source)) is not None:
        try:
            return read_image(base64.b64decode(encoded))
        except binascii.Error as error:
            raise InputError(f"the image is not valid base64: {error}") from None
    if isinstance(source, (str, os.PathLike)):
        return open_image(os.fspath(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode_image(bytes(source))
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return upright_rgb(as_image(_levels(source)))
    return upright_rgb(as_image(source))


def read_images(images: Any) -> list[Image.Image]:
    """Return one image, or a list or nested list of images, as one list; [] for None. A 4-D array is a list of images.

    Raises:
        InputError: If something is not an image.
    """
    found: list[Image.Image] = []
    for source in flat_list(images):
        is_batch = isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim == 4
        found += [read_image(one) for one in (source if is_batch else [source])]
    return found


def _downloaded(url: str) -> Image.Image:
    try:
        return upright_rgb(download(url))
    except InputError:
        raise
    except Exception as error:  # errors of the HTTP client and of Pillow, of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the image {url} cannot be downloaded: {reason}") from None


def _base64_text(source: str) -> str | None:
    """Return the base64 text of a data URI or of a bare string, None if the string is a path."""
    if source.startswith("data:image/"):
        return source.partition(",")[2]
    return source if _BASE64.fullmatch(source) and not os.path.exists(source) else None


def _levels(pixels: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return an array or tensor as uint8 [H, W] or [H, W, 3 or 4]."""
    channels_first = isinstance(pixels, torch.Tensor)
    values = pixels.detach().cpu() if isinstance(pixels, torch.Tensor) else pixels
    if isinstance(values, torch.Tensor):
        values = (values.float() if values.is_floating_point() else values).numpy()
    if values.ndim == 3:
        first, last = values.shape[0] in (1, 3, 4), values.shape[2] in (1, 3, 4)
        if first and (channels_first or not last):
            values = np.moveaxis(values, 0, 2)
        if values.shape[2] == 1:
            values = values[:, :, 0]
    if np.issubdtype(values.dtype, np.floating):
        if not (np.isfinite(values).all() and values.min(initial=0) >= 0 and values.max(initial=0) <= 1):
            raise InputError("an image of floating-point numbers must lie in 0..1; scale it first, or pass uint8")
        values = (values * 255).round().astype(np.uint8)
    return np.ascontiguousarray(values)
