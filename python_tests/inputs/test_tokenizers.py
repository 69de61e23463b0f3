"""Prompts to ids: the tokenizer files of all three checkpoint formats, in small."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import tiny_checkpoint
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_checkpoint import RELEASED, TOKENIZER, edit_json
from transformers import AutoProcessor, AutoTokenizer

from flexattn_cuda.checkpoints import load_config
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.inputs.image_processor import CLIP_MEAN
from flexattn_cuda.inputs.processor import RELEASED_IMAGE_ID, FlexAttnLlavaProcessor
from flexattn_cuda.inputs.sentencepiece import read_sentencepiece
from flexattn_cuda.mechanism.config import FlexAttnConfig

EXPECTED = json.loads((tiny_checkpoint.DATA / "tokenizer" / "expected.json").read_text(encoding="utf-8"))
VOCABULARY = 500
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.fixture
def released(tmp_path):
    """A folder as the released code saves it: a sentencepiece tokenizer that knows no <image>."""
    folder = tmp_path / "released"
    shutil.copytree(RELEASED, folder)
    shutil.copy(TOKENIZER, folder)
    edit_json(folder / "config.json", vocab_size=VOCABULARY)
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizer",
        legacy=False,
        add_bos_token=True,
        add_eos_token=False,
        bos_token={"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False},
        pad_token=None,
        padding_side="right",
        model_max_length=2048,
    )
    edit_json(
        folder / "special_tokens_map.json", bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    return folder


@pytest.fixture
def llava(tmp_path):
    """A folder in transformers' LLaVA format: <image> is a token of the tokenizer, inside the padded vocabulary."""
    folder = tmp_path / "llava"
    config = tiny.llava_config(layers=12, vocabulary=VOCABULARY + 64, image_token_index=VOCABULARY)
    config.save_pretrained(folder)
    tokenizer = tiny_checkpoint.tokenizer(("<image>", "<pad>"), prefix_everywhere=True, pad="<pad>")
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    edit_json(folder / "preprocessor_config.json", image_mean=[0.5, 0.25, 0.125], image_std=[0.5, 0.5, 0.5], resample=3)
    return folder


def image(width: int = 60, height: int = 40) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def without_padding(features, row: int = 0) -> list[int]:
    return features["input_ids"][row][features["attention_mask"][row].bool()].tolist()


# ------------------------------------------------------------------------------------------------------ sentencepiece


@pytest.mark.parametrize("prefix_everywhere", [False, True])
@pytest.mark.parametrize("case", EXPECTED, ids=[repr(case["text"])[:20] for case in EXPECTED])
def test_ids_equal_those_of_sentencepiece(case, prefix_everywhere):
    tokenizer = read_sentencepiece(TOKENIZER, prefix_everywhere)
    assert tokenizer.encode(case["text"], add_special_tokens=False).ids == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.slow
@given(st.text(max_size=40))
def test_ids_equal_those_of_sentencepiece_on_any_text(text):
    sentencepiece = pytest.importorskip("sentencepiece")
    if "\0" in text or "</s>" in text or "<s>" in text or "<unk>" in text:
        return
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    assert read_sentencepiece(TOKENIZER).encode(text, add_special_tokens=False).ids == theirs.encode(text)


def test_text_after_a_special_token_gets_a_space_only_in_legacy_tokenizers():
    apart, legacy = read_sentencepiece(TOKENIZER), read_sentencepiece(TOKENIZER, prefix_everywhere=True)
    assert apart.encode("a</s>b", add_special_tokens=False).tokens[-1] == "b"
    assert legacy.encode("a</s>b", add_special_tokens=False).tokens[-1] != "b"


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


@pytest.mark.parametrize(
    "trainer, normalizer, says",
    [
        (field(3, 1) + field(35, 1), field(4, 0), "its model type is not BPE"),
        (field(3, 2), field(4, 0), "no byte fallback"),
        (field(3, 2) + field(35, 1), field(4, 1), "removes repeated spaces"),
        (field(3, 2) + field(35, 1), field(4, 0) + field(3, 0), "no space before the text"),
        (field(3, 2) + field(35, 1), field(4, 0) + field(2, b"rules"), "rewrites characters"),
    ],
)
def test_other_sentencepiece_models_are_refused(tmp_path, trainer, normalizer, says):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(field(1, field(1, b"a")) + field(2, trainer) + field(3, normalizer))
    with pytest.raises(ValueError, match=says):
        read_sentencepiece(path)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 30, b"not a model at all", TOKENIZER.read_bytes()[:3000]])
