"""`flexattn convert`: pickled weights become safetensors, shard by shard."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from question_files import QUESTION, image
from refusals import refused
from safetensors.torch import load_file

from flexattn_cuda.tasks.ask import ask
from flexattn_cuda.tasks.load import load


@pytest.fixture
def pickled(checkpoint, tmp_path):
    """A checkpoint whose weights are pickled in two shards."""
    folder = shutil.copytree(checkpoint, tmp_path / "pickled")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, shards = sorted(weights), [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    half = len(names) // 2
    for shard, part in zip(shards, (names[:half], names[half:])):
        torch.save({name: weights[name] for name in part}, folder / shard)
    homes = {name: shards[number >= half] for number, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return folder


def test_a_converted_checkpoint_answers_as_before(flexattn, checkpoint, pickled, tmp_path):
    code, _, err = flexattn("convert", pickled, "-o", tmp_path / "new")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert code == 0 and err == "".join(f"wrote {tmp_path / 'new' / name}\n" for name in names)
    assert not list((tmp_path / "new").glob("*.bin*"))
    original, expected = load_file(checkpoint / "model.safetensors"), load(checkpoint, "cpu")
    converted = {name: weight for file in names for name, weight in load_file(tmp_path / "new" / file).items()}
    assert converted.keys() == original.keys() and all(
        torch.equal(converted[name], original[name]) for name in original
    )
    answers = [ask(*loaded, image(), QUESTION, 4).tokens for loaded in (expected, load(tmp_path / "new", "cpu"))]
    assert answers[0] == answers[1]


def test_tensors_that_share_memory_are_written_apart(flexattn, pickled, tmp_path):
    weight = torch.arange(6.0)
    for file in pickled.glob("pytorch_model*"):
        file.unlink()
    torch.save({"a": weight, "b": weight, "c": weight[2:4]}, pickled / "pytorch_model.bin")
    assert flexattn("convert", pickled, "-o", tmp_path / "new")[0] == 0
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written["a"].tolist() == written["b"].tolist() == weight.tolist() and written["c"].tolist() == [2, 3]
    assert not (tmp_path / "new" / "model.safetensors.index.json").exists()


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (print, ("this ran",))


def test_code_in_a_pickle_is_never_run(flexattn, pickled, tmp_path):
    torch.save({"a": Code()}, pickled / "pytorch_model-00001-of-00002.bin")
    assert "is damaged, or holds more than tensors" in refused(flexattn("convert", pickled, "-o", tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_converted_is_refused(flexattn, checkpoint, pickled, tmp_path):
    assert "so there is nothing to convert" in refused(flexattn("convert", checkpoint, "-o", tmp_path / "new"))
    assert "is not empty; choose a new folder" in refused(flexattn("convert", pickled, "-o", pickled))
    torch.save([1, 2], pickled / "pytorch_model-00002-of-00002.bin")
    assert "does not hold weights by name" in refused(flexattn("convert", pickled, "-o", tmp_path / "new"))
