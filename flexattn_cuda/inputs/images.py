"""Image files and arrays as upright RGB, padded to a square and resized as the released preprocessing does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from flexattn_cuda.errors import InputError

_LONGEST_SIDE = 65_535  # pixels; what a JPEG can hold. Beyond it the padded square alone would fill the memory.
_BAND_PIXELS = 1 << 24  # pixels of the padded square that are held at a time


# ------------------------------------------------------------------------------------------------------------- images


def open_image(path: str | Path) -> Image.Image:
    """Reads an image file, upright and in RGB. InputError where it is missing, empty, damaged or too large."""
    path = Path(path)
    try:
        if not path.exists():
            raise InputError(f"there is no image {path}")
        if not path.is_file():
            raise InputError(f"{path} is not an image file; pass the path of a PNG, JPEG or other image file")
        if path.stat().st_size == 0:
            raise InputError(f"the image {path} is an empty file")
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise InputError(f"the image {path} cannot be read: {error.strerror}") from None
    try:
        with Image.open(path) as image:
            return upright_rgb(image)
    except InputError as error:
        raise InputError(f"the image {path} cannot be used: {error}") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(f"the image {path} has more than {limit} pixels; make it smaller first") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{path} is not an image that can be read; PNG, JPEG and other common formats can") from None
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
        raise InputError(f"the image {path} is damaged or cannot be read: {error}") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it: turned by its EXIF orientation, transparent parts white, 8 bits of RGB."""
    if min(image.size) < 1:
        raise InputError(f"it has {image.width} x {image.height} pixels")
    if max(image.size) > _LONGEST_SIDE:
        raise InputError(f"it has {image.width} x {image.height} pixels; a side may have at most {_LONGEST_SIDE}")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        levels = np.asarray(image, dtype=np.float32)
        if levels.max() > 255:  # 16 bits; Pillow would clip them
            levels = levels / 257
        image = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        backdrop = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(backdrop, image)
    return image.convert("RGB")


def valid_rect_of(width: int, height: int, side: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right), half-open, of an image inside its square padding, in cells of a side x side grid.

    The margin is rounded as in the released code: `(W - H) // 2` first, truncated to cells last.
    """
    margin = int((abs(width - height) // 2) / max(width, height) * side)
    if width > height:
        return margin, 0, side - margin, side
    return 0, margin, side, side - margin


def square_resized(image: Image.Image, side: int, colour: tuple[int, int, int]) -> Image.Image:
    """The image padded to a centred square of `colour`, resized to side x side with Pillow's bicubic filter.

    Pillow resizes rows first, then columns, so the square is made a band of rows at a time: the pixels are those of
    the whole square resized at once, without holding it.
    """
    size = max(image.size)
    left, top = (size - image.width) // 2, (size - image.height) // 2
    narrow = Image.new("RGB", (side, size), colour)
    rows = max(1, _BAND_PIXELS // size)
    for begin in range(0, image.height, rows):
        end = min(begin + rows, image.height)
        band = Image.new("RGB", (size, end - begin), colour)
        band.paste(image.crop((0, begin, image.width, end)), (left, 0))
        narrow.paste(band.resize((side, end - begin), Image.Resampling.BICUBIC), (0, top + begin))
    return narrow.resize((side, side), Image.Resampling.BICUBIC)


def as_image(image: Any) -> Image.Image:
    """A PIL image from a PIL image or a uint8 array [H, W] or [H, W, 3 or 4]."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        if image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4)):
            return Image.fromarray(image)
        raise InputError(f"an array {list(image.shape)} is no image; it must be [H, W] or [H, W, 3 or 4]")
    raise InputError(
        f"an image is a PIL image or a uint8 array [H, W, 3], not {type(image).__name__}; open a file with open_image"
    )


def flat_list(images: Any) -> list[Any]:
    """One image, a list, or a list of lists, as one list."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flat_list(part)]
    return [images]
