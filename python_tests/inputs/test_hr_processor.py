"""The HR processor of every family: the same views and prompts as the family's own, and the base view enlarged."""

from __future__ import annotations

import copy
import io
import pickle
from base64 import b64encode

import family_processors as families
import numpy as np
import pytest
import torch
import transformers
from family_processors import SIDE, ZOOM, hr_processor
from PIL import Image
from torch.nn import functional
from transformers import ProcessorMixin

from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.inputs.frames import centre_square, padded_square, whole_image
from flexattn_cuda.inputs.hr_processor import HRProcessor, ProcessorParts, processor_for
from flexattn_cuda.inputs.image_families import FAMILIES, ImageFamily
from flexattn_cuda.inputs.image_sources import read_image

ALL = sorted(families.CASES)
ANYRES = ["llava_next", "llava_onevision"]
NATIVE = ["qwen2_5_vl", "qwen2_vl"]
LEVELS = 170  # of the ramp, of 255
QUESTION = "what is this"


def ramp(width: int, height: int) -> Image.Image:
    """Return an image that grows from left to right in red, from top to bottom in green."""
    x, y = (40 + LEVELS * (np.arange(size) + 0.5) / size for size in (width, height))
    red, green = np.meshgrid(x, y)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], axis=-1).round().astype(np.uint8))


WIDE, TALL, TINY = ramp(150, 90), ramp(80, 200), ramp(9, 14)


def own_processor(name, monkeypatch):
    """Return the family's own processor, without the part that needs torchvision for videos."""
    case, parts = families.CASES[name], families.parts(name)
    images, words = parts.image_processor, parts.tokenizer
    vocabulary = words.get_vocab()
    options = {}
    if name == "internvl":
        tokens = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        for field, token in {**tokens, "video_token": "<video>"}.items():
            setattr(words, field, token)
            setattr(words, f"{field}_id", vocabulary.get(token))
        options = {"image_seq_length": case.tokens}
    elif name in ("llava", "vipllava"):
        options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    elif name in ("idefics3", "smolvlm"):
        options = {"image_seq_len": case.tokens}
    elif name == "gemma3":
        for field, token in zip(
            ("boi_token", "eoi_token", "image_token"), ("<start_of_image>", "<end_of_image>", None)
        ):
            setattr(words, field, token or "<image_soft_token>")
            setattr(words, f"{field}_id", vocabulary[token or "<image_soft_token>"])
        options = {"image_seq_length": case.tokens}
    elif name == "paligemma":
        images.image_seq_length = case.tokens
    names = {"internvl": "InternVL", "qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "smolvlm": "SmolVLM"}
    names |= {"llava": "Llava", "vipllava": "Llava", "idefics3": "Idefics3", "gemma3": "Gemma3"}
    names["paligemma"] = "PaliGemma"
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda self, name, value: None)
    if name == "smolvlm":
        try:
            monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)
        except ModuleNotFoundError:
            pytest.skip("transformers 5.0 imports SmolVLM's processor with torchvision only")
    if name in ("internvl", "qwen2_vl", "qwen2_5_vl", "smolvlm"):
        options["video_processor"] = None
    make = getattr(transformers, f"{names[name]}Processor")
    return make(image_processor=images, tokenizer=words, chat_template=words.chat_template, **options)


