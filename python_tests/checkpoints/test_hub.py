"""Checkpoints on the hub: only what is needed is downloaded, and every option of `from_pretrained` counts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny_checkpoint
from attached_checkpoint import CHECKPOINTS
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES
from typer.testing import CliRunner

import flexattn_cuda
from flexattn_cuda import FlexAttnLlavaForConditionalGeneration as Model
from flexattn_cuda import FlexAttnLlavaProcessor as Processor
from flexattn_cuda.checkpoints import HubOptions, Part, load_config, resolve_folder
from flexattn_cuda.cli.app import app
from flexattn_cuda.errors import CheckpointError
from flexattn_cuda.tasks.load import load, read_checkpoint_info

NAME = "owner/model"
TOWER = "owner/tower"
CONFIG = {"config.json"}
WEIGHTS = {"config.json", "generation_config.json", "model.safetensors"}
INPUTS = {"config.json", "chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


@dataclass
class FakeHub:
    """Repositories in local folders, served by huggingface_hub's functions into a cache of the hub's own layout."""

    cache: Path
    folders: dict[str, Path] = field(default_factory=dict)
    error: Exception | None = None
    asked: list[tuple[str, str | None, str | bool | None]] = field(default_factory=list)
    forced: bool = False

    def list_repo_files(self, name: str, *, revision=None, token=None) -> list[str]:
        self.asked.append((name, revision, token))
        if self.error is not None:
            raise self.error
        folder = self.folders[name]
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]

    def snapshot_download(
        self,
        name: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        allow_patterns: Sequence[str] | None = None,
    ) -> str:
        self.forced |= force_download
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        revision = revision or "main"
        home = Path(cache_dir or self.cache) / f"models--{name.replace('/', '--')}"
        commit = hashlib.sha1(revision.encode()).hexdigest()
        snapshot = home / "snapshots" / commit
        for part in (snapshot, home / "refs", home / "blobs"):
            part.mkdir(parents=True, exist_ok=True)
        (home / "refs" / revision).write_text(commit)
        chosen = huggingface_hub.utils.filter_repo_objects(
            self.list_repo_files(name, revision=revision, token=token), allow_patterns=allow_patterns
        )
        for path in chosen:
            self._put(self.folders[name] / path, home / "blobs", snapshot / path)
        return str(snapshot)

    @staticmethod
    def _put(source: Path, blobs: Path, target: Path) -> None:
        blob = blobs / hashlib.sha1(source.read_bytes()).hexdigest()
        shutil.copyfile(source, blob)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(os.path.relpath(blob, target.parent))

    def cached(self, name: str = NAME, revision: str = "main", cache: Path | None = None) -> set[str]:
        """What the cache holds of a repository."""
        home = (cache or self.cache) / f"models--{name.replace('/', '--')}" / "snapshots"
        folder = home / hashlib.sha1(revision.encode()).hexdigest()
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return tiny_checkpoint.save(tmp_path_factory.mktemp("own"))


@pytest.fixture
def hub(own, tmp_path, monkeypatch):
    """A hub with one repository, which holds more than anyone needs."""
    folder = tmp_path / "repository"
    shutil.copytree(own, folder)
    for name in ("pytorch_model.bin", "tf_model.h5", "README.md", "optimizer.pt", "original/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    fake = FakeHub(tmp_path / "cache", {NAME: folder})
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fake.list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(fake.cache))
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def released_hub(hub, tmp_path):
    """A hub whose checkpoint in the released format names a vision tower that is another repository."""
    folder = tmp_path / "released"
    shutil.copytree(tiny_checkpoint.RELEASED, folder)
    shutil.copy(tiny_checkpoint.TOKENIZER, folder)
    shutil.move(folder / "vision_tower", tmp_path / "tower")
    tiny_checkpoint.edit_json(folder / "config.json", mm_vision_tower=TOWER)
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if "vision_tower" not in name}
    save_file(weights, folder / "model.safetensors")
    (tmp_path / "tower" / "tf_model.h5").touch()
    hub.folders |= {NAME: folder, TOWER: tmp_path / "tower"}
    return hub


# ------------------------------------------------------------------------------------------------ what is downloaded


def test_a_model_downloads_its_weights_once_and_nothing_else(hub):
    Model.from_pretrained(NAME)
    assert hub.cached() == WEIGHTS


def test_a_processor_downloads_no_weights(hub):
    Processor.from_pretrained(NAME)
    assert hub.cached() == INPUTS


def test_load_downloads_what_both_need(hub, own):
    model, processor = load(NAME, device="cpu")
    assert hub.cached() == WEIGHTS | INPUTS
    assert model.config.flexattn == load_config(own).flexattn
    assert processor.image_token_id == tiny_checkpoint.IMAGE_ID


def test_pickled_weights_are_downloaded_only_where_there_are_no_others(hub):
    (hub.folders[NAME] / "model.safetensors").unlink()
    folder = resolve_folder(NAME, parts=Part.WEIGHTS | Part.CONFIG)
    assert hub.cached() == {"config.json", "generation_config.json", "pytorch_model.bin"} and folder.is_dir()


def test_shards_are_those_that_the_index_names(hub):
    folder = hub.folders[NAME]
    shutil.move(folder / "model.safetensors", folder / "part-a.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(load_file(folder / "part-a.safetensors"), "part-a.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    Model.from_pretrained(NAME)
    expected = {"config.json", "generation_config.json", "model.safetensors.index.json", "part-a.safetensors"}
    assert hub.cached() == expected


@pytest.mark.parametrize("command", [["info"], ["flops", "--systems", "llava"]])
def test_commands_that_read_the_configuration_download_it_alone(hub, command):
    result = CliRunner().invoke(app, [*command, "--model", NAME])
    assert result.exit_code == 0, result.output
    assert hub.cached() == CONFIG


def test_the_configuration_of_the_released_format_needs_that_of_its_tower(released_hub):
    read_checkpoint_info(NAME)
    assert released_hub.cached() == released_hub.cached(TOWER) == CONFIG


def test_a_vision_tower_is_fetched_without_what_it_does_not_need(released_hub):
    Model.from_pretrained(NAME)
    Processor.from_pretrained(NAME)
    assert released_hub.cached() == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}
    assert released_hub.cached(TOWER) == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_a_vision_tower_inside_the_repository_is_fetched_with_it(released_hub, tmp_path):
    folder = released_hub.folders[NAME]
    shutil.copytree(tmp_path / "tower", folder / "tower")
    tiny_checkpoint.edit_json(folder / "config.json", mm_vision_tower="./tower")
    Model.from_pretrained(NAME)
    assert {"tower/config.json", "tower/model.safetensors"} <= released_hub.cached()
    assert "tower/tf_model.h5" not in released_hub.cached() and not released_hub.cached(TOWER)


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("kind", [Model, Processor])
def test_the_options_reach_the_hub(hub, kind, tmp_path):
    kind.from_pretrained(NAME, revision="v2", token="secret", cache_dir=tmp_path / "other", force_download=True)
    assert set(hub.asked) == {(NAME, "v2", "secret")} and hub.forced
    assert hub.cached(revision="v2", cache=tmp_path / "other") and not hub.cached(revision="v2")


def test_a_tower_gets_the_token_but_not_the_revision(released_hub):
    Model.from_pretrained(NAME, revision="v2", token="secret")
    assert {(name, token) for name, _, token in released_hub.asked} == {(NAME, "secret"), (TOWER, "secret")}
    assert {revision for name, revision, _ in released_hub.asked if name == TOWER} <= {None, "main"}


@pytest.mark.parametrize("kind", [Model, Processor])
def test_a_subfolder_of_a_repository_or_a_folder(hub, kind):
    shutil.move(hub.folders[NAME], hub.folders[NAME].parent / "inner")
    hub.folders[NAME].mkdir()
    shutil.move(hub.folders[NAME].parent / "inner", hub.folders[NAME] / "inner")
    kind.from_pretrained(NAME, subfolder="inner")
    assert hub.cached() == {f"inner/{name}" for name in (WEIGHTS if kind is Model else INPUTS)}
    kind.from_pretrained(hub.folders[NAME], subfolder="inner")
    with pytest.raises(CheckpointError, match="no subfolder 'outer'"):
        kind.from_pretrained(hub.folders[NAME], subfolder="outer")
    with pytest.raises(CheckpointError, match="must lie inside the checkpoint"):
        kind.from_pretrained(NAME, subfolder="../outer")


@pytest.mark.parametrize("kind", [Model, Processor])
def test_local_files_only_never_asks_the_hub(hub, kind):
    with pytest.raises(CheckpointError, match="local_files_only is set"):
        kind.from_pretrained(NAME, local_files_only=True)
    load(NAME, device="cpu")
    hub.asked.clear()
    kind.from_pretrained(NAME, local_files_only=True)
    with pytest.raises(CheckpointError, match="not complete in the local hub cache"):
        kind.from_pretrained(NAME, local_files_only=True, revision="v2")
    assert not hub.asked


def test_an_unknown_option_of_the_processor_is_refused(own):
    with pytest.raises(TypeError, match="takes no padding_sides"):
        Processor.from_pretrained(own, padding_sides="left")
    whole = Processor.from_pretrained(own)
    with pytest.raises(TypeError, match="image_tokens_id"):
        Processor(whole.image_processor, whole.tokenizer, image_tokens_id=3)


def test_default_options_are_written_as_none():
    options = dict(revision=None, token=None, subfolder=None, dtype="auto")
    assert HubOptions.pop_from(options) == HubOptions() and options == {"dtype": "auto"}


# ---------------------------------------------------------------------------------------------------------- the cache


def test_the_cache_serves_when_the_hub_does_not(hub):
    load(NAME, device="cpu")
    hub.error = ConnectionError("no route to host")
    load(NAME, device="cpu")
    with pytest.raises(CheckpointError, match="could not be downloaded .no route to host"):
        Model.from_pretrained(NAME, force_download=True)


def test_a_cache_that_holds_a_part_is_not_taken_for_a_checkpoint(hub):
    read_checkpoint_info(NAME)
    hub.error = OfflineModeIsEnabled("offline")
    assert read_checkpoint_info(NAME).config.lr_side == 6
    for part in (Part.WEIGHTS, Part.TEXT):
        with pytest.raises(CheckpointError, match="not complete in the local hub cache.*HF_HUB_OFFLINE is set"):
            resolve_folder(NAME, parts=part)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (GatedRepoError, "access to it is restricted"),
        (RepositoryNotFoundError, "the hub has no such repository"),
        (RevisionNotFoundError, "it has no revision 'v2'"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_sentence(hub, error, says):
    hub.error = error("long\nexplanations\n", response=SimpleNamespace(headers={}, request=None))
    with pytest.raises(CheckpointError, match=says) as caught:
        Model.from_pretrained(NAME, revision="v2")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"no checkpoint {NAME!r}")


def test_a_repository_that_holds_no_checkpoint(hub):
    (hub.folders[NAME] / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is not in that hub repository"):
        read_checkpoint_info(NAME)
    assert not hub.cached()


# ------------------------------------------------------------------------------------------------------------ adapters


def test_an_adapter_is_fetched_without_the_rest_of_its_repository(hub, tmp_path):
    family = FAMILIES["internvl_qwen2"]
    flexattn_cuda.save_adapter(flexattn_cuda.attach(family.model(), family.settings()), tmp_path / "repo" / "part")
    (tmp_path / "repo" / "part" / "model.safetensors").touch()
    hub.folders["owner/adapter"] = tmp_path / "repo"
    options = dict(revision="v1", token="secret", subfolder="part")
    model = flexattn_cuda.attach(family.model(), "owner/adapter", **options)
    assert model.flexattn_settings == family.settings()
    files = {"part/flexattn_adapter.json", "part/flexattn_adapter.safetensors"}
    assert hub.cached("owner/adapter", "v1") == files and ("owner/adapter", "v1", "secret") in hub.asked
    with pytest.raises(CheckpointError, match="'owner/adapter' is not a local folder, and could not be downloaded"):
        flexattn_cuda.attach(family.model(), "owner/adapter", local_files_only=True)


def test_a_model_of_another_family_is_fetched_whole_and_its_adapter_names_it(hub, tmp_path):
    hub.folders["owner/internvl"] = CHECKPOINTS["internvl_qwen2"].save(tmp_path / "internvl")
    model, _ = load("owner/internvl", "cpu", revision="v1")
    flexattn_cuda.save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "flexattn_adapter.json").read_text())["base"]["name"] == "owner/internvl"
    assert 'base_model: "owner/internvl"' in (tmp_path / "adapter" / "README.md").read_text()
    cached = hub.cached("owner/internvl", "v1")
    assert {"model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= cached
    model.save_pretrained(tmp_path / "internvl")
    whole, _ = load("owner/internvl", "cpu", revision="v2")
    assert "flexattn_adapter.json" in hub.cached("owner/internvl", "v2")
    assert whole.flexattn_settings == model.flexattn_settings
