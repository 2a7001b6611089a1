"""Where weights come from and go to: safetensors folders read lazily, models in memory, sharded writing by rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from flexi_plugins.data import Family, ModelShape
from flexi_plugins.errors import FlexiError, unknown

FamilyOf = Callable[[Any], Family]
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The weights, configuration and tokenizer of one model. ``read`` returns one tensor of the state dict by name."""

    def __init__(
        self, name: str, config: PreTrainedConfig, family: Family, read: Callable[[str], Tensor], folder: Path | None
    ) -> None:
        self.name = name
        self.config = config
        self.family = family
        self.shape: ModelShape = family.shape(config)
        self.read = read
        self.folder = folder
        self._stored = read
        self._cache: dict[Any, Any] = {}

    @classmethod
    def from_folder(cls, folder: Path | str, family_of: FamilyOf, name: str | None = None) -> Checkpoint:
        """Open a folder with config.json and safetensors; every header is checked, no weight is read."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FlexiError(f"model {str(folder)!r}: no config.json in the folder; expected a Hugging Face checkpoint")
        config = read_config(folder)
        family = family_of(config)
        files = _tensor_files(folder)
        checkpoint = cls(name or str(folder), config, family, _FolderReader(files), folder)
        _check_tensors(folder, files, checkpoint)
        return checkpoint

    @classmethod
    def from_model(cls, model: nn.Module, family_of: FamilyOf, name: str = "in memory") -> Checkpoint:
        """Wrap a transformers model in memory; its parameters are shared, not copied."""
        state = model.state_dict()
        return cls(name, model.config, family_of(model.config), state.__getitem__, None)

    def resident(self) -> Checkpoint:
        """Return the same checkpoint with every tensor it has read kept in memory."""
        tensors: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            if name not in tensors:
                tensors[name] = self.read(name)
            return tensors[name]

        copy = Checkpoint(self.name, self.config, self.family, read, self.folder)
        copy._stored, copy._cache = self._stored, self._cache
        return copy

    def block(self, index: int) -> Mapping[str, Tensor]:
        """Return the linear maps of a block by role (see ``Weights``)."""
        prefix = self.family.block_prefix(index)
        roles = self.shape.maps(self.shape.blocks[index])
        return {role: self.read(f"{prefix}{self.family.ROLES[role]}.weight") for role in roles}

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return ``make()``, computed once per checkpoint and key."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def outer_names(self) -> list[str]:
        """Return the names of the tensors outside the blocks."""
        f = self.family
        names = [f"{f.body}.{f.embedding}.weight", f"{f.body}.{f.final_norm}.weight"]
        return names if self.shape.tied else [*names, f"{f.head}.weight"]

    def tensor_names(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor the configuration promises, with its shape."""
        f, s = self.family, self.shape
        shapes = dict(
            zip(self.outer_names(), [(s.vocabulary, s.hidden), (s.hidden,), (s.vocabulary, s.hidden)], strict=False)
        )
        for index, block in enumerate(s.blocks):
            prefix = f.block_prefix(index)
            shapes |= {f"{prefix}{f.ROLES[r]}.weight": v for r, v in s.maps(block).items()}
            shapes |= {f"{prefix}{f.vector(n)}": (v,) for n, v in s.vectors(block).items()}
        return shapes

    def tokenizer(self) -> Any:
        """Load the tokenizer that lies beside the weights."""
        if self.folder is None:
            raise FlexiError(f"model {self.name!r} is in memory and has no tokenizer; open a checkpoint folder instead")
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise FlexiError(f"model {self.name!r}: no usable tokenizer in {self.folder}: {reason}") from None

    def fingerprint(self) -> str:
        """SHA-256 of the configuration and the content of every tensor (of the files, where there are files)."""
        return self.cached("fingerprint", self._fingerprint)

    def _fingerprint(self) -> str:
        total = hashlib.sha256()
        values = {k: v for k, v in self.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
        total.update(json.dumps(values, sort_keys=True, default=str).encode())
        if isinstance(self._stored, _FolderReader):
            for file in sorted(set(self._stored.files.values())):
                with file.open("rb") as stream:
                    total.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            for name in sorted(self.tensor_names()):
                total.update(self.read(name).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()


# ---------------------------------------------------------------------------------------------- reading


def read_config(folder: Path | str) -> PreTrainedConfig:
    """Read the config.json of a folder; code that comes with a model is never run."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise FlexiError(f"model {str(folder)!r}: its config.json cannot be used: {reason}") from None


class _FolderReader:
    """Reads one tensor at a time; the shard is reopened at each read, so that no mapped file stays resident."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files

    def __call__(self, name: str) -> Tensor:
        if name not in self.files:
            raise FlexiError(
                f"checkpoint: tensor {unknown('tensor', name, [])} in any shard; is the checkpoint complete?"
            )
        try:
            with safe_open(self.files[name], framework="pt") as shard:
                return shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise FlexiError(f"checkpoint: {self.files[name]}: cannot read tensor {name!r}: {error}") from None


def _tensor_files(folder: Path) -> dict[str, Path]:
    if (folder / INDEX).is_file():
        index = _weight_map(folder / INDEX)
        missing = sorted({f for f in index.values() if not (folder / f).is_file()})
        if missing:
            tensor = next(t for t, f in index.items() if f == missing[0])
            raise FlexiError(
                f"checkpoint: {folder / missing[0]} is missing (it holds {tensor!r}, says {INDEX}); fetch it again"
            )
        return {tensor: folder / file for tensor, file in index.items()}
    single = folder / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(_header(single), single)
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    found = f"found {pickles[0]}, which is a pickle and is never loaded" if pickles else "found none"
    raise FlexiError(
        f"checkpoint: {folder}: expected model.safetensors or {INDEX}, {found}; use a revision with safetensors "
        "(NAME@REVISION) or convert the folder with transformers' save_pretrained"
    )


def _weight_map(file: Path) -> dict[str, str]:
    try:
        return json.loads(file.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise FlexiError(f"checkpoint: {file} is not an index of shards ({error}); fetch it again") from None


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Read a safetensors header: tensor -> dtype, shape, data_offsets; a truncated file is an error that names a tensor."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise FlexiError(f"checkpoint: {file} is truncated: its header is longer than the file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise FlexiError(f"checkpoint: {file} is not a safetensors file: its header is not JSON") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if 8 + length + entry["data_offsets"][1] > size:
            raise FlexiError(f"checkpoint: {file} is truncated: tensor {name!r} ends beyond the file ({size} bytes)")
    return header


def _check_tensors(folder: Path, files: Mapping[str, Path], checkpoint: Checkpoint) -> None:
    headers = {file: _header(file) for file in sorted(set(files.values()))}
    for name, shape in checkpoint.tensor_names().items():
        if name not in files:
            raise FlexiError(
                f"checkpoint: {folder}: tensor {name!r} is missing; config.json promises shape {list(shape)}"
            )
        entry = headers[files[name]].get(name)
        if entry is None:
            raise FlexiError(f"checkpoint: {files[name]}: tensor {name!r} is not in it, although {INDEX} says so")
        if entry["shape"] != list(shape):
            raise FlexiError(
                f"checkpoint: {files[name]}: tensor {name!r} has shape {entry['shape']}, config.json promises {list(shape)}"
            )


# ---------------------------------------------------------------------------------------------- writing


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``, renamed to it when whole and removed when anything fails."""
    if folder.exists():
        raise FlexiError(f"output {str(folder)!r} exists already; name another folder or remove it")
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        os.chmod(temporary, 0o755)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:  # the latter is safetensors' way to say that the disk is full
        raise FlexiError(f"output {str(folder)!r}: cannot be written: {error}; nothing was left behind") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = 4 * 2**30) -> None:
    """Write tensors as they come into safetensors shards of at most ``shard_bytes`` (or one tensor), with an index."""
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    total = held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > shard_bytes:
            _write_shard(folder, len(shards), shard)
            shards.append(list(shard))
            shard, held = {}, 0
        shard[name] = tensor.detach().contiguous()
        held, total = held + size, total + size
    _write_shard(folder, len(shards), shard)
    shards.append(list(shard))
    _name_shards(folder, shards, total)


def _write_shard(folder: Path, number: int, shard: dict[str, Tensor]) -> None:
    unshared = {
        n: t.clone() if t.untyped_storage().nbytes() != t.numel() * t.element_size() else t for n, t in shard.items()
    }
    save_file(copy_repeated(unshared), folder / f"shard-{number}", metadata={"format": "pt"})


def copy_repeated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, with a copy for each that shares memory with one before it (a block that is there twice)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        place = tensor.data_ptr()
        result[name] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    return result


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        os.replace(folder / "shard-0", folder / "model.safetensors")
        return
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{number}", folder / file)
        index |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1))
