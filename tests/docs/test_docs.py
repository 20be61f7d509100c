"""The written pages: generated ones are current and complete, links lead somewhere, README's picture is small."""

import importlib
import re
from pathlib import Path

import pytest
from builders import REPOSITORY
from write_docs import PAGES, members, public

import popengine
from popengine.__main__ import COMMANDS

DOCS = REPOSITORY / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_current(name: str) -> None:
    assert (DOCS / name).read_text("utf-8") == PAGES[name](), f"run python tools/write_docs.py: docs/{name} is old"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "harness"])
def test_every_flag_of_a_command_is_told(name: str) -> None:
    section = (DOCS / "commands.md").read_text("utf-8").split(f"\n## {name}\n")[1].split("\n## ")[0]
    actions = importlib.import_module(f"popengine.{name}").parser()._actions
    flags = {flag for action in actions for flag in action.option_strings} - {"-h", "--help", "--help-all"}
    assert len(flags) > 1
    assert {flag for flag in flags if not re.search(rf"`{flag}[ `]", section)} == set()


def test_every_public_name_is_told() -> None:
    page = (DOCS / "api.md").read_text("utf-8")
    told = set(re.findall(r"^##+ (\S+)$", page, re.MULTILINE))
    assert popengine.PUBLIC.keys() <= told
    for name, one in public().items():
        if isinstance(one, type):
            assert {f"{name}.{member}" for member, _ in members(one)} <= told


def pages() -> list[Path]:
    top = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
    return [*(REPOSITORY / name for name in top), *sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
            places = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in places, f"{page.name} links to {target}"


def test_readme_shows_one_small_picture_first_and_links_every_page() -> None:
    text = (REPOSITORY / "README.md").read_text("utf-8")
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert (REPOSITORY / picture).stat().st_size < 300_000
    assert text.index(picture) < 2500
    assert {f"docs/{path.name}" for path in DOCS.glob("*.md")} <= set(re.findall(r"docs/\w+\.md", text))
