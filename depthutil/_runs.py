"""What long runs share: random streams, threads, telling how far they are, and claims.

Nothing here knows what is run.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

#: Seconds between two lines of progress.
EVERY = 10


def generator(*key: int | str) -> torch.Generator:
    """A stream of random numbers of its own for each key, whatever else a run draws.

    Examples
    --------
    >>> one, two, again = (torch.rand(1, generator=generator("test", n)) for n in (0, 1, 0))
    >>> (one == again).item(), (one == two).item()
    (True, False)
    """
    words = [int.from_bytes(str(part).encode(), "little") for part in key]
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


@contextmanager
def cpu(threads: int | None) -> Iterator[None]:
    """Set the number of threads; count numbers below 1e-38 as zero, which costs 100 times less."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


@contextmanager
def claimed(path: str | os.PathLike, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process may work on a file; a claim ends with the block or the process.

    Parameters
    ----------
    path : path
        What is worked on. The claim is a file beside it, with the ending ``.lock``.
    wait : bool
        Wait for whoever has it, and then yield True.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with claimed(f"{folder}/a.pt") as mine, claimed(f"{folder}/a.pt") as again:
    ...         print(mine, again)
    True False
    """
    path = Path(path).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


class Progress:
    """Says how far a run is, about every ten seconds and at its end.

    Parameters
    ----------
    how : bool or callable
        True prints to standard error. A function is called at every step instead, with what
        is done, the total, and the seconds left; the last two are None where unknown.
    total : int, optional
        Steps in all.
    done : int
        Steps that an earlier run has done.
    of : str
        What is counted, and anything that comes before it.
    first : bool
        Whether the first step takes as long as the rest, and not longer because it compiles.

    Attributes
    ----------
    seconds : float
        Since the run began.
    """

    def __init__(
        self, how: Any, total: int | None, done: int = 0, *, of: str = "step", first: bool = True
    ):
        self.how, self.total, self.of, self.first = how, total, of, first
        self.begin = self.told = self.from_here = time.perf_counter()
        self.start = self.counted_from = done
        self.seconds = 0.0

    def __call__(self, done: int, detail: str = "") -> None:
        """Tell that so much is done; ``detail`` is what a line says beside."""
        now = time.perf_counter()
        self.seconds = now - self.begin
        warm = self.first or done > self.start + 1
        if not self.first and done == self.start + 1:  # says nothing of the steps to come
            each, self.from_here, self.counted_from = self.seconds, now, done
        else:
            each = (now - self.from_here) / max(done - self.counted_from, 1)
        left = None if self.total is None else each * (self.total - done)
        if callable(self.how):
            self.how(done, self.total, left)
        elif self.how and (done == self.total or (now - self.told > EVERY and warm)):
            self.told = now
            line = f"{self.of} {done:,}" + ("" if self.total is None else f" of {self.total:,}")
            line += f", {detail}" if detail else ""
            line += "" if left is None else f", {left / 60:.1f} min left"
            print(line, file=sys.stderr, flush=True)
