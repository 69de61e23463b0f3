"""Image files and arrays: made upright RGB, padded to a square, and resized as the released preprocessing does."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from flexattn_cuda.errors import InputError

_MAX_SIDE = 65_535  # pixels, as a JPEG can hold; beyond it the padded square alone would fill the memory
_MAX_PIXELS = 1 << 28  # a phone takes 200 million; decoded and made RGB they take 8 bytes each
_PILLOWS_LIMIT = Image.MAX_IMAGE_PIXELS  # beyond which Pillow warns, and beyond twice as many refuses
_BAND_PIXELS = 1 << 24  # pixels of an image or its padded square that are worked on at a time
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")  # modes
_SIXTEEN_BITS_IN_I = ("PNG", "PPM")  # formats whose mode "I" holds 16 bits
_opening = threading.Lock()
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
        with _open(io.BytesIO(data), formats) as image:
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
        with _open(path) as image:
            yield image
    except InputError as error:
        raise InputError(f"the image {path} cannot be used: {error}") from None
    except Image.DecompressionBombError:
        chosen = Image.MAX_IMAGE_PIXELS
        limit = _MAX_PIXELS if chosen is None or chosen == _PILLOWS_LIMIT else 2 * chosen
        raise InputError(f"the image {path} has more than {limit} pixels; make it smaller first") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that can be read; use PNG, JPEG or another common format") from None
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
        raise InputError(f"the image {path} is damaged or cannot be read: {_one_line(error)}") from None


def _open(file: Path | io.BytesIO, formats: Sequence[str] | None = None) -> Image.Image:
    """Open an image of up to `_MAX_PIXELS`, unless Pillow's user has set another limit than Pillow's."""
    with _opening:
        before = Image.MAX_IMAGE_PIXELS
        if before == _PILLOWS_LIMIT:
            Image.MAX_IMAGE_PIXELS = _MAX_PIXELS
        try:
            return Image.open(file, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = before


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
    white. Grey values of 16 bits lie in 0..65535, as the mode or the format says; those of 32 bits lie in 0..255, as in
    Pillow. The result carries no EXIF block, so that no one turns it again.

    Raises:
        InputError: If the image is empty or too large, cannot be decoded, or holds NaN, infinite values, or grey values
            in another range, such as floats in 0..1.
    """
    _check_size(*image.size)
    if type(image) is Image.Image and image.mode == "RGB" and not image.info and _orientation(image) == 1:
        return image
    is_deep = image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in _SIXTEEN_BITS_IN_I)
    try:
        image.load()
        upright = _turned(image)
        if upright.mode in ("I", "F") or upright.mode.startswith("I;"):
            upright = _grey_as_rgb(upright, is_deep)
        elif "A" in upright.getbands() or "transparency" in upright.info:
            upright = _in_bands(upright, _on_white)
        elif upright.mode != "RGB" or upright is image:
            upright = upright.convert("RGB")
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
        raise InputError(f"the image is damaged or cannot be decoded: {_one_line(error)}") from None
    upright.info = {}
    return upright


def _check_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise InputError(f"the image has {width} x {height} pixels")
    if max(width, height) > _MAX_SIDE:
        raise InputError(f"the image has {width} x {height} pixels; a side may have at most {_MAX_SIDE}")
    if width * height > _MAX_PIXELS:
        raise InputError(
            f"the image has {width} x {height} pixels; at most {_MAX_PIXELS} are allowed, so make it smaller first"
        )


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


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the first row of each band and the band, so that what is made of it is never held for the whole image."""
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    converted = Image.new("RGB", image.size)
    for top, band in _bands(image):
        converted.paste(convert(band), (0, top))
    return converted


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _grey_as_rgb(image: Image.Image, is_deep: bool) -> Image.Image:
    """Return a grey image of 16 bits (`is_deep`) or 32, whose range is not known from its values."""
    white = 65_535 if is_deep else 255
    extremes = np.array([(levels.min(), levels.max()) for levels in (np.asarray(band) for _, band in _bands(image))])
    if not np.isfinite(extremes).all():
        raise InputError("the image holds values that are NaN or infinite; replace them first")
    low, high = extremes[:, 0].min(), extremes[:, 1].max()
    if low < 0 or high > white or (image.mode == "F" and 0 < high <= 1):
        raise InputError(
            f"the image holds grey values from {low:g} to {high:g} in 32 bits, so that it is not known what is white; "
            "scale them to 0..255, or save it with 8 or 16 bits"
        )
    scale = np.float32(255 / white)
    return _in_bands(image, lambda band: Image.fromarray((np.asarray(band) * scale).round().astype(np.uint8)))


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
