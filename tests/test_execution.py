"""Executing chapters: limits that count work, builds that go on where they were stopped."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import jupytext
import nbformat
import notebooks
import psutil
import pytest
import yaml
from conftest import ROOT

QUICK, SLEEPS = "x = 1 + 1", "import time; time.sleep(6)"
WORKS = "while True: pass"
FAILS = "raise KeyError('lost')"


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A function that makes a book of notebooks, each of one cell, and what runs it."""

    def make(**cells):
        for name, source in cells.items():
            cell = nbformat.v4.new_code_cell(source, id="only")
            metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
            path = tmp_path / "exported" / f"{name}.ipynb"
            path.parent.mkdir(exist_ok=True)
            nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=metadata), path)
        script = tmp_path / "execute.py"
        script.write_text(f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tools")!r})
import notebooks
notebooks.ROOT = root = Path({str(tmp_path)!r})
notebooks.EXPORTED, notebooks.EXECUTED = root / "exported", root / "executed"
notebooks.RUNNING, notebooks.LEDGER = root / "executed/.running", root / "executed/inputs.json"
notebooks.EXECUTED.mkdir(exist_ok=True)
notebooks.export_all = lambda: {list(cells)!r}
notebooks.inputs = lambda name: (notebooks.EXPORTED / f"{{name}}.ipynb").read_text()
notebooks._remember = lambda name, executed: None
sys.exit(notebooks.execute())
""")
        return [sys.executable, str(script)]

    return make


def kept(tmp_path):
    ledger = tmp_path / "executed" / "inputs.json"
    names = json.loads(ledger.read_text()) if ledger.exists() else {}
    return sorted(name for name in names if not name.startswith("seconds of"))


def execute(command, **environment):
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=120
    )
    return ended.returncode, ended.stdout + ended.stderr


def of_ours(tmp_path):
    """Processes that still work for a book in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(tmp_path) in " ".join(process.cmdline()) or process.cwd().startswith(
                str(tmp_path)
            ):
                found.append(process)
        except (psutil.Error, OSError):
            pass
    return found


def gone(tmp_path, seconds=15):
    end = time.monotonic() + seconds
    while of_ours(tmp_path) and time.monotonic() < end:
        time.sleep(0.2)
    return of_ours(tmp_path)


def test_each_is_kept_and_none_is_run_twice(book, tmp_path):
    command = book(a=QUICK, b=QUICK, c=FAILS)
    code, said = execute(command)
    assert code == 1 and "3 to execute" in said and "c: failed after" in said
    assert "'lost'" in said and "1 failed, c" in said
    assert kept(tmp_path) == ["a", "b"]
    code, said = execute(book(a=QUICK, b=QUICK, c=QUICK))
    assert code == 0 and "1 to execute, 2 unchanged" in said and "c: passed" in said
    assert "Notebooks: 0 to execute, 3 unchanged." in execute(command[:])[1]


def test_time_that_is_waited_is_not_counted_and_work_is(book, tmp_path):
    command = book(sleeps=SLEEPS, works=WORKS)
    code, said = execute(command, BOOK_SECONDS="4")
    assert code == 1 and "sleeps: passed" in said and kept(tmp_path) == ["sleeps"]
    assert "works: stopped after" in said
    assert "may take 4 s of one core" in said and "BOOK_SECONDS=8 make book" in said
    assert gone(tmp_path) == []


def test_the_limit_is_a_number_of_seconds(book):
    code, said = execute(book(a=QUICK), BOOK_SECONDS="soon")
    assert code and "BOOK_SECONDS is a number of seconds, not 'soon'" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_killed_leaves_no_kernel_and_goes_on(book, tmp_path, number):
    command = book(a=QUICK, b=QUICK, c=WORKS, d=WORKS)
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while kept(tmp_path) != ["a", "b"] and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(random.uniform(0, 4))
    running.send_signal(number)
    assert running.wait(timeout=10) != 0
    assert gone(tmp_path) == []
    assert kept(tmp_path) == ["a", "b"]
    code, said = execute(book(a=QUICK, b=QUICK, c=QUICK, d=QUICK))
    assert code == 0 and "2 to execute, 2 unchanged" in said


def test_a_make_that_is_killed_takes_its_children_with_it(book, tmp_path):
    command = book(a=QUICK, c=WORKS, d=WORKS)
    (tmp_path / "Makefile").write_text(f"executed:\n\t{' '.join(command)}\n")
    running = subprocess.Popen(["make", "executed"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while kept(tmp_path) != ["a"] and time.monotonic() < end:
        time.sleep(0.1)
    running.kill()
    running.wait(timeout=10)
    assert gone(tmp_path) == []


def test_a_ledger_that_is_cut_off_is_begun_again(book, tmp_path):
    command = book(a=QUICK)
    assert execute(command)[0] == 0
    (tmp_path / "executed" / "inputs.json").write_text('{"a": "half')
    assert "1 to execute" in execute(command)[1]


def test_a_folder_where_nothing_can_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "_build").write_text("a file in the way")
    monkeypatch.setattr(notebooks, "EXPORTED", tmp_path / "_build" / "notebooks")
    with pytest.raises(SystemExit, match=r"_build.*where you may write"):
        notebooks.main(["export"])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_names_the_path(tmp_path, monkeypatch, code):
    def full(*args):
        raise OSError(code, os.strerror(code), str(tmp_path / "here"))

    monkeypatch.setattr(notebooks, "export_all", full)
    with pytest.raises(SystemExit, match=rf"here: {os.strerror(code)}: make room"):
        notebooks.main(["execute"])


# Which chapters are run again -----------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    files = {
        "__init__": "",
        "flat": "import numpy",
        "wing/__init__": "from depthutil.wing.inner import thing\nfrom .other import more",
        "wing/inner": "from depthutil import flat",
        "wing/other": "from . import sibling\nfrom ..base import x",
        "wing/sibling": "",
        "wing/unused": "",
        "base": "import depthutil.deep.er as d",
        "deep/__init__": "",
        "deep/er": "",
    }
    for name, source in files.items():
        path = tmp_path / "depthutil" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return set(files)


WING = {"wing", "wing.inner", "wing.other", "wing.sibling", "flat", "base", "deep", "deep.er"}


@pytest.mark.parametrize(
    "code, modules",
    [
        ("from depthutil import wing", WING),
        ("import depthutil.wing as w", WING),
        ("from depthutil.wing import inner", WING),
        ("from depthutil.wing.inner import thing", WING),
        ("import depthutil.wing.unused", WING | {"wing.unused"}),
        ("from depthutil import flat, nothing", {"flat"}),
        ("from depthutil.deep.er import anything", {"deep", "deep.er"}),
        ("if True:\n    from depthutil import base", {"base", "deep", "deep.er"}),
        ("import depthutilities.flat", set()),
    ],
)
def test_packages_are_followed_to_their_modules(package, code, modules):
    assert notebooks.modules(code) == modules


def test_a_change_in_any_module_runs_exactly_its_chapters_again(package, tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "EXPORTED", tmp_path)
    (tmp_path / "constraints.txt").write_text("")
    uses = {"wings": "from depthutil import wing", "flats": "from depthutil import flat"}
    for name, code in uses.items():
        cells = [nbformat.v4.new_code_cell(code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    for module in sorted(package):
        dotted = module.removesuffix("/__init__").replace("/", ".")
        before = {name: notebooks.inputs(name) for name in uses}
        path = tmp_path / "depthutil" / f"{module}.py"
        path.write_text(path.read_text() + "\n# changed")
        changed = {name for name in uses if notebooks.inputs(name) != before[name]}
        wanted = {name for name, code in uses.items() if dotted in notebooks.modules(code)}
        assert changed == (set(uses) if dotted == "__init__" else wanted), module


def test_every_module_of_depthutil_is_found():
    for path in (ROOT / "depthutil").rglob("*.py"):
        parts = path.relative_to(ROOT / "depthutil").with_suffix("").parts
        if parts != ("__init__",) and "_archived" not in parts:
            name = ".".join(parts).removesuffix(".__init__")
            assert name in notebooks.modules(f"import depthutil.{name}")


def test_a_change_in_a_wing_runs_the_chapters_that_use_it():
    """Whichever of its files changes, and none but these chapters."""
    code = {}
    for page in filter(notebooks.is_notebook, notebooks.pages()):
        cells = jupytext.read(ROOT / f"{page}.md").cells
        python = [c.source for c in cells if c.cell_type == "code" and c.source[:2] != "%%"]
        code[page] = notebooks.modules("\n".join(python))
    for wing in ("stream", "trajectory", "toy", "ladder", "scaling"):
        users = {page for page, modules in code.items() if wing in modules}
        assert users and users < set(code)
        # What a wing imports when it is needed, its __init__ does not name.
        for path in (ROOT / "depthutil" / wing).glob("[!_]*.py"):
            assert {p for p, m in code.items() if f"{wing}.{path.stem}" in m} == users, path


# Whose repository -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "remote, named",
    [
        ("git@github.com:a/b.git", "a/b"),
        ("https://github.com/a/b", "a/b"),
        ("https://github.com/a/b.git/", "a/b"),
        ("https://user:secret@github.com/a/b.c", "a/b.c"),
        ("ssh://git@github.com:22/a/b.git", "a/b"),
        ("https://notgithub.com/a/b", None),
        ("git@notgithub.com:a/b.git", None),
        ("https://github.com.evil.org/a/b", None),
        ("https://github.com@evil.org/a/b", None),
        ("https://evil.org/github.com/a/b", None),
        ("https://evil.org/x@github.com/a/b", None),
        ("https://evil.org/?github.com:a/b", None),
        ("https://github.com/a/b/c", None),
        ("https://github.com/a", None),
        ("https://github.com/../b", None),
        ("/srv/github.com/a/b", None),
    ],
)
def test_only_github_itself_is_github(remote, named, tmp_path, monkeypatch):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "config", "remote.origin.url", remote], check=True)
    assert notebooks.repository(tmp_path) == named


