"""Train a model of the ladder on, for a little or on another task, whatever was done to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from depthutil import _checks, _runs, primitives
from depthutil.corpus import Corpus, Windows, corpus, pieces


def fine_tune(
    model: Any,
    steps: int,
    *,
    rate: float = 3e-4,
    sequence: int = 128,
    batch: int = 16,
    seed: int = 100,
    test_at: Sequence[int] = (),
    test_sequences: int = 256,
    text: Corpus | None = None,
    progress: Any = False,
) -> pd.DataFrame:
    """Go on training on the ladder's own text, at a low and constant rate.

    Edits of :mod:`depthutil.interventions` that hold meanwhile, hold in training and tests: with
    a block skipped, the others learn to do without.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model of the ladder, whose tokens are bytes; it is changed, and left in evaluation
        mode.
    steps : int
        Steps of AdamW; 0 tests only.
    rate : float
        A tenth of the ladder's peak by default.
    sequence, batch : int
        As in :class:`LadderConfig`.
    seed : int
        Of the order of the text; another than in training, by default.
    test_at : sequence of int
        After how many steps to test, besides the beginning and the end.
    test_sequences : int
        Held-out sequences in each test, the same every time, from all documents.
    text : Corpus, optional
        :func:`depthutil.corpus.corpus` by default.
    progress : bool or callable

    Returns
    -------
    pandas.DataFrame
        ``step, document, loss, tokens``: mean loss of each held-out document in each test.

    Raises
    ------
    ValueError
        If a number is impossible.
    FloatingPointError
        If the loss is no number any more.

    Examples
    --------
    >>> from depthutil.corpus import Document
    >>> from depthutil.ladder import LadderConfig, train
    >>> config = LadderConfig(width=16, sequence=32, batch=4, steps=2, warmup=1,
    ...                       test_sequences=4)
    >>> text = Corpus("an example", (Document("a", "to be or not to be, " * 9),),
    ...               (Document("b", "that is the question"),))
    >>> model = train(config, depth=1, seed=0, text=text).model
    >>> tests = fine_tune(model, 2, sequence=32, batch=4, text=text)
    >>> tests["step"].tolist(), tests["tokens"].tolist()
    ([0, 2], [20, 20])
    """
    text = corpus() if text is None else text
    windows = Windows(text.training, sequence, batch, seed)
    rows, owners = pieces(text.held_out, sequence)
    chosen = np.linspace(0, len(rows) - 1, min(test_sequences, len(rows))).astype(int)
    rows, owners = rows[chosen], owners[chosen]
    tests = []
    marks = {0, steps, *test_at}
    for step in _steps(model, steps, rate, lambda step: _text_loss(model, windows(step)), progress):
        if step in marks:
            tests.append(_test(model, rows, owners).assign(step=step))
    return pd.concat(tests, ignore_index=True)[["step", "document", "loss", "tokens"]]


def learn(
    model: Any,
    tasks: str | Sequence[str],
    steps: int,
    *,
    rate: float = 1e-3,
    batch: int = 32,
    seed: int = 0,
    test_at: Sequence[int] = (),
    questions: int = 500,
    progress: Any = False,
) -> pd.DataFrame:
    """Train a model of the ladder on :mod:`depthutil.primitives`, and ask it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Whose tokens are bytes; it is changed, and left in evaluation mode.
    tasks : str or sequence of str
        Learned at the same time.
    steps, rate, batch
        Steps of AdamW, its constant rate, questions in each step.
    seed : int
        Of the questions: the same ones for every model.
    test_at : sequence of int
        After how many steps to ask, besides the beginning and the end.
    questions : int
        For each task in each test, of another seed than those of training.
    progress : bool or callable

    Returns
    -------
    pandas.DataFrame
        That of :func:`depthutil.primitives.accuracy` with ``step``.

    Raises
    ------
    ValueError
        If there is no such task, or a number is impossible.
    FloatingPointError
        If the loss is no number any more.

    Examples
    --------
    >>> from depthutil.ladder import LadderConfig
    >>> from depthutil.ladder.model import new_model
    >>> asked = learn(new_model(LadderConfig(width=16), 1, 0), "copying", 2, questions=20)
    >>> asked[["step", "task"]].values.tolist()
    [[0, 'copying'], [2, 'copying']]
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    batch = _checks.count(batch, "batch")
    primitives.questions(names, 1)

    def loss(step: int) -> torch.Tensor:
        ids, targets = primitives.questions(names, batch, [seed, step])
        logits = model(ids.to(model.device), use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets.to(model.device))

    tests = []
    for step in _steps(model, steps, rate, loss, progress):
        if step in {0, steps, *test_at}:
            asked = primitives.accuracy(model, questions, seed=10_000 + seed, tasks=names)
            tests.append(asked.assign(step=step))
    return pd.concat(tests, ignore_index=True)


def _steps(
    model: Any, steps: int, rate: float, loss_at: Callable[[int], torch.Tensor], progress: Any
) -> Iterator[int]:
    """Train, and stop for a look before each step and after the last."""
    steps = _checks.count(steps, "steps", low=0)
    rate = _checks.number(rate, "rate", low=0, above=True)
    weights = [w for w in model.parameters() if w.requires_grad]
    adam = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    report = _runs.Progress(progress, steps)
    try:
        for step in range(steps):
            model.eval()
            yield step
            model.train()
            loss = loss_at(step)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is no number at step {step}: lower the rate")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            adam.step()
            adam.zero_grad(set_to_none=True)
            report(step + 1, f"loss {loss.item():.3f}")
        model.eval()
        yield steps
    finally:
        adam.zero_grad(set_to_none=True)
        model.eval()


def _text_loss(model: Any, rows: np.ndarray) -> torch.Tensor:
    return _loss(model, torch.from_numpy(rows), "mean")


def _loss(model: Any, rows: torch.Tensor, reduction: str) -> torch.Tensor:
    rows = rows.to(model.device)
    # What lies behind a text's end is −100, and not scored.
    logits = model(rows[:, :-1].clamp(min=0), use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), rows[:, 1:], reduction=reduction
    )


@torch.no_grad()
def _test(model: Any, rows: np.ndarray, owners: np.ndarray) -> pd.DataFrame:
    sums = [
        _loss(model, torch.from_numpy(rows[start : start + 32]), "none").double().sum(1).cpu()
        for start in range(0, len(rows), 32)
    ]
    table = pd.DataFrame({"document": owners, "loss": torch.cat(sums).numpy()})
    table["tokens"] = (rows[:, 1:] >= 0).sum(1)
    table = table.groupby("document", as_index=False).sum()
    return table.assign(loss=table["loss"] / table["tokens"])
