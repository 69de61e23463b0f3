"""The fonts on the signs that the default model is trained and tested on, by their files' names.

All are in Debian: fonts-dejavu-core, fonts-liberation, fonts-roboto-unhinted, fonts-crosextra-carlito,
fonts-crosextra-caladea, fonts-inter, fonts-hack, fonts-firacode, fonts-jetbrains-mono, fonts-cabin, fonts-dosis,
fonts-karla, fonts-quicksand, fonts-comfortaa, fonts-league-spartan, fonts-vollkorn, fonts-urw-base35, fonts-texgyre,
fonts-sil-andika and fonts-tuffy; held out are fonts-open-sans, fonts-lato, fonts-clear-sans and fonts-noto-core.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexattn_cuda.errors import InputError

FONTS = (
    "DejaVuSans-Bold.ttf",
    "DejaVuSans.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif-Bold.ttf",
    "LiberationSans-Bold.ttf",
    "LiberationSans-Regular.ttf",
    "LiberationSansNarrow-Bold.ttf",
    "LiberationMono-Bold.ttf",
    "LiberationSerif-Bold.ttf",
    "LiberationSerif-Regular.ttf",
    "Roboto-Bold.ttf",
    "Roboto-Regular.ttf",
    "RobotoCondensed-Bold.ttf",
    "Carlito-Bold.ttf",
    "Carlito-Regular.ttf",
    "Caladea-Bold.ttf",
    "Inter-Bold.otf",
    "Inter-Regular.otf",
    "Hack-Bold.ttf",
    "FiraCode-Bold.ttf",
    "JetBrainsMono-Bold.ttf",
    "Cabin-Bold.otf",
    "Cabin-Regular.otf",
    "Dosis-Bold.otf",
    "Karla-Bold.otf",
    "Quicksand-Bold.ttf",
    "Comfortaa-Bold.ttf",
    "LeagueSpartan-Bold.otf",
    "Vollkorn-Bold.ttf",
    "C059-Bold.otf",
    "P052-Bold.otf",
    "texgyreadventor-bold.otf",
    "Andika-Bold.ttf",
    "tuffy_bold.ttf",
)
HELD_OUT_FONTS = ("OpenSans-Bold.ttf", "Lato-Bold.ttf", "ClearSans-Bold.ttf", "NotoSerif-Bold.ttf")


def find_fonts(folders: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Return the files with these names, from the folders and their subfolders.

    Raises:
        InputError: If one is missing.
    """
    files = {path.name: path for folder in folders for path in sorted(folder.rglob("*"), reverse=True)}
    missing = [name for name in names if name not in files]
    if missing:
        raise InputError(
            f"the fonts {', '.join(missing)} are not in {', '.join(map(str, folders))}; "
            "install the packages that studies/default_model/fonts.py names, or point --fonts at them"
        )
    return [files[name] for name in names]
