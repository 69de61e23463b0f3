"""The system "crop": where the window is, what the map is, and what is asked about."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import question_files
import tiny_checkpoint
import torch

import flexattn_cuda
from flexattn_cuda import Trace
from flexattn_cuda.baselines.cropping import SIZES, crop_window
from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.frames import centre_square, padded_square, whole_image
from flexattn_cuda.tasks.cropping import Cropper, low_resolution_maps, prompt_of
from flexattn_cuda.tasks.encoded import encode_image, encoded
from flexattn_cuda.tasks.options import AskOptions, ChatOptions

QUESTION = "What is the colour of the sign?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cropper(checkpoint) -> Cropper:
    return Cropper.of(checkpoint, *flexattn_cuda.load(checkpoint, "cpu", system="llava"))


def inside(attention, rows, columns):
    return sum(attention[row, column] for row in rows for column in columns)


def window_by_definition(attention, frame, size, side):
    """Return all windows of the largest contrast, in pixels: every size at every place, cell by cell."""
    rows, columns = attention.shape
    down, across = frame.height / rows, frame.width / columns
    lines = [r for r in range(rows) if frame.top + (r + 1) * down > 0 and frame.top + r * down < size[1]]
    posts = [c for c in range(columns) if frame.left + (c + 1) * across > 0 and frame.left + c * across < size[0]]
    candidates = []
    for one in SIZES:
        high, wide = (min(max(1, round(one * side / of)), len(n)) for of, n in ((down, lines), (across, posts)))
        held = {
            (r, c): inside(attention, range(r, r + high), range(c, c + wide))
            for r in range(lines[0], lines[-1] + 2 - high)
            for c in range(posts[0], posts[-1] + 2 - wide)
        }
        r, c = max(held, key=held.get)
        around = [range(r - high, r + 2 * high), range(c - wide, c + 2 * wide)]
        cells = [[n for n in near if n in of] for near, of in zip(around, (lines, posts))]
        others = len(cells[0]) * len(cells[1]) - high * wide
        density = (inside(attention, *cells) - held[r, c]) / others if others else 0
        contrast = held[r, c] - high * wide * density if others else 0
        candidates.append((contrast, (r, c, high, wide)))
    most = max(contrast for contrast, _ in candidates)
    return [
        (
            round(max(frame.left + c * across, 0)),
            round(max(frame.top + r * down, 0)),
            round(min(frame.left + (c + wide) * across, size[0])),
            round(min(frame.top + (r + high) * down, size[1])),
        )
        for contrast, (r, c, high, wide) in candidates
        if contrast >= most - 1e-9
    ]


@pytest.mark.parametrize("frame_of", [padded_square, whole_image, centre_square])
@pytest.mark.parametrize("seed", range(8))
def test_the_window_is_that_of_the_definition(frame_of, seed):
    rng = random.Random(seed)
    size = (rng.randrange(60, 500), rng.randrange(60, 500))
    grid = (12, 12) if frame_of is not whole_image else (9, 13)
    attention = np.random.default_rng(seed).random(grid) ** 4
    frame, side = frame_of(*size), rng.choice([30, 80, 160])
    found = crop_window(attention.astype(np.float64), frame, size, side)
    assert tuple(found) in window_by_definition(attention, frame, size, side)


@pytest.mark.parametrize("cells", [1, 2, 3, 5])
@pytest.mark.parametrize("corner", [(0, 0), (7, 9), (17, 3), (19, 19)])
def test_a_planted_peak_is_inside_the_window_which_grows_with_it(cells, corner):
    row, column = (min(one, 24 - cells) for one in corner)
    attention = np.full((24, 24), 1e-3)
    attention[row : row + cells, column : column + cells] = 1.0
    left, top, right, bottom = crop_window(attention, whole_image(1200, 1200), (1200, 1200), 150)  # cells of 50 pixels
    assert left <= 50 * column and 50 * (column + cells) <= right
    assert top <= 50 * row and 50 * (row + cells) <= bottom
    assert right - left == bottom - top == 50 * max(3, cells)  # the smallest that holds the peak


def test_what_the_map_says_of_the_padding_does_not_count():
    attention = np.full((10, 10), 1e-3)
    attention[0] = 9.0  # above an image of 100 x 40 pixels, which is padded to a square
    attention[5, 6] = 1.0
    window = crop_window(attention, padded_square(100, 40), (100, 40), 10)
    assert window == (60, 20, 70, 30)


def test_an_image_that_is_no_larger_than_the_view_is_taken_whole():
    attention = np.random.default_rng(0).random((12, 12))
    assert crop_window(attention, padded_square(90, 70), (90, 70), 96) == (0, 0, 90, 70)


def test_the_map_is_that_of_flexattentions_first_selection(cropper, checkpoint):
    """The layers before the first one that sees HR tokens are the plain model's."""
    model, processor = flexattn_cuda.load(checkpoint, "cpu")
    image, trace = question_files.image(160, 100, seed=1), Trace()
    one = encode_image(model, processor, image)
    with torch.no_grad():
        model(**prompt_of(model, processor, [one], QUESTION), flexattn_trace=trace)
    images = [replace(one, inputs={"image_features": one.inputs["image_features"]})]
    maps = low_resolution_maps(cropper.model, cropper.processor, images, QUESTION)
    assert cropper.layer == model.flexattn_settings.first_layer - 1
    assert list(maps) == list(range(model.config.text_config.num_hidden_layers))
    expected = trace.steps[0][cropper.layer].of_image(0, -1, 0)[0]
    # Two prefills of the same rows and keys: the tiles of the operator may differ, so float32 rounding apart.
    torch.testing.assert_close(maps[cropper.layer][0], expected.float(), rtol=1e-4, atol=1e-7)
    assert cropper.windows(images, QUESTION) == [
        crop_window(expected.numpy(), padded_square(160, 100), (160, 100), processor.image_processor.lowres_size)
    ]


