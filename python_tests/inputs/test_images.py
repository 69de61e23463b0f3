"""Images to tensors: the released preprocessing, every kind of image file, and images that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flexattn_cuda.checkpoints import load_config
from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs import images
from flexattn_cuda.inputs.image_processor import FlexAttnLlavaImageProcessor
from flexattn_cuda.inputs.images import image_size, open_image, square_resized, upright_rgb, valid_rect_of

VECTORS = Path(__file__).parents[1] / "data" / "reference_vectors"
GREY = (122, 116, 104)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def colours(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


@pytest.fixture
def small_processor():
    return FlexAttnLlavaImageProcessor(lowres_size=48, highres_size=144, lr_side=6)


# ------------------------------------------------------------------------------------------------------ preprocessing


@pytest.mark.parametrize("name, file", [("square", "image_square.png"), ("wide4x3", "image_wide4x3.png")])
def test_pixels_equal_the_released_ones(name, file):
    expected = np.load(VECTORS / "model_cases.npz")
    processor = FlexAttnLlavaImageProcessor.from_config(VECTORS / "model", load_config(VECTORS / "model"))
    pixels = processor(Image.open(VECTORS / file))
    assert np.abs(pixels["pixel_values_hr"][0, :, ::36, ::36].numpy() - expected[f"{name}.pixel_sample"]).max() <= 1e-6
    assert np.abs(pixels["pixel_values"][0, :, ::12, ::12].numpy() - expected[f"{name}.lowres_sample"]).max() <= 1e-6


def test_shapes_and_order_of_a_batch(small_processor):
    images = [noise(60, 40, 1), noise(30, 90, 2), noise(50, 50, 3)]
    together = small_processor(images)
    assert together["pixel_values"].shape == (3, 3, 48, 48)
    assert together["pixel_values_hr"].shape == (3, 3, 144, 144)
    assert together["valid_rect"].dtype == torch.int32
    assert together["valid_rect"].tolist() == [[1, 0, 5, 6], [0, 2, 6, 4], [0, 0, 6, 6]]
    for number, image in enumerate(images):
        alone = small_processor(image)
        assert all(torch.equal(alone[key][0], together[key][number]) for key in together)
    nested = small_processor([[images[0]], [images[1], np.asarray(images[2])]])
    assert all(torch.equal(nested[key], together[key]) for key in together)


def test_plain_llava_has_no_high_resolution():
    pixels = FlexAttnLlavaImageProcessor(lowres_size=48, highres_size=None, lr_side=6)(noise(80, 80))
    assert set(pixels) == {"pixel_values", "valid_rect"} and pixels["pixel_values"].shape == (1, 3, 48, 48)


@pytest.mark.parametrize("deviation", [0.0, -0.5])
def test_an_image_processor_that_divides_by_nothing_is_refused(deviation):
    """Its pixels would be infinite, and every answer empty."""
    with pytest.raises(InputError, match="image_mean must lie in 0..1 and image_std above 0"):
        FlexAttnLlavaImageProcessor(48, 144, lr_side=6, image_std=[0.5, deviation, 0.5])


def test_padding_has_the_colour_of_the_mean(small_processor):
    pixels = small_processor(Image.new("RGB", (100, 20), "red"))["pixel_values_hr"][0]
    assert tuple(int(x * 255) for x in small_processor.image_mean) == GREY
    mean, std = (torch.tensor(x) for x in (small_processor.image_mean, small_processor.image_std))
    assert torch.allclose(pixels[:, 3, 70], (torch.tensor(GREY) / 255 - mean) / std, atol=1e-6)
    assert torch.allclose(pixels[:, 72, 70], (torch.tensor([1.0, 0.0, 0.0]) - mean) / std, atol=1e-6)


@pytest.mark.parametrize("band", [1 << 24, 5000])
@pytest.mark.parametrize("size", [(300, 301), (37, 700), (700, 37), (1, 60), (60, 1), (100, 100), (99, 100)])
def test_resizing_in_bands_gives_the_pixels_of_the_whole_square(monkeypatch, size, band):
    monkeypatch.setattr(images, "_BAND_PIXELS", band)
    image, side = noise(*size), max(size)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    expected = square.resize((100, 100), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(square_resized(image, 100, GREY)), np.asarray(expected))


@pytest.mark.parametrize(
    "width, height, side, expected",
    [
        (1000, 1000, 24, (0, 0, 24, 24)),
        (1600, 1200, 24, (3, 0, 21, 24)),
        (600, 1200, 24, (0, 6, 24, 18)),
        (10, 1, 24, (9, 0, 15, 24)),
        (1001, 1000, 24, (0, 0, 24, 24)),
        (300, 400, 16, (0, 2, 16, 14)),
    ],
)
def test_the_valid_rectangle(width, height, side, expected):
    assert valid_rect_of(width, height, side) == expected


@given(st.integers(1, 65_535), st.integers(1, 65_535), st.integers(1, 64))
def test_the_valid_rectangle_is_never_empty(width, height, side):
    top, left, bottom, right = valid_rect_of(width, height, side)
    assert 0 <= top < bottom <= side and 0 <= left < right <= side


# ---------------------------------------------------------------------------------------------------- kinds of image


def test_transparent_parts_are_white():
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert colours(upright_rgb(image)) == [(200, 0, 0), (255, 255, 255)]


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 1, 2, 3])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png", transparency=1)
    assert colours(open_image(tmp_path / "p.png")) == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "RGB", "RGBA", "HSV"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (8, 8), "white").convert(mode)
    assert set(colours(upright_rgb(image))) == {(255, 255, 255)}


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert colours(open_image(tmp_path / "deep.png")) == [(0,) * 3, (100,) * 3, (255,) * 3]


def test_an_image_is_turned_upright_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned a quarter to the left
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(tmp_path / "turned.jpg") == open_image(tmp_path / "turned.jpg").size == (20, 40)
    image = open_image(tmp_path / "turned.jpg")
    assert image.size == upright_rgb(image).size == (20, 40)


@pytest.mark.parametrize("block", [b"Exif\0\0not a TIFF header", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*"])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_an_exif_block_that_cannot_be_read_turns_nothing(tmp_path, small_processor, block, ending):
    image = noise(40, 20)
    image.save(tmp_path / f"image.{ending}", exif=block)
    upright = open_image(tmp_path / f"image.{ending}")
    assert upright.size == (40, 20) and "exif" not in upright.info
    with Image.open(tmp_path / f"image.{ending}") as lazy:
        assert small_processor(lazy)["valid_rect"].tolist() == [[1, 0, 5, 6]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_numbers_are_not_pixels(tmp_path, value):
    levels = np.full((8, 8), 100, dtype=np.float32)
    Image.fromarray(levels).save(tmp_path / "float.tiff")
    assert set(colours(open_image(tmp_path / "float.tiff"))) == {(100, 100, 100)}
    levels[3, 4] = value
    Image.fromarray(levels).save(tmp_path / "float.tiff")
    with pytest.raises(InputError, match="values that are NaN or infinite"):
        open_image(tmp_path / "float.tiff")


@pytest.mark.parametrize("values", [[0.0, 0.5], [1.0, 1.0], [-1.0, 100.0], [0.0, 300.0]])
@pytest.mark.parametrize("band", [1 << 24, 1])
def test_grey_values_in_another_range_are_refused(tmp_path, monkeypatch, values, band):
    """Pillow would clip them: most floats in 0..1 would become black."""
    monkeypatch.setattr(images, "_BAND_PIXELS", band)
    Image.fromarray(np.array([values], dtype=np.float32).T).save(tmp_path / "float.tiff")
    low, high = (f"{value:g}" for value in values)
    with pytest.raises(
        InputError, match=f"grey values from {low} to {high} in 32 bits, .*; scale them to 0..255, or save"
    ):
        open_image(tmp_path / "float.tiff")


@pytest.mark.parametrize("values, grey", [([0.0, 0.0], 0), ([1.4, 0.0, 200.0], 1), ([254.7, 0.2, 0.0], 255)])
@pytest.mark.parametrize("band", [1 << 24, 1])
def test_floats_lie_in_0_to_255(monkeypatch, values, grey, band):
    """Also where a part of the image is dark."""
    monkeypatch.setattr(images, "_BAND_PIXELS", band)
    image = upright_rgb(Image.fromarray(np.array([values], dtype=np.float32).T))
    assert colours(image)[0] == (grey,) * 3


@pytest.mark.parametrize("ending, mode", [("png", "I;16"), ("tiff", "I;16"), ("pgm", "I"), ("jp2", "I;16")])
def test_dark_images_of_16_bits_are_dark(tmp_path, ending, mode):
    """Their maximum does not say that they have 16 bits; their format and mode do."""
    path = tmp_path / f"dark.{ending}"
    levels = np.full((64, 64), 200, dtype=np.uint16)
    if ending == "pgm":
        path.write_bytes(b"P5 64 64 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(path, **({"irreversible": False} if ending == "jp2" else {}))
    with Image.open(path) as lazy:
        assert lazy.mode == mode
    assert set(colours(open_image(path))) == {(1, 1, 1)}  # 200 / 257


def test_integers_of_32_bits_lie_in_0_to_255(tmp_path):
    path = tmp_path / "deep.tiff"
    Image.fromarray(np.array([[0, 200]], dtype=np.int32)).save(path)
    assert colours(open_image(path)) == [(0,) * 3, (200,) * 3]
    Image.fromarray(np.array([[0, 40_000]], dtype=np.int32)).save(path)
    with pytest.raises(InputError, match="grey values from 0 to 40000 in 32 bits"):
        open_image(path)


def test_an_image_that_pillow_fails_to_decode_is_refused(tmp_path, small_processor):
    noise(64, 64).save(tmp_path / "image.png")
    (tmp_path / "image.png").write_bytes((tmp_path / "image.png").read_bytes()[:3000])
    with Image.open(tmp_path / "image.png") as lazy, pytest.raises(InputError, match="damaged") as error:
        small_processor(lazy)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ["bmp", "gif", "jpg", "png", "ppm", "tga", "tiff", "webp"])
def test_damage_anywhere_in_a_file_is_an_input_error(tmp_path, monkeypatch, ending):
    """Each byte of the header, and some of the rest, is set to three other values."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    noise(12, 9).save(tmp_path / f"image.{ending}")
    whole = (tmp_path / f"image.{ending}").read_bytes()
    for at in [*range(min(len(whole), 64)), *range(64, len(whole), 97)]:
        for value in (0, 0x7F, 0xFF):
            path = tmp_path / f"damaged.{ending}"
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                opened = open_image(path).mode
            except InputError as error:
                opened = str(error)
            assert "\n" not in opened


