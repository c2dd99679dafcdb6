"""What becomes of later blocks, and of the output, when a block writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from depthutil import _checks, moments
from depthutil.interventions.passes import Passes, Tally, batched, following, opened, said
from depthutil.stream import Stream, hidden, tensor

_NAMES = ("skipped", "effect", "block")


def skip_effects(
    model: nn.Module,
    batches: Iterable[Any],
    future: bool | int = False,
    *,
    first: bool | None = None,
    mask: str | Callable = "next",
    per_document: bool = False,
    progress: bool | Callable = False,
) -> pd.DataFrame:
    """Skip each block in turn, and measure what changes after it (arXiv 2505.13898, section 3).

    Costs half a forward pass for each block, and the head.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode.
    batches : iterable
        Token ids ``(documents, positions)`` or mappings: ``models.batches``.
    future : bool or int
        Skip at early positions only and measure at later ones: True takes the middle of each
        document as the first position measured, a number that position.
    first : bool, optional
        Whether to skip at the first position, too, which in many models is a sink of attention;
        by default yes, and no with ``future``, as in the paper's code.
    mask : str or callable
        Which positions count: :func:`depthutil.stream.inputs_of`.
    per_document : bool
        A row for each document instead of errors.
    progress : bool or callable

    Returns
    -------
    pandas.DataFrame
        A row for each block ``skipped`` and each ``effect``:

        - ``"update"``: relative change of what a later ``block`` writes,
          ``‖Δ − Δ'‖ / ‖Δ‖``;
        - ``"output"``: change of the probabilities of all next tokens, ``‖p − p'‖``;
        - ``"loss"``: how much is lost, in nats per token.

        ``mean`` over positions with ``stderr`` over documents, and ``max``, the largest of a
        document's positions, a mean over documents. Of output and loss, ``block`` is the
        number of blocks. ``attrs``: ``blocks``, ``loss`` and ``loss_stderr`` of the model itself.

    Raises
    ------
    ValueError
        If the model is in training mode, cannot be run from the middle, or a number is
        impossible.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> effects = skip_effects(model, [torch.randint(8, (5, 10))])
    >>> effects.query("effect == 'update'")[["skipped", "block"]].to_numpy().tolist()
    [[0, 1], [0, 2], [1, 2]]
    """
    live = opened(model)
    if not isinstance(future, bool):
        future = _checks.count(future, "future")
    first = not future if first is None else _checks.flag(first, "first")

    def begin(passes: Passes, block: int, inside: Tensor) -> tuple[Tensor, Any]:
        """The states without a block, and what to change in the pass from there."""
        states, after = passes.states[block], passes.states[block + 1]
        return torch.where(inside.to(after.device), states.to(after.device), after), None

    return _effects(live, batches, future, first, mask, per_document, progress, begin)


def local_effects(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mask: str | Callable = "next",
    per_document: bool = False,
    progress: bool | Callable = False,
) -> pd.DataFrame:
    """How much each block needs what one earlier block wrote, directly.

    Each later block reads its own clean input less the update of the block left out, so that
    nothing propagates: of what :func:`skip_effects` measures, the part that does not pass
    through blocks between (arXiv 2505.13898, section 3.2). The output reads ``h_ℓ − Δ``.

    Parameters
    ----------
    model, batches, mask, per_document, progress
        As in :func:`skip_effects`.

    Returns
    -------
    pandas.DataFrame
        As :func:`skip_effects`.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> batch = torch.randint(8, (5, 10))
    >>> skipped, local = skip_effects(model, [batch]), local_effects(model, [batch])
    >>> next_block = "block == skipped + 1"  # nothing between
    >>> gap = skipped.query(next_block)["mean"] - local.query(next_block)["mean"]
    >>> bool(gap.abs().max() < 1e-5)
    True
    """
    live = opened(model)

    def begin(passes: Passes, block: int, inside: Tensor) -> tuple[Tensor, Any]:
        update = passes.update(block)

        def without(number: int) -> Callable[[Tensor], Tensor]:
            def read(states: Tensor) -> Tensor:
                return (passes.states[number] - update.to(states.device)).to(states)

            return read

        later = range(block + 2, passes.live.parts.depth)
        before = [(passes.live.parts.blocks[number], without(number)) for number in later]
        # The norm reads the clean last state, less the update.
        return passes.states[block], [*before, (passes.live.parts.norm, without(-1))]

    return _effects(live, batches, False, True, mask, per_document, progress, begin)


def _effects(
    live: Stream,
    batches: Iterable[Any],
    future: bool | int,
    first: bool,
    mask: str | Callable,
    per_document: bool,
    progress: bool | Callable,
    begin: Callable[[Passes, int, Tensor], tuple[Tensor, Any]],
) -> pd.DataFrame:
    tally, whole, depth = Tally(), Tally(), live.parts.depth
    with live.open():
        for passes, keep in batched(live, batches, mask, progress):
            inside, measured = _boundary(passes, keep, future, first)
            rows = (measured & following(passes.inputs).to(measured.device)).flatten()
            rows = rows.nonzero().squeeze(1)
            ids = passes.inputs["input_ids"].to(rows.device).flatten()
            targets = ids[(rows + 1).clamp(max=len(ids) - 1)]
            clean = _Clean(live, passes.last, rows, targets)
            _spread(whole, ("itself",), clean.loss, rows, measured.shape)
            for block in range(depth):
                states, before = begin(passes, block, inside)
                last = passes.resume(
                    block + 1,
                    states,
                    before=before or (),
                    rewriting=_measuring(passes, block, measured, tally),
                )
                if before and block + 1 == depth:  # no block was run
                    last = passes.resume(depth, passes.states[-1] - passes.update(block))
                for name, values in zip(("output", "loss"), clean.beside(last), strict=True):
                    _spread(tally, (block, name, depth), values, rows, measured.shape)
            tally.end(_NAMES)
            whole.end(("model",))
    table = tally.per_document(_NAMES) if per_document else tally.table(_NAMES)
    loss = whole.table(("model",)).iloc[0]
    table.attrs = {"blocks": depth, "loss": loss["mean"], "loss_stderr": loss["stderr"]}
    return table


def _boundary(
    passes: Passes, keep: Tensor, future: bool | int, first: bool
) -> tuple[Tensor, Tensor]:
    """Where to skip, ``(documents, positions, 1)``, and where to measure."""
    documents, length = passes.shape
    places = torch.arange(length, device=keep.device).expand(documents, length)
    real = passes.inputs.get("attention_mask", torch.ones(documents, length))
    real = real.to(keep.device).bool()
    number = real.long().cumsum(1) - 1  # of the token in its document
    inside = torch.ones_like(keep) if first else (number > 0) | ~real
    if future is False:
        return inside[..., None], keep
    start = real.sum(1, keepdim=True) // 2 if future is True else torch.full_like(places, future)
    measured = keep & (number >= start)
    if not bool(measured.any()):
        raise ValueError(f"no position counts from position {future} on: texts are shorter")
    return (inside & (number < start))[..., None], measured


def _measuring(passes: Passes, skipped: int, measured: Tensor, tally: Tally) -> list[tuple]:
    """Hooks that compare what later blocks write with what they wrote before."""

    def compare(number: int) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple, kwargs: Mapping, output: Any) -> None:
            returned = tensor(output)
            update = returned - hidden(args, kwargs).to(returned.device)
            clean = passes.update(number).to(update.device)
            change = (clean - update).norm(dim=-1) / clean.norm(dim=-1).clamp(min=1e-30)
            tally.add((skipped, "update", number), change, measured)

        return look

    later = range(skipped + 1, passes.live.parts.depth)
    return [(passes.live.parts.blocks[number], compare(number)) for number in later]


_ROOM = {"cpu": 2**26, "cuda": 2**30}  # probabilities that are kept


class _Clean:
    """What the model says at some positions, to hold something else against.

    Probabilities are kept if there is room for them, and made again for each comparison if not.
    """

    def __init__(self, live: Stream, last: Tensor, rows: Tensor, targets: Tensor):
        self.live, self.last, self.rows, self.targets = live, last, rows, targets
        numbers = len(rows) * live.parts.vocabulary
        self.kept: list | None = None
        if numbers <= _ROOM.get(live.device.type, 2**26):
            self.kept = list(self._said(last))
        self.loss = torch.cat([loss for _, loss in self.kept or self._said(last)])

    def _said(self, last: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for _, logs, loss in said(self.live, last, self.rows, self.targets):
            yield logs.exp_(), loss

    def beside(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """At each position, ``‖p − p'‖`` and the loss gained."""
        distances, gains = [], []
        clean = self._said(self.last) if self.kept is None else self.kept
        for (before, loss), (after, other) in zip(clean, self._said(last), strict=True):
            distances.append((after - before).norm(dim=-1))
            gains.append(other - loss)
        return torch.cat(distances), torch.cat(gains)


