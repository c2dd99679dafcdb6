"""Forward passes that begin at a block, with states that are known already.

The states of a batch are computed once. What an edit at block b changes comes after b, so that
the pass with the edit begins there: the blocks before hand on what they get, and cost nothing.
Masks and rotary angles are made by the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from depthutil import _runs, moments
from depthutil.stream import (
    PROBE,
    Stream,
    computing,
    device_of,
    hidden,
    rewritten,
    tensor,
    watched,
    with_tensor,
)
from depthutil.stream.adding import differ

#: How many tokens to send through a block at a time.
TOKENS = {"cpu": 1024, "cuda": 65536}
_LOGITS = {"cpu": 2**23, "cuda": 2**28}  # numbers that the head makes at a time

Hooks = Sequence[tuple[nn.Module, Callable]]


class Passes:
    """A batch's states, and passes that begin with other ones.

    Parameters
    ----------
    live : Stream
        Open, and measured.
    inputs : dict
        As ``live.inputs`` returns them.
    check : bool
        Make sure on this batch that a pass can begin in the middle.

    Attributes
    ----------
    states : list of torch.Tensor
        ``h_0, …, h_ℓ``, each ``(documents, positions, width)``.
    last : torch.Tensor
        ``h_ℓ`` after the final norm.
    """

    def __init__(self, live: Stream, inputs: dict[str, Tensor], *, check: bool = False):
        self.live, self.inputs = live, inputs
        blocks = live.parts.blocks
        self.states: list[Tensor] = []
        self.forms: dict[nn.Module, Callable[[Tensor], Any]] = {}

        def keep(module: nn.Module, args: tuple, kwargs: Mapping, output: Any) -> None:
            if module is blocks[0]:
                self.states.append(hidden(args, kwargs))
            self.states.append(tensor(output))
            empty = with_tensor(output, tensor(output)[:0])  # which holds no states
            self.forms[module] = lambda states: with_tensor(empty, states)

        with watched(blocks, keep):
            self.last = live.run(inputs)
        if check:  # a few tokens tell
            rows, length = PROBE
            Passes(live, {name: v[:rows, :length] for name, v in inputs.items()})._check()

    @property
    def shape(self) -> tuple[int, int]:
        """Documents and positions."""
        documents, positions = self.inputs["input_ids"].shape
        return documents, positions

    def update(self, block: int) -> Tensor:
        """What a block writes."""
        return self.states[block + 1] - self.states[block].to(self.states[block + 1].device)

    def resume(
        self,
        first: int,
        states: Tensor,
        *,
        without: Iterable[int] = (),
        before: Hooks = (),
        after: Hooks = (),
        rewriting: Sequence[tuple[nn.Module, Callable]] = (),
    ) -> Tensor:
        """The last state after the final norm, if block ``first`` reads these states.

        Parameters
        ----------
        first : int
            From 0 to the number of blocks, where only the norm is left.
        states : torch.Tensor
            ``(several · documents, positions, width)``: the batch once, or several times one
            after the other.
        without : iterable of int
            Later blocks that hand on what they get, too.
        before, after
            As for :meth:`Stream.run`.
        rewriting : sequence of (module, function)
            As for :func:`depthutil.stream.rewritten`.
        """
        parts = self.live.parts
        if first == parts.depth:
            assert parts.norm is not None
            return parts.norm(states.to(device_of(parts.norm)))
        passed = [*range(first), *without]

        def handing_on(number: int) -> Callable[..., Any]:
            form = self.forms[parts.blocks[number]]

            def forward(*args: Any, **kwargs: Any) -> Any:
                return form(hidden(args, kwargs))

            return forward

        def begin(read: Tensor) -> Tensor:
            return states.to(read.device)

        replaced = [(parts.blocks[number], handing_on(number)) for number in passed]
        times = len(states) // self.shape[0]
        inputs = {name: values.repeat(times, 1) for name, values in self.inputs.items()}
        with ExitStack() as stack:
            stack.enter_context(computing(*replaced))
            for module, function in rewriting:
                stack.enter_context(rewritten([module], function))
            return self.live.run(inputs, [(parts.blocks[first], begin), *before], after)

    def pieces(self, rows: int) -> Iterator[slice]:
        """So many repetitions of the batch, as many at a time as go well through a block."""
        limit = TOKENS.get(self.live.device.type, 1024)
        size = max(1, limit // (self.shape[0] * self.shape[1]))
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))

    def _check(self) -> None:
        """Whether a pass that begins in the middle ends where the whole one does."""
        depth = self.live.parts.depth
        for first in {depth - 1, depth // 2}:
            try:
                again = self.resume(first, self.states[first])
                same = not differ(again.double(), self.last.double(), self.last.dtype)
            except (RuntimeError, TypeError, ValueError, AttributeError):
                same = False
            if not same:
                raise ValueError(
                    f"{self.live.name} cannot be run from block {first} on: its blocks hand on "
                    "more than the stream"
                )


def opened(model: nn.Module) -> Stream:
    """A model to measure effects on: in evaluation mode.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).train()
    >>> opened(model)
    Traceback (most recent call last):
    ...
    ValueError: GPT2LMHeadModel (gpt2) is in training mode, and drops out at random: model.eval()
    """
    live = Stream(model)
    if any(module.training for module in model.modules()):
        raise ValueError(f"{live.name} is in training mode, and drops out at random: model.eval()")
    return live


def batched(
    live: Stream, batches: Iterable[Any], mask: str | Callable, progress: Any, head: bool = True
) -> Iterator[tuple[Passes, Tensor]]:
    """Each batch's passes, and which of its positions count, on the model's device."""
    ready = [live.inputs(batch, mask, number) for number, batch in enumerate(batches)]
    if not ready:
        raise ValueError("there is no batch: models.batches(tokenizer, texts) makes some")
    report = _runs.Progress(progress, len(ready), of="batch")
    for number, (inputs, keep) in enumerate(ready):
        if number == 0:
            live.measure(inputs, head=head)
        yield Passes(live, inputs, check=number == 0), keep.to(live.device)
        report(number + 1)


def following(inputs: Mapping[str, Tensor]) -> Tensor:
    """Positions that are real and have a real one after them, ``(documents, positions)``."""
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    there = torch.zeros_like(real)
    there[:, :-1] = real[:, :-1] & real[:, 1:]
    return there


def said(live: Stream, last: Tensor, where: Tensor, targets: Tensor) -> Iterator[tuple]:
    """Log-probabilities and losses, some positions at a time.

    Parameters
    ----------
    live : Stream
        Measured with its head.
    last : torch.Tensor
        After the final norm, ``(documents, positions, width)``.
    where : torch.Tensor
        Rows of the flattened batch.
    targets : torch.Tensor
        The next token there.
    """
    flat = last.flatten(0, 1)
    size = max(1, _LOGITS.get(live.device.type, 2**22) // live.parts.vocabulary)
    for start in range(0, len(where), size):
        rows = where[start : start + size]
        logs = live.parts.decoded(flat[rows.to(flat.device)]).log_softmax(-1)
        goal = targets[start : start + size].to(logs.device)
        yield slice(start, start + size), logs, -logs.gather(1, goal[:, None]).squeeze(1)


class Tally:
    """Sums of values over the positions of each document, and from them a table.

    Values are kept on the device, as one number a document, until a batch ends.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[tuple, Tensor]] = []
        self.rows: list[pd.DataFrame] = []
        self.before = 0

    def add(self, key: tuple, values: Tensor, keep: Tensor) -> None:
        """Values ``(documents, positions)`` of what ``key`` names, where ``keep`` is true."""
        keep = keep.to(values.device)
        values = values.double()
        most = torch.where(keep, values, -torch.inf).amax(1)  # which may be below 0
        total = torch.where(keep, values, 0).sum(1)
        found = torch.stack([total, keep.sum(1).double(), most], 1)
        self.kept.append((key, found))

    def end(self, names: Sequence[str]) -> None:
        """A batch is over."""
        keys, values = zip(*self.kept, strict=True)
        stack = torch.stack([v.to(values[0].device) for v in values]).cpu()
        documents = stack.shape[1]
        table = pd.DataFrame(list(keys), columns=list(names))
        table = table.loc[table.index.repeat(documents)].reset_index(drop=True)
        flat = stack.flatten(0, 1).numpy()
        numbers = torch.arange(documents).repeat(len(keys)).numpy() + self.before
        table = table.assign(document=numbers, total=flat[:, 0], count=flat[:, 1], max=flat[:, 2])
        self.rows.append(table[table["count"] > 0])
        self.kept, self.before = [], self.before + documents

    def per_document(self, names: Sequence[str]) -> pd.DataFrame:
        """``mean, tokens, max`` of each document."""
        table = pd.concat(self.rows, ignore_index=True)
        table["mean"] = table["total"] / table["count"]
        table["tokens"] = table["count"].astype(int)
        return table[[*names, "document", "mean", "max", "tokens"]]

    def table(self, names: Sequence[str]) -> pd.DataFrame:
        """``mean, stderr, max`` over all positions, errors over documents."""
        found = []
        for key, some in pd.concat(self.rows).groupby(list(names), sort=False):
            mean, stderr = moments.of_totals(some["total"], some["count"])
            found.append((*key, mean, stderr, some["max"].mean()))
        return pd.DataFrame(found, columns=[*names, "mean", "stderr", "max"])