# ---------------------------------------------------------------------------------------------------------- bad input


def bad_file(folder: Path, kind: str) -> Path:
    path = folder / "image.png"
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not an image")
    elif kind in ("truncated", "corrupt"):
        noise(64, 64).save(path)
        data = bytearray(path.read_bytes())
        if kind == "corrupt":
            data[2000:2100] = bytes(100)
        path.write_bytes(data[: len(data) // 2] if kind == "truncated" else data)
    elif kind == "long":
        Image.new("1", (70_000, 1)).save(path)
    return path


@pytest.mark.parametrize(
    "kind, says",
    [
        ("missing", "there is no image"),
        ("directory", "is not an image file"),
        ("empty", "is an empty file"),
        ("text", "is not an image that can be read"),
        ("truncated", "is damaged"),
        ("corrupt", "is damaged"),
        ("long", "may have at most 65535"),
    ],
)
def test_files_that_are_not_images(tmp_path, kind, says):
    path = bad_file(tmp_path, kind)
    with pytest.raises(InputError, match=says) as error:
        open_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_image_beyond_the_limit_of_pixels(tmp_path, monkeypatch):
    noise(64, 64).save(tmp_path / "huge.png")
    with monkeypatch.context() as patch:
        patch.setattr(images, "_MAX_PIXELS", 4095)
        with pytest.raises(InputError, match="64 x 64 pixels; at most 4095 are allowed"):
            open_image(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # set by the user
    with pytest.raises(InputError, match="more than 2000 pixels"):
        open_image(tmp_path / "huge.png")


@pytest.mark.filterwarnings("error")
def test_an_image_beyond_pillows_limit_is_read(tmp_path, monkeypatch):
    """As a phone takes them: 200 million pixels."""
    noise(64, 64).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(images, "_PILLOWS_LIMIT", 1000)
    assert open_image(tmp_path / "huge.png").size == (64, 64) and Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "I;16", "F"])
def test_bands_change_no_pixel(monkeypatch, mode):
    image = noise(30, 50).convert("L" if mode in ("I;16", "F") else "RGBA").convert(mode)
    if mode in ("RGBA", "LA", "PA"):
        image.putalpha(noise(30, 50, seed=1).convert("L"))
    whole = upright_rgb(image)
    monkeypatch.setattr(images, "_BAND_PIXELS", 100)
    assert colours(upright_rgb(image)) == colours(whole)


def test_the_callers_image_is_left_as_it_is():
    image = noise(8, 8)
    image.info["dpi"] = (72, 72)
    assert upright_rgb(image) is not image and image.info == {"dpi": (72, 72)}


@pytest.mark.parametrize(
    "thing",
    [
        "image.png",
        3,
        np.zeros((4, 4)),
        np.zeros((4, 4, 7), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
        torch.zeros(3, 4, 4),
        [],
    ],
)
def test_things_that_are_not_images(small_processor, thing):
    with pytest.raises(InputError, match="image"):
        small_processor(thing)
