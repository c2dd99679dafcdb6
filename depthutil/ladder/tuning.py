"""Train a model of the ladder on for a little, whatever has been done to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from depthutil import _checks, _runs
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
    steps = _checks.count(steps, "steps", low=0)
    rate = _checks.number(rate, "rate", low=0, above=True)
    text = corpus() if text is None else text
    windows = Windows(text.training, sequence, batch, seed)
    rows, owners = pieces(text.held_out, sequence)
    chosen = np.linspace(0, len(rows) - 1, min(test_sequences, len(rows))).astype(int)
    rows, owners = rows[chosen], owners[chosen]
    weights = [w for w in model.parameters() if w.requires_grad]
    adam = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    tests, marks = [], {0, steps, *test_at}
    report = _runs.Progress(progress, steps)
    model.train()
    try:
        for step in range(steps + 1):
            if step in marks:
                tests.append(_test(model, rows, owners).assign(step=step))
            if step == steps:
                break
            loss = _loss(model, torch.from_numpy(windows(step)), "mean")
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is no number at step {step}: lower the rate")
            adam.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            adam.step()
            report(step + 1, f"loss {loss.item():.3f}")
    finally:
        adam.zero_grad(set_to_none=True)
        model.eval()
    return pd.concat(tests, ignore_index=True)[["step", "document", "loss", "tokens"]]


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
