"""Whatever is done to a network: sampled as its own call says, or refused by name; and the page that lists it."""

from __future__ import annotations

import pytest
import what_people_attach  # noqa: F401
import what_people_wrap  # noqa: F401
from what_people_do import CASES, FAMILIES, PAGE, outcome

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [(name, family) for name, (_, _, families) in CASES.items() for family in families]


@pytest.fixture(scope="module")
def page() -> dict[str, list[str]]:
    lines = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines}


@pytest.mark.parametrize(("name", "family"), ROWS, ids=lambda value: str(value).replace(" ", "_"))
def test_nothing_differs_silently(page, name, family):
    found = outcome(name, family)
    assert not found.startswith("SILENT"), found
    assert page[name][list(FAMILIES).index(family)] == found


def test_the_page_has_every_case(page):
    assert set(CASES) <= set(page)
    assert len(CASES) >= 30