def pixels_of_patches(patches, rows, columns, patch=14, merge=2):
    """Return the image of Qwen-VL's patches, which come in blocks of merge x merge."""
    image = torch.zeros(3, rows * patch, columns * patch)
    places = [
        (top + y, left + x)
        for top in range(0, rows, merge)
        for left in range(0, columns, merge)
        for y in range(merge)
        for x in range(merge)
    ]
    for values, (y, x) in zip(patches, places):
        frames = values.view(3, 2, patch, patch)
        assert torch.equal(frames[:, 0], frames[:, 1])
        image[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = frames[:, 0]
    return image


def base_views(features):
    """Return the base views [3, H, W] of all images."""
    pixels = features["pixel_values"]
    if "pixel_attention_mask" in features:
        return list(pixels[features["pixel_attention_mask"].flatten(2).any(2)])
    if "image_grid_thw" not in features:
        return list(pixels.reshape(-1, *pixels.shape[-3:]))
    grids = features["image_grid_thw"].tolist()
    parts = pixels.split([rows * columns for _, rows, columns in grids])
    return [pixels_of_patches(part, rows, columns) for part, (_, rows, columns) in zip(parts, grids)]


def runs(ids, token):
    """Return the lengths of the runs of a token."""
    marks = "".join("x" if one == token else " " for one in ids.tolist())
    return [len(run) for run in marks.split()]


@pytest.mark.parametrize("name", ALL)
def test_every_image_takes_one_token_per_cell_in_one_run(name):
    processor = hr_processor(name)
    prompts = [processor.prompt(QUESTION, images=2), processor.prompt("what")]
    features = processor([WIDE, TALL, TINY], prompts)
    views = base_views(features)
    cells = [(view.shape[1] // processor.cell) * (view.shape[2] // processor.cell) for view in views]
    if (tokens := families.CASES[name].tokens) is not None:
        assert cells == [tokens] * 3
    rows = [runs(row, processor.image_token_id) for row in features["input_ids"]]
    joined = [[sum(cells[:2])]] if len(rows[0]) == 1 else [cells[:2]]  # marks without anything between them
    assert rows == [*joined, cells[2:]]


@pytest.mark.parametrize("name", ALL)
def test_the_hr_view_is_the_base_view_with_zoom_times_the_sides(name):
    processor = hr_processor(name)
    images = [WIDE, TALL, TINY]
    features = processor(images, [processor.prompt(QUESTION)] * 3)
    lr, hr = base_views(features), features["pixel_values_hr"]
    assert isinstance(hr, list) == (name in NATIVE) and len(hr) == 3
    for small, large in zip(lr, hr):
        assert large.shape == (3, ZOOM * small.shape[1], ZOOM * small.shape[2])
        shrunk = functional.avg_pool2d(large[None], ZOOM)[0]
        # In grey levels: each view is rounded twice (rows, columns), and sides and margins are rounded to pixels, which
        # shifts a view by up to one pixel, as does a filter that ends at the border.
        slope = LEVELS / min(small.shape[1:])
        std = min(processor.image_processor.image_std)
        assert (shrunk - small).abs().max() <= (4 + 2 * slope) / 255 / std
        assert (shrunk - small.flip(-1)).abs().max() > (4 + 2 * slope) / 255 / std


@pytest.mark.parametrize("name", [name for name in ALL if name not in ANYRES])
def test_prompt_and_base_view_are_those_of_the_familys_own_processor(name, monkeypatch):
    own = own_processor(name, monkeypatch)
    processor = processor_for(families.model(name, own), own)
    prompts = [processor.prompt(QUESTION), processor.prompt("what")]
    no_tiles = FAMILIES[name].base_view(SIDE)
    expected = own(
        images=[[WIDE], [TALL]], text=prompts, padding=True, padding_side="left", return_tensors="pt", **no_tiles
    )
    features = processor([WIDE, TALL], prompts)
    assert set(features) == set(expected) - {"labels"} | {"pixel_values_hr"}
    for key in set(expected) & set(features):
        assert torch.equal(features[key], expected[key]), key


@pytest.mark.parametrize("name", ANYRES)
def test_the_base_view_is_the_first_of_the_tiles_that_the_family_makes(name):
    processor = hr_processor(name)
    expected = processor.image_processor([[WIDE], [TALL]], return_tensors="pt")["pixel_values"]
    features = processor([WIDE, TALL], [processor.prompt(QUESTION)] * 2)
    assert expected.shape[1] > 1
    assert torch.equal(features["pixel_values"], expected[:, 0])
    assert set(features) == {"input_ids", "attention_mask", "pixel_values", "pixel_values_hr"}


@pytest.mark.parametrize("name", ["internvl", "idefics3", "qwen2_5_vl"])
def test_rows_may_have_no_image_or_several(name):
    processor = hr_processor(name)
    prompts = ["what is", processor.prompt(QUESTION, images=2), processor.prompt("what")]
    together = processor([[], [WIDE, TALL], [TINY]], prompts)
    assert len(together["pixel_values_hr"]) == 3
    alone = processor([WIDE, TALL], prompts[1])
    kept = together["attention_mask"][1].bool()
    assert torch.equal(together["input_ids"][1][kept], alone["input_ids"][0])
    assert together["attention_mask"][0, 0] == 0 and together["attention_mask"][0, -1] == 1  # left padding
    if name == "idefics3":
        assert together["pixel_values"].shape[:2] == (3, 2)
        assert together["pixel_attention_mask"].flatten(2).amax(2).tolist() == [[0, 0], [1, 1], [1, 0]]
    assert set(processor(text="what is")) == set(together) - {
        "pixel_values", "pixel_values_hr", "pixel_attention_mask", "image_grid_thw"
    }  # fmt: skip


def test_every_kind_of_image_gives_the_same_pixels(tmp_path):
    processor = hr_processor("internvl")
    WIDE.save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    array = np.asarray(WIDE)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    base64 = "data:image/png;base64," + b64encode(data).decode()
    sources = [tmp_path / "image.png", str(tmp_path / "image.png"), data, bytearray(data), base64, base64[22:]]
    sources += [array, array.transpose(2, 0, 1), array / 255, tensor, tensor / 255, tensor.permute(1, 2, 0)]
    mark = processor.family.image_mark
    features = processor(sources, mark * len(sources))
    expected = processor(WIDE, mark)
    for key in ("pixel_values", "pixel_values_hr"):
        assert torch.equal(features[key], expected[key].expand_as(features[key]))
    batch = processor(torch.stack([tensor, tensor]), mark * 2)
    assert torch.equal(batch["pixel_values"], expected["pixel_values"].expand(2, -1, -1, -1))


def test_a_url_is_downloaded_by_transformers(monkeypatch):
    monkeypatch.setattr("flexattn_cuda.inputs.image_sources.download", lambda url: {"https://a/b.png": WIDE}[url])
    assert np.array_equal(read_image("https://a/b.png"), WIDE)
    with pytest.raises(InputError, match=r"the image https://c cannot be downloaded"):
        read_image("https://c")


def test_transparency_orientation_and_gray_are_handled_as_elsewhere():
    gray = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert read_image(gray).getpixel((3, 1)) == (19, 19, 19)
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    assert read_image(clear).getpixel((0, 0)) == (255, 255, 255)
    upright, exif = io.BytesIO(), Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    WIDE.save(upright, "PNG", exif=exif)
    assert read_image(upright.getvalue()).size == (90, 150)


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere.png", "there is no image nowhere.png"),
        (b"text", "the bytes are not an image"),
        (np.full((4, 4, 3), 7.0), "must lie in 0..1"),
        (torch.full((3, 4, 4), float("nan")), "must lie in 0..1"),
        (np.zeros((5, 4, 7), dtype=np.uint8), "is not an image"),
        (7, "not a int"),
    ],
)
def test_what_is_not_an_image_is_refused(source, message):
    with pytest.raises(InputError, match=message):
        read_image(source)


@pytest.mark.parametrize("name", NATIVE)
def test_an_image_that_the_family_cannot_view_is_refused(name):
    processor, thin = hr_processor(name), Image.new("RGB", (900, 3))
    for call in (
        lambda: processor(thin, processor.prompt(QUESTION)),
        lambda: processor.prompt_length(QUESTION, thin),
        lambda: processor.image_inputs([thin]),
    ):
        with pytest.raises(InputError, match="cannot be used by this model's image processor: .*aspect ratio"):
            call()


@pytest.mark.parametrize("deviation", [0.0, -1.0, float("nan"), float("inf")])
def test_an_image_processor_that_cannot_normalise_is_refused(deviation):
    processor = hr_processor("internvl")
    images = copy.deepcopy(processor.image_processor)
    images.image_std = [0.5, deviation, 0.5]
    with pytest.raises(InputError, match=r"image_std of the image processor is .*; it must be positive numbers"):
        HRProcessor(ProcessorParts(images, processor.tokenizer), processor.family, 3, processor.cell)


def test_a_chat_with_images_is_tokenized_at_once(tmp_path):
    processor = hr_processor("qwen2_5_vl")
    WIDE.save(tmp_path / "image.png")
    content = [{"type": "image", "path": str(tmp_path / "image.png")}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    features = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    expected = processor(WIDE, processor.prompt(QUESTION))
    assert torch.equal(features["input_ids"], expected["input_ids"])
    assert torch.equal(features["pixel_values_hr"][0], expected["pixel_values_hr"][0])
    assert processor.decode(features["input_ids"][0], skip_special_tokens=True).endswith("this ASSISTANT:")
    assert processor.batch_decode(features["input_ids"][:, -1:]) == ["ASSISTANT:"]


@pytest.mark.parametrize("name", ALL)
def test_the_length_of_a_prompt_is_known_beforehand(name):
    processor = hr_processor(name)
    features = processor(WIDE, processor.prompt(QUESTION))
    assert processor.prompt_length(QUESTION, WIDE) == features["input_ids"].shape[1]
    if name in NATIVE:
        with pytest.raises(InputError, match=r"pass image="):
            processor.prompt_length(QUESTION)
    else:
        assert processor.prompt_length(QUESTION) == features["input_ids"].shape[1]


def test_a_prompt_that_begins_with_the_first_token_gets_no_second():
    processor = hr_processor("gemma3")
    processor.tokenizer.add_bos_token = True
    ids = processor(text="<s> what is")["input_ids"][0]
    assert ids.tolist().count(processor.tokenizer.bos_token_id) == 1


def test_an_image_that_llava_pads_has_a_valid_rect():
    images = families.made("LlavaImageProcessor", **families.CLIP, do_pad=True)()
    parts = ProcessorParts(images, families.tokenizer("<image>"))
    features = processor_for(families.model("llava", parts), parts)([WIDE, TALL], ["<image>", "<image>"])
    # 56 pixels a side, cells of 14: 11.2 pixels above and below are padding, 16.8 left and right.
    assert features["valid_rect"].tolist() == [[0, 0, 4, 4], [0, 1, 4, 3]]
    assert "valid_rect" not in hr_processor("llava")([WIDE], ["<image>"])


def test_options_of_the_tokenizer_and_of_the_image_processor_are_taken():
    processor = hr_processor("internvl")
    mark = processor.family.image_mark
    features = processor(WIDE, [f"{mark} what"], padding="max_length", max_length=20, padding_side="right")
    assert features["input_ids"].shape == (1, 20) and features["attention_mask"][0, -1] == 0
    plain = processor(WIDE, mark, images_kwargs={"do_normalize": False})
    assert plain["pixel_values_hr"].min() >= 0 and plain["pixel_values_hr"].max() <= 1
    larger = processor(WIDE, mark, size={"height": 84, "width": 84})
    assert larger["pixel_values_hr"].shape[-1] == 84 * ZOOM
    assert (larger["input_ids"] == processor.image_token_id).sum() == 9
    arrays = processor(WIDE, mark, return_tensors="np")
    assert isinstance(arrays["input_ids"], np.ndarray) and isinstance(arrays["pixel_values_hr"], np.ndarray)
    with pytest.raises(TypeError, match="takes no colour"):
        processor(WIDE, mark, colour="red")


@pytest.mark.parametrize(
    "name, option",
    [
        ("internvl", {"crop_to_patches": True}),
        ("idefics3", {"do_image_splitting": True}),
        ("gemma3", {"do_pan_and_scan": True}),
        ("llava_next", {"image_grid_pinpoints": [[56, 112]]}),
    ],
)
def test_tiles_of_the_models_own_are_refused(name, option):
    processor = hr_processor(name)
    with pytest.raises(InputError, match=r"would send tiles of the model's own"):
        processor(WIDE, processor.family.image_mark, **option)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": WIDE, "text": "what"}, "the text has 0 <image> marks, but 1 images"),
        ({"images": [[WIDE, WIDE], []], "text": ["<image>", "<image>"]}, "came with them, text by text"),
        ({"images": WIDE, "text": "<image>", "do_resize": False}, "leaves no larger view"),
        ({"images": WIDE, "text": "<image> what", "truncation": True, "max_length": 5}, "5 image tokens of the 16"),
        ({"videos": [WIDE], "text": "what"}, "leave out videos"),
        ({"text": None}, "there is no text; every image needs a prompt"),
        ({"text": ["what", "what is"], "padding": False}, "pass padding=True"),
    ],
)
def test_a_call_that_cannot_be_right_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        hr_processor("llava")(**arguments)


