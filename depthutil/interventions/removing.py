"""The loss against the number of blocks left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from depthutil import _checks, _runs, moments, trajectory
from depthutil.interventions.edits import scale
from depthutil.interventions.passes import Passes, batched, following, opened, said
from depthutil.interventions.places import block_numbers
from depthutil.stream import Stream

ORDERS = ("influence", "end", "random")


def influence(model: nn.Module, batches: Iterable[Any], *, mask: str | Callable = "next") -> Any:
    """How little a block turns the stream: ``1 − E cos(h_b, h_{b+1})`` (arXiv 2403.03853).

    Parameters
    ----------
    model, batches, mask
        As in :func:`removal`.

    Returns
    -------
    pandas.Series
        For each block, from 0 on.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> influence(model, [torch.randint(8, (5, 10))]).index.tolist()
    [0, 1, 2]
    """
    opened(model)
    found = trajectory.record(model, list(batches), mask=mask).block_influence()
    return pd.Series(found["mean"].to_numpy(), name="influence").rename_axis("block")


def removal(
    model: nn.Module,
    batches: Iterable[Any],
    order: str | Sequence[int] = "influence",
    *,
    most: int | None = None,
    among: Sequence[int] | None = None,
    draws: int = 8,
    rescaled: bool = False,
    seed: int = 0,
    mask: str | Callable = "next",
    progress: bool | Callable = False,
) -> pd.DataFrame:
    """Leave out one block after the other, and watch the loss.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode.
    batches : iterable
        As in :func:`skip_effects`.
    order : {"influence", "end", "random"} or sequence of int
        Which to leave out first: those that turn the stream least (arXiv 2403.03853), measured
        on these batches before anything is left out; the last ones; ``draws`` random orders,
        each a row of its own; or an order of your own.
    most : int, optional
        How many to leave out in the end; all of ``among`` but one by default.
    among : sequence of int, optional
        Blocks that may be left out; all by default.
    draws : int
        Random orders, seeded by ``seed``.
    rescaled : bool
        Multiply what the rest of ``among`` write by ``n / (n − k)`` if k of n are left out: what
        makes up for it if each is one estimate of the same change, and their sum an average.
    mask, progress
        As in :func:`skip_effects`.

    Returns
    -------
    pandas.DataFrame
        ``order, draw, removed`` (how many), ``block`` (the last one of them), and ``mean,
        stderr`` of the loss gained, in nats per token, errors over documents. ``attrs``:
        ``blocks``, and ``loss`` and ``loss_stderr`` of the whole model.

    Raises
    ------
    ValueError
        If there is no such block or order, or too many are to be left out.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> table = removal(model, [torch.randint(8, (5, 10))], "end")
    >>> table[["removed", "block"]].to_numpy().tolist()
    [[1, 2], [2, 1]]
    """
    live = opened(model)
    batches = list(batches)
    some = block_numbers(range(live.parts.depth) if among is None else among, live, "among")
    highest = len(some) - 1 if most is None else _checks.count(most, "most")
    if highest > len(some) - rescaled or highest < 1:
        raise ValueError(f"of {len(some)} blocks {highest} cannot be left out")
    name = order if isinstance(order, str) else "given"
    orders = _orders(model, live, batches, order, some, draws, seed, mask)
    if highest > len(orders[0]):
        raise ValueError(f"the order given has {len(orders[0])} blocks, and most is {highest}")
    sums: dict[tuple[int, int], list[np.ndarray]] = {}
    whole: list[tuple[np.ndarray, np.ndarray]] = []
    steps = [(draw, k) for draw in range(len(orders)) for k in range(1, highest + 1)]
    report = _runs.Progress(progress, len(batches) * len(steps), of="pass")
    with live.open():
        for number, (passes, keep) in enumerate(batched(live, batches, mask, False)):
            rows = (keep & following(passes.inputs).to(keep.device)).flatten()
            rows = rows.nonzero().squeeze(1)
            clean, tokens = _losses(passes, passes.last, rows)
            whole.append((clean, tokens))
            for at, (draw, k) in enumerate(steps):
                out = orders[draw][:k]
                factor = len(some) / (len(some) - k) if rescaled else 1.0
                last = _without(passes, out, [b for b in some if b not in out], factor)
                gained, _ = _losses(passes, last, rows)
                sums.setdefault((draw, k), []).append(gained - clean)
                report(number * len(steps) + at + 1)
    counts = np.concatenate([count for _, count in whole])
    found = []
    for (draw, k), each in sums.items():
        mean, stderr = moments.of_totals(np.concatenate(each), counts)
        found.append((name, draw, k, orders[draw][k - 1], mean, stderr))
    table = pd.DataFrame(found, columns=["order", "draw", "removed", "block", "mean", "stderr"])
    loss, error = moments.of_totals(np.concatenate([clean for clean, _ in whole]), counts)
    table.attrs = {"blocks": live.parts.depth, "loss": loss, "loss_stderr": error}
    return table


def _orders(
    model: nn.Module,
    live: Stream,
    batches: list,
    order: Any,
    some: list[int],
    draws: int,
    seed: int,
    mask: Any,
) -> list[list[int]]:
    if not isinstance(order, str):
        given = block_numbers(order, live, "order", ordered=True)
        if not set(given) <= set(some):
            raise ValueError(f"order names {sorted(set(given) - set(some))}, not among {some}")
        return [given]
    _checks.word(order, ORDERS, "order", other="a list of blocks")
    if order == "end":
        return [some[::-1]]
    if order == "influence":
        return [influence(model, batches, mask=mask)[some].sort_values().index.tolist()]
    rng = np.random.default_rng(_checks.count(seed, "seed", low=0))
    return [rng.permutation(some).tolist() for _ in range(_checks.count(draws, "draws"))]


def _without(passes: Passes, out: Sequence[int], rest: Sequence[int], factor: float) -> Tensor:
    """The last state without some blocks, and what the rest write times a factor."""
    if factor == 1:
        first = min(out)
        later = [block for block in out if block > first]
        return passes.resume(first + 1, passes.states[first], without=later)

    first = min(*out, *rest)
    with scale(passes.live.model, rest, factor):
        return passes.resume(first, passes.states[first], without=out)


def _losses(passes: Passes, last: Tensor, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of each document, the sum of its losses and how many there are."""
    documents, length = passes.shape
    ids = passes.inputs["input_ids"].to(rows.device).flatten()
    targets = ids[(rows + 1).clamp(max=len(ids) - 1)]
    each = torch.cat([loss for _, _, loss in said(passes.live, last, rows, targets)]).double()
    number = (rows // length).to(each.device)
    zeros = torch.zeros(documents, dtype=torch.float64, device=each.device)
    totals = zeros.index_add(0, number, each)
    counts = zeros.index_add(0, number, torch.ones_like(each))
    return totals.cpu().numpy(), counts.cpu().numpy()
