"""The exported notebooks: plain Markdown, a setup cell that works, solutions left out."""

import os
import re
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import nbformat
import notebooks
import pytest
from conftest import ROOT

PAGES = [page for page in notebooks.pages() if notebooks.is_notebook(page)]
REFERENCES = notebooks.References.of_book()


def _export(page, student=False, repo="someone/book"):
    return notebooks.export(page, REFERENCES, repo, student=student)


def _markdown(notebook):
    return "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


@pytest.mark.parametrize("page", PAGES)
def test_no_myst_is_left(page):
    text = re.sub(r"```.*?```|`[^`\n]+`", "", _markdown(_export(page)), flags=re.S)
    assert not re.findall(r"\{[a-z:]+\}`|^```\{|^\([\w-]+\)=$|^:\w+:", text, flags=re.M)


@pytest.mark.parametrize("page", PAGES)
def test_code_is_the_chapters_own(page):
    source = (ROOT / f"{page}.md").read_text()
    cells = [c for c in _export(page).cells if c.cell_type == "code"]
    assert cells[0].metadata["tags"] == ["setup"]
    for cell in cells[1:]:
        assert cell.source in source


@pytest.mark.parametrize("page", PAGES)
def test_student_copy_has_exercises_and_no_solutions(page):
    full, student = _export(page), _export(page, student=True)
    assert full.cells[0] == student.cells[0]
    assert _markdown(student).count("### Exercise") == _markdown(full).count("### Exercise")
    assert "Solution of" not in _markdown(student)
    answers = [c for c in student.cells if c.source == "# Your answer\n"]
    assert len(answers) == _markdown(full).count("#### Solution of exercise")


def test_every_figure_keeps_its_caption():
    for page in PAGES:
        notebook = _export(page)
        figures = [c for c in notebook.cells if c.metadata.get("mystnb", {}).get("figure")]
        assert _markdown(notebook).count("**Figure ") == len(figures)


def test_unknown_syntax_is_refused_rather_than_exported_raw():
    convert = notebooks.Converter(REFERENCES, "")
    with pytest.raises(ValueError, match=r"\{kbd\}"):
        convert.text("press {kbd}`a`")
    with pytest.raises(ValueError, match=r"\{mermaid\}"):
        convert.text("```{mermaid}\nx\n```")


def test_a_chapter_depends_on_the_modules_it_uses_and_on_no_others():
    of_scaling = notebooks.modules("from depthutil import scaling")
    assert {"scaling", "scaling.solver", "_checks"} <= of_scaling and "toy" not in of_scaling
    assert "signatures" in notebooks.modules("import depthutil.regimes as r")
    assert notebooks.modules("import torch") == set()


def test_a_chapter_that_may_load_a_model_is_run_again_when_a_model_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "EXPORTED", tmp_path)
    (tmp_path / "constraints.txt").write_text("")
    for module in ("__init__", "models", "trajectory", "scaling"):
        (tmp_path / "depthutil" / f"{module}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "depthutil" / f"{module}.py").write_text("")
    (tmp_path / "depthutil" / "trajectory.py").write_text("from depthutil import models")
    for name, module in {"language": "trajectory", "other": "scaling"}.items():
        cell = nbformat.v4.new_code_cell(f"from depthutil import {module}")
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / f"{name}.ipynb")
    for path in ("models/one/config.json", "results/ladder_losses.parquet"):
        before = {name: notebooks.inputs(name) for name in ("language", "other")}
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text("new")
        after = {name: notebooks.inputs(name) for name in ("language", "other")}
        assert before["language"] != after["language"] and before["other"] == after["other"]


def test_repository_comes_from_the_environment_or_the_remote(monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_REPOSITORY", "teacher/course")
    assert notebooks.repository(tmp_path) == "teacher/course"
    monkeypatch.delenv("GITHUB_REPOSITORY")
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert notebooks.repository(tmp_path) is None
    for remote in ("git@github.com:a/b.git", "https://github.com/a/b"):
        subprocess.run([*git, "config", "remote.origin.url", remote], check=True)
        assert notebooks.repository(tmp_path) == "a/b"
    subprocess.run([*git, "config", "remote.origin.url", "/srv/a/b"], check=True)
    assert notebooks.repository(tmp_path) is None


# ------------------------------------------------------------------------- setup cell


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """An environment like Colab's: everything but depthutil is installed."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    here = Path(next(p for p in sys.path if p.endswith("site-packages")))
    there = next((folder / "env" / "lib").glob("python*/site-packages"))
    for item in here.iterdir():
        ours = re.match(r"_?_?(editable_impl_)?depthutil", item.name)
        if not ours and not (there / item.name).exists():
            (there / item.name).symlink_to(item)
    return python


def _run_setup(python: Path, repo, tmp_path, then="", **environment):
    notebook = _export(PAGES[-1], repo=repo)
    script = tmp_path / "setup.py"
    script.write_text(notebook.cells[0].source + "\n" + textwrap.dedent(then))
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DEPTHUTIL_SOURCE")}
    # The build tool is in the environment already, so that no network is needed. pip reads
    # this variable as the option's value: "0" means no isolation.
    env |= {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"} | environment
    return subprocess.run(
        [python, script], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300
    )


def test_setup_without_repository_says_what_to_do(bare_python, tmp_path):
    ran = _run_setup(bare_python, None, tmp_path)
    assert ran.returncode and "set DEPTHUTIL_SOURCE to a clone" in ran.stderr.splitlines()[-1]


def test_setup_installs_from_a_clone_and_leaves_torch_alone(bare_python, tmp_path):
    then = """
        import importlib.metadata as metadata
        from depthutil import archive, scaling
        assert "site-packages" in scaling.__file__, scaling.__file__
        assert len(scaling.load_chinchilla()) == 245
        assert "site-packages" in str(archive.find("results"))
        print("torch is", metadata.version("torch"))
    """
    import importlib.metadata

    torch = importlib.metadata.version("torch")
    ran = _run_setup(bare_python, "no/where", tmp_path, then, DEPTHUTIL_SOURCE=str(ROOT))
    assert not ran.returncode, ran.stderr
    assert f"Installing depthutil and its archived results from {ROOT}" in ran.stdout
    assert f"torch {torch} is installed and stays." in ran.stdout
    assert f"torch is {torch}" in ran.stdout
    again = _run_setup(bare_python, None, tmp_path)
    assert again.stdout.startswith("depthutil is here already"), again.stderr
