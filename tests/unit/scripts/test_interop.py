"""The table of who reads whose: the page has what the generator makes of the last run, and no word more."""

from __future__ import annotations

from scripts.lib import interop


def test_the_page_has_the_table_of_the_last_run() -> None:
    page = interop.DOCUMENT.read_text()
    assert page.count(interop.BEGIN) == page.count(interop.END) == 1
    assert page == interop.with_table(page, interop.read_seen()), "python -m scripts.lib.interop writes it"


def test_what_was_seen_is_of_cells_that_there_are() -> None:
    names = [cell.name for cell in interop.CELLS]
    assert len(set(names)) == len(names)
    assert interop.read_seen().keys() <= {cell.name for cell in interop.CELLS if cell.commands}


def test_a_cell_that_was_not_run_says_so_and_one_that_was_says_with_what() -> None:
    seen = {"crane, our artifact": {"version": "v1.2.3"}, "wkg, our node": {"why": "no wkg"}}
    rows = dict(
        line.strip("| ").split(" | ", 1)
        for line in interop.rendered(seen).splitlines()[2:]
        if "crane" in line
    )
    assert rows["crane on our artifact"].endswith("| works, v1.2.3")
    assert rows["our node on crane's"].endswith("| **not run**: no run has come to it")
    assert "| **not run**: no wkg |" in interop.rendered(seen)
    assert interop.rendered({}).count("**not run**") == sum(bool(cell.commands) for cell in interop.CELLS)