@pytest.mark.parametrize("question", ["", "  ", "a <image> b", "a </s> b", "a <|image_pad|> b"])
def test_a_question_that_cannot_be_asked_is_refused(question):
    with pytest.raises(InputError):
        hr_processor("llava").prompt(question)


def test_a_template_that_marks_no_image_is_refused():
    processor = hr_processor("llava")
    processor.chat_template = "{{ messages[0]['content'][1]['text'] }}"
    with pytest.raises(CheckpointError, match="writes 0 <image> marks for 1 images"):
        processor.prompt(QUESTION)
    processor.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        processor.prompt(QUESTION)


def test_paligemma_needs_no_template():
    processor = hr_processor("paligemma")
    processor.chat_template = None
    assert processor.prompt(QUESTION, images=2) == "<image><image>what is this"


def test_a_saved_processor_is_found_through_the_model(tmp_path):
    processor = hr_processor("internvl")
    processor.save_pretrained(tmp_path)
    model = families.model("internvl", processor)
    model.config.save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    loaded = processor_for(model)
    prompt = loaded.prompt(QUESTION)
    assert prompt == processor.prompt(QUESTION)
    for key, value in processor(WIDE, prompt).items():
        assert torch.equal(loaded(WIDE, prompt)[key], value)
    again = HRProcessor.from_pretrained(tmp_path, family=FAMILIES["internvl"], zoom=3, cell=28)
    assert again(WIDE, prompt)["pixel_values_hr"].shape[-1] == 3 * SIDE


