"""Tensors in and out of files: read once and whole, written one by one, and what happens when a file or disk is not right."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import attached_for, change, close, family_of, logits, narrowed, opened, sharing, tiny, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from flexi_plugins import checkpoint as module
from flexi_plugins.checkpoint import INDEX, Checkpoint, write_tensors
from flexi_plugins.data import BlockRecipe, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.rewrite import PlanWeights, block_tensors, build_model, write_checkpoint

logging.disable_progress_bar()

NAME = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama of five blocks in shards of 16 KB."""
    tiny().save_pretrained(tmp_path / "model", max_shard_size="16KB")
    return tmp_path / "model"


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint.from_folder(folder, family_of)


def stored(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder as safetensors itself loads it."""
    return {n: t for file in sorted(folder.glob("model*.safetensors")) for n, t in load_file(file).items()}


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def header_of(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: tensor -> dtype, shape and data_offsets."""
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {n: e for n, e in header.items() if n != "__metadata__"}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    alike = a.dtype == b.dtype and a.shape == b.shape
    flat = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return alike and torch.equal(*flat)


def random_tensor(code: str, shape: tuple[int, ...]) -> Tensor:
    """Return random content in the dtype that safetensors calls so."""
    values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(len(code)))
    return (values % 2).bool() if code == "BOOL" else values.to(module.DTYPES[code])


# ---------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("huge", [False, True])
def test_every_tensor_is_read_as_safetensors_reads_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, huge: bool
) -> None:
    if huge:
        monkeypatch.setattr(module, "HUGE", 64)
    checkpoint, expected = Checkpoint.from_folder(folder, family_of), stored(folder)
    assert expected.keys() == checkpoint.tensor_names().keys()
    assert all(same_bytes(checkpoint.read(n), t) for n, t in expected.items())


@pytest.mark.parametrize("code", module.DTYPES)
def test_every_dtype_is_read_and_written(tmp_path: Path, code: str) -> None:
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    extra = {f"{code}.{len(shape)}": random_tensor(code, shape) for shape in ((), (5,), (0, 3), (2, 3, 4))}
    save_file({**load_file(file), **extra}, file, {"format": "pt"})
    checkpoint = Checkpoint.from_folder(tmp_path, family_of)
    assert all(same_bytes(checkpoint.read(n), t) for n, t in extra.items())

    (tmp_path / "written").mkdir()
    write_tensors(tmp_path / "written", extra.items())
    written = load_file(tmp_path / "written" / "model.safetensors")
    assert written.keys() == extra.keys()
    assert all(same_bytes(written[n], t) for n, t in extra.items())


def test_a_tensor_has_memory_of_its_own(checkpoint: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {f: f.read_bytes() for f in folder.iterdir()}
    for limit in (module.HUGE, 64):
        monkeypatch.setattr(module, "HUGE", limit)
        first, second = checkpoint.read(NAME), checkpoint.read(NAME)
        first.zero_()
        assert torch.equal(second, stored(folder)[NAME])
    assert {f: f.read_bytes() for f in folder.iterdir()} == before


def test_what_was_read_is_counted(checkpoint: Checkpoint, folder: Path) -> None:
    sizes = {n: t.nbytes for n, t in stored(folder).items()}
    assert checkpoint.bytes_of(sizes) == sum(sizes.values())
    assert checkpoint.bytes_of([NAME, NAME]) == 2 * sizes[NAME]
    assert checkpoint.bytes_read == 0  # neither opening nor asking for sizes reads a tensor
    checkpoint.read(NAME)
    assert checkpoint.bytes_read == sizes[NAME]
    resident = checkpoint.resident()
    for _ in range(3):
        resident.read(NAME)
    assert checkpoint.bytes_read == resident.bytes_read == 2 * sizes[NAME]


def test_a_model_in_memory_reads_nothing() -> None:
    model = tiny()
    checkpoint = opened(model)
    for name in checkpoint.tensor_names():
        checkpoint.read(name)
    assert checkpoint.bytes_read == 0
    assert checkpoint.bytes_of(checkpoint.tensor_names()) == sum(p.nbytes for p in model.parameters())


def test_threads_read_at_once(checkpoint: Checkpoint, folder: Path) -> None:
    expected = stored(folder)
    names = [*expected] * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(checkpoint.read, names))
    assert all(same_bytes(t, expected[n]) for n, t in zip(names, found, strict=True))
    assert checkpoint.bytes_read == 20 * sum(t.nbytes for t in expected.values())


