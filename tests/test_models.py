"""Models by name: what is fetched of a repository, and what is said where it cannot be."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import close_session
from tiny import opened, tiny

from flexi_plugins import models
from flexi_plugins.errors import FlexiError
from flexi_plugins.models import IGNORED, PATTERNS, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "somebody/some-model"


def refusal(name: str = NAME) -> str:
    """Return what is said where a model cannot be fetched."""
    with pytest.raises(FlexiError) as error:
        locate(name)
    said = str(error.value)
    assert said.startswith(f"model '{name}': ")
    assert error.value.__suppress_context__
    return said


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Let the cache be empty, and nobody answer at the hub's address."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    close_session()  # it keeps the proxies that it was made with
    yield tmp_path / "hub"
    close_session()


@contextmanager
def answering(status: int, code: str = "") -> Iterator[str]:
    """Within: a server on this machine answers every request so, with the hub's name of the error; yield its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_CONNECT = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_cache_that_cannot_be_written_is_named_before_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FLEXI_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(models, "_convert", lambda *_: pytest.fail("read"))
    with pytest.raises(FlexiError, match=r"cannot be written \(.*\); name another folder as FLEXI_CACHE"):
        models.default_model()


def test_a_tokenizer_that_is_sentencepieces_alone_says_what_it_takes(tmp_path: Path) -> None:
    checkpoint = opened(tiny())
    checkpoint.folder = tmp_path
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(FlexiError, match=r"for a tokenizer\.model alone, pip install sentencepiece protobuf"):
        checkpoint.tokenizer()


@pytest.mark.parametrize(
    ("status", "code", "what", "said", "to_do"),
    [
        (
            403,
            "GatedRepo",
            "its repository is gated",
            "GatedRepoError: 403 Client Error",
            f"/{NAME}, log in with `hf auth login`",
        ),
        (
            404,
            "RepoNotFound",
            "the hub has no such repository, or it is private",
            "RepositoryNotFoundError: 404 Client Error",
            "log in with `hf auth login`",
        ),
        (
            404,
            "RevisionNotFound",
            "its repository has no revision 'typo'",
            "RevisionNotFoundError: 404 Client Error",
            "as OWNER/NAME@REVISION",
        ),
        (
            418,
            "",
            "its files cannot be fetched",
            "HfHubHTTPError: Client error '418",
            "give a folder with the checkpoint instead",
        ),
    ],
    ids=["gated", "no repository", "no revision", "another answer"],
)
def test_what_the_hub_refuses_is_said(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, what: str, said: str, to_do: str
) -> None:
    with answering(status, code) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        found = refusal(f"{NAME}@typo")
    assert f": {what} (" in found
    assert said in found
    assert found.endswith(to_do) or f"{to_do}, then give the same command again" in found


def test_a_hub_that_does_not_answer_is_said() -> None:
    said = refusal()
    assert "the hub cannot be reached and no local copy is cached (LocalEntryNotFoundError: Got: ConnectError" in said
    assert said.endswith("give a folder with the checkpoint instead")


def test_a_proxy_that_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(407) as address:
        monkeypatch.setenv("HTTPS_PROXY", address)
        monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
        said = refusal()
    assert "the proxy lets nothing through to the hub (ProxyError: 407" in said
    assert "check HTTPS_PROXY" in said


def test_a_name_that_no_repository_can_have_is_said() -> None:
    said = refusal("a/b--c")
    assert "no repository can have this name (HFValidationError: Cannot have -- or .. in repo_id: 'a/b--c'.)" in said


@pytest.mark.skipif(not hasattr(errors, "IncompleteSnapshotError"), reason="taken for whole by this release")
def test_a_local_copy_that_is_not_whole_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache / "models--somebody--some-model"
    files = {name: {"size": 2, "blob_id": "0" * 40} for name in ("config.json", "model.safetensors")}
    for path, text in {
        f"trees/{COMMIT}.json": json.dumps({"format_version": 1, "files": files}),
        f"snapshots/{COMMIT}/config.json": "{}",
        "refs/main": COMMIT,
    }.items():
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
    said = refusal()
    assert "the hub cannot be reached, and the local copy is not whole (IncompleteSnapshotError: " in said
    assert "1 file(s) are missing (model.safetensors)" in said
    assert "connect to the network, then give the same command again" in said

    with answering(403, "GatedRepo") as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert "its repository is gated (GatedRepoError: 403" in refusal()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/x.incomplete"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("Data processing error: I/O error: No space left on device (os error 28)"),
    ],
    ids=["disk", "quota", "xet"],
)
def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch, cache: Path, error: Exception) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    said = refusal()
    assert f": the disk is full ({type(error).__name__}: {error}); free space for {cache}, or name a folder" in said
    assert "the hub cannot be reached" not in said


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), TimeoutError("too slow")])
def test_whatever_else_goes_wrong_is_said(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    assert f"its files cannot be fetched ({type(error).__name__}: {error}); try again when" in refusal()


def raising(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_one_form_of_the_weights_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **options: asked.update(options) or tmp_path)
    assert locate(NAME) == tmp_path
    assert (asked["allow_patterns"], asked["ignore_patterns"]) == (PATTERNS, IGNORED)

    def fetched(file: str) -> bool:
        return any(fnmatch(file, p) for p in PATTERNS) and not any(fnmatch(file, p) for p in IGNORED)

    assert all(map(fetched, ("model.safetensors", "model-00001-of-00003.safetensors", "model.safetensors.index.json")))
    assert not any(map(fetched, ("consolidated.safetensors", "consolidated-00001-of-00003.safetensors", "x.bin")))
