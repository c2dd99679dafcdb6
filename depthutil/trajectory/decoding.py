"""What a model would say if it stopped at each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from depthutil import _checks, _runs
from depthutil.stream import Stream, device_of, tensor, watched, with_hidden
from depthutil.stream.adding import differ
from depthutil.trajectory.passing import pick
from depthutil.trajectory.sums import Decoded

# The last block takes the states of several layers at once, as long as there are so few tokens: on
# a CPU larger products are no faster (20 µs a token for 512 to 4,096 of them at width 256).
_TOKENS = {"cpu": 512, "cuda": 65536}
_LOGITS = {"cpu": 2**22, "cuda": 2**26}  # numbers that the head makes at a time


class Decoder:
    """Decodes the states of one forward pass, with as few calls of block and head as it can.

    Parameters
    ----------
    live : Stream
        Measured, with its head.
    through_last : bool
        Send states through the last block first.
    top : int
        Of how many most probable tokens to count the overlap; 0 for losses alone.
    """

    def __init__(self, live: Stream, through_last: bool = True, top: int = 0):
        self.live, self.through_last, self.top = live, through_last, top
        self.layers = live.parts.depth + (not through_last)
        # Whether the last block takes several layers of batches of that shape at once.
        self.together: dict[torch.Size, bool] = {}
        self.states: list[Tensor] = []
        self.given: tuple[tuple, dict[str, Any]] = ((), {})

    def hooks(self) -> tuple[list[tuple[nn.Module, Callable]], list[tuple[nn.Module, Callable]]]:
        """What to give to :meth:`Stream.run` before a pass that is decoded."""
        blocks, self.states = self.live.parts.blocks, []
        keep = self.states.append
        return [(block, keep) for block in blocks], [(blocks[-1], keep)]

    def watching(self) -> Any:
        """Remembers what else the last block is given; a context for the same pass."""

        def arguments(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self.given = args, kwargs

        return watched(self.live.parts.blocks[-1:], arguments)

    def decode(self, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """``(tokens, names · layers)`` of those positions of the flattened batch."""
        if not len(rows):
            return torch.zeros((0, self.layers * (3 if self.top else 1)), dtype=torch.float64)
        ids = inputs["input_ids"].reshape(-1)
        targets = ids[(rows + 1).clamp(max=len(ids) - 1)]
        ends = self._ends(rows)
        self.states, self.given = [], ((), {})
        # Some positions at a time, and as many layers of them as the head takes.
        size = max(1, _LOGITS.get(self.live.device.type, 2**22) // self.live.parts.vocabulary)
        found = []
        for first in range(0, len(rows), size):
            goal = targets[first : first + size]
            here = [states[first : first + size] for states in ends]
            final = self._logits(here[-1]) if self.top else None
            several = size // len(goal)
            groups = [here[i : i + several] for i in range(0, self.layers, several)]
            found.append(torch.cat([self._compare(group, goal, final) for group in groups], 1))
        return torch.cat(found, 2).permute(2, 0, 1).flatten(1)

    def _ends(self, rows: Tensor) -> list[Tensor]:
        """For each layer, the states of those positions that go to the norm."""
        if not self.through_last:
            return [pick(states, rows).to(self.live.device) for states in self.states]
        shape = self.states[0].shape[:-1]
        size = max(1, _TOKENS.get(self.live.device.type, 4096) // shape.numel())
        others = range(self.layers - 1)  # the model's own last step is known
        if size > 1 and len(others) > 1:
            if shape not in self.together:
                self.together[shape] = self._alike()
            size = size if self.together[shape] else 1
        groups = [others[i : i + size] for i in range(0, len(others), size)]
        ends = [pick(states, rows) for group in groups for states in self._last(group)]
        return [*ends, pick(self.states[-1], rows)]

    def _last(self, layers: Sequence[int]) -> tuple[Tensor, ...]:
        """What the last block makes of the states of these layers."""
        where, batch = self.live.device, len(self.states[0])
        states = self.states[layers[0]].to(where)
        args, kwargs = self.given
        if len(layers) > 1:
            states = torch.cat([self.states[layer].to(where) for layer in layers])
            args, kwargs = _repeated((args, kwargs), batch, len(layers))
        args, kwargs = with_hidden(args, kwargs, states)
        return tensor(self.live.parts.blocks[-1](*args, **kwargs)).split(batch)

    def _alike(self) -> bool:
        """Whether the last block does the same to two layers at once as to one after the other.

        What else it is given has one entry for each document in most families, which is
        repeated for each layer; where that is not so, this is False.
        """
        try:
            both = self._last([0, 1])
            apart = [*self._last([0]), *self._last([1])]
        except Exception:  # of whatever kind a shape that does not fit may be
            return False
        return not any(differ(b, a, b.dtype) for a, b in zip(both, apart, strict=True))

    def _logits(self, states: Tensor) -> Tensor:
        parts = self.live.parts
        return parts.logits(states.to(device_of(parts.norm or parts.blocks[-1])))

    def _compare(self, states: list[Tensor], targets: Tensor, final: Tensor | None) -> Tensor:
        """``(names, layers, tokens)``: losses; beside the final logits, distance and overlap."""
        logits = self._logits(torch.cat(states))
        goal = targets.to(logits.device).repeat(len(states))
        losses = nn.functional.cross_entropy(logits, goal, reduction="none")
        found = [losses.double().view(len(states), -1)]
        if final is not None:
            found += _beside(logits.reshape(len(states), *final.shape), final, self.top)
        return torch.stack(found).cpu()


def _beside(logits: Tensor, final: Tensor, top: int) -> list[Tensor]:
    """KL(early ‖ final) in nats, and the share of the ``top`` tokens that both have."""
    early, late = logits.log_softmax(-1), final.log_softmax(-1)
    distance = (early.exp() * (early - late)).sum(-1).double()
    count = min(top, logits.shape[-1])
    ours, theirs = (part.topk(count, -1).indices for part in (logits, final))
    shared = (ours[..., :, None] == theirs[..., None, :]).any(-1).double().mean(-1)
    return [distance, shared]


def _repeated(thing: Any, batch: int, times: int) -> Any:
    """Tensors with a row for each document, once for each layer."""
    if isinstance(thing, Tensor):
        several = thing.ndim > 1 and thing.shape[0] == batch > 1
        return thing.repeat(times, *[1] * (thing.ndim - 1)) if several else thing
    if isinstance(thing, dict):
        return {name: _repeated(value, batch, times) for name, value in thing.items()}
    if type(thing) in (tuple, list):
        return type(thing)(_repeated(value, batch, times) for value in thing)
    return thing


def next_rows(inputs: Mapping[str, Tensor], keep: Tensor) -> Tensor:
    """Positions of the flattened batch that count and have a next token."""
    keep = keep.clone()
    keep[:, -1] = False
    if "attention_mask" in inputs:
        keep[:, :-1] &= inputs["attention_mask"][:, 1:].bool().cpu()
    return keep.reshape(-1).nonzero().squeeze(1)


def decode_early(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    documents: int | None = None,
    through_last: bool = True,
    top: int = 0,
    per_token: bool = False,
    mask: str | Callable[[Tensor, Tensor], Tensor] = "next",
    progress: bool | Callable[[int, int | None, float | None], None] = False,
) -> pd.DataFrame:
    """The loss that the model would have if it stopped at each layer.

    ``h_l`` goes through the last block, the final norm and the head (arXiv 2602.05970,
    figure 2), so that l = ℓ − 1 is the model itself. Each layer costs a block and the
    head, several forward passes together: take a sample of documents, whose standard
    error the table gives. To record the same documents in the same pass, see ``decode`` of
    :func:`record`.

    Parameters
    ----------
    model, batches, mask, progress
        As in :func:`record`; positions without a next token never count.
    documents : int, optional
        How many to decode, spread evenly over all; all by default.
    through_last : bool
        False leaves the last block out (the logit lens); then l goes up to ℓ.
    top : int
        Also compare with the model's own prediction: KL(early ‖ final), and the share of its
        ``top`` most probable tokens that are among the early ones (arXiv 2505.13898 has 5).
    per_token : bool
        Instead, the loss of every token at every layer.

    Returns
    -------
    pandas.DataFrame
        ``layer, mean, stderr, std`` of the cross-entropy, in nats per token, errors over
        documents; with ``top``, also ``kl, kl_stderr, overlap, overlap_stderr``. ``attrs`` holds
        ``documents``, ``of`` (how many there were) and ``tokens``. With ``per_token``, a row for
        each token: ``document, position``, and the loss at layers ``0, 1, …``.

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
    >>> losses = decode_early(model, [torch.randint(8, (6, 10))], documents=4, top=5)
    >>> losses["layer"].tolist(), losses.attrs
    ([0, 1, 2], {'documents': 4, 'tokens': 36, 'of': 6})
    >>> float(losses["overlap"].iloc[-1])  # the last layer is the model itself
    1.0
    """
    live = Stream(model)
    documents = None if documents is None else _checks.count(documents, "documents")
    decoder = Decoder(live, through_last, _checks.count(top, "top", low=0))
    batches = [live.inputs(b, mask, number) for number, b in enumerate(batches)]
    chosen, there = spread(batches, documents)
    sums = Decoded(decoder.layers, bool(top))
    report = _runs.Progress(progress, len(chosen), of="batch")
    tables, before = [], 0
    with live.open():
        for number, (inputs, keep) in enumerate(chosen):
            rows = next_rows(inputs, keep)
            if number == 0:
                live.measure(inputs, head=True)
            with decoder.watching():
                live.run(inputs, *decoder.hooks())
            values = decoder.decode(inputs, rows)
            shape = tuple(inputs["input_ids"].shape)
            sums.add(values, rows, shape, number)
            if per_token:
                table = pd.DataFrame(values[:, : decoder.layers].numpy())
                table.insert(0, "document", rows.numpy() // shape[1] + before)
                table.insert(1, "position", rows.numpy() % shape[1])
                tables.append(table)
            before += shape[0]
            report(number + 1, f"{sums.tokens:,} tokens")
    whole = sums.table(there)
    return pd.concat(tables, ignore_index=True) if per_token else whole


def spread(
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