@pytest.mark.parametrize("name", ALL)
def test_a_processor_can_be_sent_to_another_process(name):
    processor = hr_processor(name)
    copy = pickle.loads(pickle.dumps(processor))
    assert copy.prompt(QUESTION) == processor.prompt(QUESTION)
    assert isinstance(copy, ProcessorMixin) and copy.zoom == ZOOM


def test_a_family_can_be_described_by_the_user():
    parts = families.parts("llava")
    model = families.model("llava", parts)
    model.config.model_type = "my_vlm"
    family = ImageFamily(token="<image>", cell=lambda config: config.vision_config.patch_size)
    assert (
        processor_for(model, parts, family)(WIDE, "<image>")["input_ids"] == parts.tokenizer.get_vocab()["<image>"]
    ).sum() == 16
    with pytest.raises(InputError, match="the model family 'my_vlm' is unknown; known: gemma3, "):
        processor_for(model, parts)


def test_a_model_and_processor_that_do_not_fit_are_refused():
    parts = families.parts("llava")
    model = families.model("llava", parts)
    model.config.image_token_id = 3
    with pytest.raises(InputError, match="in the tokenizer, and 3 in the model"):
        processor_for(model, parts)
    model.config._name_or_path = ""
    with pytest.raises(InputError, match="not loaded from a checkpoint"):
        processor_for(model)
    del model.flexattn_settings
    with pytest.raises(InputError, match=r"call flexattn_cuda.attach\(model\) first"):
        processor_for(model, parts)
    with pytest.raises(InputError, match="zoom is 0"):
        HRProcessor(parts, FAMILIES["llava"], zoom=0, cell=14)
    with pytest.raises(InputError, match="the tokenizer has no token <x>"):
        HRProcessor(parts, ImageFamily(token="<x>", cell=len), zoom=2, cell=14)