# ---------------------------------------------------------------------------------------- lazy blocks


def test_a_block_reads_what_is_asked_for(checkpoint: Checkpoint, folder: Path) -> None:
    block, sizes = checkpoint.block(3), {n: t.nbytes for n, t in stored(folder).items()}
    assert list(block) == ["query", "key", "value", "attention_output", "gate", "up", "down"]
    assert "up" in block
    assert "nothing" not in block
    assert len(block) == 7
    assert checkpoint.bytes_read == 0
    assert torch.equal(block["up"], stored(folder)[NAME])
    assert checkpoint.bytes_read == sizes[NAME]
    with pytest.raises(KeyError):
        block["nothing"]


def test_a_loop_over_roles_reads_each_map_once(checkpoint: Checkpoint, folder: Path) -> None:
    shape = checkpoint.shape
    expected = stored(folder)
    plan, attached = attached_for(sharing(shape, {3: 1}))
    maps = [f"model.layers.1.{path}.weight" for path in checkpoint.family.ROLES.values()]
    size = sum(expected[n].nbytes for n in maps)
    for number, index in enumerate((1, 3), 1):  # a donor, and the block that runs with its weights
        for role, weight in PlanWeights(plan, checkpoint, attached).block(index).items():
            own = expected[f"model.layers.1.{checkpoint.family.ROLES[role]}.weight"]
            low = attached.get(f"blocks.{index}.{role}.lora_a"), attached.get(f"blocks.{index}.{role}.lora_b")
            assert close(weight, own if low[0] is None or low[1] is None else own + low[0] @ low[1])
        assert checkpoint.bytes_read == number * size


@pytest.mark.parametrize(
    "recipe",
    [
        BlockRecipe(mix=((1, 0.25), (3, 0.75))),
        BlockRecipe(parts=(Part(1, (0, 3), (0, 1)), Part(3, (1,), (2, 5))), norms=((1, 0.5), (3, 0.5))),
        BlockRecipe(parts=(Part(1, (0,), (0, 1)), Part(3, (1,), (7,)), Part(1, (2,), (3,))), norms=((3, 1.0),)),
        BlockRecipe(parts=(Part(1, (), (4, 5)), Part(3, (0,), ())), norms=((1, 2.0),)),
    ],
    ids=["mix", "two parts", "one source twice", "half of each"],
)
def test_a_tensor_of_a_block_reads_each_of_its_inputs_once(checkpoint: Checkpoint, recipe: BlockRecipe) -> None:
    plan = change(PruningPlan.identity(checkpoint.shape), {2: recipe})
    asked: list[str] = []
    read = checkpoint.read
    checkpoint.read = lambda name: asked.append(name) or read(name)
    found = block_tensors(plan, 2, checkpoint, {})
    assert len(asked) == len(set(asked))
    expected = block_tensors(plan, 2, opened(tiny()), {})
    assert found.keys() == expected.keys()
    assert all(same_bytes(t, expected[n]) for n, t in found.items())


# ---------------------------------------------------------------------------------------- files that are not right


def refusal(checkpoint: Checkpoint, name: str = NAME) -> str:
    with pytest.raises(FlexiError) as error:
        checkpoint.read(name)
    return str(error.value)


def test_a_tensor_that_is_in_no_shard(checkpoint: Checkpoint, folder: Path) -> None:
    assert f"{folder}: tensor 'nothing' is in none of its shards" in refusal(checkpoint, "nothing")
    with pytest.raises(FlexiError, match="tensor 'nothing' is in none of its shards"):
        checkpoint.bytes_of(["nothing"])


def test_a_shard_that_vanished(checkpoint: Checkpoint, folder: Path) -> None:
    shard_of(folder, NAME).unlink()
    said = refusal(checkpoint)
    assert f"{shard_of(folder, NAME)}: cannot read tensor '{NAME}': No such file or directory; fetch the file" in said


