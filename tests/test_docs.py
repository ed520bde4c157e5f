"""What the documentation names exists: links lead somewhere, settings and commands are the real ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ood_runners.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


def test_the_api_page_lists_every_setting_with_its_default() -> None:
    from ood_runners.settings import Settings

    table = (ROOT / "docs" / "api.md").read_text().partition("## Settings")[2]
    listed = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]*?)`? \|", table, re.MULTILINE))
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    assert {name: float(text) if text[:1].isdigit() else text for name, text in listed.items()} == {
        name: default or "empty" for name, default in defaults.items()
    }


def test_every_command_in_the_readme_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"^python build_artifacts\.py (\w+)", readme, re.MULTILINE))
    commands |= set(re.findall(r"`(\w+) (?:DATA|NAME|FILE)\b", readme))
    assert {"fit", "evaluate", "export", "import"} <= commands
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
