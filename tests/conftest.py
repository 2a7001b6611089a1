"""What the tests of the harness share: a tiny model with a tokenizer in a folder, and a text."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies import make_model, make_text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.txt")
