"""Photographs, the backgrounds of the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from flexattn_cuda.errors import InputError

MIN_PHOTOGRAPHS = 8
MAX_SIDE = 1100  # pixels: images show about half of a photograph's side, at 384 pixels
_NOT_PHOTOGRAPHS = {"abstract", "desktop"}  # folders of Debian's mate-backgrounds: one drawing in several sizes


def photograph_files(folders: Sequence[Path]) -> list[Path]:
    """Return the JPEG files in the folders and their subfolders, sorted by file name.

    Raises:
        InputError: If there are fewer than MIN_PHOTOGRAPHS.
    """
    paths = [
        path
        for folder in map(Path, folders)
        for path in folder.rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg") and _NOT_PHOTOGRAPHS.isdisjoint(path.relative_to(folder).parts)
    ]
    if len(paths) < MIN_PHOTOGRAPHS:
        raise InputError(
            f"found {len(paths)} photographs (*.jpg, *.jpeg) in {', '.join(map(str, folders))}; "
            f"at least {MIN_PHOTOGRAPHS} are needed"
        )
    return sorted(paths, key=lambda path: path.name)


def find_photographs(folders: Sequence[Path], held_out: bool) -> list[Image.Image]:
    """Return every fourth of `photograph_files` if `held_out`, else the others, with sides of up to MAX_SIDE pixels.

    Raises:
        InputError: If there are fewer than MIN_PHOTOGRAPHS, or one cannot be read.
    """
    paths = photograph_files(folders)
    return [_open_photograph(path) for number, path in enumerate(paths) if (number % 4 == 3) == held_out]


def _open_photograph(path: Path) -> Image.Image:
    try:
        with Image.open(path) as photograph:
            photograph.draft("RGB", (MAX_SIDE, MAX_SIDE))
            photograph = photograph.convert("RGB")
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
        raise InputError(f"the photograph {path} is damaged or cannot be read: {error}") from None
    photograph.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return photograph