def test_damaged_sentencepiece_models(tmp_path, damage):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match="is not a|damaged"):
        read_sentencepiece(path)


# ----------------------------------------------------------------------------------------------------- released format


def test_released_prompt_is_tokenized_around_the_image(released):
    processor = FlexAttnLlavaProcessor.from_pretrained(released)
    assert processor.prompt("What is it?") == SYSTEM + "USER: <image>\nWhat is it? ASSISTANT:"
    plain = read_sentencepiece(TOKENIZER)
    before = plain.encode(SYSTEM + "USER: ", add_special_tokens=False).ids
    after = plain.encode("\nWhat is it? ASSISTANT:", add_special_tokens=False).ids
    features = processor(images=image(), text=processor.prompt("What is it?"))
    assert without_padding(features) == [1, *before, *[VOCABULARY] * 576, *after]
    assert processor.tokenizer.convert_ids_to_tokens(VOCABULARY) == "<image>"
    assert processor.decode(after) == "\nWhat is it? ASSISTANT:"


def test_released_image_id_is_expanded(released):
    processor = FlexAttnLlavaProcessor.from_pretrained(released)
    ids = [1, 40, RELEASED_IMAGE_ID, 41, RELEASED_IMAGE_ID]
    expected = [1, 40, *[VOCABULARY] * 576, 41, *[VOCABULARY] * 576]
    assert processor.expand_image_tokens(ids) == expected
    assert processor.expand_image_tokens(torch.tensor(ids)).tolist() == expected
    assert processor.expand_image_tokens(expected) == expected
    assert processor.expand_image_tokens([VOCABULARY, VOCABULARY, 7]) == [*[VOCABULARY] * (2 * 576), 7]
    assert processor.expand_image_tokens([]) == []
    with pytest.raises(InputError, match="one prompt"):
        processor.expand_image_tokens([ids])


def test_multi_turn_prompt(released):
    processor = FlexAttnLlavaProcessor.from_pretrained(released)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "one?"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "two?"},
    ]
    expected = SYSTEM + "USER: <image>\none? ASSISTANT: yes</s>USER: two? ASSISTANT:"
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == expected


@pytest.mark.parametrize("legacy", [True, None])
def test_legacy_setting_of_the_released_tokenizer(released, legacy):
    edit_json(released / "tokenizer_config.json", legacy=legacy)
    tokenizer = FlexAttnLlavaProcessor.from_pretrained(released).tokenizer
    assert tokenizer("a</s>b").input_ids == [1, *tokenizer("a").input_ids[1:], 2, *tokenizer("b").input_ids[1:]]


def test_released_folder_needs_only_tokenizer_model(released):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (released / name).unlink()
    processor = FlexAttnLlavaProcessor.from_pretrained(released)
    assert without_padding(processor(text="a"))[0] == processor.tokenizer.bos_token_id == 1
    assert processor.tokenizer.pad_token_id == 0


def test_mean_and_std_come_from_the_vision_tower_or_are_those_of_clip(released):
    tower = released / "vision_tower" / "preprocessor_config.json"
    edit_json(tower, image_mean=[0.5, 0.5, 0.5])
    assert FlexAttnLlavaProcessor.from_pretrained(released).image_processor.image_mean == [0.5, 0.5, 0.5]
    tower.unlink()
    assert FlexAttnLlavaProcessor.from_pretrained(released).image_processor.image_mean == list(CLIP_MEAN)


# -------------------------------------------------------------------------------------------------------- LLaVA format


def test_llava_ids_equal_those_of_transformers(llava):
    processor = FlexAttnLlavaProcessor.from_pretrained(llava)
    assert processor.image_token_id == VOCABULARY and not processor.split_at_images
    assert processor.tokenizer.pad_token == "<pad>"
    prompt = processor.prompt("What is it?")
    theirs = AutoTokenizer.from_pretrained(llava)(prompt.replace("<image>", "<image>" * 36)).input_ids
    assert without_padding(processor(images=image(), text=prompt)) == theirs


