"""The Gram matrix of what is written to one token's stream, and all geometry read off it.

A residual stream starts at ``h_0``, and every layer adds a write to it. Stack them,
``U = [h_0, Δ_1, …, Δ_ℓ]``: the small matrix ``G = U Uᵀ`` holds every inner product. States
are partial sums of writes, so every norm and angle of the trajectory is a function of
``G``, whatever the width. Simulations and toy networks come in by :func:`of_states`, language
models by their recorded writes; :func:`statistics` is the same for all.

Angles between neighbouring states are taken from the update and not from two large states,
whose difference has lost the digits that a small update needs. ``G`` is in double precision:
single precision misplaces angles by up to 8e-3 radians (see ``trajectory``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

#: What :func:`statistics` gives, and the layer that its first entry belongs to.
STATISTICS = {
    "norms": 0,
    "angles": 0,
    "update_norms": 1,
    "update_angles": 1,
    "update_cosines": 1,
    "angle_to_end": 0,
    "projections": 0,
    "block_influence": 1,
    "contributions.block": 1,
    "contributions.attention": 1,
    "contributions.mlp": 1,
    "write_norms.attention": 1,
    "write_norms.mlp": 1,
    "cosines.block": 1,
    "cosines.attention": 1,
    "cosines.mlp": 1,
    "last_angle_after_norm": None,  # the last layer
    "last_update_angle_after_norm": None,
    "null_angles": 1,
    "null_cosines": 1,
}


def of_states(states: Any) -> np.ndarray:
    """Inner products of everything written to each input's stream.

    Parameters
    ----------
    states : array
        Residual stream, ``(depth + 1, inputs, width)``; a NumPy array or a torch tensor.

    Returns
    -------
    numpy.ndarray
        ``(inputs, depth + 1, depth + 1)``, in double precision.

    Raises
    ------
    ValueError
        If the shape is not that of states, or a state is not finite.

    Examples
    --------
    >>> states = np.array([[[1.0, 0.0]], [[1.0, 2.0]], [[4.0, 2.0]]])
    >>> of_states(states)[0]
    array([[1., 0., 3.],
           [0., 4., 0.],
           [3., 0., 9.]])
    """
    if hasattr(states, "detach"):  # a torch tensor, of any precision, anywhere
        states = states.detach().cpu().double().numpy()
    states = np.asarray(states, dtype=float)
    if states.ndim != 3 or states.shape[0] < 2 or 0 in states.shape:
        raise ValueError(
            "states must be an array (depth + 1, inputs, width) with at least one layer, "
            f"not of shape {states.shape}: for one input, use states[:, None, :]"
        )
    if not np.isfinite(states).all():
        bad = int(np.argmax(~np.isfinite(states).all(axis=(1, 2))))
        raise ValueError(f"states[{bad}] holds numbers that are not finite: leave those inputs out")
    writes = np.concatenate([states[:1], np.diff(states, axis=0)]).transpose(1, 0, 2)
    with np.errstate(over="ignore", invalid="ignore"):
        result = writes @ writes.transpose(0, 2, 1)
    if not np.isfinite(result).all():
        raise ValueError(
            f"states as large as {np.abs(states).max():.1e} overflow when they are squared: divide "
            "them by a common number, which changes no angle"
        )
    return result


def of_blocks(gram: Tensor) -> Tensor:
    """Gram matrices of whole blocks' writes, from those of the writes of their two sublayers.

    Parameters
    ----------
    gram : torch.Tensor
        ``(tokens, 2 · depth + 1, 2 · depth + 1)``.

    Returns
    -------
    torch.Tensor
        ``(tokens, depth + 1, depth + 1)``.

    Examples
    --------
    >>> of_blocks(torch.eye(3, dtype=torch.float64)[None])[0]
    tensor([[1., 0.],
            [0., 2.]], dtype=torch.float64)
    """
    rows = torch.cat([gram[:, :1], gram[:, 1::2] + gram[:, 2::2]], 1)
    return torch.cat([rows[:, :, :1], rows[:, :, 1::2] + rows[:, :, 2::2]], 2)


def angle(xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """Angle of two vectors from their inner products; not a number where one is zero.

    Examples
    --------
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> round(angle(one, 2 * one, one).item() / torch.pi, 12)
    0.25
    """
    across = (xx * yy - xy * xy).clamp(min=0).sqrt()
    return torch.where((xx > 0) & (yy > 0), torch.atan2(across, xy), torch.nan)


def turn(h2: Tensor, d2: Tensor, hd: Tensor, to2: Tensor) -> Tensor:
    """Angle between ``h`` and ``h + d``, from ``‖h‖²``, ``‖d‖²``, ``h·d`` and ``‖h + d‖²``.

    The triangle of ``h``, ``d`` and ``h + d`` has one area, twice of which is the
    cross product of any two sides; from the two shortest it loses the fewest digits.

    Examples
    --------
    >>> one, tiny = torch.ones(1, dtype=torch.float64), torch.full((1,), 1e-20).double()
    >>> round(turn(one, tiny, 0 * one, one + tiny).item(), 12)  # d of length 1e-10 across h
    1e-10
    """
    without_sum = h2 * d2 - hd * hd
    without_d = h2 * to2 - (h2 + hd) ** 2
    without_h = d2 * to2 - (d2 + hd) ** 2
    across = torch.where(d2 >= to2, without_d, without_sum)
    across = torch.where((h2 >= d2) & (h2 >= to2), without_h, across)
    angle = torch.atan2(across.clamp(min=0).sqrt(), h2 + hd)
    return torch.where((h2 > 0) & (to2 > 0), angle, torch.nan)


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """``above / below``; not a number where ``below`` is not positive."""
    return torch.where(below > 0, above / below, torch.nan)


def _along(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each write: its square, its product with the stream before it, that stream's square.

    The last is one entry longer: it ends with the last state's.
    """
    square = gram.diagonal(dim1=1, dim2=2)
    along = gram.tril(-1).sum(2)  # the stream is the sum of what was written before
    # ‖h + w‖² = ‖h‖² + 2 h·w + ‖w‖²
    return square[:, 1:], along[:, 1:], (square + 2 * along).cumsum(1).clamp(min=0)


