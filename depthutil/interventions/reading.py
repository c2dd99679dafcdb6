"""Read early, as it is or through an affine map, and maps between the depths of two models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from depthutil import _checks
from depthutil.interventions.passes import (
    Passes,
    Tally,
    batched,
    following,
    opened,
)


@dataclass(frozen=True)
class AffineLens:
    """For each layer an affine map to the last state.

    Attributes
    ----------
    weight : torch.Tensor
        ``(blocks + 1, width, width)``, in float32; the last is the identity.
    bias : torch.Tensor
        ``(blocks + 1, width)``.
    """

    weight: Tensor
    bias: Tensor

    def read(self, states: Tensor, layer: int) -> Tensor:
        """What states ``(…, width)`` of a layer would become."""
        weight, bias = self.weight[layer].to(states), self.bias[layer].to(states)
        return states @ weight.T + bias


def affine_lens(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    ridge: float = 1e-2,
    mask: str | Callable = "inner",
) -> AffineLens:
    """The best affine guess, from each layer's state, of the last state.

    The idea is the tuned lens's (arXiv 2303.08112): layers may speak languages of their own,
    and a map learned for each tells a change of language from computation. Maps are found by
    least squares on the last states, as in arXiv 2303.09435, in one pass and without a learning
    rate, and not by gradient descent on the divergence of predictions.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode.
    batches : iterable
        As in :func:`skip_effects`. Take many more tokens than the model is wide.
    ridge : float
        Added to each eigenvalue of the states' covariance, in units of their mean.
    mask : str or callable
        By default first positions, whose states are enormous in many models, do not count.

    Returns
    -------
    AffineLens

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> affine_lens(model, [torch.randint(8, (5, 10))]).weight.shape
    torch.Size([4, 4, 4])
    """
    live, sums = opened(model), _Sums()
    with live.open():
        for passes, keep in batched(live, batches, mask, False, head=False):
            picked = [_picked(states, keep) for states in passes.states]
            sums.add(picked, picked[-1:])
    maps = [sums.map(layer, 0, ridge) for layer in range(live.parts.depth)]
    weights, biases = (list(part) for part in zip(*maps, strict=True))
    width = weights[0].shape[0]
    weights.append(torch.eye(width, dtype=torch.float64))
    biases.append(torch.zeros(width, dtype=torch.float64))
    return AffineLens(torch.stack(weights).float(), torch.stack(biases).float())


def lens(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    reader: AffineLens | None = None,
    top: int = 5,
    mask: str | Callable = "next",
    per_document: bool = False,
    progress: bool | Callable = False,
) -> pd.DataFrame:
    """What the model would say at each layer, beside what it says (arXiv 2505.13898, section 4).

    Each layer's state goes through the final norm and the head: the logit lens.

    Parameters
    ----------
    model, batches, mask, per_document, progress
        As in :func:`skip_effects`.
    reader : AffineLens, optional
        Send each state through its layer's map first: :func:`affine_lens`.
    top : int
        Of how many most probable tokens to count the overlap.

    Returns
    -------
    pandas.DataFrame
        For each ``layer`` from 0 (before the first block) to the number of blocks, and each
        ``reading``: ``"loss"`` in nats per token, ``"kl"``, KL(early ‖ final) in nats, and
        ``"overlap"``, the share of the ``top`` tokens that both have. ``mean``, ``stderr`` over
        documents, ``max``.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> table = lens(model, [torch.randint(8, (5, 10))], top=2)
    >>> table.query("layer == 3 and reading == 'overlap'")["mean"].tolist()  # is the model itself
    [1.0]
    """
    live, tally = opened(model), Tally()
    top = _checks.count(top, "top")
    names = ("layer", "reading")
    with live.open():
        for passes, keep in batched(live, batches, mask, progress):
            keep = keep & following(passes.inputs).to(keep.device)
            _read(passes, keep, reader, top, tally)
            tally.end(names)
    return tally.per_document(names) if per_document else tally.table(names)


def _read(passes: Passes, keep: Tensor, reader: AffineLens | None, top: int, tally: Tally) -> None:
    live, shape = passes.live, keep.shape
    rows = keep.flatten().nonzero().squeeze(1)
    ids = passes.inputs["input_ids"].to(rows.device).flatten()
    targets = ids[(rows + 1).clamp(max=len(ids) - 1)]
    vocabulary = live.parts.vocabulary
    top = min(top, vocabulary)
    size = max(1, (2**23 if live.device.type == "cpu" else 2**27) // vocabulary)
    count, kinds = live.parts.depth + 1, ("loss", "kl", "overlap")
    full = torch.zeros(count, len(kinds), shape.numel(), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        goal = targets[start : start + size]
        final = live.parts.decoded(passes.last.flatten(0, 1)[some]).log_softmax(-1)
        theirs = final.topk(top, -1).indices
        for layer, states in enumerate(passes.states):
            picked = states.flatten(0, 1)[some.to(states.device)]
            if reader is not None:
                picked = reader.read(picked, layer)
            early = live.parts.logits(picked.to(live.device)).log_softmax(-1)
            loss = -early.gather(1, goal.to(early.device)[:, None]).squeeze(1)
            ours = early.topk(top, -1).indices
            shared = (ours[:, :, None] == theirs[:, None, :]).any(-1).double().mean(-1)
            apart = (early.exp() * (early - final)).sum(-1)
            for kind, values in enumerate((loss, apart, shared)):
                full[layer, kind, some] = values.double().to(full.device)
    for layer in range(count):
        for kind, name in enumerate(kinds):
            tally.add((layer, name), full[layer, kind].view(shape), keep)


def spoken(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    reader: AffineLens | None = None,
    top: int = 1,
) -> pd.DataFrame:
    """The most probable next token at every layer and position of a text, in words.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode.
    tokenizer : callable
    text : str
    reader : AffineLens, optional
    top : int
        How many tokens to name, the most probable first.

    Returns
    -------
    pandas.DataFrame
        ``layer, position, token`` (that stands there), ``rank`` from 0 on, ``says`` and its
        ``probability``.

    Examples
    --------
    >>> from depthutil import models
    >>> model, tokenizer = models.load("ladder-w64-d02-s0")
    >>> said = spoken(model, tokenizer, "import")  # a character is a token
    >>> said.query("layer == 2")["says"].tolist()[-3:]
    ['r', 't', ' ']
    """
    live = opened(model)
    top = _checks.count(top, "top")
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ValueError(f"{text!r} has no token")
    rows = []
    with live.open():
        inputs, _ = live.inputs(torch.as_tensor(list(ids))[None])
        live.measure(inputs, head=True)
        states = Passes(live, inputs).states
        for layer, state in enumerate(states):
            state = state[0] if reader is None else reader.read(state[0], layer)
            best = live.parts.logits(state.to(live.device)).softmax(-1).topk(top)
            for position, number in enumerate(ids):
                for rank in range(top):
                    says = tokenizer.decode([int(best.indices[position, rank])])
                    odds = float(best.values[position, rank])
                    here = tokenizer.decode([int(number)])
                    rows.append((layer, position, here, rank, says, odds))
    names = ["layer", "position", "token", "rank", "says", "probability"]
    return pd.DataFrame(rows, columns=names)


def linear_maps(
    shallow: nn.Module,
    deep: nn.Module,
    batches: Iterable[Any],
    *,
    ridge: float = 1e-3,
    mask: str | Callable = "inner",
    progress: bool | Callable = False,
) -> pd.DataFrame:
    """How well each layer of one model is an affine map of each layer of another.

    If a deeper model does the same computation in smaller steps, the layer at the same part
    of the depth fits best (arXiv 2505.13898, section 6). Maps are found by least squares on
    every other batch and judged on the rest.

    Parameters
    ----------
    shallow, deep : torch.nn.Module
        In evaluation mode, for the same tokens.
    batches : iterable
        At least two; as in :func:`skip_effects`.
    ridge : float
        As in :func:`affine_lens`.
    mask : str or callable

    Returns
    -------
    pandas.DataFrame
        For each ``layer`` of the first model and each ``target``, a layer of the second:
        ``unexplained``, the share of the target's variance that is missed, and ``error``, the
        mean of ‖error‖/‖target‖ over tokens, with its ``stderr`` over documents.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=2)).eval()
    >>> maps = linear_maps(model, model, torch.randint(8, (2, 30, 10)), ridge=1e-9)
    >>> bool(maps.query("layer == target")["error"].max() < 1e-3)
    True
    """
    lives, sums, batches = (opened(shallow), opened(deep)), _Sums(), list(batches)
    if len(batches) < 2:
        raise ValueError("maps are found on every other batch and judged on the rest: give two")
    tally, pairs = Tally(), (lives[0].parts.depth + 1, lives[1].parts.depth + 1)
    missed = torch.zeros(pairs, dtype=torch.float64)
    variance = torch.zeros(pairs[1], dtype=torch.float64)
    with lives[0].open(), lives[1].open():
        for chosen, fitting in ((batches[::2], True), (batches[1::2], False)):
            both = zip(
                batched(lives[0], chosen, mask, progress, head=False),
                batched(lives[1], chosen, mask, False, head=False),
                strict=True,
            )
            for (one, keep), (other, _) in both:
                here = [_picked(states, keep) for states in one.states]
                there = [_picked(states, keep) for states in other.states]
                if fitting:
                    sums.add(here, there)
                    continue
                variance += torch.stack(
                    [(h - m).square().sum() for h, m in zip(there, sums.means(1), strict=True)]
                )
                for layer in range(pairs[0]):
                    weight, bias = sums.maps(layer, ridge)
                    guess = here[layer] @ weight.T + bias
                    gap = torch.stack(there, 1) - guess.view(len(guess), pairs[1], -1)
                    missed[layer] += gap.square().sum((0, 2))
                    part = gap.norm(dim=2) / torch.stack(there, 1).norm(dim=2)
                    full = torch.zeros(pairs[1], *keep.shape, dtype=torch.float64)
                    full[:, keep.cpu()] = part.T
                    for target in range(pairs[1]):
                        tally.add((layer, target), full[target], keep.cpu())
                tally.end(("layer", "target"))
    table = tally.table(("layer", "target")).rename(columns={"mean": "error"})
    table["unexplained"] = (missed / variance).flatten().numpy()
    return table[["layer", "target", "unexplained", "error", "stderr"]]


def _picked(states: Tensor, keep: Tensor) -> Tensor:
    return states[keep.to(states.device)].double().cpu()


class _Sums:
    """Sums for least squares from each of some states to each of some others."""

    def __init__(self) -> None:
        self.count = 0
        self.parts: list[Tensor] = []
        self.widths: list[int] = []
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, here: list[Tensor], there: list[Tensor]) -> None:
        x, y = torch.stack(here), torch.cat(there, 1)
        parts = [x.sum(1), y.sum(0), x.transpose(1, 2) @ x, x.transpose(1, 2) @ y]
        before = (
            parts if not self.count else [a + b for a, b in zip(self.parts, parts, strict=True)]
        )
        self.parts, self.count = before, self.count + x.shape[1]
        self.widths = [part.shape[1] for part in there]
        self.found = {}

    def means(self, which: int) -> list[Tensor]:
        """Of the states (0) or of the others (1)."""
        if which == 0:
            return list(self.parts[0] / self.count)
        return list((self.parts[1] / self.count).split(self.widths))

    def maps(self, layer: int, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight ``(all others, width)`` and bias of the map from one of the states."""
        if layer not in self.found:
            sx, sy, xx, xy = (
                self.parts[0][layer],
                self.parts[1],
                *(p[layer] for p in self.parts[2:]),
            )
            mx, my = sx / self.count, sy / self.count
            cov = xx / self.count - mx[:, None] * mx
            cross = xy / self.count - mx[:, None] * my
            cov += ridge * cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype)
            weight = torch.linalg.solve(cov, cross).T
            self.found[layer] = weight, my - weight @ mx
        return self.found[layer]

    def map(self, layer: int, target: int, ridge: float) -> tuple[Tensor, Tensor]:
        """The same to one of the others."""
        weight, bias = self.maps(layer, ridge)
        return weight.split(self.widths)[target], bias.split(self.widths)[target]