def test_llava_images_use_the_folders_mean(llava):
    processor = FlexAttnLlavaProcessor.from_pretrained(llava).image_processor
    assert processor.image_mean == [0.5, 0.25, 0.125]
    assert (processor.lowres_size, processor.highres_size, processor.lr_side) == (48, 144, 6)
    (llava / "preprocessor_config.json").rename(llava / "old.json")
    edit_json(llava / "processor_config.json", image_processor=json.loads((llava / "old.json").read_text()))
    assert FlexAttnLlavaProcessor.from_pretrained(llava).image_processor.image_mean == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_checkpoints_own_prompt_is_used(llava, file):
    template = "{% for message in messages %}Q: <image>{{ message['content'][-1]['text'] }} A:{% endfor %}"
    if file.endswith(".jinja"):
        (llava / file).write_text(template)
    else:
        edit_json(llava / file, chat_template=template)
    assert FlexAttnLlavaProcessor.from_pretrained(llava).prompt("why?") == "Q: <image>why? A:"


def test_sizes_follow_the_model_that_is_fed(llava):
    config = load_config(llava)
    config.flexattn_config = FlexAttnConfig(zoom=2, lowres_size=48, highres_size=96).to_dict()
    processor = FlexAttnLlavaProcessor.from_pretrained(llava, config=config)
    assert processor(images=image(), text="<image>")["pixel_values_hr"].shape == (1, 3, 96, 96)


# ---------------------------------------------------------------------------------------------------------- own format


@pytest.mark.slow
@pytest.mark.parametrize("source", ["released", "llava"])
def test_processor_round_trips(request, tmp_path, source):
    folder = request.getfixturevalue(source)
    before = FlexAttnLlavaProcessor.from_pretrained(folder)
    own = tmp_path / "own"
    load_config(folder).save_pretrained(own)
    before.save_pretrained(own)
    texts = [before.prompt("What?"), "<image> and <image>", "no image, two  spaces", " <image>", "end</s>USER: more"]
    inputs = dict(images=[image(60, 40), image(40, 60), image(50, 50), image(9, 9)], text=texts)
    expected = before(**inputs)
    for after in (FlexAttnLlavaProcessor.from_pretrained(own), AutoProcessor.from_pretrained(own)):
        assert isinstance(after, FlexAttnLlavaProcessor)
        features = after(**inputs)
        assert features.keys() == expected.keys()
        assert all(torch.equal(features[key], expected[key]) for key in expected)
        assert after.prompt("What?") == before.prompt("What?")


# ------------------------------------------------------------------------------------------------ batches and images


def test_batches_are_padded_on_the_left(llava):
    processor = FlexAttnLlavaProcessor.from_pretrained(llava)
    texts = ["<image> one", "two <image> three <image>", "no image"]
    features = processor(images=[image()] * 3, text=texts)
    assert features["pixel_values"].shape[0] == 3
    for row, text in enumerate(texts):
        alone = processor(images=[image()] * text.count("<image>"), text=text)["input_ids"][0].tolist()
        assert without_padding(features, row) == alone
        padded = features["input_ids"].shape[1] - len(alone)
        assert features["attention_mask"][row].tolist() == [0] * padded + [1] * len(alone)
        assert set(features["input_ids"][row, :padded].tolist()) <= {processor.tokenizer.pad_token_id}
    right = processor(images=[image()] * 3, text=texts, padding_side="right")
    assert right["attention_mask"][2, 0] == 1 and right["attention_mask"][2, -1] == 0


def test_text_alone_has_no_pixels(llava):
    features = FlexAttnLlavaProcessor.from_pretrained(llava)(text=["a", "a longer one"])
    assert set(features) == {"input_ids", "attention_mask"}


def test_chat_template_may_tokenize_at_once(released):
    processor = FlexAttnLlavaProcessor.from_pretrained(released)
    content = [{"type": "image", "image": image()}, {"type": "text", "text": "What?"}]
    features = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    expected = processor(images=image(), text=processor.prompt("What?"))
    assert torch.equal(features["input_ids"], expected["input_ids"]) and "pixel_values_hr" in features


