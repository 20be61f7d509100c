"""The files beside the code: licence, citation, CI, contributing. Each is held to what it speaks of."""

import hashlib
import re
from typing import Any

import pytest
import yaml
from builders import REPOSITORY

import popengine


def parsed(name: str) -> Any:
    return yaml.safe_load((REPOSITORY / name).read_text("utf-8"))


def test_the_licence_is_apache_2_0_word_for_word() -> None:
    text = (REPOSITORY / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_the_citation_is_of_this_version_and_both_papers() -> None:
    citation = parsed("CITATION.cff")
    assert citation["version"] == popengine.__version__ and citation["license"] == "Apache-2.0"
    assert {one["url"].rpartition("/")[2] for one in citation["references"]} == {"2602.06822", "2602.03295"}
    assert all(one["title"] and one["authors"] for one in citation["references"])


def test_ci_runs_the_same_script_on_every_python_that_is_supported() -> None:
    job = parsed(".github/workflows/ci.yml")["jobs"]["check"]
    versions = [int(version.removeprefix("3.")) for version in job["strategy"]["matrix"]["python"]]
    (least,) = re.findall(r'requires-python = ">=3\.(\d+)"', (REPOSITORY / "pyproject.toml").read_text("utf-8"))
    assert versions == [*range(int(least), 15)]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (REPOSITORY / ".ci/run").stat().st_mode & 0o111


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_contributors_are_sent_to_are_there(name: str) -> None:
    text = (REPOSITORY / name).read_text("utf-8")
    paths = set(re.findall(r"`((?:popengine|models|weights|tests|tools|docs|\.ci)/[\w/.-]*)", text))
    assert len(paths) > 10
    assert {path for path in paths if not (REPOSITORY / path).exists()} == set()


def test_names_that_contributors_are_sent_to_are_there() -> None:
    """Class and function names that CONTRIBUTING.md writes as code stand in a file that it names."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
    paths = set(re.findall(r"`((?:popengine|models|weights|tests)/[\w/.-]*\.py)", text))
    code = "\n".join((REPOSITORY / path).read_text("utf-8") for path in paths)
    code += (REPOSITORY / "models/matrices/plain.py").read_text("utf-8")
    names = set(re.findall(r"`([A-Z]\w+|[a-z]+_\w+)`", text))
    assert len(names) > 15
    assert {name for name in names if not re.search(rf"\b{name}\b", code)} == set()