def _spread(tally: Tally, key: tuple, values: Tensor, rows: Tensor, shape: torch.Size) -> None:
    """One value for each of some rows of the flattened batch."""
    keep = torch.zeros(shape.numel(), dtype=torch.bool, device=values.device)
    keep[rows.to(values.device)] = True
    full = torch.zeros(shape.numel(), dtype=torch.float64, device=values.device)
    full[rows.to(values.device)] = values.double()
    tally.add(key, full.view(shape), keep.view(shape))


class Score(NamedTuple):
    """A depth score and its standard error over documents."""

    score: float
    stderr: float


def depth_score(effects: pd.DataFrame, of: str = "output", use: str = "mean") -> Score:
    """At which part of its depth a model does what has an effect (arXiv 2505.13898, section 5).

    ``Σ s e_s / Σ e_s`` over the blocks s, divided by the last block's number: effects that are
    the same for all blocks score one half in a model of any depth, where the paper's own score,
    which is not divided, grows with the depth.

    Parameters
    ----------
    effects : pandas.DataFrame
        From :func:`skip_effects` or :func:`local_effects`, best with ``per_document=True``, without
        which the error is not a number.
    of : {"output", "loss", "update"}
        ``"update"`` is a block's effect on all later ones, in the mean; the last block, after
        which there is none, counts 0.
    use : {"mean", "max"}
        Of a document's positions.

    Returns
    -------
    Score
        ``score, stderr``.

    Raises
    ------
    ValueError
        If the table has other columns, fewer than two blocks, or no effect.

    Examples
    --------
    >>> even = pd.DataFrame({"skipped": range(9), "effect": "output", "block": 9, "mean": 0.2})
    >>> round(depth_score(even).score, 12)
    0.5
    """
    _checks.word(of, ("output", "loss", "update"), "of")
    _checks.word(use, ("mean", "max"), "use")
    missing = {*_NAMES, use} - set(effects.columns)
    if missing:
        raise ValueError(f"effects need columns {sorted(missing)}: skip_effects makes them")
    some = effects[effects["effect"] == of]
    units = some["document"] if "document" in some else 0
    each = some.assign(document=units).groupby(["document", "skipped"])[use].mean().unstack(0)
    depth = effects["skipped"].max() + 1
    each = each.reindex(range(depth), fill_value=0.0).clip(lower=0)
    if depth < 2 or not each.to_numpy().any():
        raise ValueError("a depth score needs two blocks, and an effect")
    weight = each.index.to_numpy()[:, None] / (depth - 1)
    return Score(*moments.of_totals((weight * each).sum(), each.sum()))