def _to_end(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Of what is written after each state: its square, and its product with that state."""
    square = gram.diagonal(dim1=1, dim2=2)
    later = gram.triu(1).sum(2)
    rest = (square + 2 * later)[:, 1:].flip(1).cumsum(1).flip(1)
    # From one state to the next, a write moves from the rest to the state.
    product = (later - gram.tril(-1).sum(2)).cumsum(1)
    return torch.cat([rest, torch.zeros_like(rest[:, :1])], 1), product


def statistics(
    gram: Tensor, *, sublayers: bool = False, parallel: bool = False, normed: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Norms, angles, cosines and contributions, token by token.

    Parameters
    ----------
    gram : torch.Tensor
        ``(tokens, writes + 1, writes + 1)``, in double precision.
    sublayers : bool
        Whether two writes make a block, attention and MLP.
    parallel : bool
        Whether both are added to the block's input (GPT-NeoX, Phi).
    normed : bool
        Whether the matrices have one more row and column, of the last state after the final norm.

    Returns
    -------
    dict of str to torch.Tensor
        Statistics ``(tokens, entries)`` by their names in :data:`STATISTICS`; angles in radians.
    torch.Tensor
        Angles, then cosines, of all pairs of blocks' updates, ``(tokens, 2 · pairs)``, pairs in
        the order of ``numpy.triu_indices(depth, 1)``.

    Examples
    --------
    >>> states = np.array([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 1.0]]])
    >>> values, pairs = statistics(torch.from_numpy(of_states(states)))
    >>> (values["angles"] / torch.pi).round(decimals=4).tolist(), pairs.shape
    ([[0.25, 0.25]], torch.Size([1, 2]))
    """
    if normed:
        after, gram = gram[:, -1], gram[:, :-1, :-1]
    whole = of_blocks(gram) if sublayers else gram
    u2, uh, h2 = _along(whole)
    before = h2[:, :-1]
    angles = turn(before, u2, uh, h2[:, 1:])
    moved = whole[:, 1:, 1:].sum(2).cumsum(1)  # (h_l − h_0)·(h_ℓ − h_0)
    moved = torch.cat([torch.zeros_like(moved[:, :1]), moved], 1)
    values = {
        "norms": h2.sqrt(),
        "angles": angles,
        "update_norms": u2.sqrt(),
        "angle_to_end": turn(h2, *_to_end(whole), h2[:, -1:]),
        "projections": ratio(moved, moved[:, -1:]),
        "block_influence": 2 * torch.sin(angles / 2) ** 2,  # 1 − cos, to all digits
        "contributions.block": ratio(u2, before).sqrt(),
        "cosines.block": ratio(uh, (u2 * before).sqrt()),
    }
    if sublayers:
        values |= _of_sublayers(gram, parallel)
    i, j = torch.triu_indices(u2.shape[1], u2.shape[1], 1, device=gram.device)
    xx, yy, xy = u2[:, i], u2[:, j], whole[:, i + 1, j + 1]
    pairs = torch.cat([angle(xx, yy, xy), ratio(xy, (xx * yy).sqrt())], 1)
    near = torch.nonzero(j == i + 1).squeeze(1)
    values["update_angles"] = pairs[:, near]
    values["update_cosines"] = pairs[:, near + len(i)]
    if normed:
        before_last = after[:, : -3 if sublayers else -2].sum(1)
        values["last_angle_after_norm"] = angle(h2[:, -2], after[:, -1], before_last)[:, None]
        if u2.shape[1] > 1:  # between Δ_{ℓ−1} and norm(h_ℓ) − h_{ℓ−1}
            own = after[:, -5:-3].sum(1) if sublayers else after[:, -3]
            product = own - whole[:, :-1, -2].sum(1)
            length = after[:, -1] - 2 * before_last + h2[:, -2]
            last = angle(u2[:, -2], length.clamp(min=0), product)
            values["last_update_angle_after_norm"] = last[:, None]
    return values, pairs


def _of_sublayers(gram: Tensor, parallel: bool) -> dict[str, Tensor]:
    """Sizes and cosines of attention and MLP writes against the stream they are added to."""
    square, along, stream = _along(gram)
    parts = {
        "attention": (square[:, 0::2], along[:, 0::2], stream[:, 0:-1:2]),
        "mlp": (square[:, 1::2], along[:, 1::2], stream[:, 1::2]),
    }
    if parallel:  # both are added to the block's input
        both = gram.diagonal(-1, dim1=1, dim2=2)[:, 1::2]
        parts["mlp"] = (square[:, 1::2], along[:, 1::2] - both, stream[:, 0:-1:2])
    values = {}
    for name, (w2, wh, h2) in parts.items():
        values[f"write_norms.{name}"] = w2.sqrt()
        values[f"contributions.{name}"] = ratio(w2, h2).sqrt()
        values[f"cosines.{name}"] = ratio(wh, (w2 * h2).sqrt())
    return values