def test_a_shard_that_was_cut_off(checkpoint: Checkpoint, folder: Path) -> None:
    file = shard_of(folder, NAME)
    os.truncate(file, 5000)
    header = header_of(file)
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    assert refusal(checkpoint, last) == (
        f"checkpoint: {file} is truncated: tensor '{last}' ends beyond the file (5000 bytes); fetch it again"
    )
    assert checkpoint.bytes_read == 0


def rewrite_in_place(file: Path) -> None:
    """Write other content of the same length into the same file."""
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\x00\x00\x00\x00")


def replace_by_a_copy(file: Path) -> None:
    """Put another file in its place that has the same size and time."""
    shutil.copy2(file, file.with_suffix(".copy"))
    os.replace(file.with_suffix(".copy"), file)


def append(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b" ")


@pytest.mark.parametrize("change_file", [rewrite_in_place, replace_by_a_copy, append])
def test_a_shard_that_was_changed(folder: Path, change_file: Callable[[Path], None]) -> None:
    file = shard_of(folder, NAME)
    os.utime(file, ns=(0, 0))
    checkpoint = Checkpoint.from_folder(folder, family_of)
    change_file(file)
    said = refusal(checkpoint)
    assert said.startswith(f"checkpoint: {file} has changed since it was opened (while tensor '{NAME}' was being read)")
    assert "run again" in said
    with pytest.raises(FlexiError, match=f"{file} has changed since it was opened"):
        checkpoint.fingerprint()


def test_a_shard_that_changes_while_it_is_read(
    checkpoint: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_bytes = module._bytes

    def meanwhile(tensor: Tensor) -> memoryview:
        append(shard_of(folder, NAME))  # the file is open, the tensor is not read yet
        return to_bytes(tensor)

    monkeypatch.setattr(module, "_bytes", meanwhile)
    assert f"{shard_of(folder, NAME)} has changed since it was opened" in refusal(checkpoint)


def with_header(file: Path, header: bytes) -> None:
    content = file.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("header", [b"{'a': 1}", b"[1]", b"\xff\xfe\xff", b"{"])
def test_a_header_that_is_none(folder: Path, header: bytes) -> None:
    file = shard_of(folder, NAME)
    with_header(file, header)
    with pytest.raises(FlexiError, match=rf"{file} is not a safetensors file: its header is no.*; fetch it again"):
        Checkpoint.from_folder(folder, family_of)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [24, 32]},
        {"dtype": "F32", "shape": [24, 32], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [24, 32], "data_offsets": [3072, 0]},
        {"dtype": "F32", "shape": [24, 32], "data_offsets": [-3072, 0]},
        {"dtype": "F32", "shape": ["24", 32], "data_offsets": [0, 3072]},
        [],
    ],
)
def test_a_header_that_contradicts_itself(folder: Path, entry: object) -> None:
    file = shard_of(folder, NAME)
    with_header(file, json.dumps({**header_of(file), NAME: entry}).encode())
    with pytest.raises(FlexiError, match=rf"{file}: its header is wrong about tensor '{NAME}'.*; fetch it again"):
        Checkpoint.from_folder(folder, family_of)


def test_a_dtype_that_torch_does_not_have(folder: Path) -> None:
    file = shard_of(folder, NAME)
    header = header_of(file)
    with_header(file, json.dumps({**header, NAME: {**header[NAME], "dtype": "F6_E2M3"}}).encode())
    with pytest.raises(FlexiError, match=rf"{file}: tensor '{NAME}' has dtype F6_E2M3, expected one of F64, .*convert"):
        Checkpoint.from_folder(folder, family_of)


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "I8", "U8"])
def test_quantised_weights_are_refused_by_the_header(tmp_path: Path, code: str) -> None:
    """Of the promised names and shapes, with their scales beside them, which nobody would read."""
    tiny("qwen3-biases").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    quantised = {NAME: random_tensor(code, tuple(tensors[NAME].shape)), f"{NAME}_scale": torch.ones(1)}
    save_file({**tensors, **quantised}, file, {"format": "pt"})
    with pytest.raises(FlexiError) as error:
        Checkpoint.from_folder(tmp_path, family_of, "somebody/some-model-fp8")
    said = str(error.value)
    assert f"{file}: tensor '{NAME}' has dtype {code}, expected one of F64, F32, F16, BF16: " in said
    assert "model 'somebody/some-model-fp8' are quantised" in said
    assert "give the unquantised checkpoint" in said


