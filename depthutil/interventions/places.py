"""What edits need to know: blocks, positions, write points, caches; and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthutil.stream import Anatomy, Stream, announced

Positions = int | slice | Sequence[int] | Tensor | None


def block_numbers(
    blocks: Any, live: Stream, name: str = "blocks", *, ordered: bool = False
) -> list[int]:
    """Numbers of blocks that there are, each once; sorted, unless their order counts.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2))
    >>> block_numbers(3, Stream(model))
    Traceback (most recent call last):
    ...
    ValueError: there is no block 3: GPT2LMHeadModel (gpt2) has blocks 0 to 2
    """
    depth = live.parts.depth
    single = isinstance(blocks, int | np.integer | str)
    several: list[Any] = [blocks] if single else list(blocks)
    for number in several:
        whole = isinstance(number, int | np.integer) and not isinstance(number, bool | np.bool_)
        if not whole or not 0 <= number < depth:
            said = number if whole else repr(number)
            raise ValueError(f"there is no block {said}: {live.name} has blocks 0 to {depth - 1}")
    numbers = [int(number) for number in several]
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} names at least one block, and each once, not {numbers}")
    return numbers if ordered else sorted(numbers)


def written_by(live: Stream, part: str) -> tuple[nn.Module, ...]:
    """For each block, the module whose output is what attention or the MLP adds to the stream.

    Of a family that is not known by name, measured on a few tokens.
    """
    parts = live.parts
    if parts.writes is None:
        ids = torch.arange(16)[None] % parts.tokens
        with live.open():
            live.measure({"input_ids": ids})
        parts = live.parts
    writers = parts.attention_write if part == "attention" else parts.mlp_write
    if writers is None:
        raise ValueError(
            f"{live.name} cannot be told apart into attention and MLP: take part='block'"
        )
    return writers


def embedding_std(parts: Anatomy) -> float:
    """Standard deviation of all entries that the token embedding returns."""
    total = squares = count = 0.0
    embedding: Any = parts.embedding
    device = embedding.weight.device
    with torch.no_grad():
        for ids in torch.arange(parts.tokens, device=device).split(4096):
            rows = embedding(ids).double()
            total += float(rows.sum())
            squares += float(rows.square().sum())
            count += rows.numel()
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5


class Where:
    """Some positions of whatever batch comes.

    Attributes
    ----------
    columns : torch.Tensor or None
        Their numbers, of the last batch; None of a mask, or of all positions.
    """

    def __init__(self, positions: Positions):
        self.columns: Tensor | None = None
        self.shape: torch.Size | None = None
        if isinstance(positions, Tensor) and positions.dtype == torch.bool:
            if positions.ndim != 2:
                shape = tuple(positions.shape)
                raise ValueError(f"positions as booleans are (documents, positions), not {shape}")
            self.given: Any = positions
        elif positions is None or isinstance(positions, slice):
            self.given = positions
        else:
            single = isinstance(positions, int | np.integer)
            several: list[Any] = [positions] if single else list(positions)  # type: ignore[arg-type]
            bad = [p for p in several if isinstance(p, bool) or int(p) != p]
            if not several or bad:
                raise ValueError(f"positions are whole numbers, at least one, not {positions!r}")
            self.given = [int(p) for p in several]

    @contextmanager
    def checking(self, live: Stream) -> Iterator[None]:
        """Learn each batch's shape, and object to one that goes on from a cache."""
        if self.given is None:
            yield
            return

        def look(args: tuple, kwargs: Mapping) -> None:
            no_past(args, kwargs, "positions are given")
            ids = kwargs.get("input_ids", args[0] if args else None)
            ids = kwargs.get("inputs_embeds") if ids is None else ids
            self.shape = None if ids is None else ids.shape[:2]
            if self.shape is not None:
                self.columns = self._columns(*self.shape)

        with announced(live.parts.backbone, look):
            yield

    def _columns(self, documents: int, length: int) -> Tensor | None:
        if isinstance(self.given, Tensor):
            if tuple(self.given.shape) != (documents, length):
                raise ValueError(
                    f"positions have shape {tuple(self.given.shape)}, and the batch "
                    f"({documents}, {length})"
                )
            return None
        if isinstance(self.given, slice):
            return torch.arange(length)[self.given]
        for position in self.given:
            if not -length <= position < length:
                raise ValueError(
                    f"there is no position {position}: the batch has positions 0 to {length - 1}"
                )
        return torch.tensor([position % length for position in self.given])

    def __call__(self, states: Tensor) -> Tensor | None:
        """Which states are meant, to broadcast over them; None if all are."""
        if self.given is None:
            return None
        if self.shape is None:
            raise ValueError("a model that is run without its backbone says no positions")
        if isinstance(self.given, Tensor):
            inside = self.given
        else:
            assert self.columns is not None
            inside = torch.zeros(self.shape, dtype=torch.bool)
            inside[:, self.columns] = True
        return inside.to(states.device).reshape(*states.shape[:-1], 1)


def check_states(states: Tensor, live: Stream) -> None:
    width = live.parts.width
    if not 1 <= states.ndim <= 3 or states.shape[-1] != width:
        raise ValueError(
            f"states end in the model's width, (…, {width}), and have 1 to 3 dimensions, not "
            f"{tuple(states.shape)}"
        )
    if not bool(torch.isfinite(states).all()):
        raise ValueError("states to put in place hold numbers that are not finite")


def fitting(states: Tensor, place: Tensor) -> Tensor:
    try:
        return states.expand_as(place)
    except RuntimeError as error:
        raise ValueError(
            f"states of shape {tuple(states.shape)} do not fit the positions chosen, "
            f"{tuple(place.shape)}"
        ) from error


def attention_kind(parts: Anatomy, number: int) -> str:
    """What a block attends to, where blocks of one model differ in that."""
    kinds = getattr(parts.backbone.config, "layer_types", None)
    if kinds is not None and len(kinds) == parts.depth:
        # Where blocks stand in another order just now, they say it themselves.
        kind = getattr(parts.blocks[number], "attention_type", None)
        return str(kinds[number] if kind is None else kind)
    return str(getattr(parts.blocks[number], "is_sliding", "attention"))


def _caches(things: Sequence | Mapping) -> Iterator[Any]:
    values = things.values() if isinstance(things, Mapping) else things
    return (value for value in values if hasattr(value, "get_seq_length"))


def no_past(args: tuple, kwargs: Mapping, what: str) -> None:
    """Refuse a pass that goes on from a cache that holds something."""
    for cache in (*_caches(args), *_caches(kwargs)):
        if int(cache.get_seq_length()):
            raise ValueError(
                f"this pass goes on from a cache of {int(cache.get_seq_length())} tokens, and "
                f"{what}: run the whole text at once, use_cache=False"
            )


def without_cache(things: Any) -> Any:
    """The same arguments without a cache."""

    def kept(value: Any) -> Any:
        return None if hasattr(value, "get_seq_length") else value

    if isinstance(things, Mapping):
        return {name: kept(value) for name, value in things.items()}
    return tuple(kept(value) for value in things)
