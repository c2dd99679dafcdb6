"""One model, ready to be run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from depthutil.stream.hooks import evaluating, hooked, tensor
from depthutil.stream.inputs import device_of, forward, inputs_of
from depthutil.stream.measuring import measured
from depthutil.stream.parts import Anatomy, anatomy


class Stream:
    """A causal language model and its residual stream.

    Parameters
    ----------
    model : torch.nn.Module
        See :func:`anatomy`.

    Attributes
    ----------
    model : torch.nn.Module
    parts : Anatomy
        What names say, and what was found out once :meth:`measure` has run.

    Raises
    ------
    TypeError, ValueError
        As :func:`anatomy`.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2))
    >>> live, states = Stream(model), []
    >>> inputs, _ = live.inputs([[1, 2, 3]])
    >>> with live.open():
    ...     live.measure(inputs)
    ...     last = live.run(inputs, before=[(block, states.append) for block in live.parts.blocks])
    >>> len(states), last.shape, live.parts.parallel
    (3, torch.Size([1, 3, 4]), False)
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.parts: Anatomy = anatomy(model)

    def __repr__(self) -> str:
        return f"Stream({self.name})"

    @property
    def name(self) -> str:
        """Class and family, for messages."""
        return f"{type(self.model).__name__} ({self.parts.family})"

    @property
    def dtype(self) -> torch.dtype | None:
        """The precision of its weights."""
        first = next(self.model.parameters(), None)
        return None if first is None else first.dtype

    @property
    def device(self) -> torch.device:
        """Where the last block is."""
        return device_of(self.parts.blocks[-1])

    @contextmanager
    def open(self) -> Iterator[None]:
        """No dropout and no gradients, until the block ends."""
        with evaluating(self.model):
            yield

    def inputs(
        self, batch: Any, mask: str | Callable = "all", number: int = 0
    ) -> tuple[dict[str, Tensor], Tensor]:
        """A batch as the model takes it, and which positions count: :func:`inputs_of`."""
        return inputs_of(batch, self.parts, mask, number)

    def measure(self, inputs: dict[str, Tensor], *, head: bool = False) -> None:
        """Find out on a batch what its parts do, or refuse: :func:`measured`."""
        self.parts = measured(self.model, inputs, self.parts, head=head)

    def run(
        self,
        inputs: dict[str, Tensor],
        before: Sequence[tuple[nn.Module, Callable]] = (),
        after: Sequence[tuple[nn.Module, Callable]] = (),
    ) -> Tensor:
        """One forward pass without the head; what is looked at or changed is for this pass only.

        Parameters
        ----------
        inputs : dict
            What :meth:`inputs` returned.
        before, after : sequence of (module, function)
            As for :func:`hooked`.

        Returns
        -------
        torch.Tensor
            The last state, after the final norm, ``(documents, positions, width)``.
        """
        with hooked(before, after):
            return tensor(forward(self.parts, inputs))
