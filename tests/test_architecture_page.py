"""`docs/architecture.md` and the glossary name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TREE = Path(__file__).parents[1]
PACKAGE = TREE / "lightning_sbckpt"
PAGES = [TREE / "docs" / "architecture.md", TREE / "CONTRIBUTING.md"]


def missing(text):
    """Return the modules and folders that a page names and that are not in the package."""
    named = re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:/|\.py))`", text)
    return [
        name
        for name in named
        if not any((at / name).exists() for at in (PACKAGE, PACKAGE / "plugin", TREE))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_module_that_a_page_names_exists(page):
    assert "`_save/" in page.read_text()
    assert missing(page.read_text()) == []


def test_a_module_that_is_gone_is_found():
    assert missing("`_save/stage.py`, `_save/gone.py`, `nowhere/`") == ["_save/gone.py", "nowhere/"]
