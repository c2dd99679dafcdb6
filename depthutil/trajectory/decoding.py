"""The loss that a model would have if it stopped at each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from depthutil import _checks, _runs
from depthutil.moments import Moments, tally
from depthutil.stream import Anatomy, Stream, device_of, tensor, watched, with_hidden
from depthutil.trajectory.passing import not_finite, pick
from depthutil.trajectory.result import frame


def decode_early(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    documents: int | None = None,
    through_last: bool = True,
    mask: str | Callable[[Tensor, Tensor], Tensor] = "next",
    progress: bool | Callable[[int, int | None, float | None], None] = False,
) -> pd.DataFrame:
    """The loss that the model would have if it stopped at each layer.

    ``h_l`` goes through the last block, the final norm and the head (arXiv 2602.05970,
    figure 2), so that l = ℓ − 1 is the model itself. Each layer costs a block and the
    head, several forward passes together: take a sample of documents, whose standard
    error the table gives.

    Parameters
    ----------
    model, batches, mask, progress
        As in :func:`record`; positions without a next token never count.
    documents : int, optional
        How many to decode, spread evenly over all; all by default.
    through_last : bool
        False leaves the last block out (the logit lens); then l goes up to ℓ.

    Returns
    -------
    pandas.DataFrame
        ``layer, mean, stderr, std`` of the cross-entropy, in nats per token, errors over
        documents. ``attrs`` holds ``documents``, ``of`` (how many there were) and ``tokens``.

    Raises
    ------
    ValueError
        If the model has no head, or does something else between the final norm and its
        logits than is known.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2))
    >>> losses = decode_early(model, [torch.randint(8, (6, 10))], documents=4)
    >>> losses["layer"].tolist(), losses.attrs
    ([0, 1, 2], {'documents': 4, 'of': 6, 'tokens': 36})
    """
    live = Stream(model)
    documents = None if documents is None else _checks.count(documents, "documents")
    batches = [live.inputs(b, mask, number) for number, b in enumerate(batches)]
    chosen, there = _spread(batches, documents)
    moments = Moments(live.parts.depth + (0 if through_last else 1), joint=False)
    report = _runs.Progress(progress, len(chosen), of="batch")
    tokens = count = 0
    with live.open():
        for number, (inputs, keep) in enumerate(chosen):
            ids, keep = inputs["input_ids"], keep.clone()
            keep[:, -1] = False
            if "attention_mask" in inputs:
                keep[:, :-1] &= inputs["attention_mask"][:, 1:].bool().cpu()
            rows = keep.reshape(-1).nonzero().squeeze(1)
            if number == 0:
                live.measure(inputs, head=True)
            losses = _losses(live, inputs, rows, through_last)
            _all_finite(losses, rows, ids.shape[1], number)
            inside = rows // ids.shape[1] == torch.arange(len(ids))[:, None]
            inside = inside.double()
            if moments.n.sum() == 0 and len(rows):
                moments.shift = losses.mean(0).numpy()
            losses = losses - torch.from_numpy(moments.shift)
            moments.add(*(total.numpy() for total in tally(losses, inside)))
            tokens += len(rows)
            count += int((inside.sum(1) > 0).sum())
            report(number + 1, f"{tokens:,} tokens")
    if tokens == 0:
        raise ValueError("no position counts: batches are empty, or the mask leaves nothing")
    table = frame(np.arange(len(moments.n)), moments, slice(None))
    table.attrs = {"documents": count, "of": there, "tokens": tokens}
    return table


def _all_finite(losses: Tensor, rows: Tensor, length: int, number: int) -> None:
    bad = (~torch.isfinite(losses).all(1)).nonzero()
    if len(bad):
        row, position = divmod(int(rows[bad[0]]), length)
        raise FloatingPointError(not_finite(number, "losses", row, position))


def _spread(
    batches: list[tuple[dict[str, Tensor], Tensor]], documents: int | None
) -> tuple[list[tuple[dict[str, Tensor], Tensor]], int]:
    """Evenly spaced rows of all batches, and how many rows there are."""
    starts = np.cumsum([0, *(len(keep) for _, keep in batches)])
    there = int(starts[-1])
    if documents is None or documents >= there:
        return batches, there
    rows = (np.arange(documents) * there) // documents
    result = []
    for start, stop, (inputs, keep) in zip(starts[:-1], starts[1:], batches, strict=True):
        some = torch.from_numpy(rows[(rows >= start) & (rows < stop)] - start)
        if len(some):
            result.append(({name: tensor[some] for name, tensor in inputs.items()}, keep[some]))
    return result, there


def _losses(live: Stream, inputs: dict[str, Tensor], rows: Tensor, through_last: bool) -> Tensor:
    """Cross-entropies ``(tokens, layers)`` of the next token, decoded at every layer."""
    parts, states = live.parts, list[Tensor]()
    last: dict[str, Any] = {}

    def keep_arguments(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        last.update(args=args, kwargs=kwargs)

    before = [(block, states.append) for block in parts.blocks]
    after = [(parts.blocks[-1], states.append)]
    with watched(parts.blocks[-1:], keep_arguments):
        live.run(inputs, before, after)
    end, where = states[-1], live.device
    args, kwargs = last["args"], last["kwargs"]

    def final(number: int) -> Tensor:
        state = states[number]
        if not through_last:
            return state
        if number == parts.depth - 1:  # the model's own last step
            return end
        given, named = with_hidden(args, kwargs, state.to(where))
        return tensor(parts.blocks[-1](*given, **named))

    targets = inputs["input_ids"].reshape(-1)[(rows + 1).clamp(max=inputs["input_ids"].numel() - 1)]
    columns = [
        _cross_entropy(parts, final(number), rows, targets)
        for number in range(parts.depth + (not through_last))
    ]
    return torch.stack(columns, 1)


def _cross_entropy(parts: Anatomy, state: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    losses = []
    size = max(1, 2**24 // parts.vocabulary)
    norm_at = device_of(parts.norm or parts.blocks[-1])
    for some, goal in zip(rows.split(size), targets.split(size), strict=True):
        logits = parts.logits(pick(state, some).to(norm_at))
        goal = goal.to(logits.device)
        losses.append(nn.functional.cross_entropy(logits, goal, reduction="none").double().cpu())
    return torch.cat(losses) if losses else torch.zeros(0, dtype=torch.float64)
