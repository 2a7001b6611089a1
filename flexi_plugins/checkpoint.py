"""Where weights come from and go to: safetensors folders read tensor by tensor, models in memory, shards written as
tensors come, folders that appear by rename when they are whole."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import mmap
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from flexi_plugins.data import Family, ModelShape
from flexi_plugins.errors import FlexiError
from flexi_plugins.files import remove_leftovers

FamilyOf = Callable[[Any], Family]
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls torch's dtypes."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Those of weights; in others weights mean something with their scales only, which are not read."""
HUGE = 4 * 2**20
"""Tensors of at least so many bytes are read into huge pages."""
HEADER = 128 * 2**10
"""Bytes at the beginning of a new shard that are kept for its header: enough for about a thousand tensors."""


@dataclass(frozen=True, eq=False)
class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for, and again when it is asked for again."""

    readers: Mapping[str, Callable[[], Tensor]]

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)

    def __contains__(self, name: object) -> bool:
        return name in self.readers


class Checkpoint:
    """The weights, configuration and tokenizer of one model. ``read`` returns one tensor of the state dict by name.

    From a folder every ``read`` reads the file, into memory that is the tensor's own; threads may read at once.
    """

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
        """Open a folder with config.json and safetensors; every header is checked, no weight is read.

        Raise a FlexiError where a tensor is missing, has another shape than config.json promises or is quantised.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FlexiError(f"model {str(folder)!r}: no config.json in the folder; expected a Hugging Face checkpoint")
        config = read_config(folder)
        family = family_of(config)
        _check_unquantised(config, name or str(folder))
        reader = _FolderReader(folder)
        checkpoint = cls(name or str(folder), config, family, reader, folder)
        _check_tensors(reader, checkpoint)
        return checkpoint

    @classmethod
    def from_model(cls, model: nn.Module, family_of: FamilyOf, name: str = "in memory") -> Checkpoint:
        """Wrap a transformers model in memory; its parameters are shared, and copied from a GPU when they are read."""
        checkpoint = cls(name, model.config, family_of(model.config), model.state_dict().__getitem__, None)
        return checkpoint.on_cpu()

    def on_cpu(self) -> Self:
        """Return itself, reading tensors of a GPU from it; their sizes are asked for where they are."""
        stored = self._stored
        self.read = lambda name: stored(name).cpu()
        return self

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

    def mapped(self) -> Checkpoint:
        """Return the same checkpoint with tensors that are views of its files; one in memory is itself.

        Their pages are read when they are touched: a model of which little is used takes little memory. Writing to them
        changes no file.
        """
        if not isinstance(self.read, _FolderReader):
            return self
        reader, maps = self.read, dict[Path, mmap.mmap]()

        def read(name: str) -> Tensor:
            place = reader.place(name)
            if place.file not in maps:
                with reader.opened(place.file, f"tensor {name!r}") as stream:
                    maps[place.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            dtype = _dtype(place, name)
            count = place.size // dtype.itemsize
            flat = torch.frombuffer(maps[place.file], dtype=dtype, count=count, offset=place.start)
            return flat.view(place.shape)

        return Checkpoint(self.name, self.config, self.family, read, self.folder)

    def block(self, index: int) -> LazyTensors:
        """Return the linear maps of a block by role (see ``Weights``); each is read when it is asked for."""
        prefix = self.family.block_prefix(index)
        roles = self.shape.maps(self.shape.blocks[index])
        return LazyTensors({r: partial(self.read, f"{prefix}{self.family.ROLES[r]}.weight") for r in roles})

    def vectors(self, index: int) -> LazyTensors:
        """Return the norms and biases of a block by name (see ``Weights``); each is read when it is asked for."""
        prefix = self.family.block_prefix(index)
        names = self.shape.vectors(self.shape.blocks[index])
        return LazyTensors({n: partial(self.read, prefix + self.family.vector(n)) for n in names})

    @property
    def bytes_read(self) -> int:
        """Bytes of the tensors that were read from files since the checkpoint was opened; 0 for a model in memory."""
        return self._stored.bytes_read if isinstance(self._stored, _FolderReader) else 0

    def bytes_of(self, names: Iterable[str]) -> int:
        """Return the bytes that tensors take as they are stored; of files only the headers are needed."""
        if isinstance(self._stored, _FolderReader):
            return sum(self._stored.place(name).size for name in names)
        return sum(self._stored(name).nbytes for name in names)

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
            if (self.folder / "tokenizer.model").is_file() and not (self.folder / "tokenizer.json").is_file():
                reason += "; for a tokenizer.model alone, pip install sentencepiece protobuf"
            raise FlexiError(f"model {self.name!r}: no usable tokenizer in {self.folder}: {reason}") from None

    def fingerprint(self) -> str:
        """SHA-256 of the configuration and the content of every tensor (of the files, where there are files)."""
        return self.cached("fingerprint", self._fingerprint)

    def sample_digest(self) -> str:
        """SHA-256 of a sample of the weights: quick, and the same for the same model in other files or another dtype."""
        return self.cached("sample", self._sample_digest)

    def _sample_digest(self) -> str:
        total = hashlib.sha256()
        for index in (0, len(self.shape.blocks) - 1):
            vectors, maps = self.vectors(index), self.block(index)
            for tensor in (*(vectors[name] for name in sorted(vectors)), *(maps[role] for role in [*maps][:1])):
                total.update(_bytes(tensor.to(torch.bfloat16)))
        return total.hexdigest()

    def _fingerprint(self) -> str:
        total = hashlib.sha256()
        values = {k: v for k, v in self.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
        total.update(json.dumps(values, sort_keys=True, default=str).encode())
        if isinstance(self._stored, _FolderReader):
            for file in self._stored.files:
                with self._stored.opened(file, "it") as stream:
                    total.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            for name in sorted(self.tensor_names()):
                total.update(_bytes(self.read(name)))
        return total.hexdigest()


# ---------------------------------------------------------------------------------------------- reading


def read_config(folder: Path | str) -> PreTrainedConfig:
    """Read the config.json of a folder; code that comes with a model is never run."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise FlexiError(f"model {str(folder)!r}: its config.json cannot be used: {reason}") from None


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: ``size`` bytes of a file from ``start`` on. dtype is safetensors' name of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class _Version:
    """What tells one content of a file from another."""

    size: int
    modified: int  # nanoseconds
    inode: int

    @classmethod
    def of(cls, stream: BufferedReader) -> _Version:
        """Return the version of an open file."""
        found = os.fstat(stream.fileno())
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


class _FolderReader:
    """Reads one tensor at a time from the shards of a folder, whose headers are read when it is made.

    A tensor is read at once into memory of its own instead of mapped: a mapped tensor is read by page faults inside the
    products that use it, where nothing can be read ahead, and every page of it counts as resident. A file is opened at
    each read, so threads share nothing, and checked afterwards to be what it was when the headers were read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._places: dict[str, _Place] = {}
        self._versions: dict[Path, _Version] = {}
        if (folder / INDEX).is_file():
            index = _weight_map(folder / INDEX)
            _check_shards(folder, index)
            for file in sorted(set(index.values())):
                self._add(folder / file, [tensor for tensor, f in index.items() if f == file])
        else:
            self._add(_single_file(folder), None)

    def _add(self, file: Path, names: Iterable[str] | None) -> None:
        """Note where the tensors of a shard lie: of the names that the index gives it, or all."""
        try:
            header, self._versions[file] = _header(file)
        except OSError as error:
            raise FlexiError(f"checkpoint: {file}: cannot read its header: {error.strerror}; fetch it again") from error
        for name in header if names is None else names:
            if name not in header:
                raise FlexiError(
                    f"checkpoint: {file}: tensor {name!r} is not in it, although {INDEX} says so; fetch it again"
                )
            self._places[name] = header[name]

    @property
    def files(self) -> list[Path]:
        """The shards, sorted."""
        return sorted(self._versions)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def place(self, name: str) -> _Place:
        """Return where a tensor lies."""
        if name not in self._places:
            raise FlexiError(
                f"checkpoint: {self.folder}: tensor {name!r} is in none of its shards; is the checkpoint complete?"
            )
        return self._places[name]

    def __call__(self, name: str) -> Tensor:
        """Read one tensor; while it is read, other threads run."""
        place = self.place(name)
        tensor = _memory(place.size, _dtype(place, name)).view(place.shape)
        with self.opened(place.file, f"tensor {name!r}") as stream:
            stream.seek(place.start)
            count = stream.readinto(_bytes(tensor))
            if count < place.size:
                raise FlexiError(
                    f"checkpoint: {place.file} is truncated: tensor {name!r} ends beyond the file "
                    f"({_Version.of(stream).size} bytes); fetch it again"
                )
        with self._lock:
            self.bytes_read += place.size
        return tensor

    @contextmanager
    def opened(self, file: Path, what: str) -> Iterator[BufferedReader]:
        """Open a shard to read something from it; raise if it is not, or no longer, the file of the headers."""
        try:
            with file.open("rb") as stream:
                yield stream
                found = _Version.of(stream)
        except OSError as error:
            raise FlexiError(
                f"checkpoint: {file}: cannot read {what}: {error.strerror}; fetch the file again if it is gone or damaged"
            ) from error
        if found != self._versions[file]:
            raise FlexiError(
                f"checkpoint: {file} has changed since it was opened (while {what} was being read): run again when "
                "nothing writes to it"
            )


def _memory(size: int, dtype: torch.dtype) -> Tensor:
    """Return uninitialised memory for a tensor, one-dimensional.

    Large ones are made of huge pages where there are some: they are filled three times as fast, since most of the time
    that it takes to read a file which the system has cached goes into page faults.
    """
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size // dtype.itemsize, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # it is advice, which a kernel built without huge pages refuses
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, a copy only if it is not contiguous or not on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _dtype(place: _Place, name: str) -> torch.dtype:
    if place.dtype not in DTYPES:
        raise FlexiError(
            f"checkpoint: {place.file}: tensor {name!r} has dtype {place.dtype}, expected one of {', '.join(DTYPES)}; "
            "convert the checkpoint, to BF16 for instance"
        )
    return DTYPES[place.dtype]


def _check_shards(folder: Path, index: Mapping[str, str]) -> None:
    missing = sorted({f for f in index.values() if not (folder / f).is_file()})
    if missing:
        tensor = next(t for t, f in index.items() if f == missing[0])
        raise FlexiError(
            f"checkpoint: {folder / missing[0]} is missing (it holds {tensor!r}, says {INDEX}); fetch it again"
        )


def _single_file(folder: Path) -> Path:
    single = folder / "model.safetensors"
    if single.is_file():
        return single
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    found = f"found {pickles[0]}, which is a pickle and is never loaded" if pickles else "found none"
    raise FlexiError(
        f"checkpoint: {folder}: expected model.safetensors or {INDEX}, {found}; use a revision with safetensors "
        "(NAME@REVISION), or load the model with transformers (pickles of a hub repository are not fetched here), "
        "save_pretrained to a folder, and give that"
    )


def _weight_map(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise FlexiError(f"checkpoint: {file} is not an index of shards ({error}); fetch it again") from None


def _header(file: Path) -> tuple[dict[str, _Place], _Version]:
    """Read where the tensors of a safetensors file lie; a truncated file is an error that names a tensor."""
    with file.open("rb") as stream:
        version = _Version.of(stream)
        length = int.from_bytes(stream.read(8), "little")
        if version.size < 8 or length > version.size - 8:
            raise FlexiError(
                f"checkpoint: {file} is truncated: its header is longer than the file ({version.size} bytes); "
                "fetch it again"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise FlexiError(
                f"checkpoint: {file} is not a safetensors file: its header is not JSON; fetch it again"
            ) from None
    if not isinstance(header, dict):
        raise FlexiError(f"checkpoint: {file} is not a safetensors file: its header is no mapping; fetch it again")
    header.pop("__metadata__", None)
    places = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    for name, place in places.items():
        if place.start + place.size > version.size:
            raise FlexiError(
                f"checkpoint: {file} is truncated: tensor {name!r} ends beyond the file ({version.size} bytes); "
                "fetch it again"
            )
    return places, version


def _entry(file: Path, name: str, entry: Any, data: int) -> _Place:
    """Read one tensor's entry in a header; ``data`` is where the header ends."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        size = end - start if dtype not in DTYPES else math.prod(shape) * DTYPES[dtype].itemsize
        whole = 0 <= start <= end and size == end - start
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise FlexiError(f"checkpoint: {file}: its header is wrong about tensor {name!r}: {entry}; fetch it again")
    return _Place(file, dtype, shape, data + start, size)


def _check_unquantised(config: PreTrainedConfig, name: str) -> None:
    """Raise if a configuration says that the weights are quantised."""
    found = getattr(config, "quantization_config", None)
    if found:
        values = found if isinstance(found, Mapping) else found.to_dict()
        raise FlexiError(
            f"model {name!r}: its config.json has a quantization_config (quant_method {values.get('quant_method')!r}), and "
            f"weights are read without scales; expected none, and weights in one of {', '.join(FLOATS)}: give the "
            "unquantised checkpoint"
        )


def _check_tensors(reader: _FolderReader, checkpoint: Checkpoint) -> None:
    for name, shape in checkpoint.tensor_names().items():
        if name not in reader:
            raise FlexiError(
                f"checkpoint: {reader.folder}: tensor {name!r} is missing; config.json promises shape {list(shape)}"
            )
        place = reader.place(name)
        if place.dtype not in FLOATS:
            raise FlexiError(
                f"checkpoint: {place.file}: tensor {name!r} has dtype {place.dtype}, expected one of {', '.join(FLOATS)}: "
                f"the weights of model {checkpoint.name!r} are quantised, and would be read without their scales; give "
                "the unquantised checkpoint, or convert this one to BF16"
            )
        if place.shape != shape:
            raise FlexiError(
                f"checkpoint: {place.file}: tensor {name!r} has shape {list(place.shape)}, "
                f"config.json promises {list(shape)}"
            )


# ---------------------------------------------------------------------------------------------- writing


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``, renamed to it when whole and removed when anything fails.

    What a killed process left of the same folder is removed first.
    """
    if folder.exists():
        raise FlexiError(f"output {str(folder)!r} exists already; name another folder or remove it")
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        host = platform.node()  # numbers of processes are a machine's own
        remove_leftovers(folder.parent, f".{glob.escape(folder.name)}.????????.{glob.escape(host)}.*.tmp")
        temporary = Path(tempfile.mkdtemp(f".{host}.{os.getpid()}.tmp", f".{folder.name}.", folder.parent))
        yield temporary
        os.chmod(temporary, 0o755)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:  # the latter is safetensors' way to say that the disk is full
        raise FlexiError(f"output {str(folder)!r}: cannot be written: {error}; nothing was left behind") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = 4 * 2**30) -> None:
    """Write tensors as they come into safetensors shards of at most ``shard_bytes`` (or one tensor), with an index.

    One tensor is held at a time: a tensor is written, and forgotten, before the next one is asked for.
    """
    index: dict[str, int] = {}
    shards = total = 0
    with ExitStack() as stack:
        shard = stack.enter_context(_Shard(folder / "shard-0"))
        for name, tensor in tensors:
            assert name not in index, f"tensor {name!r} comes twice"
            if not shard.takes(name, tensor, shard_bytes):
                shard.finish()
                shards += 1
                shard = stack.enter_context(_Shard(folder / f"shard-{shards}"))
            shard.write(name, tensor)
            index[name] = shards
            total += tensor.nbytes
            del tensor
        shard.finish()
    _name_shards(folder, index, shards + 1, total)


def read_ahead(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors while the next one is read, in a thread; so two are held at a time."""
    waiting = iter(tensors)
    with ThreadPoolExecutor(1, "reading ahead") as pool:
        coming = pool.submit(next, waiting, None)
        while (found := coming.result()) is not None:
            coming = pool.submit(next, waiting, None)
            yield found
            del found


class _Shard:
    """A safetensors file that is written tensor by tensor; a place is kept for the header, which is written last.

    The file is the length of the header in 8 bytes, the header (JSON padded with spaces) and the tensors without gaps:
    https://huggingface.co/docs/safetensors/index#format
    """

    def __init__(self, file: Path) -> None:
        self._stream = file.open("wb")
        self._stream.seek(HEADER)
        self._entries: dict[str, dict[str, Any]] = {}
        self._size = 0  # bytes of the tensors
        self._room = HEADER - 8 - len(self._header())

    def __enter__(self) -> _Shard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def takes(self, name: str, tensor: Tensor, most: int) -> bool:
        """Whether a tensor fits in: with at most so many bytes in all, in the header's place, aligned to its elements."""
        if not self._entries:
            return True
        fits = self._size + tensor.nbytes <= most and self._size % tensor.element_size() == 0
        return fits and len(json.dumps({name: self._entry(tensor)})) <= self._room

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; it is copied only if it is not contiguous or not on the CPU."""
        entry = self._entry(tensor)
        self._stream.write(_bytes(tensor))
        self._entries[name] = entry
        self._size += tensor.nbytes
        self._room -= len(json.dumps({name: entry}))

    def finish(self) -> None:
        """Write the header and close the file."""
        header = self._header()
        assert len(header) <= HEADER - 8, "a name is longer than a header may be"
        self._stream.seek(0)
        self._stream.write((HEADER - 8).to_bytes(8, "little") + header.ljust(HEADER - 8))
        self._stream.close()

    def _entry(self, tensor: Tensor) -> dict[str, Any]:
        offsets = [self._size, self._size + tensor.nbytes]
        return {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

    def _header(self) -> bytes:
        return json.dumps({"__metadata__": {"format": "pt"}, **self._entries}).encode()


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _name_shards(folder: Path, index: Mapping[str, int], count: int, total: int) -> None:
    if count == 1:
        os.replace(folder / "shard-0", folder / "model.safetensors")
        return
    files = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    for number, file in enumerate(files):
        os.replace(folder / f"shard-{number}", folder / file)
    weight_map = {name: files[number] for name, number in index.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