def test_packed_weights_are_said_to_be_quantised_not_misshapen(folder: Path) -> None:
    file = shard_of(folder, NAME)
    save_file({**load_file(file), NAME: torch.zeros(24, 4, dtype=torch.int32)}, file, {"format": "pt"})
    with pytest.raises(FlexiError, match=f"tensor '{NAME}' has dtype I32, expected one of .* are quantised"):
        Checkpoint.from_folder(folder, family_of)


def test_a_configuration_that_says_quantised_is_refused(folder: Path) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "quantization_config": {"quant_method": "compressed-tensors"}}))
    with pytest.raises(FlexiError) as error:
        Checkpoint.from_folder(folder, family_of, "somebody/some-model-w8a8")
    said = str(error.value)
    assert said.startswith("model 'somebody/some-model-w8a8': its config.json has a quantization_config (quant_method ")
    assert "'compressed-tensors')" in said
    assert "give the unquantised checkpoint" in said
    file.write_text(json.dumps({**values, "quantization_config": None}))
    Checkpoint.from_folder(folder, family_of)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_in_every_float_are_taken(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny().to(dtype).save_pretrained(tmp_path)
    assert Checkpoint.from_folder(tmp_path, family_of).read(NAME).dtype == dtype


def test_a_dtype_that_nobody_asks_for_is_no_obstacle(folder: Path) -> None:
    """A tensor that the configuration does not promise may be anything, until it is read."""
    file, index = shard_of(folder, NAME), json.loads((folder / INDEX).read_text())
    header = header_of(file)
    end = max(e["data_offsets"][1] for e in header.values())
    extra = {"dtype": "F4", "shape": [2, 4], "data_offsets": [end, end + 4]}
    with_header(file, json.dumps({**header, "extra": extra}).encode())
    with file.open("ab") as stream:
        stream.write(b"1234")
    index["weight_map"]["extra"] = file.name
    (folder / INDEX).write_text(json.dumps(index))
    checkpoint = Checkpoint.from_folder(folder, family_of)
    assert checkpoint.bytes_of(["extra"]) == 4
    assert "tensor 'extra' has dtype F4" in refusal(checkpoint, "extra")


def test_a_shard_that_cannot_be_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = shard_of(folder, NAME)
    to_open = Path.open

    def refuse(path: Path, *arguments, **options):
        if path == file:
            raise PermissionError(13, "Permission denied")
        return to_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FlexiError, match=f"{file}: cannot read its header: Permission denied"):
        Checkpoint.from_folder(folder, family_of)


# ---------------------------------------------------------------------------------------- writing tensors


def written(folder: Path, tensors: dict[str, Tensor], shard_bytes: int = 2**30) -> dict[str, Tensor]:
    """Write tensors; return what safetensors loads from each file, after checks of the files themselves."""
    folder.mkdir()
    write_tensors(folder, iter(tensors.items()), shard_bytes)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened_file:
            assert opened_file.metadata() == {"format": "pt"}
            assert all(same_bytes(opened_file.get_tensor(n), tensors[n]) for n in opened_file.keys())  # noqa: SIM118
    loaded = stored(folder)
    assert loaded.keys() == tensors.keys()
    return loaded


def test_tensors_are_written_whatever_their_memory_looks_like(tmp_path: Path) -> None:
    base = torch.arange(60.0).view(5, 12)
    tensors = {
        "whole": base,
        "again": base,
        "rows": base[1:3],
        "columns": base[:, 2:5],
        "transposed": base.T,
        "expanded": base[:1].expand(4, 12),
        "parameter": torch.nn.Parameter(base[0]),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 7),
    }
    loaded = written(tmp_path / "x", tensors)
    assert all(torch.equal(loaded[n], t) for n, t in tensors.items())


