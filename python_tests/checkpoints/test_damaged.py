"""Damaged checkpoints: `load` and `ask` either work, or say in one sentence what is wrong.

Every field of every JSON file is damaged in turn, then whole files, tensors, indexes, pickles and links. Nothing
outside of the folder is opened, and no code of a checkpoint runs.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import re
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_checkpoint
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoint import edit_json
from transformers import GenerationConfig

from flexattn_cuda.checkpoints import load_config
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.tasks import load as loading
from flexattn_cuda.tasks.ask import ask
from flexattn_cuda.tasks.load import load

VALUES = (None, "word", -1, 0, 1.5, True, [], {}, [["a"]], 10**9, {"a": {"b": 1}})
TEXTS = (b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe\0", b"[" * 100_000)
# What a message must never ask for, to get around a check.
NEVER_ADVISED = ("weights_only", "trust_remote_code", "ignore_mismatched_sizes")
DELETED = "<deleted>"  # in place of a value: the field is removed

Damage = Callable[[Path], Any]


def save_llava(folder: Path) -> None:
    tiny_checkpoint.save_llava(folder)
    edit_json(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])


def save_released(folder: Path) -> None:
    tiny_checkpoint.save_released(folder)
    extra = json.loads((folder / "config.json").read_text())["extra"]
    edit_json(folder / "config.json", extra=extra | {"lowres_size": "126", "highres_size": "378"})  # faster
    settings = {"legacy": False, "add_bos_token": True, "bos_token": {"content": "<s>"}, "model_max_length": 2048}
    edit_json(folder / "tokenizer_config.json", **settings)
    edit_json(folder / "special_tokens_map.json", eos_token="</s>", unk_token="<unk>")
    edit_json(folder / "added_tokens.json", **{"<extra>": 499})


FORMATS = {"flexattn": tiny_checkpoint.save, "llava": save_llava, "released": save_released}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint that answers, in each format."""
    folder = tmp_path_factory.mktemp("whole")
    for form, save in FORMATS.items():
        save(folder / form)
        assert answer(folder / form) is None
    return folder


@pytest.fixture
def damaged(whole, tmp_path):
    """Damage a copy of a checkpoint, ask it, and return the message of its error, None without one."""

    def outcome(form: str, damage: Damage) -> str | None:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(whole / form, tmp_path / "model")
        damage(tmp_path / "model")
        return answer(tmp_path / "model")

    return outcome


def answer(folder: Path) -> str | None:
    """Ask a checkpoint; any error but those with a sentence for the user fails the test."""
    try:
        form = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        form = None
    try:
        model, processor = load(folder, device="cpu", flexattn=tiny.settings() if form == "llava" else None)
        ask(model, processor, Image.linear_gradient("L").resize((60, 40)), "Which one?", max_new_tokens=2)
    except (CheckpointError, InputError) as error:
        return str(error)
    return None


def is_a_sentence(message: str | None) -> bool:
    return message is None or (
        message.strip() != "" and "\n" not in message and not any(advice in message for advice in NEVER_ADVISED)
    )


# ------------------------------------------------------------------------------------------------- every field, in turn


def fields(values: Any, before: tuple = ()) -> Iterator[tuple]:
    """The paths of all fields; of a long list or mapping (a vocabulary) the first two."""
    items = list(values.items()) if isinstance(values, dict) else list(enumerate(values))
    for name, value in items if len(items) < 40 else items[:2]:
        yield (*before, name)
        if isinstance(value, (dict, list)):
            yield from fields(value, (*before, name))


def replaced(text: str, path: tuple, value: Any) -> str:
    values = json.loads(text)
    holder = values
    for name in path[:-1]:
        holder = holder[name]
    if value is DELETED:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return json.dumps(values)