# -------------------------------------------------------------------------------------------------- what a view shows


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(300, 180), (120, 400)])
def test_the_frame_is_the_part_of_the_image_that_the_view_shows(name, size):
    processor = hr_processor(name)
    view = processor(ramp(*size), processor.prompt(QUESTION))["pixel_values_hr"][0].permute(1, 2, 0).numpy()
    levels = (view * processor.image_processor.image_std + processor.image_processor.image_mean) * 255
    frame = processor.frame(*size)
    at = [round(share * side) for share, side in zip((0.3, 0.7), view.shape[:2])]  # row, column
    for axis, (start, length) in enumerate(((frame.top, frame.height), (frame.left, frame.width))):
        pixel = start + (at[axis] + 0.5) / view.shape[axis] * length
        channel = 1 - axis  # green grows downwards, red to the right
        expected = 40 + LEVELS * pixel / size[1 - axis]
        assert abs(levels[at[0], at[1], channel] - expected) < 4


def test_padded_images_lie_in_the_frame_of_their_padding():
    image_processor = transformers.LlavaImageProcessor(**families.CLIP, do_pad=True)
    assert FAMILIES["llava"].frame(image_processor) is padded_square
    assert FAMILIES["llava"].frame(transformers.LlavaImageProcessor(**families.CLIP, do_pad=False)) is centre_square
    assert FAMILIES["llava_next"].frame(image_processor) is whole_image