@pytest.mark.parametrize(
    "inputs, says",
    [
        (dict(text="no mark", images=image()), "0 <image> marks, but 1 images"),
        (dict(text="<image>"), "1 <image> marks, but 0 images"),
        (dict(text=["<image>", "<image><image>"], images=[[image(), image()], [image()]]), "text by text"),
        (dict(images=image()), "there is no text"),
        (dict(text=7), "must be a string"),
        (dict(text=[]), "must be a string"),
        (dict(text="a", padding_side="top"), "allowed: left, right"),
        (dict(text=["a", "a longer one"], padding=False), "pass padding=True"),
    ],
)
def test_images_and_prompts_that_do_not_match(llava, inputs, says):
    with pytest.raises(InputError, match=says):
        FlexAttnLlavaProcessor.from_pretrained(llava)(**inputs)


@pytest.mark.parametrize("question, says", [("", "empty"), ("  \n", "empty"), ("what is <image>?", "contains <image>")])
def test_questions_that_cannot_be_asked(llava, question, says):
    with pytest.raises(InputError, match=says):
        FlexAttnLlavaProcessor.from_pretrained(llava).prompt(question)


SPECIAL = ["</s>", "<s>", "<unk>"]


@pytest.mark.parametrize("source", ["released", "llava"])
@pytest.mark.parametrize("token", [*SPECIAL, "<pad>", "<extra>", "<image>"])
def test_a_question_cannot_write_special_tokens(request, source, token):
    """They would become the tokens' ids: a question could end the prompt, or begin another."""
    processor = FlexAttnLlavaProcessor.from_pretrained(request.getfixturevalue(source))
    if token == "<extra>":
        processor.tokenizer.add_tokens([token], special_tokens=True)
    question = f"What is {token} in HTML?"
    if token not in processor.tokenizer.get_vocab():  # the released tokenizer has no <pad>
        assert processor.prompt(question)
        return
    with pytest.raises(InputError, match=f"contains '?{token}"):
        processor.prompt(question)
    part = [{"type": "text", "text": question}]
    system = {"role": "system", "content": part}
    user = {"role": "user", "content": part}
    for messages in (
        [user],
        [system, user],
        [user, {"role": "assistant", "content": question}, user],
        [[user], [user]],
    ):
        with pytest.raises(InputError, match=f"contains '?{token}"):
            processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)


@pytest.mark.parametrize("source", ["released", "llava"])
def test_only_the_template_writes_special_tokens(request, source):
    processor = FlexAttnLlavaProcessor.from_pretrained(request.getfixturevalue(source))
    special = set(processor.tokenizer.all_special_ids) - {processor.tokenizer.bos_token_id}
    for question in ("Is 1 < s > 0?", "</ s>", "< unk>", "<S>", "a\u2581b"):
        ids = processor.tokenize(processor.prompt(question))
        assert not special & (set(ids) - {processor.image_token_id, RELEASED_IMAGE_ID})
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "yes"}]
    assert processor.tokenize(processor.apply_chat_template(turns)).count(processor.tokenizer.eos_token_id) == 1


def test_a_caller_may_end_an_answer_and_mark_an_image_in_plain_content(llava):
    processor = FlexAttnLlavaProcessor.from_pretrained(llava)
    turns = [{"role": "user", "content": "<image>\none?"}, {"role": "assistant", "content": "yes</s>"}]
    assert "<image>\none? ASSISTANT: yes</s>" in processor.apply_chat_template(turns)
    turns[1]["content"] = "yes</s> no</s>"
    with pytest.raises(InputError, match="of the assistant contains '</s>'"):
        processor.apply_chat_template(turns)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for", "the chat template of the checkpoint fails"),
        ("{{ raise_exception('no') }}", "the chat template of the checkpoint fails: no"),
        ("{{ messages[7]['content'] }}", "the chat template of the checkpoint fails"),
        ("{{ messages[0]['content'][-1]['text'] }}", "writes 0 <image> marks for 1 images"),
    ],
)
def test_a_chat_template_that_cannot_ask(llava, template, says):
    (llava / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=says) as error:
        FlexAttnLlavaProcessor.from_pretrained(llava).prompt("why?")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["released", "llava"])
def test_missing_or_damaged_tokenizer(request, source):
    folder = request.getfixturevalue(source)
    path = folder / ("tokenizer.model" if source == "released" else "tokenizer.json")
    path.write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        FlexAttnLlavaProcessor.from_pretrained(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="neither tokenizer.json nor tokenizer.model"):
        FlexAttnLlavaProcessor.from_pretrained(folder)
