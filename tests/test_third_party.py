"""A metric from another distribution: installed by pip, found by its entry point, used like any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexi_plugins.testing.models import write_tiny_folder

SOURCE = Path(__file__).parent / "thirdparty"
CATALOGUE = """
import json
from flexi_plugins.plugins import Plugins
plugins = Plugins.load()
print(json.dumps([sorted(plugins.entries("metric")), sorted(plugins.entries("statistic")), list(plugins.problems)]))
"""
TWO_LINES = """
def test_conformance(flexi_check):
    flexi_check()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the example distribution is installed into; built from a copy, without a network."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--target", str(folder / "site"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run(site: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the distribution is installed."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("FLEXI_PLUGINS", "PYTEST_ADDOPTS")}
    return subprocess.run(
        [sys.executable, *command],
        env={**inherited, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def catalogue(site: Path, **environment: str) -> list[Any]:
    done = run(site, "-c", CATALOGUE, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def flexi(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(site, "-c", "from flexi_plugins.cli import main; main()", *arguments, **environment)


def test_it_is_in_the_catalogue_with_its_distribution_and_version(site: Path) -> None:
    done = flexi(site, "list", "--json", FLEXI_PLUGINS="example")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    [metric] = [p for p in listed["plugins"] if p["name"] == "example-energy"]
    assert (metric["kind"], metric["distribution"], metric["version"]) == ("metric", "flexi-example-metric", "1.2.3")
    assert metric["options"] == {"exponent": 0.5}
    refused = [p for p in listed["incompatible"] if p["metric"] == "example-energy"]
    assert {p["strategy"] for p in refused} == {"extend", "least-squares-merge", "remove-blocks", "share-lora"}
    [reason] = [p["reason"] for p in refused if p["strategy"] == "remove-blocks"]
    assert "wants block scores" in reason
    assert listed["problems"] == []


def test_it_makes_a_plan_with_a_built_in_strategy(site: Path, tmp_path: Path) -> None:
    model = write_tiny_folder(tmp_path / "model")
    options = ["--metric", "example-energy", "--metric-option", "exponent=1", "--strategy", "remove-units"]
    done = flexi(site, "plan", "--model", str(model), *options, "--ratio", "0.3", "-o", str(tmp_path / "plan.json"))
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["origin"]["metric"] == "example-energy"
    assert plan["origin"]["metric_options"] == {"exponent": 1.0}
    assert "ratio 0.3" in done.stdout


def test_flexi_plugins_limits_what_is_loaded(site: Path) -> None:
    metrics, statistics, problems = catalogue(site)
    assert "example-energy" in metrics
    assert "energy" in statistics
    assert problems == []
    metrics, statistics, problems = catalogue(site, FLEXI_PLUGINS="")
    assert "example-energy" not in metrics
    assert "come" in metrics
    assert problems == []
    assert "example-energy" in catalogue(site, FLEXI_PLUGINS="example")[0]
    metrics, _, [problem] = catalogue(site, FLEXI_PLUGINS="exmaple")
    assert "example-energy" not in metrics
    assert problem.startswith("FLEXI_PLUGINS: unknown installed plugin 'exmaple': did you mean 'example'? there is ")


def test_two_lines_check_it(site: Path, tmp_path: Path) -> None:
    file = tmp_path / "test_example.py"
    file.write_text(TWO_LINES)
    command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "-W", "error", str(file)]
    done = run(site, *command, FLEXI_PLUGINS="example")
    assert done.returncode == 0, done.stdout
    assert "test_conformance[metric-example-energy-dead-units-score-low] PASSED" in done.stdout
    assert "test_conformance[statistic-energy-does-not-depend-on-batching] PASSED" in done.stdout
    assert "come" not in done.stdout
    done = run(site, *command, FLEXI_PLUGINS="")
    assert done.returncode != 0
    assert "no distribution with an entry point flexi_plugins is installed" in done.stdout


def test_a_module_without_anything_to_check_is_an_error(tmp_path: Path) -> None:
    """A model family has no checks; one test that is skipped would look like a check that passed."""
    file = tmp_path / "test_example.py"
    file.write_text('import pytest\n\n@pytest.mark.flexi("flexi_plugins.families.llama")' + TWO_LINES)
    done = run(SOURCE, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(file))
    assert done.returncode != 0
    assert "flexi_plugins.families.llama has nothing to check" in done.stdout


def test_a_module_that_is_not_installed_is_named_by_a_marker(tmp_path: Path) -> None:
    file = tmp_path / "test_example.py"
    file.write_text('import pytest\n\n@pytest.mark.flexi("flexi_example_metric")' + TWO_LINES)
    done = run(SOURCE, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-W", "error", str(file))
    assert done.returncode == 0, done.stdout
    assert "test_conformance[metric-example-energy-scores-fit-every-model]" in done.stdout