# What others run ------------------------------------------------------------------------

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def workflow(path):
    text = path.read_text()
    read = yaml.safe_load(text)
    return text, read, read.get("on", read.get(True))  # YAML takes "on" for a truth value


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_only_read_and_run_what_is_pinned(path):
    text, read, _ = workflow(path)
    assert read["permissions"] == {"contents": "read"}
    for name, job in read["jobs"].items():
        if job.get("permissions", {}) != {}:
            assert job["permissions"] == {"contents": "write"} and name == "deploy"
            assert not any("checkout" in step.get("uses", "") for step in job["steps"])
        assert "timeout-minutes" in job or "uses" in job
    for line in text.splitlines():
        if "uses:" in line and "./.github/" not in line:
            assert re_full(line), f"{path.name}: {line.strip()} is not pinned to a commit"


def re_full(line):
    return re.fullmatch(r"\s*-? ?uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)


def test_the_site_is_published_after_the_tests():
    _, publish, on = workflow(ROOT / ".github" / "workflows" / "publish.yml")
    assert on["push"]["branches"] == ["main"]
    jobs = publish["jobs"]
    assert jobs["deploy"]["needs"] == "test" and "main" in jobs["deploy"]["if"]
    assert jobs["test"]["uses"] == "./.github/workflows/test.yml"
    _, test, on = workflow(ROOT / ".github" / "workflows" / "test.yml")
    assert "workflow_call" in on and "pull_request" in on
    assert any(step.get("run") == "bash .ci/run" for step in test["jobs"]["test"]["steps"])


def test_the_citation_has_one_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert isinstance(citation["license"], str)  # Zenodo refuses a list
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'license = "{citation["license"]}"' in pyproject
    assert "CC BY 4.0" in (ROOT / "README.md").read_text()  # the text's
