"""Image files and arrays: made upright RGB, padded to a square, and resized as the released preprocessing does."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from flexattn_cuda.errors import InputError

_MAX_SIDE = 65_535  # pixels, as a JPEG can hold; beyond it the padded square alone would fill the memory
_BAND_PIXELS = 1 << 24  # pixels of the padded square that are held at a time
_ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def open_image(path: str | Path) -> Image.Image:
    """Read an image file.

    Args:
        path: A PNG, JPEG or any other file that Pillow reads.

    Returns:
        The image upright and in RGB, see `upright_rgb`.

    Raises:
        InputError: If the file is missing, empty, damaged, not an image, or too large.
    """
    with _opened(path) as image:
        return upright_rgb(image)


def images_in(folder: Path) -> list[str]:
    """Return the names of the image files in a folder, in their order: those with an extension that Pillow reads.

    Raises:
        InputError: If the folder cannot be read, or holds none.
    """
    Image.init()
    readable = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}") from None
    found = [name for name in names if Path(name).suffix.lower() in readable and not name.startswith(".")]
    if not found:
        raise InputError(f"the folder {folder} holds no files that end in .png, .jpg or another image format's name")
    return found


def is_url(source: str) -> bool:
    """Return whether text names an image on the web, and not a file."""
    return source.startswith(("http://", "https://"))


def read_standard_input() -> Image.Image:
    """Read an image file from standard input, as `open_image` would.

    Raises:
        InputError: If standard input is a terminal, or not an image.
    """
    if sys.stdin.isatty():
        raise InputError("the image is '-', but standard input is a terminal; pipe an image file into it, or name one")
    try:
        return decode_image(sys.stdin.buffer.read())
    except InputError as error:
        raise InputError(f"standard input cannot be used: {error}") from None


def decode_image(data: bytes, formats: Sequence[str] | None = None, max_pixels: int | None = None) -> Image.Image:
    """Read the bytes of an image file, as `open_image` would.

    Args:
        data: The file.
        formats: Names of the formats to read, as Pillow has them; None: all that it reads.
        max_pixels: Maximum number of pixels, which is checked before any is decoded.

    Raises:
        InputError: If they are not such an image, damaged, or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise InputError(
                    f"the image has {image.width} x {image.height} pixels; at most {max_pixels} in all are allowed, "
                    "so make it smaller"
                )
            return upright_rgb(image)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
        reason = type(error).__name__ if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"the bytes are not an image that can be read: {reason}") from None


def image_size(path: str | Path) -> tuple[int, int]:
    """Return (width, height) in pixels of the image that `open_image` would read, mostly without decoding it.

    Raises:
        InputError: If the file is missing, empty or not an image.
    """
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in _ON_ITS_SIDE else (width, height)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file; errors of opening and of decoding it in the block become InputErrors that name it."""
    path = Path(path)
    _check_file(path)
    try:
        with Image.open(path) as image:
            yield image
    except InputError as error:
        raise InputError(f"the image {path} cannot be used: {error}") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(f"the image {path} has more than {limit} pixels; make it smaller first") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that can be read; use PNG, JPEG or another common format") from None
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
        raise InputError(f"the image {path} is damaged or cannot be read: {_one_line(error)}") from None


def _check_file(path: Path) -> None:
    try:
        if not path.exists():
            raise InputError(f"there is no image {path}")
        if not path.is_file():
            raise InputError(f"{path} is not an image file; pass the path of a PNG, JPEG or other image file")
        if path.stat().st_size == 0:
            raise InputError(f"the image {path} is an empty file")
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise InputError(f"the image {path} cannot be read: {error.strerror}") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image as a viewer shows it.

    It is turned as its EXIF block says (an unreadable block is ignored, as viewers do), and transparent parts become
    white. Grey values of more than 8 bits lie in 0..255, as in Pillow, or in 0..65535 if one exceeds 255. The result
    carries no EXIF block, so that no one turns it again.

    Raises:
        InputError: If the image is empty or too large, cannot be decoded, or holds NaN, infinite values, or grey values
            in another range, such as floats in 0..1.
    """
    if min(image.size) < 1:
        raise InputError(f"the image has {image.width} x {image.height} pixels")
    if max(image.size) > _MAX_SIDE:
        raise InputError(f"the image has {image.width} x {image.height} pixels; a side may have at most {_MAX_SIDE}")
    try:
        image.load()
        image = _turned(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            image = _eight_bits(image)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
        raise InputError(f"the image is damaged or cannot be decoded: {_one_line(error)}") from None
    image.info = {}
    return image


def _orientation(image: Image.Image) -> int:
    try:
        orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # SyntaxError, struct.error, ...: an EXIF block that no one can read turns nothing
        return 1
    return orientation


def _turned(image: Image.Image) -> Image.Image:
    if _orientation(image) == 1:
        return image
    upright = ImageOps.exif_transpose(image)
    return image if upright is None else upright


def _eight_bits(image: Image.Image) -> Image.Image:
    levels = np.asarray(image, dtype=np.float32)
    if not np.isfinite(levels).all():
        raise InputError("the image holds values that are NaN or infinite; replace them first")
    low, high = levels.min(), levels.max()
    if low < 0 or high > 65_535 or (image.mode == "F" and 0 < high <= 1):
        raise InputError(
            f"the image holds grey values from {low:g} to {high:g}; scale them to 0..255 or 0..65535 first"
        )
    if high > 255:  # 16 bits; Pillow would clip them
        levels = levels / 257
    return Image.fromarray(levels.round().astype(np.uint8))


def valid_rect_of(width: int, height: int, side: int) -> tuple[int, int, int, int]:
    """Return where an image of width x height pixels lies inside its square padding, in cells of a side x side grid.

    The margin is rounded as in the released code: `(W - H) // 2` first, truncated to cells last.

    Returns:
        (top, left, bottom, right), half-open.
    """
    margin = int((abs(width - height) // 2) / max(width, height) * side)
    if width > height:
        return margin, 0, side - margin, side
    return 0, margin, side, side - margin


def square_resized(image: Image.Image, side: int, colour: tuple[int, int, int]) -> Image.Image:
    """Return an RGB image padded to a centred square of `colour` and resized to side x side, bicubic as in Pillow.

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
    """Return a PIL image for a PIL image or a uint8 array [H, W] or [H, W, 3 or 4].

    Raises:
        InputError: If it is anything else.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        if 0 not in image.shape and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            return Image.fromarray(image)
        raise InputError(f"an array {list(image.shape)} is not an image; it must be [H, W] or [H, W, 3 or 4]")
    given = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
    raise InputError(f"an image is a PIL image or a uint8 array [H, W, 3], not {given}; open a file with open_image")


def flat_list(images: Any) -> list[Any]:
    """Return one image, a list of images, or a list of such lists as one list; [] for None."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flat_list(part)]
    return [images]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
