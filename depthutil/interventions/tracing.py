"""Where in layers and positions a prediction is made: erasing, restoring, attributing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from depthutil import _checks, _runs, moments
from depthutil.interventions.edits import noise as disturbed
from depthutil.interventions.passes import Passes, batched, opened
from depthutil.stream import Stream


def mean_states(
    model: nn.Module, batches: Iterable[Any], *, mask: str | Callable = "inner"
) -> Tensor:
    """The mean state at each layer, to erase with.

    Parameters
    ----------
    model : torch.nn.Module
    batches : iterable
        As in :func:`skip_effects`.
    mask : str or callable
        Which positions count: :func:`depthutil.stream.inputs_of`. By default not the first,
        whose state is enormous in many models and would be most of the mean (in the code
        of arXiv 2505.13898 it counts).

    Returns
    -------
    torch.Tensor
        ``(blocks + 1, width)``, in double precision on the CPU; row l is of ``h_l``.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> mean_states(model, [torch.randint(8, (5, 10))]).shape
    torch.Size([4, 4])
    """
    live, count = opened(model), 0
    total: Any = 0.0
    with live.open():
        for passes, keep in batched(live, batches, mask, False, head=False):
            sums = [h[keep.to(h.device)].double().sum(0).cpu() for h in passes.states]
            total = total + torch.stack(sums)
            count += int(keep.sum())
    if not count:
        raise ValueError("no position counts: texts are too short for this mask")
    return total / count


def erasure_effects(
    model: nn.Module,
    batches: Iterable[Any],
    states: Tensor,
    *,
    read: int | Sequence[int] = -1,
    progress: bool | Callable = False,
) -> pd.DataFrame:
    """How long each token's stream is needed (arXiv 2505.13898, section 5).

    At one layer and one position the state is set to the mean state, and what changes in the
    prediction is measured. All positions are changed in one pass, which begins at the layer.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode.
    batches : iterable
        Prompts of one length, filled up nowhere, so that positions mean the same.
    states : torch.Tensor
        ``(blocks + 1, width)``: :func:`mean_states`.
    read : int or sequence of int
        At which positions the prediction is read; of several, the largest effect counts.

    Returns
    -------
    pandas.DataFrame
        For each ``layer`` from 0 (before the first block) to the number of blocks, and each
        ``position`` up to the last one read: ``mean`` and ``stderr`` over documents of the
        change of probabilities ``‖p − p'‖``.

    Raises
    ------
    ValueError
        If prompts have different lengths, a position is not there, or means have another shape.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> effects = erasure_effects(model, [torch.randint(8, (5, 4))], torch.zeros(4, 4))
    >>> effects.query("layer == 3")["mean"].round(6).tolist()[:3]  # nothing reads them any more
    [0.0, 0.0, 0.0]
    """
    live = opened(model)
    shape = (live.parts.depth + 1, live.parts.width)
    if tuple(states.shape) != shape:
        raise ValueError(f"states are the means of all layers, {shape}, not {tuple(states.shape)}")
    found: list[Tensor] = []
    with live.open():
        for passes, _ in batched(live, batches, "all", progress):
            places = _places(passes, read)
            clean = _odds(live, passes.last, places)
            count = max(places) + 1
            if found and found[0].shape[1] != count:
                raise ValueError("prompts have different lengths: trace them one by one")
            effects = [
                _erased(passes, layer, states[layer], count, places, clean)
                for layer in range(live.parts.depth + 1)
            ]
            found.append(torch.stack(effects).cpu())
    values = torch.cat(found, 2)
    rows = [
        (layer, position, *_mean(values[layer, position].numpy()))
        for layer in range(values.shape[0])
        for position in range(values.shape[1])
    ]
    return pd.DataFrame(rows, columns=["layer", "position", "mean", "stderr"])


def _erased(
    passes: Passes, layer: int, mean: Tensor, count: int, places: list[int], clean: Tensor
) -> Tensor:
    """``(positions, documents)`` of what erasing each position changes."""
    own, found = passes.states[layer], []
    documents = passes.shape[0]
    for piece in passes.pieces(count):
        positions = range(count)[piece]
        changed = own.repeat(len(positions), 1, 1).view(len(positions), *own.shape)
        for row, position in enumerate(positions):
            changed[row, :, position] = mean.to(own)
        last = passes.resume(layer, changed.flatten(0, 1))
        odds = _odds(passes.live, last, places)
        odds = odds.view(len(positions), documents, len(places), -1)
        found.append((odds - clean).norm(dim=-1).amax(-1).double())
    return torch.cat(found)


def _odds(live: Stream, last: Tensor, places: list[int]) -> Tensor:
    """Probabilities at some positions, ``(documents, places, vocabulary)``."""
    return live.parts.decoded(last[:, places]).softmax(-1)


def _places(passes: Passes, read: int | Sequence[int]) -> list[int]:
    _, length = passes.shape
    mask = passes.inputs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise ValueError("prompts are filled up: erase in prompts of one length")
    several = [read] if isinstance(read, int | np.integer) else list(read)
    for place in several:
        if not -length <= place < length:
            raise ValueError(f"there is no position {place}: prompts have 0 to {length - 1}")
    if length < 2:
        raise ValueError("a prompt of one token has nothing to erase but what is read")
    return [int(place) % length for place in several]


def _mean(values: np.ndarray) -> tuple[float, float]:
    return moments.of_totals(values, np.ones(len(values)))


# Causal tracing -------------------------------------------------------------------------


def causal_trace(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    subject: str,
    target: str,
    noise: float = 3.0,
    draws: int = 8,
    seed: int = 0,
    *,
    progress: bool | Callable = False,
) -> pd.DataFrame:
    """Which single state brings a fact back (arXiv 2202.05262; 2602.05970, figure 6).

    Noise on the embeddings of the subject's tokens makes the model forget. Then the state of
    one layer at one position is set to what it was without noise, and the probability of the
    target is read at the last position.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode.
    tokenizer : callable
    text : str
        Up to the answer: ``"The Colosseum is in the country of"``.
    subject : str
        A part of the text that is there once.
    target : str
        The answer, one token, with the space before it: ``" Italy"``.
    noise : float
        In units of the standard deviation of the embedding's entries.
    draws : int
        Of noise; all go through the model together.
    seed : int

    Returns
    -------
    pandas.DataFrame
        For each ``layer`` from 0 (before the first block) to the number of blocks, and each
        ``position``: ``token``, ``probability`` and its ``stderr`` over draws. ``attrs``:
        ``clean``, ``corrupted`` and ``corrupted_stderr`` are the probabilities with nothing
        restored; ``best`` and ``best_probability`` what the model would say; ``subject`` the
        first and last position of it.

    Raises
    ------
    ValueError
        If the subject is not in the text, or twice, the target is no single token, or the
        prompt has one token.

    Warns
    -----
    UserWarning
        If the model does not know the fact (its answer is another), or noise does not make it
        less probable: then there is nothing to bring back.

    Examples
    --------
    >>> from depthutil import models
    >>> model, tokenizer = models.load("ladder-w64-d02-s0")  # a character is a token
    >>> table = causal_trace(model, tokenizer, "impor", "imp", "t", draws=2)
    >>> table["layer"].nunique(), table["position"].nunique(), len(table.attrs["subject"])
    (3, 6, 2)
    """
    live = opened(model)
    draws = _checks.count(draws, "draws")
    ids, first, final = _subject(tokenizer, text, subject)
    goal = _single(tokenizer, target)
    tokens = [tokenizer.decode([number]) for number in ids.tolist()]
    length = len(tokens)
    depth = live.parts.depth
    with live.open():
        inputs, _ = live.inputs(ids[None])
        live.measure(inputs, head=True)
        clean = Passes(live, inputs, check=True)
        rows = {name: values.repeat(draws, 1) for name, values in inputs.items()}
        with disturbed(model, slice(first, final + 1), noise, seed):
            corrupted = Passes(live, rows)
        whole = _odds(live, clean.last, [length - 1])[0, 0]
        without = _odds(live, corrupted.last, [length - 1])[:, 0, goal]
        # Before the subject nothing was disturbed; after the last block nothing is read
        # any more but the last position, where the clean state is the clean answer.
        odds = without.expand(depth + 1, length, draws).clone()
        odds[depth, length - 1] = whole[goal]
        report = _runs.Progress(progress, depth, of="layer")
        for layer in range(depth):
            restored = [p for p in range(first, length) if layer or p <= final]
            for piece in corrupted.pieces(len(restored)):
                positions = restored[piece]
                states = corrupted.states[layer].repeat(len(positions), 1, 1)
                states = states.view(len(positions), draws, *states.shape[1:])
                for row, position in enumerate(positions):
                    states[row, :, position] = clean.states[layer][0, position]
                last = corrupted.resume(layer, states.flatten(0, 1))
                found = _odds(live, last, [length - 1])[:, 0, goal]
                odds[layer, positions] = found.view(len(positions), draws)
            report(layer + 1)
    values = odds.double().cpu().numpy()
    table = pd.DataFrame(
        [
            (layer, position, tokens[position], *_mean(values[layer, position]))
            for layer in range(depth + 1)
            for position in range(length)
        ],
        columns=["layer", "position", "token", "probability", "stderr"],
    )
    mean, stderr = _mean(without.double().cpu().numpy())
    best = int(whole.argmax())
    table.attrs = {
        "clean": float(whole[goal]),
        "corrupted": mean,
        "corrupted_stderr": stderr,
        "best": tokenizer.decode([best]),
        "best_probability": float(whole[best]),
        "subject": (first, final),
    }
    _warn(text, target, table.attrs, known=best == goal)
    return table


def _warn(text: str, target: str, about: dict, known: bool) -> None:
    if not known:
        warnings.warn(
            f"the model does not know it: after {text!r} it says {about['best']!r} "
            f"({about['best_probability']:.2f}), and {target!r} with {about['clean']:.3f}",
            stacklevel=3,
        )
    elif not about["corrupted"] < about["clean"]:
        warnings.warn(
            f"noise does not make {target!r} less probable ({about['clean']:.3f} without, "
            f"{about['corrupted']:.3f} with it): nothing can be brought back",
            stacklevel=3,
        )


def _subject(tokenizer: Any, text: str, subject: str) -> tuple[Tensor, int, int]:
    """Tokens of a text, and the first and last position of a part of it."""
    times = text.count(subject) if subject else 0
    if times != 1:
        said = "is not in" if not times else f"is {times} times in"
        raise ValueError(f"the subject {subject!r} {said} {text!r}: it must be there once")
    ids = [int(number) for number in tokenizer(text)["input_ids"]]
    if len(ids) < 2:
        raise ValueError(f"{text!r} is a single token: there is no path from a subject to it")
    begin = text.index(subject)
    end = begin + len(subject)
    # Where each token ends in the text, by what the tokens up to there decode to.
    ends = [len(_plain(tokenizer, ids[: i + 1])) for i in range(len(ids))]
    shift = len(_plain(tokenizer, ids)) - len(text)  # what special tokens decode to
    ends = [stop - shift for stop in ends]
    starts = [0, *ends[:-1]]
    inside = [
        i
        for i, (start, stop) in enumerate(zip(starts, ends, strict=True))
        if stop > begin and start < end and stop > start
    ]
    if not inside:
        raise ValueError(f"the tokens of {text!r} cannot be told apart at {subject!r}")
    return torch.tensor(ids), inside[0], inside[-1]


def _plain(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _single(tokenizer: Any, target: str) -> int:
    """The one token that a target is."""
    try:
        ids = list(tokenizer(target, add_special_tokens=False)["input_ids"])
    except TypeError:  # a tokenizer of one's own
        ids = list(tokenizer(target)["input_ids"])
    if len(ids) != 1:
        parts = " + ".join(repr(tokenizer.decode([number])) for number in ids)
        raise ValueError(
            f"the target {target!r} is {len(ids)} tokens ({parts}): name an answer of one token, "
            "with the space before it"
        )
    return int(ids[0])


# Integrated gradients -------------------------------------------------------------------


def integrated_gradients(
    model: nn.Module,
    batch: Any,
    target: int | Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    steps: int = 32,
    read: int = -1,
    progress: bool | Callable = False,
) -> pd.DataFrame:
    """What each position's state contributes to the probability of a token.

    Along the straight line from the mean over positions to the states themselves, the gradient
    of the probability is integrated (arXiv 1703.01365), at one layer after the other, as in
    arXiv 2505.13898, section 5. Attributions of one layer sum to what the probability gains
    along the line. The integral is Gauss and Legendre's, which at a given number of points is
    far closer than a sum of rectangles.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode.
    batch : array or mapping
        Prompts of one length.
    target : int or sequence of int
        The token, of all prompts or of each.
    layers : sequence of int, optional
        From 0 (before the first block) to the number of blocks; all by default.
    steps : int
        Points of the integral.
    read : int
        At which position the probability is read.

    Returns
    -------
    pandas.DataFrame
        ``layer, position``, ``mean`` attribution and ``stderr`` over prompts. ``attrs``: for each
        layer, ``gain``, the mean of P(states) − P(all positions at the mean), and ``gap``, the
        largest difference between that and the sum of attributions in any prompt.

    Raises
    ------
    ValueError
        If prompts have different lengths, or a token, layer or position is not there.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)).eval()
    >>> table = integrated_gradients(model, torch.randint(8, (5, 4)), target=3)
    >>> max(table.attrs["gap"].values()) < 1e-4
    True
    """
    live = opened(model)
    steps = _checks.count(steps, "steps")
    points, weights = np.polynomial.legendre.leggauss(steps)
    points, weights = (points + 1) / 2, weights / 2
    depth = live.parts.depth
    layers = list(range(depth + 1)) if layers is None else [int(layer) for layer in layers]
    beyond = [layer for layer in layers if not 0 <= layer <= depth]
    if beyond:
        raise ValueError(f"there is no layer {beyond[0]}: {live.name} has layers 0 to {depth}")
    rows, gains, gaps = [], {}, {}
    with live.open():
        (passes, _), *_ = batched(live, [batch], "all", False)
        (place,) = _places(passes, read)
        documents = passes.shape[0]
        goal = torch.as_tensor(target).expand(documents).to(live.device)
        if int(goal.min()) < 0 or int(goal.max()) >= live.parts.vocabulary:
            raise ValueError(f"target is a token from 0 to {live.parts.vocabulary - 1}")

        def odds(last: Tensor) -> Tensor:
            found = _odds(live, last, [place])[:, 0]
            return found.gather(1, goal.repeat(len(last) // documents)[:, None]).squeeze(1)

        clean = odds(passes.last)
        report = _runs.Progress(progress, len(layers), of="layer")
        for done, layer in enumerate(layers):
            states = passes.states[layer]
            base = states.mean(1, keepdim=True).expand_as(states)
            total = torch.zeros(states.shape, dtype=torch.float64, device=states.device)
            for piece in passes.pieces(steps):
                some = torch.as_tensor(points[piece]).to(states)
                line = base + some.view(-1, 1, 1, 1) * (states - base)
                with torch.enable_grad():
                    line = line.flatten(0, 1).detach().requires_grad_()
                    found = odds(passes.resume(layer, line))
                    (slope,) = torch.autograd.grad(found.sum(), line)
                weight = torch.as_tensor(weights[piece], device=states.device).view(-1, 1, 1, 1)
                total += (weight * slope.view(-1, *states.shape)).sum(0)
            each = (total * (states - base)).sum(-1).cpu().numpy()
            gain = (clean - odds(passes.resume(layer, base))).double().cpu().numpy()
            gains[layer] = float(gain.mean())
            gaps[layer] = float(np.abs(each.sum(1) - gain).max())
            rows += [(layer, p, *_mean(each[:, p])) for p in range(each.shape[1])]
            report(done + 1)
    table = pd.DataFrame(rows, columns=["layer", "position", "mean", "stderr"])
    table.attrs = {"gain": gains, "gap": gaps}
    return table