FILES = [
    ("flexattn", "config.json"),
    ("flexattn", "generation_config.json"),
    ("flexattn", "processor_config.json"),
    ("flexattn", "tokenizer.json"),
    ("flexattn", "tokenizer_config.json"),
    ("llava", "config.json"),
    ("llava", "preprocessor_config.json"),
    ("llava", "tokenizer.json"),
    ("llava", "tokenizer_config.json"),
    ("released", "added_tokens.json"),
    ("released", "config.json"),
    ("released", "special_tokens_map.json"),
    ("released", "tokenizer_config.json"),
    ("released", "vision_tower/config.json"),
    ("released", "vision_tower/preprocessor_config.json"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("form", "name"), FILES, ids=map("/".join, FILES))
def test_a_damaged_field_gives_an_answer_or_a_sentence(whole, damaged, form, name):
    """Each field is deleted or set to one of VALUES, in turn, so that every file sees every value."""
    text = (whole / form / name).read_text()
    wrong = []
    for path, value in zip(fields(json.loads(text)), itertools.cycle([DELETED, *VALUES])):
        new = replaced(text, path, value)
        try:
            message = damaged(form, lambda folder, new=new: (folder / name).write_text(new))
        except Exception as error:
            message = f"{type(error).__name__}:\n{error}"
        if not is_a_sentence(message):
            wrong.append((path, value, message))
    assert not wrong


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("form", "name"), FILES, ids=map("/".join, FILES))
def test_a_file_that_holds_something_else_gives_an_answer_or_a_sentence(damaged, form, name):
    for text in TEXTS:
        assert is_a_sentence(damaged(form, lambda folder, text=text: (folder / name).write_bytes(text))), text[:9]

    def put_a_folder_there(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    assert is_a_sentence(damaged(form, put_a_folder_there))
    assert is_a_sentence(damaged(form, lambda folder: (folder / name).unlink()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 0), ("num_beams", 0), ("num_return_sequences", 3), ("repetition_penalty", -1.0),
        ("no_repeat_ngram_size", -1), ("max_time", "soon"), ("eos_token_id", [10**9]), ("suppress_tokens", ["a"]),
        ("bad_words_ids", [[]]), ("cache_implementation", "paged"), ("prompt_lookup_num_tokens", 3),
        ("stop_strings", ["."]), ("assistant_early_exit", 2), ("guidance_scale", 2.0), ("dola_layers", "high"),
        ("watermarking_config", {"bias": 2.0}), ("validate", 1), ("to_dict", "word"), ("length_penalty", True),
    ],
)  # fmt: skip
def test_an_impossible_generation_config_is_refused_by_name(damaged, name, value):
    text = json.dumps({name: value})
    message = damaged("flexattn", lambda folder: (folder / "generation_config.json").write_text(text))
    assert message is not None and name in message and "generation_config.json" in message and is_a_sentence(message)


def test_every_setting_of_generation_may_be_null_or_absent(damaged):
    text = json.dumps(dict.fromkeys(vars(GenerationConfig())))
    assert damaged("flexattn", lambda folder: (folder / "generation_config.json").write_text(text)) is None
    vicuna = {"do_sample": True, "temperature": 0.9, "top_p": 0.6, "max_length": 4096, "pad_token_id": -1, "unknown": 3}
    text = json.dumps(vicuna)
    assert damaged("flexattn", lambda folder: (folder / "generation_config.json").write_text(text)) is None


@pytest.mark.parametrize("form", ["flexattn", "llava"])
@pytest.mark.parametrize(
    "template", ["", "{{", "{% for x in y %}", "{{ messages.x.y }}", "{{ 1 / 0 }}", "{% include 'x' %}", "a"]
)
def test_a_bad_chat_template_gives_an_answer_or_a_sentence(damaged, form, template):
    assert is_a_sentence(damaged(form, lambda folder: (folder / "chat_template.jinja").write_text(template)))


