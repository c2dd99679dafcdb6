"""What every chapter has, read from its source and from its executed notebook."""

import ast
import json
import re

import jupytext
import nbformat
import notebooks
import pytest
import yaml
from conftest import ROOT

PAGES = [page for page in notebooks.pages() if notebooks.is_notebook(page)]
# Pages of reference may compute, too, but teach nothing.
CHAPTERS = [page for page in PAGES if re.match(r"chapters/(?!reference/)", page)]


def _source(page):
    return (ROOT / f"{page}.md").read_text()


def _executed(page):
    path = notebooks.EXECUTED / f"{page}.ipynb"
    assert path.exists(), f"{page} was not executed: run `make book`"
    return nbformat.read(path, as_version=4)


def _code(page):
    return [c for c in _executed(page).cells if c.cell_type == "code"]


def test_every_page_is_in_the_table_of_contents():
    files = {"index", *(str(p.relative_to(ROOT))[:-3] for p in ROOT.glob("chapters/**/*.md"))}
    assert files == set(notebooks.pages())


@pytest.mark.parametrize("page", CHAPTERS)
def test_chapter_has_its_parts(page):
    text = _source(page)
    box = re.search(
        r"```\{admonition\} In this chapter\n:class: objectives\n(.*?)\n```", text, re.S
    )
    assert box, "no box of objectives"
    assert len(re.findall(r"^- ", box.group(1), re.M)) >= 3, "fewer than three objectives"
    assert re.search(r"\*\*Time:\*\*.*\d+ (minutes|seconds)", box.group(1)), "no times"
    assert "**Needs:**" in box.group(1)
    for heading in ("What you should remember", "Exercises", "Sources"):
        assert f"\n## {heading}\n" in text, f"no section “{heading}”"
    assert "{cite:" in text.split("\n## Sources\n")[1], "no work cited among the sources"


def _needs(page):
    """Labels of the chapters that a chapter's first box says it builds on."""
    box = re.search(r"\*\*Needs:\*\*(.*)", _source(page))
    return set(re.findall(r"\{ref\}`([\w-]+)`", box.group(1))) if box else set()


def _label(page):
    return re.search(r"^\(([\w-]+)\)=\n+# ", _source(page), re.M).group(1)


def test_what_a_chapter_needs_comes_before_it():
    before = set()
    for page in CHAPTERS:
        assert _needs(page) <= before, f"{page} needs {_needs(page) - before}, which come later"
        before.add(_label(page))


def test_the_first_page_says_where_one_can_go_on():
    first, *others = CHAPTERS
    free = {_label(page) for page in others if _needs(page) == {_label(first)}}
    read = _source("chapters/start/how_to_use").split("\n## Read\n")[1].split("\n\n")[0]
    assert set(re.findall(r"\{ref\}`([\w-]+)`", read)) == free | {_label(first)}


def test_a_check_cell_looks_like_no_other_cell():
    css = (ROOT / "_static/book.css").read_text()
    check = re.search(r"\.cell\.tag_check \.cell_input \{(.*?)\}", css, re.S).group(1)
    other = re.search(r"\.cell:not\(\.tag_check\) \.cell_input \{(.*?)\}", css).group(1)
    assert "background-color: var(--pst-color-success-bg)" in check
    assert "border-left-color: var(--pst-color-border)" in other


@pytest.mark.parametrize("page", CHAPTERS)
def test_exercises_have_solutions(page):
    text = _source(page)
    exercises = re.findall(r"```\{exercise-start\}.*\n:label: ([\w-]+)", text)
    solutions = re.findall(r"```\{solution-start\} ([\w-]+)\n:class: dropdown", text)
    assert 3 <= len(exercises) <= 5
    assert exercises == solutions
    for kind in ("exercise", "solution"):
        assert text.count(f"{{{kind}-start}}") == text.count(f"{{{kind}-end}}")


@pytest.mark.parametrize("page", PAGES)
def test_check_cells_can_fail(page):
    checks = [c for c in _code(page) if "check" in c.metadata.get("tags", [])]
    assert checks or page not in CHAPTERS, "no check cell"
    for cell in checks:
        asserts = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Assert)]
        assert asserts, f"a check without an assertion:\n{cell.source}"
        for node in asserts:
            names = [n for n in ast.walk(node.test) if isinstance(n, ast.Name)]
            assert names, f"an assertion about constants:\n{cell.source}"
        printed = "".join(o.get("text", "") for o in cell.outputs)
        assert re.search(r"\d", printed), f"a check that shows no measured value:\n{cell.source}"


def _silent(statements, hidden=False):
    """Assertions that an ``if`` may leave out without a word."""
    for node in statements:
        if isinstance(node, ast.Assert) and hidden:
            yield ast.unparse(node)
        elif isinstance(node, ast.If):
            says_so = ast.unparse(node.test).startswith("checks.applies(")
            yield from _silent(node.body, hidden or not says_so)
            yield from _silent(node.orelse, hidden=True)
        else:
            yield from _silent(getattr(node, "body", []), hidden)


@pytest.mark.parametrize("page", PAGES)
def test_a_check_that_is_left_out_says_so(page):
    for cell in jupytext.read(ROOT / f"{page}.md").cells:
        if "check" in cell.metadata.get("tags", []):
            left_out = list(_silent(ast.parse(cell.source).body))
            assert not left_out, f"write `if checks.applies(…):` around {left_out}"


def test_a_silent_if_is_seen():
    silent = "if a:\n    for b in c:\n        assert b > 0"
    assert list(_silent(ast.parse(silent).body)) == ["assert b > 0"]
    assert not list(_silent(ast.parse(silent.replace("a:", "checks.applies(a, 'no'):", 1)).body))
    assert not list(_silent(ast.parse("for b in c:\n    assert b > 0").body))


