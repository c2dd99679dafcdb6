"""New blocks between the blocks of a trained model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthutil import _checks, _runs
from depthutil.stream import Anatomy, anatomy
from depthutil.surgery.arranging import arrange, checked, sharing

WAYS = ("predicted", "mean", "copy", "identity")
#: What the families call the map from attention, or from the MLP, back to the stream.
WRITERS = ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "dense_4h_to_h", "fc2")
#: As in LESA's code: hidden units, rows in a step, learning rate, the norm's share in the loss.
HIDDEN, ROWS, RATE, NORM = 256, 64, 1e-3, 5e-4


def insert(
    model: nn.Module,
    after: int | Sequence[int],
    method: str = "predicted",
    *,
    seed: int = 0,
    epochs: int = 10,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """Put a new block behind each of some blocks, without data and without training the model.

    - ``"predicted"`` (LESA, Yang et al., arXiv 2502.13794) guesses each matrix from those of the
      two neighbours. The matrices of one kind, such as all query projections, side by side are
      W = [W_1 … W_L] = U S [V_1 … V_L], with the stream's axis along U. Row by row, a small
      network learns to tell V_i from V_{i−1} and V_{i+1}; between blocks i and i + 1 come U S
      times what it makes of V_i and V_{i+1}.
    - ``"mean"`` takes the mean of the two neighbours' weights.
    - ``"copy"`` copies the block in front, as SOLAR and MIDAS do with several at a time.
    - ``"identity"`` copies it, and sets to zero what writes to the stream, as LLaMA Pro does
      (Wu et al., arXiv 2401.02415). The model computes what it did before.

    Unlike the official code, ``"predicted"`` sets what is no matrix (norm gains, biases) to the
    mean of the neighbours'. That code copies the gains of layer 0, which reads a short stream: in
    SmolLM2 they are the smallest of all. Coefficients are also brought to a mean square of 1, so
    that what the network learns in so few steps does not hang on the model's size. A model of 135
    million weights takes some minutes of a CPU core.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place.
    after : int or sequence of int
        Behind which blocks, from 0 on, as they are counted before; each at most once. Behind the
        last one there is no second neighbour: only copies and identities can stand there.
    method : {"predicted", "mean", "copy", "identity"}
    seed : int
        Of the predictor.
    epochs : int
        Of the predictor, over all rows of all blocks but the first and the last.
    optimizer : torch.optim.Optimizer, optional
        Copied weights begin with a copy of its state of what they are copies of, new ones with
        none.

    Returns
    -------
    transformers.PreTrainedModel
        The same object.

    Raises
    ------
    ValueError
        If there is no such block or neighbour, blocks share weights or differ in shape, or there
        is nothing to learn from. The model is then as it was.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=4, n_head=2)).eval()
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> before = model(ids).logits
    >>> torch.equal(insert(model, 3, "identity")(ids).logits, before), model.config.n_layer
    (True, 5)
    >>> insert(model, [0, 2], epochs=1).config.n_layer
    7
    """
    parts = anatomy(model)
    method = _checks.word(method, WAYS, "method")
    seed, epochs = _checks.count(seed, "seed", low=0), _checks.count(epochs, "epochs")
    given: Any = [after] if isinstance(after, int | np.integer) else after
    places = sorted(checked(given, parts.depth))
    if len(set(places)) < len(places):
        raise ValueError(f"one block is put behind each: {places} names a place twice")
    owners = sharing(model)
    if owners != list(range(parts.depth)):
        second = next(number for number, owner in enumerate(owners) if owner != number)
        raise ValueError(
            f"blocks {owners[second]} and {second} share their weights: insert into models whose "
            "blocks have weights of their own"
        )
    if method == "predicted":
        weights = _predicted(parts, places, seed, epochs)
    elif method == "mean":
        weights = {place: _mean(parts, place) for place in places}
    elif method == "identity":
        weights = {place: _silent(parts, place) for place in places}
    else:
        weights = {place: {} for place in places}
    order = sorted([*range(parts.depth), *places])
    arrange(model, order, optimizer=optimizer)
    blocks = anatomy(model).blocks
    for before, place in enumerate(places):
        _put(blocks[place + before + 1], weights[place], optimizer)
    return model


@torch.no_grad()
def _put(
    block: nn.Module, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None
) -> None:
    for name, weight in block.named_parameters():
        if name in weights:
            weight.copy_(weights[name])
            if optimizer is not None:
                optimizer.state.pop(weight, None)


def _together(parts: Anatomy, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
    """Weights of blocks that have the same ones, or a ValueError."""
    each = [dict(parts.blocks[number].named_parameters()) for number in numbers]
    shapes = {name: weight.shape for name, weight in each[0].items()}
    for number, own in zip(numbers, each, strict=True):
        if {name: weight.shape for name, weight in own.items()} != shapes:
            raise ValueError(
                f"blocks {numbers[0]} and {number} have weights of other names or shapes: "
                "copies and identities can be inserted, nothing between the two"
            )
        for name, weight in own.items():
            if weight.is_meta or not weight.is_floating_point():
                raise ValueError(
                    f"{name} of block {number} holds no numbers to compute with ({weight.dtype}): "
                    "load the whole model, unquantised"
                )
    return [{name: weight.detach() for name, weight in own.items()} for own in each]


def _mean(parts: Anatomy, place: int) -> dict[str, Tensor]:
    """Half way between a block and the next; 16 bits are added up in 32."""
    if place + 1 == parts.depth:
        raise ValueError(
            f"behind block {place}, the last one, there is no second neighbour: insert copies or "
            "identities there"
        )
    one, other = _together(parts, [place, place + 1])
    return {
        name: torch.lerp(_wide(weight), _wide(other[name]).to(weight.device), 0.5).to(weight.dtype)
        for name, weight in one.items()
    }


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


def _silent(parts: Anatomy, place: int) -> dict[str, Tensor]:
    """Zeros for what writes to the stream."""
    modules = {
        name: module
        for name, module in parts.blocks[place].named_modules()
        if name.rpartition(".")[2] in WRITERS
    }
    if parts.writes is None or len(modules) != len(parts.writes[place]):
        raise ValueError(
            f"which weights of a block of this {parts.family} model write to the stream is not "
            "known: insert a copy, and set them to zero"
        )
    return {
        f"{name}.{own}": torch.zeros_like(weight)
        for name, module in modules.items()
        for own, weight in module.named_parameters()
    }


def _predicted(
    parts: Anatomy, places: Sequence[int], seed: int, epochs: int
) -> dict[int, dict[str, Tensor]]:
    weights = {place: _mean(parts, place) for place in places}
    if parts.depth < 3:
        raise ValueError(
            f"a model of {parts.depth} blocks has none with two neighbours, from which a "
            "predictor could learn: take another method"
        )
    each = _together(parts, range(parts.depth))
    for name, first in each[0].items():
        if first.dim() == 2:
            stack = torch.stack([own[name].to(first.device) for own in each])
            # The stream's axis comes first; of square matrices, the one that is stored first.
            turned = first.shape[0] != parts.width == first.shape[1]
            key = _runs.generator("insert", seed, name).initial_seed()
            basis, scores = _decomposed(stack.mT if turned else stack)
            for place, guess in _guessed(scores, places, key, epochs).items():
                new = basis @ guess.to(basis)
                weights[place][name] = (new.T if turned else new).to(first.dtype)
    return weights


def _decomposed(stack: Tensor) -> tuple[Tensor, Tensor]:
    """U S, and all V_i in single precision, of matrices ``(blocks, rows, columns)``.

    Directions of singular values below a millionth of the largest are left out.
    """
    squares, basis = torch.linalg.eigh(sum(w.double() @ w.double().T for w in stack))
    kept = squares > 1e-12 * squares[-1]
    basis, sizes = basis[:, kept], squares[kept].sqrt()
    scores = torch.stack([(basis.T @ w.double() / sizes[:, None]).float() for w in stack])
    return basis * sizes, scores


def _guessed(scores: Tensor, places: Sequence[int], key: int, epochs: int) -> dict[int, Tensor]:
    """For each place, what a predictor makes of the coefficients before and behind it."""
    blocks, rows, columns = scores.shape
    if not rows:  # all weights are zero
        return {place: scores[place] for place in places}
    scale = math.sqrt(blocks * columns)  # rows of all V_i together have length 1
    pairs = torch.cat([scores[:-2], scores[2:]], -1).flatten(0, 1) * scale
    targets = scores[1:-1].flatten(0, 1) * scale
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(key)
        network = nn.Sequential(
            *(nn.Linear(2 * columns, HIDDEN), nn.ReLU()),
            *(nn.Linear(HIDDEN, HIDDEN), nn.ReLU()),
            nn.Linear(HIDDEN, columns),
        ).to(scores.device)
        adam = torch.optim.AdamW(network.parameters(), lr=RATE)
        for _ in range(epochs):
            for some in torch.randperm(len(pairs)).to(scores.device).split(ROWS):
                guess, target = network(pairs[some]), targets[some]
                loss = (1 - NORM) * (guess - target).square().mean()
                loss = loss + NORM * (guess.norm() - target.norm()).square()
                adam.zero_grad()
                loss.backward()
                adam.step()
    with torch.no_grad():
        return {
            place: network(torch.cat([scores[place], scores[place + 1]], -1) * scale) / scale
            for place in places
        }