def test_a_tokenizer_that_panics_is_refused(damaged):
    """The tokenizers library panics where its post-processor names a token without ids: not an Exception in Python."""

    def damage(folder: Path) -> None:
        single = [{"SpecialToken": {"id": "<none>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
        edit_json(folder / "tokenizer.json", post_processor=template)

    message = damaged("flexattn", damage)
    assert message is not None and "the tokenizer in" in message and is_a_sentence(message)


def test_a_tokenizer_whose_unknown_token_has_no_id_is_refused(damaged):
    message = damaged("released", lambda folder: edit_json(folder / "special_tokens_map.json", unk_token=""))
    assert message is not None and "the tokenizer in" in message and is_a_sentence(message)


def test_a_tokenizer_that_does_not_know_the_image_token_is_refused(damaged):
    def damage(folder: Path) -> None:
        added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        edit_json(folder / "tokenizer.json", added_tokens=[token for token in added if token["content"] != "<image>"])

    message = damaged("llava", damage)
    assert message is not None and "0 image tokens of 1 <image> marks" in message and is_a_sentence(message)


@pytest.mark.slow
def test_a_damaged_sentencepiece_model_gives_an_answer_or_a_sentence(damaged):
    data = tiny_checkpoint.TOKENIZER.read_bytes()
    for at in range(0, len(data), len(data) // 12):
        new = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        assert is_a_sentence(damaged("released", lambda folder, new=new: (folder / "tokenizer.model").write_bytes(new)))


# -------------------------------------------------------------------------------------------------------------- weights


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_weights(path: Path, header: Any, tensors: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)


@pytest.mark.parametrize("entry", ["dtype", "shape", "data_offsets"])
@pytest.mark.parametrize("value", [DELETED, *VALUES, "F16", [1], [0, 8], [8, 0], [10**12, 10**12 + 4]], ids=repr)
def test_a_damaged_header_of_weights_is_refused(damaged, entry, value):
    def damage(folder: Path) -> None:
        header, tensors = header_of(folder / "model.safetensors")
        name = next(name for name in header if name.endswith("q_proj.weight"))
        if value is DELETED:
            del header[name][entry]
        else:
            header[name][entry] = value
        write_weights(folder / "model.safetensors", header, tensors)

    message = damaged("flexattn", damage)
    assert message is not None and is_a_sentence(message)


@pytest.mark.parametrize(
    "data", [b"", b"short", b"\xff" * 64, struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"[]"]
)
def test_weights_that_are_something_else_are_refused(damaged, data):
    message = damaged("flexattn", lambda folder: (folder / "model.safetensors").write_bytes(data))
    assert message is not None and is_a_sentence(message)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q_proj.weight", "k_proj_hd.weight", "lm_head.weight", "norm.weight"])
def test_weights_that_are_not_numbers_are_refused(damaged, name, value):
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        next(weight for key, weight in weights.items() if key.endswith(name)).view(-1)[7] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    message = damaged("flexattn", damage)
    assert message is not None and re.search(
        f"1 weights in .* hold NaN or infinite numbers, the first is .*{name}", message
    )


def test_a_weight_under_another_name_is_missed(damaged):
    def rename(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["model.unknown.weight"] = weights.pop(next(name for name in weights if name.endswith("up_proj.weight")))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    assert "lacks 1 weights" in damaged("flexattn", rename)


@pytest.mark.parametrize("form", ["flexattn", "llava"])
def test_weights_of_other_shapes_are_refused(damaged, form):
    def widen(folder: Path) -> None:
        text = json.loads((folder / "config.json").read_text())["text_config"]
        edit_json(folder / "config.json", text_config=text | {"intermediate_size": text["intermediate_size"] + 16})

    message = damaged(form, widen)
    assert message is not None and "other shapes than its config.json says" in message and is_a_sentence(message)


def into_shards(folder: Path, index: Any) -> Path:
    """Replace the weights by an index of shards; return where the weights are now."""
    path = folder / "model-00001-of-00001.safetensors"
    shutil.move(folder / "model.safetensors", path)
    if callable(index):
        index = index(list(load_file(path)))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_an_index_of_shards_is_read(damaged):
    def index(names: list[str]) -> Any:
        return {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}

    assert damaged("flexattn", lambda folder: into_shards(folder, index)) is None


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": "a"}]
)
def test_a_damaged_index_of_shards_is_refused(damaged, index):
    message = damaged("flexattn", lambda folder: into_shards(folder, index))
    assert message is not None and "index" in message and is_a_sentence(message)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{folder}/../outside.safetensors", "a/../../outside.safetensors"]
)
def test_an_index_cannot_name_a_file_outside_of_the_folder(damaged, name):
    """The file is there, and it holds the model's weights: it would answer if it were opened."""

    def damage(folder: Path) -> None:
        outside = name.format(folder=folder)
        path = into_shards(folder, lambda names: {"metadata": {}, "weight_map": dict.fromkeys(names, outside)})
        (folder / "a").mkdir()
        shutil.move(path, folder.parent / "outside.safetensors")

    message = damaged("flexattn", damage)
    assert message is not None and "a file outside of its folder" in message and is_a_sentence(message)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_link_to_a_file_outside_of_the_folder_is_not_followed(damaged, name):
    def damage(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    message = damaged("flexattn", damage)
    assert message is not None and "is a link to a file outside of its folder" in message


def test_a_link_inside_of_the_folder_is_followed(damaged):
    def damage(folder: Path) -> None:
        shutil.move(folder / "model.safetensors", folder / "weights")
        (folder / "model.safetensors").symlink_to("weights")

    assert damaged("flexattn", damage) is None


@pytest.mark.parametrize("name", ["{folder}/../tower", "../tower", "inside"])
def test_a_vision_tower_is_not_looked_for_outside(damaged, name):
    """Neither at a path that a checkpoint brings along, nor behind a link that it brings along."""

    def damage(folder: Path) -> None:
        elsewhere = folder.parent / "elsewhere"
        shutil.rmtree(elsewhere, ignore_errors=True)
        elsewhere.mkdir()
        shutil.move(folder / "vision_tower", elsewhere / "tower")
        (folder / "inside").symlink_to(elsewhere / "tower")
        tower = name.replace("../tower", "../elsewhere/tower").format(folder=folder)
        edit_json(folder / "config.json", mm_vision_tower=tower)

    message = damaged("released", damage)
    assert message is not None and "the vision tower" in message and is_a_sentence(message)


# -------------------------------------------------------------------------------------------------------------- pickles


class Malicious:
    """A pickle that leaves a file behind if it is executed."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("kind", ["torch", "bare", "text", "cut off"])
@pytest.mark.parametrize("form", ["flexattn", "llava"])
def test_code_in_a_pickle_is_never_executed(damaged, tmp_path, form, kind):
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        path = folder / "pytorch_model.bin"
        if kind == "bare":
            path.write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
        elif kind == "text":
            path.write_text("not weights")
        else:
            torch.save(weights | ({"code": Malicious(tmp_path / "executed")} if kind == "torch" else {}), path)
        if kind == "cut off":
            path.write_bytes(path.read_bytes()[:5000])

    message = damaged(form, damage)
    assert message is not None and "never executed" in message and is_a_sentence(message)
    assert not (tmp_path / "executed").exists()


def test_tensors_in_a_pickle_are_loaded(damaged):
    def damage(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    assert damaged("flexattn", damage) is None


def test_code_that_a_checkpoint_brings_along_is_never_executed(damaged, tmp_path):
    def damage(folder: Path) -> None:
        (folder / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\nclass Own: ...\n")
        for name, kind in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
            edit_json(folder / name, auto_map={kind: ["code.Own", "code.Own"]}, tokenizer_class="Own")

    assert is_a_sentence(damaged("llava", damage))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused(whole, tmp_path, name):
    """Reading it would wait for a writer for ever."""
    folder = shutil.copytree(whole / "flexattn", tmp_path / "model")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name} is a pipe or a device; put a file there"):
        load(folder, device="cpu")


def test_a_chat_template_that_never_ends_is_refused(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_SECONDS", 2.0)
    folder = shutil.copytree(whole / "flexattn", tmp_path / "model")
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(endless)
    threads = threading.active_count()
    with pytest.raises(CheckpointError, match="the chat template or the tokenizer in .*: no end after 2 seconds"):
        load(folder, device="cpu")
    end = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.05)
    assert threading.active_count() == threads  # the template was ended


@pytest.mark.parametrize("part", ["missing", None])
def test_a_configuration_of_a_far_larger_model_is_refused_before_anything_is_made(whole, tmp_path, part):
    shutil.copytree(whole / "flexattn", tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    del values["text_config"]  # transformers' default is a language model of 7B
    values |= {"text_config": None} if part is None else {}
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"bytes, too few for the [0-9]+ weights and more that its config\.json"):
        load(tmp_path / "model", device="cpu")


def test_sizes_that_no_machine_holds_are_refused_before_anything_is_made(whole, tmp_path):
    values = json.loads((whole / "flexattn" / "config.json").read_text())
    for part, name in itertools.product(("text_config", "vision_config"), ("num_hidden_layers", "hidden_size")):
        huge = values | {part: values[part] | {name: 10**9}}
        (tmp_path / "config.json").write_text(json.dumps(huge))
        with pytest.raises(CheckpointError, match=f"{name} is 1000000000; it must be a whole number from 1 to"):
            load_config(tmp_path)
