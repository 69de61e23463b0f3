"""Images of every format and mode that Pillow writes, whole and damaged."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from flexattn_cuda.inputs.images import image_size, open_image
from python_tests.attack.damage import damaged
from python_tests.attack.verdicts import Verdict, WrongError

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16")
EXACT = ("BMP", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF")  # formats that keep pixels as they are
SKIPPED = ("PDF", "PALM", "MSP", "EPS", "MPO", "SPIDER")  # which Pillow cannot read again, or by another program alone


class Images:
    """One image a case: written by Pillow, and damaged in all cases but those of whole number of turns."""

    def __init__(self, folder: Path):
        warnings.simplefilter("ignore")
        Image.init()
        self._path = folder / "image"
        self._written = self._write_all()

    def _write_all(self) -> list[tuple[str, str, bytes]]:
        written = []
        for form in sorted(set(Image.SAVE) - set(SKIPPED)):
            for mode in MODES:
                try:
                    picture(mode, form).save(self._path, form)
                    Image.open(self._path).load()
                except Exception:  # a mode that the format does not have
                    continue
                written.append((form, mode, self._path.read_bytes()))
        return written

    def run(self, number: int, rng: random.Random) -> Verdict:
        form, mode, content = self._written[number % len(self._written)]
        if number < len(self._written):
            return self._check_whole(form, mode, content)
        self._path.write_bytes(damaged(content, rng))
        Image.MAX_IMAGE_PIXELS = 1_000_000  # a damaged header may ask for gigabytes
        image = open_image(self._path)
        if (image.mode, image.info) != ("RGB", {}) or min(image.size) < 1:
            raise WrongError(f"a damaged {form} of mode {mode} became {image}")
        if image_size(self._path) != image.size:
            raise WrongError(f"a damaged {form} has {image.size} pixels, not {image_size(self._path)} as was said")
        return Verdict.RIGHT

    def _check_whole(self, form: str, mode: str, content: bytes) -> Verdict:
        self._path.write_bytes(content)
        found = np.asarray(open_image(self._path), dtype=int)
        with Image.open(self._path) as read:
            keeps_alpha = "A" in read.getbands() or "transparency" in read.info
        expected = np.asarray(as_seen(picture(mode, form), keeps_alpha), dtype=int)
        if found.shape != expected.shape and form not in ("ICO", "ICNS", "WMF"):
            raise WrongError(f"{form} of mode {mode} has shape {found.shape}")
        if form in EXACT and np.abs(found - expected).max() > 1:
            raise WrongError(f"{form} of mode {mode} differs by {np.abs(found - expected).max()}")
        return Verdict.RIGHT


def picture(mode: str, form: str) -> Image.Image:
    """Return a smooth image of a mode with all levels, half of it transparent where the mode can be."""
    ramp = Image.linear_gradient("L").resize((48, 32))
    image = Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_180), Image.new("L", ramp.size, 90)))
    if mode == "I;16" or (mode == "I" and form in ("PNG", "PPM")):  # which write 16 bits
        return Image.fromarray(np.asarray(ramp).astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    if mode in ("I", "F"):
        return ramp.convert(mode)
    if mode in ("LA", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        image.paste((0, 0, 0, 0), (0, 0, 24, 32))
        return image.convert("LA").convert("PA") if mode == "PA" else image.convert(mode)
    if mode == "LAB":
        return Image.frombytes("LAB", ramp.size, image.tobytes())
    return image.convert(mode)


def as_seen(image: Image.Image, keeps_alpha: bool) -> Image.Image:
    """Return what Pillow itself makes of an image, on a white ground if the file holds what is transparent."""
    if image.mode == "I;16" or (image.mode == "I" and image.getextrema()[1] > 255):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode not in ("LA", "PA", "RGBA", "RGBa"):
        return image.convert("RGB")
    image = (image if image.mode in ("RGBA", "RGBa") else image.convert("LA")).convert("RGBA")
    if not keeps_alpha:
        return image.convert("RGB")
    ground = Image.new("RGB", image.size, "white")
    ground.paste(image, mask=image.getchannel("A"))
    return ground