# ---------------------------------------------------------------------------------------------- the limit of LR tokens


def limited(limit, **options):
    """Return the LR tokens of a large image under a limit."""
    images = transformers.Qwen2VLImageProcessor(size={"shortest_edge": 28**2, "longest_edge": 28**2 * 2000})
    parts = ProcessorParts(images, families.parts("qwen2_5_vl").tokenizer)
    processor = processor_for(families.model("qwen2_5_vl", parts), parts, max_lr_tokens=limit)
    large = ramp(2000, 1000)
    features = processor(large, processor.prompt(QUESTION), **options)
    count = int((features["input_ids"] == processor.image_token_id).sum())
    rows, columns = features["image_grid_thw"][0, 1:].tolist()
    assert features["pixel_values_hr"][0].shape == (3, rows * 14 * ZOOM, columns * 14 * ZOOM)
    assert options or processor.prompt_length(QUESTION, large) == features["input_ids"].shape[1]
    return count


def test_a_large_image_takes_as_many_lr_tokens_as_the_limit_allows():
    assert 60 <= limited(80) <= 80
    assert 1900 <= limited(None) <= 2000
    assert 1000 <= limited(80, size={"shortest_edge": 28**2, "longest_edge": 28**2 * 1100}) <= 1100
    parts = families.parts("qwen2_5_vl")
    assert processor_for(families.model("qwen2_5_vl", parts), parts).max_lr_tokens == 576


@pytest.mark.parametrize("limit", [0, 2.5])
def test_a_limit_that_is_no_number_of_tokens_is_refused(limit):
    with pytest.raises(InputError, match="max_lr_tokens is .*; it must be a whole number of at least 1"):
        limited(limit)


# ------------------------------------------------------------------------------------------------- a named checkpoint


def test_the_processor_of_a_named_checkpoint_is_loaded(tmp_path):
    parts = families.parts("internvl")
    model = families.model("internvl", parts)
    folder = tmp_path / "repository" / "part"
    model.config.save_pretrained(folder)
    parts.save_pretrained(folder)
    named = processor_for(model, tmp_path / "repository", subfolder="part")
    assert named.prompt(QUESTION) == processor_for(model, parts).prompt(QUESTION)
    model.config._name_or_path = str(folder)
    assert processor_for(model).prompt(QUESTION) == named.prompt(QUESTION)
    with pytest.raises(CheckpointError, match="no checkpoint 'owner/name'"):
        processor_for(model, "owner/name", local_files_only=True)