def test_nothing_at_all_can_be_written(tmp_path: Path) -> None:
    assert written(tmp_path / "x", {}) == {}


def test_a_shard_is_closed_when_it_is_full(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((size,), float(i)) for i, size in enumerate((10, 10, 5, 100, 1, 24, 25))}
    written(tmp_path / "x", tensors, shard_bytes=100)
    shards = json.loads((tmp_path / "x" / INDEX).read_text())["weight_map"]
    expected = [1, 1, 1, 2, 3, 3, 4]
    assert [shards[n] for n in tensors] == [f"model-{k:05d}-of-00004.safetensors" for k in expected]


def test_a_shard_is_closed_when_its_header_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEADER", 512)
    tensors = {f"model.layers.{i}.a_tensor_with_a_long_name": torch.full((3, i), 1.0 * i) for i in range(20)}
    tensors["é" * 20] = torch.ones(2)
    written(tmp_path / "x", tensors)
    files = sorted((tmp_path / "x").glob("*.safetensors"))
    assert len(files) > 3
    assert all(len(header_of(f)) > 1 for f in files[:-1])
    for file in files:
        assert int.from_bytes(file.read_bytes()[:8], "little") == 512 - 8


def test_elements_are_aligned(tmp_path: Path) -> None:
    """As in files that safetensors writes, whose tensors are sorted by the size of their elements for that."""
    dtypes = [torch.bfloat16, torch.float32, torch.bool, torch.float64, torch.bfloat16, torch.bfloat16]
    tensors = {str(i): torch.ones(3).to(d) for i, d in enumerate(dtypes)}
    written(tmp_path / "x", tensors)
    for file in (tmp_path / "x").glob("*.safetensors"):
        for name, entry in header_of(file).items():
            assert entry["data_offsets"][0] % tensors[name].element_size() == 0
    assert module.HEADER % 8 == 0


def test_transformers_loads_what_was_written(tmp_path: Path) -> None:
    model, ids = tiny("qwen3-biases"), tokens()
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    for name, size in (("one", 2**30), ("many", 5000)):
        written(tmp_path / name, state, size)
        model.config.save_pretrained(tmp_path / name)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name), ids), logits(model, ids))


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(9):
            assert [r() for r in alive] == [None] * number
            made = torch.ones(4, 5)
            if number % 2:
                made = made.T
            alive.append(weakref.ref(made))
            item = (f"t{number}", made)
            del made
            yield item
            del item

    write_tensors(tmp_path, tensors())
    assert len(load_file(tmp_path / "model.safetensors")) == 9


# ---------------------------------------------------------------------------------------- writing checkpoints


def merge(shape):
    recipe = BlockRecipe(parts=(Part(1, (0, 3), (1, 2)), Part(2, (1,), (0, 7))), norms=((1, 0.5), (2, 0.5)))
    whole = PruningPlan.identity(shape).blocks
    return PruningPlan(shape, (whole[0], recipe, *whole[3:]))