def test_the_answer_is_that_to_both_images(cropper):
    """Against the prompt made by hand: where the image stands, its tokens and then the crop's."""
    image = question_files.image(220, 150, seed=2)
    model, processor = cropper.model, cropper.processor
    [window] = cropper.windows([encode_image(model, processor, image)], QUESTION)
    ids = processor.conversation_ids(processor.prompt(QUESTION), [processor.image_tokens])
    start = ids.index(processor.image_token_id)
    ids = ids[:start] + [processor.image_token_id] * processor.image_tokens + ids[start:]
    features = encoded(model, processor.image_inputs([image, image.crop(window)]))
    tokens = torch.tensor([ids])
    made = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        image_features=features["image_features"],
        max_new_tokens=6,
        do_sample=False,
    )
    answer = cropper.ask(image, QUESTION, max_new_tokens=6)
    assert answer.tokens == made[0, len(ids) :].tolist()[: len(answer.tokens)] and answer.tokens
    assert window != (0, 0, 220, 150)


def test_several_images_have_a_crop_each(cropper):
    images = [question_files.image(220, 150, seed=2), question_files.image(100, 200, seed=3)]
    encoded_images = [encode_image(cropper.model, cropper.processor, one) for one in images]
    windows = cropper.windows(encoded_images, QUESTION)
    assert len(windows) == 2 and cropper.ask(images, QUESTION, max_new_tokens=2).tokens
    pair = cropper.with_crop(encoded_images[1], images[1], windows[1])
    cells = cropper.model.config.lr_grid.cells
    assert pair.inputs["image_features"].shape[:2] == (2, cells)
    assert torch.equal(pair.inputs["image_features"][0], encoded_images[1].inputs["image_features"][0])


def test_the_command_answers_as_the_function(cropper, checkpoint, tmp_path, flexattn):
    image = question_files.image(220, 150, seed=2)
    image.save(tmp_path / "image.png")
    options = ("--model", checkpoint, "--system", "crop", "--max-new-tokens", 5, "--device", "cpu", "--json")
    code, out, err = flexattn("ask", tmp_path / "image.png", QUESTION, *options)
    assert code == 0, err
    assert json.loads(out)["answer"] == cropper.ask(image, QUESTION, max_new_tokens=5).text
    code, _, err = flexattn("ask", tmp_path / "image.png", QUESTION, *options, "--map", tmp_path / "map.png")
    assert code == 2 and "there is no map to draw" in err


def test_what_cannot_be_cropped_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder; --system crop takes images, so name one"):
        AskOptions(images=[str(tmp_path)], question=QUESTION, system="crop")
    with pytest.raises(InputError, match="--system crop answers single questions; use `flexattn ask`"):
        ChatOptions(system="crop")