@pytest.mark.parametrize("page", PAGES)
def test_with_the_books_parameters_every_check_is_made(page):
    for cell in _code(page):
        printed = "".join(o.get("text", "") for o in cell.outputs)
        assert "Not checked:" not in printed, cell.source


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_has_caption_and_alt_text(page):
    for cell in _code(page):
        shown = {kind for o in cell.outputs for kind in o.get("data", {})}
        page_code = any(
            "<svg" in "".join(o.get("data", {}).get("text/html", ""))
            or "<script" in "".join(o.get("data", {}).get("text/html", ""))
            for o in cell.outputs
        )
        if not page_code and not any(kind.startswith("image/") for kind in shown):
            continue
        about = cell.metadata.get("mystnb", {})
        figure = about.get("figure", {})
        assert len(figure.get("caption", "")) > 40, f"no caption:\n{cell.source}"
        assert figure.get("name", "").startswith("fig-"), f"no name:\n{cell.source}"
        if not page_code:
            assert len(about.get("image", {}).get("alt", "")) > 20, f"no alt text:\n{cell.source}"
            assert not shown & {"image/png", "image/jpeg"}, f"not drawn as SVG:\n{cell.source}"


@pytest.mark.parametrize("page", PAGES)
def test_nothing_went_to_stderr(page):
    for cell in _code(page):
        for output in cell.outputs:
            assert output.get("name") != "stderr", output.text


@pytest.mark.parametrize("page", PAGES)
def test_no_chapter_takes_over_three_minutes(page):
    ledger = json.loads(notebooks.LEDGER.read_text())
    assert ledger[f"seconds of {page}"] < notebooks.seconds_allowed()


def _source_cells(page):
    """Code cells as they are written, without those that hold parameters."""
    cells = [c for c in jupytext.read(ROOT / f"{page}.md").cells if c.cell_type == "code"]
    return [c for c in cells if "parameters" not in c.metadata.get("tags", [])]


def _lines(source):
    return [line for line in source.splitlines() if line.strip()]


def test_a_long_code_cell_is_rare():
    """About 15 lines can be read aloud; what is longer belongs to depthutil, or is folded."""
    for page in PAGES:
        for cell in _source_cells(page)[1:]:
            folded = "hide-input" in cell.metadata.get("tags", [])
            count = len(_lines(cell.source))
            assert count <= (34 if folded else 24), f"{page}: {count} lines\n{cell.source}"


@pytest.mark.parametrize("page", PAGES)
def test_code_is_as_wide_as_the_page(page):
    for cell in _source_cells(page):
        wide = [line for line in cell.source.splitlines() if len(line) > 80]
        assert not wide, "\n".join(wide)


@pytest.mark.parametrize("page", PAGES)
def test_a_chapter_defines_what_it_teaches_and_nothing_else(page):
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = [
        node.name
        for cell in _source_cells(page)
        for node in ast.parse(cell.source).body
        if isinstance(node, kinds)
    ]
    assert len(names) <= 4, f"{names}: what is not taught here belongs to depthutil"


def test_no_two_chapters_define_the_same():
    seen = {}
    for page in PAGES:
        for cell in _source_cells(page):
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef):
                    body = ast.dump(ast.Module(node.body, []))
                    assert body not in seen, f"{node.name} is in {seen[body]} and in {page}"
                    seen[body] = page


def test_chapters_leave_slopes_to_the_package():
    for page in PAGES:
        for cell in _source_cells(page):
            assert "polyfit" not in cell.source, f"{page}: use depthutil.powerlaw.fit"


#: What the longest chapter has. They are to become shorter: lower these when one has.
MOST = {"lines": 1_120, "lines of code": 580, "open lines of code": 330, "words": 6_200}


@pytest.mark.parametrize("page", CHAPTERS)
def test_no_chapter_grows(page):
    text = _source(page)
    prose = re.sub(r"```\{code-cell\}.*?\n```", "", text, flags=re.S)
    found = {
        "lines": text.count("\n"),
        "lines of code": sum(len(_lines(c.source)) for c in _source_cells(page)),
        "open lines of code": sum(
            len(_lines(c.source))
            for c in _source_cells(page)
            if "hide-input" not in c.metadata.get("tags", [])
        ),
        "words": len(re.findall(r"\w[\w'-]*", prose)),
    }
    for name, count in found.items():
        assert count <= MOST[name], f"{count} {name}"


@pytest.mark.parametrize("page", PAGES)
def test_what_draws_and_what_checks_is_folded(page):
    for cell in _source_cells(page):
        tags, about = cell.metadata.get("tags", []), cell.metadata.get("mystnb", {})
        if "check" in tags or "figure" in about:
            assert "hide-input" in tags, cell.source
        if "figure" in about:
            assert about.get("code_prompt_show"), f"say what is folded:\n{cell.source}"


def test_the_text_names_no_number_of_ours_by_hand():
    """Results in prose are printed by a cell; a typed ± would be one that is not."""
    for page in CHAPTERS:
        prose = re.sub(r"```\{code-cell\}.*?\n```", "", _source(page), flags=re.S)
        for line in prose.splitlines():
            if "±" in line or r"\pm" in line:
                assert "{cite:" in line or "paper" in line.lower(), line


def test_every_label_is_used_once():
    labels = [
        label
        for page in notebooks.pages()
        for label in re.findall(r"^\(([\w-]+)\)=$|\$\$ \(([\w-]+)\)$", _source(page), re.M)
    ]
    flat = ["".join(pair) for pair in labels]
    assert len(flat) == len(set(flat))


def test_configuration_is_jupyter_book_1():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    assert config["title"] == "What Are Layers For?" and toc["format"] == "jb-book"