PLANS = {
    "remove-blocks": lambda shape: PruningPlan.keep(shape, [0, 2, 4]),
    "remove-units": lambda shape: narrowed(shape, (0, 2), (1, 5, 6, 20)),
    "concat-merge": merge,
    "share-lora": lambda shape: sharing(shape, {3: 1, 2: 4}),
}
UNREAD = {
    "remove-blocks": lambda name: name.startswith(("model.layers.1.", "model.layers.3.")),
    "remove-units": lambda name: False,
    "concat-merge": lambda name: False,
    "share-lora": lambda name: name.startswith(("model.layers.2.", "model.layers.3.")) and "_proj" in name,
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("strategy", PLANS)
def test_a_checkpoint_is_written_with_one_read_of_each_tensor(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path, strategy: str, dtype: torch.dtype | None
) -> None:
    plan, attached = attached_for(PLANS[strategy](checkpoint.shape))
    alive: list[weakref.ref[Tensor]] = []
    read = checkpoint.read

    def watched(name: str) -> Tensor:
        held = [r for r in alive if r() is not None]
        assert len(held) <= 2, f"more than the tensor being written, and the one before it, is held when {name} is read"
        tensor = read(name)
        alive.append(weakref.ref(tensor))
        return tensor

    checkpoint.read = watched
    write_checkpoint(plan, checkpoint, attached, tmp_path / "x", dtype)
    checkpoint.read = read
    wanted = sum(t.nbytes for n, t in stored(folder).items() if not UNREAD[strategy](n))
    assert checkpoint.bytes_read == wanted
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert torch.equal(logits(found, tokens()), logits(build_model(plan, opened(tiny()), attached, dtype), tokens()))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within: no file can be longer than this, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1000, module.HEADER + 100, module.HEADER + 20_000])
def test_a_full_disk_leaves_nothing_behind(checkpoint: Checkpoint, tmp_path: Path, size: int) -> None:
    plan = PruningPlan.identity(checkpoint.shape)
    with largest_file(size), pytest.raises(FlexiError, match=r"'.*x': cannot be written: .*; nothing was left behind"):
        write_checkpoint(plan, checkpoint, None, tmp_path / "out" / "x")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (Path.unlink, "cannot read tensor '.*': No such file"),
        (append, "has changed since it was opened"),
        (lambda file: os.truncate(file, 3000), "is truncated: tensor '.*' ends beyond the file"),
    ],
    ids=["missing", "changed", "truncated"],
)
def test_a_shard_spoiled_half_way_leaves_nothing_behind(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    file, read = shard_of(folder, NAME), checkpoint.read

    def spoiling(name: str) -> Tensor:
        if name == NAME:
            spoil(file)
        return read(name)

    checkpoint.read = spoiling
    with pytest.raises(FlexiError, match=f"{file}.*{said}"):
        write_checkpoint(PruningPlan.identity(checkpoint.shape), checkpoint, None, tmp_path / "out" / "x")
    assert list((tmp_path / "out").iterdir()) == []


def left_by(killed: int, out: Path, host: str = platform.node()) -> Path:
    """Return a folder of half a checkpoint, as the process of a number left it."""
    left = out.parent / f".{out.name}.abcdefgh.{host}.{killed}.tmp"
    left.mkdir(parents=True)
    (left / "shard-0").write_bytes(b"half")
    return left


def test_what_a_killed_write_left_is_removed_by_the_next_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out" / "x[1]"
    script = f"""
import os, signal
from pathlib import Path
from flexi_plugins.checkpoint import new_folder
with new_folder(Path({str(out)!r})) as temporary:
    (temporary / "shard-0").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    [left] = out.parent.iterdir()
    assert (left / "shard-0").is_file()
    write_checkpoint(PruningPlan.identity(checkpoint.shape), checkpoint, None, out)
    assert list(out.parent.iterdir()) == [out]


def test_what_others_are_writing_or_left_of_other_folders_stays(checkpoint: Checkpoint, tmp_path: Path) -> None:
    gone, out = 999_999_999, tmp_path / "out" / "x"
    running, other = left_by(os.getppid(), out), left_by(gone, out.with_name("y"))
    deeper, dead = left_by(gone, out.parent / "z" / "x"), left_by(gone, out)
    elsewhere = left_by(gone, out, "another-host")  # whose numbers of processes say nothing here
    write_checkpoint(PruningPlan.identity(checkpoint.shape), checkpoint, None, out)
    assert not dead.exists()
    assert elsewhere.exists()
    assert running.exists()
    assert other.exists()
    assert deeper.exists()


# ---------------------------------------------------------------------------------------- mapped


def test_mapped_tensors_are_views_of_the_files_and_writing_changes_none(tmp_path: Path) -> None:
    tiny("qwen2").bfloat16().save_pretrained(tmp_path)
    checkpoint = Checkpoint.from_folder(tmp_path, family_of)
    mapped = checkpoint.mapped()
    for name in checkpoint.tensor_names():
        assert torch.equal(mapped.read(name), checkpoint.read(name))
    before = checkpoint.bytes_read
    view = mapped.read("model.norm.weight")
    view.zero_()
    assert checkpoint.bytes_read == before
    assert checkpoint.read("model.norm.weight").any()
    assert mapped.mapped() is mapped
    assert opened(tiny()).mapped().read("model.norm.weight").any()
