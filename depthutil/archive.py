"""Measurements that take longer than a chapter may: saved and read with their provenance.

One measurement is one Parquet file, a table that any data tool opens. Its
metadata carries what produced it: settings, seeds, device, date, wall time and
code version. Chapters caption archived figures from that metadata, so nothing
about a run is ever typed in by hand.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from depthutil import __version__

_KEY = b"depthutil"
_SUM = b"depthutil.sha256"
_PACKAGE = Path(__file__).resolve().parent
_REQUIRED = ("config", "seeds", "scale", "device", "date", "wall_seconds", "version", "commit")


def find(name: str) -> Path:
    """The path of something the chapters read besides code, wherever this package lives.

    A clone keeps it at its top level, an installed package (Colab's too) inside itself.

    Parameters
    ----------
    name : str
        Path relative to the repository, such as ``"results/nested_steps.parquet"``.

    Raises
    ------
    FileNotFoundError
        If neither place has it.

    Examples
    --------
    >>> find("results").is_dir()
    True
    """
    places = [_PACKAGE.parent / name, _PACKAGE / "_archived" / name]
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(
        f"{name!r} is neither at {places[0]} nor at {places[1]}: "
        "reinstall depthutil from a complete clone, or run the code that makes it"
    )


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def _reason(error: OSError) -> str:
    reasons = {
        errno.ENOSPC: "the disk is full, make room or name another folder",
        errno.EDQUOT: "your quota is used up, make room or name another folder",
        errno.EACCES: "you may not write there, name another folder",
        errno.EROFS: "nothing can be written there, name another folder",
        errno.EISDIR: "it is a folder, name a file",
        errno.ENOTDIR: "a file is in the place of one of its folders, name another",
        errno.EEXIST: "a file is in the place of one of its folders, name another",
    }
    return reasons.get(error.errno or 0, error.strerror or str(error))


def _make_folder(folder: Path) -> None:
    """Make a folder and those it is in, or say which cannot be made and why."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"the folder {folder} cannot be made: {_reason(error)}"
        raise type(error)(error.errno, message) from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A place to write a file or a folder, which takes the place of ``path`` in the end.

    Whoever reads ``path`` meanwhile, or after a crash, finds the old one whole, or nothing.
    Where the block fails, nothing stays. Processes on several machines may write the same
    file; the last one wins.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "new" / "a.txt") as partial:
    ...         _ = partial.write_text("whole")
    ...     print((Path(folder) / "new" / "a.txt").read_text())
    whole
    """
    path = Path(path)
    _make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    old = partial.with_name(partial.name + ".old")
    try:
        yield partial
        if partial.is_dir():
            if path.exists():  # a folder cannot be put in the place of one that is not empty
                os.replace(path, old)
        else:
            with partial.open("r+b") as file:
                os.fsync(file.fileno())  # the content before the name, on every file system
        os.replace(partial, path)
    except OSError as error:
        ours = {str(partial), None} if error.errno in _FULL else {str(partial)}
        if error.filename not in ours:
            raise  # of something else that the block did
        raise type(error)(error.errno, f"{path} cannot be written: {_reason(error)}") from error
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for rest in (partial, old):
            if rest.is_dir():
                shutil.rmtree(rest, ignore_errors=True)
            else:
                rest.unlink(missing_ok=True)


@dataclass(frozen=True)
class Archived:
    """A table of measurements and what produced it.

    Attributes
    ----------
    frame : pandas.DataFrame
        The measurements, one a row.
    provenance : dict
        ``config``, ``seeds``, ``scale``, ``device``, ``date`` (UTC), ``wall_seconds``,
        ``version``, ``commit`` and, where it is known, ``method``.
    """

    frame: pd.DataFrame
    provenance: dict[str, Any]

    @property
    def caption(self) -> str:
        """Scale, device, date, seeds, wall time and commit, as a sentence for a figure."""
        p = self.provenance
        # A plus says that files differed from the commit.
        commit = p["commit"][:10] + "+" * p["commit"].endswith("+")
        return (
            f"Archived run, scale “{p['scale']}”, {p['device']}, {p['date'][:10]}, "
            f"seeds {p['seeds']}, {p['wall_seconds'] / 60:.0f} min, code {commit}."
        )


def save(
    frame: pd.DataFrame,
    path: str | os.PathLike,
    *,
    config: dict[str, Any],
    seeds: Any,
    scale: str,
    wall_seconds: float,
    device: str | None = None,
    method: str = "",
) -> Path:
    """Write a table of measurements with its provenance, all of it or nothing.

    Parameters
    ----------
    frame : pandas.DataFrame
    path : path
        Ends in ``.parquet``; its folder is made where missing.
    config : dict
        Every setting of the run, as JSON can hold it.
    seeds : int, list or str
        What was seeded, as JSON can hold it.
    scale : str
        ``"demo"``, ``"colab"`` or ``"paper"``, or what was run instead, in words.
    wall_seconds : float
        How long the run took.
    device : str, optional
        Where it ran; by default this machine's processor and number of cores.
    method : str, optional
        How it was computed, where that may move digits: the kernel, its precision.

    Returns
    -------
    pathlib.Path
        Where the file is.

    Raises
    ------
    ValueError
        If ``path`` does not end in ``.parquet``.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> frame = pd.DataFrame({"depth": [1, 2], "loss": [0.5, 0.25]})
    >>> path = save(frame, folder.name + "/r.parquet", config={"width": 8}, seeds=[0],
    ...             scale="demo", wall_seconds=1.5)
    >>> load(path).provenance["config"]
    {'width': 8}
    >>> folder.cleanup()
    """
    path = Path(path)
    if path.suffix != ".parquet":
        raise ValueError(f"an archived table is a .parquet file, not {path.name!r}")
    provenance = {
        "config": config,
        "seeds": seeds,
        "scale": scale,
        "device": device or f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": float(wall_seconds),
        "version": __version__,
        "commit": commit(),
    } | ({"method": method} if method else {})
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"frame is a pandas DataFrame, not a {type(frame).__name__}")
    index = frame.index
    if any(name is not None for name in index.names) or not pd.api.types.is_integer_dtype(index):
        names = [name for name in index.names if name is not None] or [str(index.dtype)]
        raise ValueError(
            f"the index of the frame ({', '.join(map(str, names))}) would be lost: make it a "
            "column, frame.reset_index()"
        )
    table = pa.Table.from_pandas(frame, preserve_index=False)
    about = json.dumps(provenance).encode()
    table = table.replace_schema_metadata(
        {**(table.schema.metadata or {}), _KEY: about, _SUM: _checksum(table, about)}
    )
    with replacing(path) as partial:
        pq.write_table(table, partial, write_page_checksum=True)
    return path


def load(name: str | os.PathLike) -> Archived:
    """Read an archived table and check that it is one.

    Parameters
    ----------
    name : path
        A file, or a path relative to the repository (see :func:`find`).

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, or was not written by :func:`save`, or is a folder.
    """
    path = Path(name) if Path(name).is_file() else find(str(name))
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name one of the files in it")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        frame = table.to_pandas()
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise ValueError(
            f"{path} is not a whole Parquet file: fetch or make it again ({error})"
        ) from error
    metadata = table.schema.metadata or {}
    # Pages of numbers have checksums of their own; this is for names and provenance.
    if metadata.get(_SUM, b"") not in (b"", _checksum(table, metadata.get(_KEY, b""))):
        raise ValueError(f"{path} is damaged in its provenance: fetch or make it again")
    try:
        provenance = json.loads(metadata[_KEY])
        missing = [key for key in _REQUIRED if key not in provenance]
    except (KeyError, ValueError, TypeError):
        missing = list(_REQUIRED)
    if missing:
        raise ValueError(
            f"{path} lacks the provenance that archive.save writes ({', '.join(missing)}): "
            "it comes from elsewhere, read it with pandas.read_parquet"
        )
    return Archived(frame, provenance)


def _checksum(table: pa.Table, about: bytes) -> bytes:
    """Of a table's shape, of what its columns are called and are, and of its provenance."""
    columns = [[column.name, str(column.type)] for column in table.schema]
    # What is kept under "pandas" makes a column a type of pandas.
    types = (table.schema.metadata or {}).get(b"pandas", b"")
    parts = json.dumps([table.num_rows, columns]).encode() + types + about
    return hashlib.sha256(parts).hexdigest().encode()


def commit() -> str:
    """The commit of the clone this package runs from, with '+' if files differ from it."""
    git = ["git", "-C", str(_PACKAGE.parent)]
    try:
        # Another repository may hold the folder of an installed package.
        top = subprocess.run(
            [*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True
        )
        known = subprocess.run(
            [*git, "ls-files", "--error-unmatch", "depthutil/archive.py"], capture_output=True
        )
        if known.returncode or Path(top.stdout.strip()).resolve() != _PACKAGE.parent.resolve():
            return "unknown"
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", "depthutil"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
