"""Find a checkpoint: a local folder, or the files of a hub repository that are needed, downloaded if necessary."""

from __future__ import annotations

import dataclasses
import enum
import glob
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub

from flexattn_cuda.checkpoints.files import first_line, is_inside, read_json, refuse_foreign_files
from flexattn_cuda.errors import CheckpointError


class Part(enum.Flag):
    """Parts of a checkpoint; of a hub repository only the requested ones are downloaded."""

    CONFIG = enum.auto()
    WEIGHTS = enum.auto()
    IMAGES = enum.auto()
    TEXT = enum.auto()
    INPUTS = IMAGES | TEXT
    ALL = CONFIG | WEIGHTS | IMAGES | TEXT


_FILES = {
    Part.CONFIG: ("config.json",),
    Part.WEIGHTS: ("generation_config.json", "flexattn_adapter.json", "flexattn_adapter.safetensors"),
    Part.IMAGES: ("preprocessor_config.json", "processor_config.json"),
    Part.TEXT: (
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ),
}


@dataclass(frozen=True)
class HubOptions:
    """How a hub repository is looked up. The names and meanings are those of transformers' `from_pretrained`.

    Attributes:
        revision: Branch, tag or commit; None: the main branch.
        token: Access token, True for the one that `hf auth login` has stored, False for none; None: the hub's default.
        cache_dir: Folder of the hub cache; None: the hub's default.
        local_files_only: Use what the cache holds, and never the network.
        force_download: Download files even if the cache holds them.
        subfolder: Folder inside the repository, or inside a local folder, that holds config.json.
        variant: Kind of weights, such as "fp16" for model.fp16.safetensors.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""
    variant: str | None = None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.subfolder)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"subfolder is {self.subfolder!r}; it must lie inside the checkpoint")

    @classmethod
    def pop_from(cls, kwargs: dict[str, Any]) -> HubOptions:
        """Take the hub's options out of the keyword arguments of a `from_pretrained`; None stands for the default."""
        given = {field.name: kwargs.pop(field.name, None) for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def elsewhere(self) -> HubOptions:
        """Return the same options for another repository: without revision, subfolder and variant."""
        return dataclasses.replace(self, revision=None, subfolder="", variant=None)


def resolve_folder(name_or_path: str | Path, hub: HubOptions | None = None, parts: Part = Part.ALL) -> Path:
    """Return the local folder of a checkpoint, after downloading what is missing of a hub repository.

    Args:
        name_or_path: A folder, or a hub id ("owner/name"). The hub is asked first, and only files that the cache lacks
            are downloaded; if the hub does not deliver, the cached files are used, provided that they are complete.
        hub: Options of the hub; None: the defaults.
        parts: What to download of a hub repository.

    Raises:
        CheckpointError: If there is no such checkpoint, it lacks a part, or a file in it is a link to somewhere else.
    """
    name, hub = str(name_or_path), hub or HubOptions()
    if not name.strip():  # Path("") is the current folder
        raise CheckpointError("the name of the checkpoint is empty; pass a folder or a hub id")
    folder = Path(name, hub.subfolder)
    if not folder.is_dir():
        if Path(name).is_file():
            raise CheckpointError(f"{name!r} is a file; a checkpoint is the folder that holds config.json")
        if Path(name).is_dir():
            raise CheckpointError(f"no checkpoint {name!r}: the folder has no subfolder {hub.subfolder!r}")
        if not is_hub_id(name):
            raise CheckpointError(f"no checkpoint {name!r}: it is neither a local folder nor a hub id, owner/name")
        folder = _from_hub(name, hub, parts)
    refuse_foreign_files(folder)
    return folder


def resolve_files(name_or_path: str | Path, names: Iterable[str], hub: HubOptions | None = None) -> Path:
    """Return the local folder of files that are no checkpoint, after downloading them from a hub repository.

    Args:
        name_or_path: A folder, whose subfolder is returned as it is, or a hub id.
        names: What to download of a hub repository.
        hub: Options of the hub; None: the defaults.

    Raises:
        CheckpointError: If there is no such folder, and the hub does not deliver.
    """
    name, hub = str(name_or_path), hub or HubOptions()
    folder = Path(name, hub.subfolder)
    if folder.is_dir():
        return folder
    try:
        paths = [str(PurePosixPath(hub.subfolder, file)) for file in names]
        return _Repository(name, hub).fetch(paths) / hub.subfolder
    except Exception as error:  # of the hub, of the network, of the disk
        reason = _why_not(error, hub)
        raise CheckpointError(f"{name!r} is not a local folder, and could not be downloaded ({reason})") from error


def is_hub_id(name: str) -> bool:
    """Return whether a name may be that of a hub repository, "owner/name"."""
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except huggingface_hub.errors.HFValidationError:
        return False
    return name.count("/") == 1


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the files that hold a checkpoint's weights, which are those that transformers would choose.

    Args:
        variant: As in transformers: "fp16" stands for model.fp16.safetensors and so on.

    Raises:
        CheckpointError: If there are none, or an index of shards is damaged or names files that are missing or outside
            of the folder.
    """
    for name, index in _weight_names(variant):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index).is_file():
            return [_shard(folder / index, shard) for shard in _shard_names(folder / index)]
    names = " nor ".join(name for name, _ in _weight_names(variant))
    raise CheckpointError(f"{folder} has no readable weights: neither {names}, nor an index of shards")


def _weight_names(variant: str | None) -> list[tuple[str, str]]:
    """Return (file, index of shards) of each kind, in the order in which transformers looks for them."""
    kind = f".{variant}" if variant else ""
    return [
        (f"model{kind}.safetensors", f"model.safetensors.index{kind}.json"),
        (f"pytorch_model{kind}.bin", f"pytorch_model.bin.index{kind}.json"),
    ]


def _shard_names(index: Path) -> list[str]:
    values = read_json(index).get("weight_map")
    if not isinstance(values, dict) or not values or not all(isinstance(name, str) for name in values.values()):
        raise CheckpointError(f"{index} is damaged: its weight_map must map names of weights to names of files")
    return sorted(set(values.values()))


def _shard(index: Path, name: str) -> Path:
    path = index.parent / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not is_inside(path, index.parent):
        raise CheckpointError(f"{index} names {name!r}, a file outside of its folder; no such file is opened")
    if not path.is_file():
        raise CheckpointError(f"{index.parent} has no readable weights: {name!r} is missing, which {index.name} names")
    return path


# -------------------------------------------------------------------------------------------------------------- the hub


def _from_hub(name: str, hub: HubOptions, parts: Part) -> Path:
    reason = "local_files_only is set"
    if not hub.local_files_only:
        try:
            return _Repository(name, hub).fetch_parts(parts)
        except CheckpointError:
            raise
        except Exception as error:  # of the hub, of the network, of the disk: all end in one sentence below
            reason = _why_not(error, hub)
    folder = _cached_folder(name, hub)
    if hub.force_download or folder is None or not _holds(folder, parts, hub.variant):
        raise CheckpointError(
            f"no checkpoint {name!r}: it is not a local folder, not complete in the local hub cache, and could not be "
            f"downloaded ({reason})"
        )
    return folder


def _cached_folder(name: str, hub: HubOptions) -> Path | None:
    config = str(PurePosixPath(hub.subfolder, "config.json"))
    found = huggingface_hub.try_to_load_from_cache(name, config, cache_dir=hub.cache_dir, revision=hub.revision)
    return Path(found).parent if isinstance(found, str) else None


def _why_not(error: Exception, hub: HubOptions) -> str:
    match type(error).__name__:
        case "GatedRepoError":
            return "access to it is restricted; ask for access on its page, then run hf auth login or pass token"
        case "RepositoryNotFoundError":
            return "the hub has no such repository, or it is private; check its name, or pass token"
        case "RevisionNotFoundError":
            return f"it has no revision {hub.revision!r}"
        case "OfflineModeIsEnabled":
            return "HF_HUB_OFFLINE is set"
    return first_line(error)


def _holds(folder: Path, parts: Part, variant: str | None) -> bool:
    """Return whether a cached snapshot with a config.json has the other parts too."""
    if Part.TEXT in parts and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return False
    if Part.WEIGHTS in parts:
        try:
            weight_files(folder, variant)
        except CheckpointError:
            return False
    return True


@dataclass(frozen=True)
class _Repository:
    """A repository on the hub."""

    name: str
    hub: HubOptions

    @cached_property
    def files(self) -> frozenset[str]:
        """The paths of all its files, as the hub lists them."""
        listed = huggingface_hub.list_repo_files(self.name, revision=self.hub.revision, token=self.hub.token)
        return frozenset(listed)

    def fetch_parts(self, parts: Part) -> Path:
        """Download parts of the checkpoint, and return its folder in the cache."""
        home = PurePosixPath(self.hub.subfolder)
        if str(home / "config.json") not in self.files:
            raise CheckpointError(f"no checkpoint {self.name!r}: {home / 'config.json'} is not in that hub repository")
        root = self.fetch(self._paths(home, Part.CONFIG))
        paths = self._paths(home, parts | Part.CONFIG)
        tower = read_json(root / home / "config.json").get("mm_vision_tower")  # in the released format
        if isinstance(tower, str) and tower:
            paths += self._paths(home / PurePosixPath(tower).name, parts | Part.CONFIG)
        self.fetch(paths)
        return root / home

    def fetch(self, paths: Iterable[str]) -> Path:
        """Download files that the cache lacks, and return the root of the snapshot."""
        return Path(
            huggingface_hub.snapshot_download(
                self.name,
                revision=self.hub.revision,
                token=self.hub.token,
                cache_dir=self.hub.cache_dir,
                force_download=self.hub.force_download,
                local_files_only=self.hub.local_files_only,
                allow_patterns=[glob.escape(path) for path in paths],
            )
        )

    def _paths(self, home: PurePosixPath, parts: Part) -> list[str]:
        """Return the paths of the parts in one folder of the repository; no other folder is entered."""
        names = [name for part, files in _FILES.items() if part in parts for name in files]
        if Part.WEIGHTS in parts:
            names += self._weights(home)
        return [path for path in (str(home / name) for name in names) if path in self.files]

    def _weights(self, home: PurePosixPath) -> list[str]:
        for name, index in _weight_names(self.hub.variant):
            if str(home / name) in self.files:
                return [name]
            if str(home / index) in self.files:
                root = self.fetch([str(home / index)])
                return [index, *_shard_names(root / home / index)]
        return []
