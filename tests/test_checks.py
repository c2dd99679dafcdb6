"""Checks of chapters: what they share, that each ran, and that it can fail."""

import ast
import json

import check_hook
import jupytext
import nbformat
import notebooks
import pytest
from conftest import ROOT

from depthutil import archive, checks, ladder, toy


def test_a_check_that_applies_is_silent(capsys):
    assert checks.applies(3 > 2, "never said") is True
    assert capsys.readouterr().out == ""


def test_a_check_that_does_not_apply_says_why(capsys):
    assert checks.applies([], "RATES is empty") is False
    assert capsys.readouterr().out == "Not checked: RATES is empty\n"


@pytest.mark.parametrize("reason", ["", "  ", None])
def test_a_check_is_left_out_for_a_reason(reason):
    with pytest.raises(ValueError, match="says why"):
        checks.applies(False, reason)


# Every check of the book, as it was executed --------------------------------------------

PAGES = [page for page in notebooks.pages() if notebooks.is_notebook(page)]


def check_cells(page):
    """Source of the cells that the page calls checks."""
    executed = nbformat.read(notebooks.EXECUTED / f"{page}.ipynb", as_version=4)
    return [c.source for c in executed.cells if "check" in c.metadata.get("tags", [])]


@pytest.mark.parametrize("page", PAGES)
def test_every_check_ran_and_something_makes_it_fail(page):
    path = notebooks.checks_of(page)
    assert path.exists(), f"{page} was not executed: run `make book`"
    asked, lost = json.loads(path.read_text())["cells"], []
    for source in check_cells(page):
        found = asked.get(check_hook.key(source), [])
        lines = source.strip().splitlines()
        if "assert " in source and not found:
            lost.append(f"was not asked: {lines[0]}")
        for one in found:
            line = lines[one["line"] - 1].strip()
            if not one["ran"]:
                lost.append(f"did not run: {line}")
            elif not one["held"]:
                lost.append(f"does not hold when it is run again: {line}")
            elif one["by"] is None:
                lost.append(f"nothing that was spoilt made it fail: {line}")
    assert not lost, f"{page}:\n" + "\n".join(lost)


def readings(page):
    """Calls of a page that read archived measurements, as code; those in a try are None."""
    code = "\n".join(
        cell.source
        for cell in jupytext.reads((ROOT / f"{page}.md").read_text(), fmt="md:myst").cells
        if cell.cell_type == "code" and not cell.source.startswith("%")
    )
    tree = ast.parse(code)
    tried = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        words = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if words in ("archive.load", "toy.ToyResult.load", "ladder.curves", "ladder.documents"):
            constant = all(isinstance(argument, ast.Constant) for argument in node.args)
            yield None if id(node) in tried else ast.unparse(node) if constant else f"{words}('x')"


@pytest.mark.parametrize("page", [page for page in PAGES if any(True for _ in readings(page))])
def test_an_archive_that_is_missing_stops_its_page(page, monkeypatch, tmp_path):
    calls = set(readings(page))
    assert None not in calls, "a missing archive would be passed over"
    names = {"archive": archive, "toy": toy, "ladder": ladder}
    for call in calls - {"archive.load(path)", "toy.ToyResult.load(path)"}:
        if "('x')" not in call:
            eval(call, names)  # it is there
    monkeypatch.setattr(archive, "_PACKAGE", tmp_path / "depthutil")
    monkeypatch.chdir(tmp_path)
    for call in calls:
        with pytest.raises(FileNotFoundError) as missing:
            eval(call, names)
        said = str(missing.value)
        assert "\n" not in said and ("results" in said or "x" in said)
