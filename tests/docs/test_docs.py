"""The written pages: generated ones are current and complete, links lead somewhere, README's picture is small."""

import importlib
import itertools
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
    return [*(REPOSITORY / name for name in top), *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", pages(), ids=name_of)
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


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def headers(text: str) -> list[list[str]]:
    """The cells of the first row of every table."""
    lines = text.splitlines()
    return [cells(row) for row, rule in itertools.pairwise(lines) if re.fullmatch(r"\s*\|(-+\|)+", rule)]


@pytest.mark.parametrize("page", [page for page in pages() if page.name not in PAGES], ids=name_of)
def test_every_ratio_in_a_table_says_which(page: Path) -> None:
    """A ratio is the prune ratio, or it is named otherwise; r alone is no name."""
    text = page.read_text("utf-8")
    for header in headers(text):
        assert not {"ratio", "r", "r (FFN)"} & set(header), header
    for row in text.splitlines():
        if row.lstrip().startswith("|"):
            words = re.sub("`[^`]*`", "", row)
            assert not re.search(r"(?<!prune )(?<!FFN )(?<!head )\bratios? 0\.|\br (= )?0\.", words), row


RESULTS = ("results.md", "speed.md", "packed.md", "tables.md", "evaluation.md", "prefill_only.md")


@pytest.mark.parametrize("name", RESULTS)
def test_a_page_of_results_begins_with_conclusions_and_one_table(name: str) -> None:
    text = (DOCS / name).read_text("utf-8")
    beginning = text.split("\n## ")[0]
    assert len(headers(beginning)) == 1
    words = beginning.partition("\n|")[0]
    assert len(words.splitlines()) <= 40 and 5 <= words.count("\n- **") <= 10
    assert "](measurements/" in text


@pytest.mark.parametrize("page", sorted((DOCS / "measurements").glob("*.md")), ids=name_of)
def test_a_page_of_measurements_has_commands_and_is_linked(page: Path) -> None:
    text = page.read_text("utf-8")
    assert headers(text) and re.search(r"^    python (-m popengine\.|tools/)", text, re.MULTILINE)
    assert any(f"(measurements/{page.name}" in (DOCS / name).read_text("utf-8") for name in RESULTS)


def test_readme_shows_two_small_pictures_one_of_them_first_and_links_every_page() -> None:
    text = (REPOSITORY / "README.md").read_text("utf-8")
    first, second = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert all((REPOSITORY / picture).stat().st_size < 300_000 for picture in (first, second))
    assert text.index(first) < 2500
    assert {f"docs/{path.name}" for path in DOCS.glob("*.md")} <= set(re.findall(r"docs/\w+\.md", text))
    assert "(docs/measurements)" in text and len(text.splitlines()) <= 120
