"""Images that the encoder is trained on: crops at every resolution that a system uses, with labels of their tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image

from studies.small.backbone import SceneImages
from studies.small.objects import COLORS, VEHICLES
from studies.small.painter import SIDE, Drawing, Painter
from studies.small.questions import SIGN_TASKS, TASKS
from studies.small.scenes import SIZES, draw_scene, object_scale, sign_content
from studies.small.token_labels import LabelledImages, TokenLabels

_WHOLE_SHARE = 0.25  # of whole images among those of a batch
_ZOOM_SHARES = {2: 0.15, 3: 0.45, 4: 0.15}  # of tiles, by zoom


class EncoderData:
    """Crops of crowded images at the resolution of a tile, and whole low-resolution images.

    Args:
        painter: Draws; its generator also chooses the crops.
        images: Makes the low-resolution images.
        cell: Side of a token in pixels.
        zooms: Of the systems that see tiles.
    """

    def __init__(self, painter: Painter, images: SceneImages, cell: int, zooms: Sequence[int] = tuple(_ZOOM_SHARES)):
        self.painter, self.images, self.cell, self.zooms = painter, images, cell, zooms

    def tile(self, resolution: int, side: int, size: str) -> LabelledImages:
        """Return a crop of `side` x `side` pixels of an image whose longer side is scaled to `resolution`.

        Args:
            resolution: In pixels.
            side: In pixels.
            size: Of the objects, a key of SIZES.
        """
        rng = self.painter.rng
        canvas = side + side // 4
        drawing = self._crowded(
            round(canvas * SIDE / resolution), size, (0.15, 0.5) if resolution > 200 else (0.3, 0.8)
        )
        left, top = rng.randint(0, canvas - side), rng.randint(0, canvas - side)
        image = drawing.image.resize((canvas, canvas), Image.Resampling.BICUBIC)
        ratio = canvas / drawing.image.width
        labels = TokenLabels(side // self.cell, self.cell)
        for sign in drawing.signs:
            labels.add_sign(sign.moved(left / ratio, top / ratio, ratio))
        for vehicle in drawing.vehicles:
            labels.add_vehicle(vehicle.moved(left / ratio, top / ratio, ratio))
        crop = image.crop((left, top, left + side, top + side))
        return LabelledImages(normalised_pixels(crop, self.images), labels.tensors())

    def _crowded(self, side: int, size: str, shares: tuple[float, float]) -> Drawing:
        """Draw many signs or many vehicles on an image of `side` pixels."""
        painter, rng = self.painter, self.painter.rng
        room = (side / SIDE / SIZES[size]) ** 2  # for objects, relative to that of a scene
        if rng.random() < 0.65:
            drawing = Drawing(painter.background(side, side, shares), object_scale(size))
            for color in rng.choices(list(COLORS), k=min(12, max(2, round(room * rng.uniform(15, 45))))):
                painter.add_sign(drawing, color, partial(_crowded_content, rng))
        else:
            drawing = Drawing(painter.ground(side, side), object_scale(size))
            for kind in rng.choices(VEHICLES, k=min(16, max(2, round(room * rng.uniform(20, 80))))):
                painter.add_vehicle(drawing, kind)
        return drawing

    def whole(self) -> LabelledImages:
        """Return a scene's image at low resolution."""
        rng, low = self.painter.rng, self.images.lowres_size
        scene = draw_scene(self.painter, rng.choice(TASKS), rng.choice(list(SIZES)))
        labels = TokenLabels(low // self.cell, self.cell)
        for sign in scene.signs:
            labels.add_sign(sign.moved(0, 0, low / SIDE))
        for vehicle in scene.vehicles:
            labels.add_vehicle(vehicle.moved(0, 0, low / SIDE))
        return LabelledImages(self.images([scene.image])["pixel_values"][0], labels.tensors())

    def batch(self, count: int) -> LabelledImages:
        """Return tiles of every zoom, and whole images, of lowres x lowres pixels."""
        rng, low, images = self.painter.rng, self.images.lowres_size, []
        shares = {1: _WHOLE_SHARE} | {zoom: _ZOOM_SHARES[zoom] for zoom in self.zooms}
        for _ in range(count):
            zoom = rng.choices(list(shares), list(shares.values()))[0]
            size = rng.choices(list(SIZES), (0.6, 0.4))[0]
            images.append(self.whole() if zoom == 1 else self.tile(zoom * low, low, size))
        return LabelledImages.stack(images)

    def hd_batch(self, count: int) -> LabelledImages:
        """Return tiles of 2/3 lowres pixels, as LLaVA-HD cuts 2 x 2 of them from an image of 4/3 lowres."""
        low, rng = self.images.lowres_size, self.painter.rng
        tiles = [self.tile(low * 4 // 3, low * 2 // 3, rng.choices(list(SIZES), (0.3, 0.7))[0]) for _ in range(count)]
        return LabelledImages.stack(tiles)


def _crowded_content(rng: random.Random) -> tuple[str, ...]:
    """Return what a sign in a crowd shows: digits, the hardest to read, twice as often."""
    return sign_content(rng, rng.choices(SIGN_TASKS, (1, 1, 2))[0], rng.randrange(2))


def normalised_pixels(image: Image.Image, images: SceneImages) -> torch.Tensor:
    """Return an image at its own size as the encoder takes it, [3, H, W] float32."""
    mean, std = (torch.tensor(channels)[:, None, None] for channels in (images.image_mean, images.image_std))
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
