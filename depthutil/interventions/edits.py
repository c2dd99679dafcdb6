"""Change what blocks write, until a block of code ends.

Every edit is a context manager. While it holds, the model does what a forward pass written by
hand would do, with the change; afterwards, whatever happened inside, it is what it was, to the
last bit. Edits compose, and may end in any order. Blocks count from 0, as in the model's list:
block b turns the state ``h_b`` into ``h_{b+1}``. An edit holds on to the blocks that stand at
these places when it begins, and moves with them if :func:`swap` moves them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthutil import _checks, _runs
from depthutil.interventions.places import (
    Positions,
    Where,
    attention_kind,
    block_numbers,
    check_states,
    embedding_std,
    fitting,
    no_past,
    without_cache,
    written_by,
)
from depthutil.stream import (
    Stream,
    announced,
    hidden,
    hooked,
    rewritten,
    tensor,
    with_hidden,
    with_tensor,
)
from depthutil.stream.hooks import reordered

#: Blocks that are repeated just now.
_REPEATED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def skip(
    model: nn.Module,
    blocks: int | Sequence[int],
    part: str = "block",
    positions: Positions = None,
) -> Iterator[None]:
    """Blocks, or one of their sublayers, write nothing.

    What they would have written is computed and left out, so that caches stay in step.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model: :func:`depthutil.stream.anatomy`.
    blocks : int or sequence of int
        Which, from 0 on.
    part : {"block", "attention", "mlp"}
        What of them. Of a family that is not known by name, the model is first measured on a
        few tokens.
    positions : int, slice, sequence of int or bool tensor, optional
        Where; all positions by default. Negative ones count from the end of the batch's rows.
        A tensor of booleans ``(documents, positions)`` chooses for each document.

    Raises
    ------
    ValueError
        If there is no such block, part or position; or if positions are given and a pass
        goes on from a cache, where they would be others.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> before = model(ids).logits
    >>> with skip(model, [0, 1, 2]), torch.no_grad():
    ...     alone = model.lm_head(model.transformer.ln_f(model.transformer.wte(ids)
    ...                           + model.transformer.wpe.weight[:3]))
    ...     torch.equal(model(ids).logits, alone)
    True
    >>> torch.equal(model(ids).logits, before)
    True
    """
    _checks.word(part, ("block", "attention", "mlp"), "part")
    live = Stream(model)
    numbers = block_numbers(blocks, live)
    where = Where(positions)
    if part == "block":

        def unchanged(module: nn.Module, args: tuple, kwargs: Mapping, output: Any) -> Any:
            returned = tensor(output)
            read = hidden(args, kwargs).to(returned.device)
            inside = where(returned)
            kept = read if inside is None else torch.where(inside, read, returned)
            return with_tensor(output, kept)

        with where.checking(live), rewritten([live.parts.blocks[i] for i in numbers], unchanged):
            yield
        return
    writers = written_by(live, part)

    def nothing(returned: Tensor) -> Tensor:
        inside = where(returned)
        gone = torch.zeros_like(returned)
        return gone if inside is None else torch.where(inside, gone, returned)

    edits = [(writers[i], nothing) for i in numbers]
    with where.checking(live), hooked(after=edits):
        yield


@contextmanager
def swap(model: nn.Module, a: int | Sequence[int], b: int | Sequence[int]) -> Iterator[None]:
    """Two blocks, or two runs of as many blocks, change places.

    Parameters
    ----------
    model : torch.nn.Module
    a, b : int or sequence of int
        Places, from 0 on: ``swap(model, 3, 4)``, or runs, ``swap(model, [2, 3], [4, 5])``. No
        place may be in both.

    Raises
    ------
    ValueError
        If there is no such place, runs are of different lengths or overlap, or two blocks
        attend in different ways (one to all positions, one to a window), because then the
        model gives each place what belongs to it and not to the block.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2))
    >>> first, second, third = model.transformer.h
    >>> with swap(model, 0, 2):
    ...     list(model.transformer.h) == [third, second, first]
    True
    >>> list(model.transformer.h) == [first, second, third]
    True
    """
    live = Stream(model)
    ones = block_numbers(a, live, "a", ordered=True)
    others = block_numbers(b, live, "b", ordered=True)
    if len(ones) != len(others):
        raise ValueError(f"a and b are as many blocks each, not {len(ones)} and {len(others)}")
    both = sorted(set(ones) & set(others))
    if both:
        raise ValueError(f"block {both[0]} is in a and in b: no block changes places with itself")
    places = list(range(live.parts.depth))
    for i, j in zip(ones, others, strict=True):
        kinds = [attention_kind(live.parts, place) for place in (i, j)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"blocks {i} and {j} of {live.name} attend in different ways ({kinds[0]}, "
                f"{kinds[1]}): swap two of one kind"
            )
        places[i], places[j] = j, i
    with reordered(live.parts.container, places):
        yield


@contextmanager
def repeat(model: nn.Module, blocks: int | Sequence[int], times: int = 2) -> Iterator[None]:
    """A run of blocks is passed several times, each time from where it ended.

    Parameters
    ----------
    model : torch.nn.Module
    blocks : int or sequence of int
        Neighbours, in order: ``repeat(model, [4, 5], 3)`` runs 4, 5, 4, 5, 4, 5.
    times : int
        How often in all; 1 changes nothing.

    Raises
    ------
    ValueError
        If there is no such block, they are no neighbours, one of them is repeated already, or a
        pass goes on from a cache, which has room for one passage.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2))
    >>> passed = []
    >>> with hooked(before=[(model.transformer.h[1], passed.append)]), repeat(model, 1, 3):
    ...     _ = model(torch.tensor([[1, 2, 3]]))
    >>> len(passed)
    3
    """
    live = Stream(model)
    numbers = block_numbers(blocks, live, ordered=True)
    times = _checks.count(times, "times")
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ValueError(f"blocks to repeat are neighbours, in order, not {numbers}")
    if live.parts.norm is None:
        raise ValueError(f"{live.name} has no final norm, so that no place ends its last block")
    run = {live.parts.blocks[i] for i in numbers}
    twice = [i for i in numbers if live.parts.blocks[i] in _REPEATED]
    if twice:
        raise ValueError(f"block {twice[0]} of {live.name} is repeated already")
    passed: list[tuple[nn.Module, tuple, dict]] = []
    busy = False

    def begin(args: tuple, kwargs: Mapping) -> None:
        nonlocal busy
        no_past(args, kwargs, "blocks are repeated")
        passed.clear()
        busy = False

    def remember(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not busy:
            passed.append((module, without_cache(args), without_cache(kwargs)))

    def again(states: Tensor) -> Tensor | None:
        """Before what comes after the run, whatever that is: pass the run again."""
        nonlocal busy
        if busy or len(passed) < len(run):
            return None
        order, busy = list(passed), True
        passed.clear()
        try:
            for _ in range(times - 1):
                for module, args, kwargs in order:
                    args, kwargs = with_hidden(args, kwargs, states)
                    states = tensor(module(*args, **kwargs))
        finally:
            busy = False
        return states

    after = [*live.parts.blocks, live.parts.norm]
    _REPEATED.update(run)
    try:
        with (
            announced(live.parts.backbone, begin),
            rewritten(run, remember),
            hooked(before=[(module, again) for module in after]),
        ):
            yield
    finally:
        _REPEATED.difference_update(run)


@contextmanager
def patch(model: nn.Module, block: int | str, positions: Positions, states: Any) -> Iterator[None]:
    """The state after a block is another one at some positions.

    Parameters
    ----------
    model : torch.nn.Module
    block : int or "embedding"
        After which block, from 0 on; ``"embedding"`` is the stream before the first.
    positions : int, slice, sequence of int, bool tensor or None
        As in :func:`skip`.
    states : array
        ``(width,)``, ``(positions, width)`` or ``(documents, positions, width)``, for the
        positions chosen; finite.

    Raises
    ------
    ValueError
        As :func:`skip`, or if states have another shape or are not finite.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> ids, other = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
    >>> theirs = model(other, output_hidden_states=True).hidden_states[2]  # after block 1
    >>> with patch(model, 1, None, theirs):
    ...     torch.equal(model(ids).logits, model(other).logits)
    True
    """
    live = Stream(model)
    states = torch.as_tensor(np.asarray(states) if isinstance(states, list) else states).detach()
    check_states(states, live)
    where = Where(positions)

    def put(returned: Tensor) -> Tensor:
        new = states.to(device=returned.device, dtype=returned.dtype)
        inside = where(returned)
        if inside is None:
            return fitting(new, returned)
        changed = returned.clone()
        if where.columns is None:  # a mask: a state for each position that is marked
            marked = inside.squeeze(-1)
            changed[marked] = fitting(new, changed[marked])
        else:
            columns = where.columns.to(returned.device)
            changed[:, columns] = fitting(new, changed[:, columns])
        return changed

    with where.checking(live), _after(live, block, put):
        yield


@contextmanager
def erase(model: nn.Module, block: int | str, positions: Positions, states: Any) -> Iterator[None]:
    """The state after a block is the mean state, which says nothing about the text.

    Parameters
    ----------
    model, block, positions
        As in :func:`patch`.
    states : array
        The mean there, ``(width,)``, or the means of all layers, ``(blocks + 1, width)``:
        :func:`depthutil.interventions.mean_states`.

    Raises
    ------
    ValueError
        As :func:`patch`.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> one, other = torch.tensor([[1, 2]]), torch.tensor([[3, 2]])
    >>> with erase(model, 2, 1, torch.zeros(4)):
    ...     torch.equal(model(one).logits[:, 1], model(other).logits[:, 1])
    True
    """
    live = Stream(model)
    means = torch.as_tensor(states)
    width, depth = live.parts.width, live.parts.depth
    if tuple(means.shape) == (depth + 1, width):
        means = means[0 if block == "embedding" else block_numbers(block, live)[0] + 1]
    if tuple(means.shape) != (width,):
        raise ValueError(
            f"states to erase with are a mean of shape ({width},), or one for each layer, "
            f"({depth + 1}, {width}), not {tuple(means.shape)}"
        )
    with patch(model, block, positions, means):
        yield


@contextmanager
def noise(model: nn.Module, positions: Positions, scale: float, seed: int = 0) -> Iterator[None]:
    """Gaussian noise on the token embeddings at some positions.

    Every pass draws the same numbers: for each document others, the first documents of a
    larger batch the same.

    Parameters
    ----------
    model : torch.nn.Module
    positions : int, slice, sequence of int, bool tensor or None
        As in :func:`skip`.
    scale : float
        Standard deviation, in units of that of the embedding's entries (3 in arXiv 2202.05262
        and in arXiv 2602.05970, figure 6).
    seed : int

    Raises
    ------
    ValueError
        As :func:`skip`, or if ``scale`` is negative or no number.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> with noise(model, 1, scale=3.0):
    ...     one, again = model(ids).logits, model(ids).logits
    >>> torch.equal(one, again), torch.equal(one[:, 0], model(ids).logits[:, 0])
    (True, True)
    """
    live = Stream(model)
    scale, seed = _checks.number(scale, "scale", low=0), _checks.count(seed, "seed", low=0)
    if live.parts.embedding is None:
        raise ValueError(f"{live.name} has no token embedding to add noise to")
    where, unit = Where(positions), embedding_std(live.parts)

    def disturbed(returned: Tensor) -> Tensor:
        inside = where(returned)
        rng = _runs.generator("noise", seed)
        drawn = torch.randn(returned.shape, generator=rng).to(returned)
        added = returned + scale * unit * drawn
        return added if inside is None else torch.where(inside, added, returned)

    with where.checking(live), hooked(after=[(live.parts.embedding, disturbed)]):
        yield


@contextmanager
def scale(model: nn.Module, blocks: int | Sequence[int], factor: float) -> Iterator[None]:
    """What blocks write is multiplied with a number.

    Parameters
    ----------
    model : torch.nn.Module
    blocks : int or sequence of int
    factor : float
        0 leaves the blocks out, 1 changes nothing.

    Raises
    ------
    ValueError
        If there is no such block, or the factor is no number.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> with scale(model, 1, 0.0):
    ...     none = model(ids).logits
    >>> with skip(model, 1):
    ...     torch.equal(model(ids).logits, none)
    True
    """
    live = Stream(model)
    numbers, factor = block_numbers(blocks, live), _checks.number(factor, "factor")

    def scaled(module: nn.Module, args: tuple, kwargs: Mapping, output: Any) -> Any:
        returned = tensor(output)
        read = hidden(args, kwargs).to(returned.device)
        return with_tensor(output, read + factor * (returned - read))

    with rewritten([live.parts.blocks[i] for i in numbers], scaled):
        yield


def _after(live: Stream, block: int | str, put: Callable[[Tensor], Tensor]) -> Any:
    """A context in which the state after a block, or before the first, goes through a function."""
    if block == "embedding":
        return hooked(before=[(live.parts.blocks[0], put)])
    numbers = block_numbers(block, live, "block")
    return hooked(after=[(live.parts.blocks[numbers[0]], put)])
