"""How a trained student uses its depth: from outside, from inside, and by intervention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from depthutil import _checks, _runs
from depthutil.signatures import diagnose, signature
from depthutil.toy.model import Network, ToyConfig, rms, teacher_weights


class Probed(NamedTuple):
    """What :func:`probe` finds.

    Attributes
    ----------
    numbers : dict
        ``loss``, and ``relative_loss`` in units of what a student that does nothing has;
        ``off_path``, mean squared distance of its normed states from the teacher's at the same
        fractions of depth, in the same unit, and ``straight_off_path``, that of a straight line
        to its end; the ``signature`` (``agreement``, ``memory``, ``evenness``,
        ``finish_spread``, errors, ``neighbour``, ``length``) and the ``regime`` that it is
        diagnosed as, with the ``reason``; ``cancellation``, squared length of the sum of the
        layers' errors over the sum of their squares; ``without_one``, ``half`` and
        ``shuffled``, the relative loss without a layer, with half of them, and with all in
        random order, the remaining ones scaled up. From ``neighbour`` on only where the
        student has two layers or more and moves.
    profiles : pandas.DataFrame
        ``statistic, index, value``: ``off_path`` and ``straight_off_path`` by state,
        ``update`` (length) by layer, ``lag`` (cosine of updates) by lag.
    """

    numbers: dict[str, Any]
    profiles: pd.DataFrame


@torch.no_grad()
def probe(
    config: ToyConfig,
    weights: Sequence[Tensor],
    *,
    teacher: int,
    rho: float,
    inputs: int = 1000,
) -> Probed:
    """Measure one student, whose loss is the mean squared difference of normed last states.

    Parameters
    ----------
    config : ToyConfig
        Of the teacher, and of the order of the student's layers.
    weights : sequence of torch.Tensor
        The student's ``w1, b, w2``, as :class:`Network` takes them.
    teacher : int
    rho : float
        Whose student it is.
    inputs : int
        How many inputs to draw, always the same.

    Returns
    -------
    Probed

    Raises
    ------
    ValueError
        If weights are not of a whole number of layers.

    Examples
    --------
    >>> config = ToyConfig(width=4, vocabulary=8, teacher_depth=8, depths=(4,), rhos=(1.0,),
    ...                    teachers=(0,), batch=16, steps=20, loss="mse", head="none")
    >>> from depthutil.toy import train
    >>> (*weights, _), = train(config, students=True).weights.values()
    >>> found = probe(config, weights, teacher=0, rho=1.0, inputs=50)
    >>> bool(0 < found.numbers["relative_loss"] < 1.1)
    True
    >>> found.profiles.groupby("statistic").size().to_dict()
    {'lag': 3, 'off_path': 5, 'straight_off_path': 5, 'update': 4}
    """
    count = _checks.count(inputs, "inputs")
    depth, rest = divmod(len(weights[0]), config.order)
    if rest:
        raise ValueError(
            f"{len(weights[0])} MLPs make no whole layers of {config.order}: give the config of "
            "the run that these weights come from"
        )
    x = torch.randn((count, config.width), generator=_runs.generator("measure"))
    w1, b, w2, _ = teacher_weights(config, teacher, rho)
    deep = Network(w1, b, w2)
    truth = torch.stack(deep.states(x)).double()
    goal = rms(truth[-1])

    def states(w: Sequence[Tensor]) -> Tensor:
        w1, b, w2 = w
        return torch.stack(Network(w1, b, w2, order=config.order).states(x)).double()

    def error(last: Tensor) -> float:
        return float((rms(last) - goal).square().mean())

    h = states(weights)
    nothing, loss = error(h[0]), error(h[-1])
    numbers: dict[str, Any] = {"loss": loss, "relative_loss": loss / nothing}
    at = np.round(np.arange(depth + 1) * config.teacher_depth / depth).astype(int)
    off = (rms(h) - rms(truth[at])).square().mean((1, 2)) / nothing
    line = h[0] + (h[-1] - h[0]) * torch.linspace(0, 1, depth + 1)[:, None, None]
    straight = (rms(line) - rms(truth[at])).square().mean((1, 2)) / nothing
    profiles: dict[str, Any] = {"off_path": off.tolist(), "straight_off_path": straight.tolist()}
    numbers["off_path"] = float(off[1:-1].mean())
    numbers["straight_off_path"] = float(straight[1:-1].mean())
    if depth >= 2 and float((h[1:] - h[:-1]).abs().sum()) > 0:
        s = signature(h)
        found = diagnose(s)
        names = ("agreement", "memory", "evenness", "finish_spread")
        numbers |= {name: getattr(s, name) for name in names}
        numbers |= {name: getattr(s, name) for name in ("agreement_stderr", "memory_stderr")}
        numbers |= {"neighbour": s.lag_cosine[0], "length": s.update_norms.sum()}
        numbers |= {"regime": found.regime, "reason": found.reasons[-1]}
        profiles |= {"update": s.update_norms, "lag": s.lag_cosine}
        # Errors of layers, if each were to write an equal share of the change.
        change = goal * (h[-1].norm(dim=-1) / goal.norm(dim=-1))[:, None] - h[0]
        errors = (h[1:] - h[:-1]) - change / depth
        numbers["cancellation"] = float(errors.sum(0).square().sum() / errors.square().sum())
        numbers |= _without_layers(
            weights, depth, config.order, lambda w: error(states(w)[-1]) / nothing
        )
    table = [
        {"statistic": name, "index": i, "value": float(v)}
        for name, values in profiles.items()
        for i, v in enumerate(values, start=0 if "path" in name else 1)
    ]
    return Probed(numbers, pd.DataFrame(table))


def _without_layers(
    weights: Sequence[Tensor], depth: int, order: int, error: Callable[[list[Tensor]], float]
) -> dict[str, float]:
    """Errors without a layer, with half of the layers, and with all in random order."""

    def only(layers: Iterable[int], share: float) -> float:
        mlps = [order * layer + i for layer in layers for i in range(order)]
        w1, b, w2 = (w[mlps].clone() for w in weights)
        w2[order - 1 :: order] *= share  # what a layer writes to the stream
        return error([w1, b, w2])

    rng = np.random.default_rng(0)
    halves = [sorted(rng.choice(depth, depth // 2, replace=False)) for _ in range(8)]
    orders = [rng.permutation(depth) for _ in range(8)]
    dropped = [only(np.delete(np.arange(depth), i), depth / (depth - 1)) for i in range(depth)]
    return {
        "without_one": float(np.mean(dropped)),
        "half": float(np.mean([only(half, depth / len(half)) for half in halves])),
        "shuffled": float(np.mean([only(mixed, 1.0) for mixed in orders])),
    }
