"""Three ways to use depth as minimal simulations, and a diagnostic that tells them apart.

Three rooms, in this order:

* networks that are built, not trained: :func:`ensemble`, :func:`procedural` and
  :func:`compositional` each return a :class:`Run`, whose hidden states are an array
  ``(depth + 1, inputs, width)``;
* networks that are trained: :func:`learn_folds`;
* loss against depth: :func:`measure`, :func:`measure_all`, :func:`fit_exponent`.

What the hidden states of these and of any other network say is read in
``depthutil.signatures``; its two functions ``signature`` and ``diagnose`` are here too.

The three regimes and their exponents are those of Liu, Kangaslahti, Liu and Gore,
"Inverse Depth Scaling From Most Layers Being Similar" (arXiv 2602.05970, 2026).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from depthutil import _checks, powerlaw
from depthutil.powerlaw import PowerLaw as PowerLaw
from depthutil.signatures import diagnose as diagnose
from depthutil.signatures import signature as signature

_REFERENCE_STEPS = 128  # of the fourth-order integrator that stands in for the exact flow


# ----------------------------------------------------------------- built networks


@dataclass(frozen=True)
class Run:
    """What one built network did to a batch of inputs.

    Attributes
    ----------
    regime : str
        ``"ensemble"``, ``"procedural"`` or ``"compositional"``.
    states : numpy.ndarray
        The residual stream, ``(depth + 1, inputs, width)``; ``states[0]`` is the input.
    target : numpy.ndarray
        Where the stream is wanted at the end, ``(inputs, width)``.
    loss : float
        Squared error of the last state, in units in which a network without layers has
        loss 1.
    """

    regime: str
    states: np.ndarray
    target: np.ndarray
    loss: float

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.states) - 1


def ensemble(
    depth: int,
    *,
    width: int = 32,
    inputs: int = 256,
    noise: float = 2.0,
    shared: float = 0.0,
    seed: int = 0,
) -> Run:
    """Every layer estimates the whole change, with an error of its own; the stream averages.

    The change that is wanted is linear, ``v(x) = A x``. Layer l carries an imperfect
    copy ``A + noise · E_l`` and writes a share ``1/depth`` of its estimate. The loss is
    ``noise² · (shared + (1 − shared) / depth)``: Liu et al. 2026, section 3, for
    ``shared = 0``.

    Parameters
    ----------
    depth, width, inputs : int
        Layers, size of the stream, number of inputs.
    noise : float
        Size of a layer's error relative to the change.
    shared : float
        Correlation of two layers' errors, from 0 to 1. Depth cannot average this part.
    seed : int
        Seeds the target, the layers and the inputs.

    Raises
    ------
    ValueError
        If a size is below 1, ``noise`` is negative or ``shared`` is outside [0, 1].

    Examples
    --------
    >>> run = ensemble(depth=16, noise=2.0)
    >>> run.states.shape
    (17, 256, 32)
    >>> round(run.loss * 16)  # noise² / depth
    4
    """
    _check_sizes(depth=depth, width=width, inputs=inputs)
    if not (np.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise is a relative size, 0 or larger, not {noise!r}")
    if not 0 <= shared <= 1:
        raise ValueError(f"shared is a correlation between 0 and 1, not {shared!r}")
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((inputs, width))
    target, common = rng.standard_normal((2, width, width)) / np.sqrt(width)
    own = rng.standard_normal((depth, width, width)) / np.sqrt(width)
    layers = target + noise * (np.sqrt(shared) * common + np.sqrt(1 - shared) * own)
    writes = x @ layers.transpose(0, 2, 1) / depth
    states = np.concatenate([x[None], x + np.cumsum(writes, axis=0)])
    goal = x + x @ target.T
    return Run("ensemble", states, goal, _relative_error(states, goal))


def _swirl(width: int, rng: np.random.Generator) -> Callable:
    weights = rng.standard_normal((2, width, width)) / np.sqrt(width)
    return lambda x: 2.0 * np.tanh(x @ weights[0]) @ weights[1]


def _rotation(width: int, rng: np.random.Generator) -> Callable:
    generator = rng.standard_normal((width, width)) / np.sqrt(width)
    return lambda x: x @ (generator - generator.T)


def _pendulums(width: int, rng: np.random.Generator) -> Callable:
    frequency = rng.uniform(1.0, 3.0, width - width // 2)

    def rate(
        x: np.ndarray,
    ) -> np.ndarray:  # the first half of the stream are angles, the rest their velocities
        angle, velocity = x[..., : width // 2], x[..., width // 2 :]
        pull = np.zeros_like(velocity)
        pull[..., : width // 2] = -np.sin(angle)
        return np.concatenate([velocity[..., : width // 2], frequency**2 * pull], axis=-1)

    return rate


#: Smooth flows by name – each takes the width and a random generator, returns ``dx/dt``.
FLOWS: dict[str, Callable] = {"swirl": _swirl, "rotation": _rotation, "pendulums": _pendulums}


def procedural(
    depth: int,
    *,
    order: int = 1,
    errors: str = "coherent",
    flow: str | Callable[[np.ndarray], np.ndarray] = "swirl",
    width: int = 32,
    inputs: int = 64,
    seed: int = 0,
) -> Run:
    """Every layer takes one step of a smooth flow ``dx/dt = f(x)`` from time 0 to 1.

    With ``errors="coherent"`` a layer is Euler's step (order 1) or the midpoint step
    (order 2), and neighbouring layers err alike. With ``errors="incoherent"`` a layer
    errs by the same amount, but along a direction of its own: the exact step plus the
    scheme's local error with random signs on its components. The loss falls as
    ``depth^−2`` and ``depth^−3`` at order 1, ``depth^−4`` and ``depth^−5`` at order 2
    (the incoherent exponents: Liu et al. 2026, section 3).

    Parameters
    ----------
    depth, width, inputs : int
        Layers (a midpoint step counts as one), size of the stream, number of inputs.
    order : {1, 2}
        Order of the scheme.
    errors : {"coherent", "incoherent"}
        Whether the layers' local errors point the same way.
    flow : str or callable
        A name in ``FLOWS``, or your own ``f``, from ``(inputs, width)`` to the same shape.
    seed : int
        Seeds the flow, the signs and the inputs.

    Raises
    ------
    ValueError
        If a size is below 1, an option is unknown, or the flow moves nothing from time 0 to 1.

    Examples
    --------
    >>> one, two = procedural(16).loss, procedural(32).loss
    >>> round(np.log2(one / two))  # halving the step quarters the squared error
    2
    """
    _check_sizes(depth=depth, width=width, inputs=inputs)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 (Euler) or 2 (midpoint), not {order!r}")
    if errors not in ("coherent", "incoherent"):
        raise ValueError(f"errors must be 'coherent' or 'incoherent', not {errors!r}")
    if isinstance(flow, str) and flow not in FLOWS:
        raise ValueError(f"flow {flow!r} is not one of {', '.join(FLOWS)}: pass its f(x) instead")
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((inputs, width))
    f = FLOWS[flow](width, rng) if isinstance(flow, str) else flow
    substeps = -(-_REFERENCE_STEPS // depth)
    states = [x]
    for signs in rng.choice([-1.0, 1.0], size=(depth, width)):
        h, step = states[-1], 1 / depth
        new = h + step * f(h) if order == 1 else h + step * f(h + step / 2 * f(h))
        if errors == "incoherent":
            exact = _flow_exactly(f, h, step, substeps)
            new = exact + signs * (new - exact)
        states.append(new)
    stream = np.stack(states)
    target = _flow_exactly(f, x, 1.0, depth * substeps)
    return Run("procedural", stream, target, _relative_error(stream, target))


def compositional(
    depth: int,
    *,
    folds: int = 8,
    levels: str | Sequence[int] = "same",
    width: int = 32,
    inputs: int = 256,
    seed: int = 0,
) -> Run:
    """Every layer is one level of a hierarchy: one more fold of a strip of paper.

    Each of the stream's ``width`` coordinates is a strip, the unit interval. A layer
    has one ReLU per strip and folds every strip in half: ``h ← h − 2 relu(h − c)``, or
    its mirror image, whichever the seed says. The target is where a point lies after
    ``folds`` folds, a wave of ``2^folds`` straight pieces. A layer with one ReLU at most
    doubles the number of pieces, so fewer layers than folds cannot make it (Montúfar,
    Pascanu, Cho and Bengio 2014, section 2; Telgarsky 2016). Layers beyond ``folds`` do nothing.

    Parameters
    ----------
    depth, width, inputs : int
        Layers, strips, number of inputs.
    folds : int
        Folds of the target, k.
    levels : {"same", "mixed"} or sequence of int
        How many folds each input is to get: ``folds`` for all, a number drawn evenly
        from 1 to ``folds``, or the number for each input. A layer learns it from a
        code in the input, which is constant and left out of ``states``.
    seed : int
        Seeds the inputs, their levels and the sides from which layers fold.

    Returns
    -------
    Run
        Its loss is the variance of the target that the best linear readout of the last
        state leaves unexplained, averaged over levels.

    Raises
    ------
    ValueError
        If a size is below 1, ``folds`` is above 40 (numbers in double precision cannot be
        halved reliably more often), or a level is not between 1 and ``folds``.

    Examples
    --------
    >>> [round(compositional(depth, folds=3).loss, 1) for depth in (1, 2, 3, 4)]
    [1.0, 1.0, 0.0, 0.0]
    """
    _check_sizes(depth=depth, folds=folds, width=width, inputs=inputs)
    if folds > 40:
        raise ValueError(f"folds = {folds} is more than double precision can hold: use 40 or fewer")
    rng = np.random.default_rng(seed)
    h = rng.random((inputs, width))
    each = _levels(levels, folds, inputs, rng)
    low = np.zeros(width)
    states, last = [h], h
    for layer in range(1, max(depth, folds) + 1):
        if layer <= folds:
            crease = low + 0.5**layer
            from_right = rng.random(width) < 0.5
            fold = np.where(
                from_right, np.minimum(h, 2 * crease - h), np.maximum(h, 2 * crease - h)
            )
            h = np.where((each >= layer)[:, None], fold, h)
            low = np.where(from_right, low, crease)
        if layer <= depth:
            states.append(h)
            last = h
    unexplained = np.full(inputs, np.nan)
    for level in np.unique(each):
        of_level = each == level
        unexplained[of_level] = _unexplained(last[of_level], h[of_level])
    return Run("compositional", np.stack(states), h, float(unexplained.mean()))


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        _checks.count(size, name)


def _levels(
    levels: str | Sequence[int], folds: int, inputs: int, rng: np.random.Generator
) -> np.ndarray:
    if isinstance(levels, str):
        if levels not in ("same", "mixed"):
            raise ValueError(f"levels must be 'same', 'mixed' or a number each, not {levels!r}")
        drawn = rng.integers(1, folds + 1, inputs)
        return drawn if levels == "mixed" else np.full(inputs, folds)
    each = np.asarray(levels)
    if each.shape != (inputs,) or each.min() < 1 or each.max() > folds:
        raise ValueError(
            f"levels needs {inputs} numbers from 1 to folds = {folds}, one for each input; "
            f"got shape {each.shape} from {each.min()} to {each.max()}"
        )
    return each


def _relative_error(states: np.ndarray, target: np.ndarray) -> float:
    change = ((target - states[0]) ** 2).sum()
    if change <= 1e-12 * (states[0] ** 2).sum():
        raise ValueError(
            "the target is the input, so no loss can be relative to the change: choose a flow "
            "that ends elsewhere"
        )
    return float(((states[-1] - target) ** 2).sum() / change)


def _unexplained(h: np.ndarray, target: np.ndarray) -> float:
    """1 − R² (adjusted) of the straight line from each strip's state to its target."""
    n = len(h)
    if n < 3 or np.array_equal(h, target):
        return float(not np.array_equal(h, target))
    h, target = h - h.mean(axis=0), target - target.mean(axis=0)
    squares = (h**2).sum(axis=0) * (target**2).sum(axis=0)
    explained = (h * target).sum(axis=0) ** 2 / squares
    return float((1 - explained.mean()) * (n - 1) / (n - 2))


def _flow_exactly(f: Callable, x: np.ndarray, time: float, steps: int) -> np.ndarray:
    """The flow to high accuracy: fourth-order Runge-Kutta in many small steps."""
    dt = time / steps
    for _ in range(steps):
        k1 = f(x)
        k2 = f(x + dt / 2 * k1)
        k3 = f(x + dt / 2 * k2)
        k4 = f(x + dt * k3)
        x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


# ------------------------------------------------------------------ a trained network


@dataclass(frozen=True)
class LearnedFolds:
    """Small networks that were trained to fold a strip.

    Attributes
    ----------
    frame : pandas.DataFrame
        Columns ``folds``, ``depth``, ``seed`` and ``loss``, relative to the target's variance.
    x : numpy.ndarray
        A grid on [0, 1].
    target : numpy.ndarray
        The folded position at ``x``.
    outputs : numpy.ndarray
        What each network says at ``x``; ``(depths, seeds, len(x))``.
    """

    frame: pd.DataFrame
    x: np.ndarray = field(repr=False)
    target: np.ndarray = field(repr=False)
    outputs: np.ndarray = field(repr=False)


def tent(x: Any, folds: int) -> Any:
    """Where a point of a strip lies after some folds, in units of the folded strip.

    Examples
    --------
    >>> tent(np.array([0.0, 0.25, 0.5, 0.75, 1.0]), folds=2)
    array([0., 1., 0., 1., 0.])
    """
    for _ in range(folds):
        x = 1 - abs(2 * x - 1)
    return x


def learn_folds(
    folds: int,
    depths: Iterable[int],
    *,
    seeds: int = 16,
    curriculum: bool = True,
    steps: int = 250,
    seed: int = 0,
) -> LearnedFolds:
    """Train narrow networks of several depths to fold a strip ``folds`` times.

    A layer is ``h ← a h + b |h − t| + c`` on a stream of width one. It has one kink, as a
    ReLU has (``|z| = 2 relu(z) − z``), and four numbers to learn. All depths and seeds
    train at once with Adam, on fresh points of the strip. With a curriculum the target
    has one fold, then two, and so on, each stage first training only the layer that it
    adds (every layer, once there are none to add), then all layers; without, the full
    target is trained from random layers for as many steps.

    Parameters
    ----------
    folds : int
        Folds of the target, k.
    depths : iterable of int
        Numbers of layers.
    seeds : int
        Networks of each depth.
    curriculum : bool
        Whether folds are taught one at a time.
    steps : int
        Half the steps of a stage.
    seed : int
        Seeds the networks and the points.

    Raises
    ------
    ValueError
        If a size is below 1, or ``depths`` is empty.

    Examples
    --------
    >>> learned = learn_folds(2, depths=[1, 2], seeds=4)
    >>> learned.frame.groupby("depth")["loss"].min().round(1).tolist()
    [0.8, 0.0]
    """
    import torch

    depths = list(depths)
    _check_sizes(folds=folds, seeds=seeds, steps=steps, **{f"depths[{d}]": d for d in depths})
    if not depths:
        raise ValueError("depths is empty: name at least one number of layers")
    generator = torch.Generator().manual_seed(seed)
    layers, networks = max(depths), len(depths) * seeds
    depth_of = torch.tensor(depths).repeat_interleave(seeds)
    # a, b, c, t for every layer and network; a layer starts as the identity
    start = torch.zeros(4, layers, networks)
    start[0] = 1.0
    start[3] = 0.25 + 0.5 * torch.rand(layers, networks, generator=generator)
    if not curriculum:
        start[1] = torch.randn(layers, networks, generator=generator)
    weights = start.requires_grad_()

    def forward(x: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        h = x.expand(networks, -1)
        for layer, (a, b, c, t) in enumerate(weights.unbind(1)):
            new = a[:, None] * h + b[:, None] * (h - t[:, None]).abs() + c[:, None]
            h = torch.where((layer < active)[:, None], new, h)
        return h

    def train(
        target_folds: int,
        active: torch.Tensor,
        trained: torch.Tensor,
        steps: int,
        rate: float,
    ) -> None:
        adam = torch.optim.Adam([weights], lr=rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps, eta_min=rate / 50)
        for _ in range(steps):
            x = torch.rand(1, 128, generator=generator)
            loss = (forward(x, active) - tent(x, target_folds)).square().mean(1).sum()
            adam.zero_grad()
            loss.backward()
            if weights.grad is not None:
                weights.grad *= trained
            adam.step()
            decay.step()

    everything = torch.ones(layers, networks)
    if curriculum:
        layer = torch.arange(layers)[:, None]
        for stage in range(1, folds + 1):
            active = depth_of if stage == folds else depth_of.clamp(max=stage)
            new = (layer >= stage - 1) | (depth_of < stage)
            train(stage, active, new.float(), steps, 3e-2)
            train(stage, active, everything, steps, 6e-3)
    else:
        train(folds, depth_of, everything, 2 * steps * folds, 3e-2)
    with torch.no_grad():
        grid = torch.linspace(0, 1, 1025)
        outputs = forward(grid[None], depth_of).numpy()
    x = grid.numpy().astype(float)
    target = tent(x, folds)
    loss = ((outputs - target) ** 2).mean(axis=1) / target.var()
    frame = pd.DataFrame(
        {
            "folds": folds,
            "depth": depth_of.numpy(),
            "seed": np.tile(np.arange(seeds), len(depths)),
            "loss": loss,
        }
    )
    return LearnedFolds(frame, x, target, outputs.reshape(len(depths), seeds, -1))


# ----------------------------------------------------------------- loss against depth

#: The built networks of the book's first chapter, and the exponent that theory gives each.
SETTINGS: dict[str, tuple[Callable[..., Run], dict[str, Any], float]] = {
    "ensemble": (ensemble, {}, 1.0),
    "Euler, coherent": (procedural, {"order": 1, "errors": "coherent"}, 2.0),
    "Euler, incoherent": (procedural, {"order": 1, "errors": "incoherent"}, 3.0),
    "midpoint, coherent": (procedural, {"order": 2, "errors": "coherent"}, 4.0),
    "midpoint, incoherent": (procedural, {"order": 2, "errors": "incoherent"}, 5.0),
}


def measure(
    network: Callable[..., Run],
    depths: Iterable[int],
    seeds: Iterable[int] = range(8),
    **settings: Any,
) -> pd.DataFrame:
    """Loss of one kind of network at several depths and seeds.

    Parameters
    ----------
    network : callable
        :func:`ensemble`, :func:`procedural`, :func:`compositional`, or your own.
    depths, seeds : iterable of int
    **settings
        Passed to ``network``.

    Returns
    -------
    pandas.DataFrame
        Columns ``depth``, ``seed`` and ``loss``.

    Examples
    --------
    >>> measure(ensemble, depths=[4, 8], seeds=range(2), noise=1.0).shape
    (4, 3)
    """
    rows = [
        (depth, seed, network(depth, seed=seed, **settings).loss)
        for depth in depths
        for seed in seeds
    ]
    return pd.DataFrame(rows, columns=["depth", "seed", "loss"])


def measure_all(
    depths: Sequence[int] = (4, 8, 16, 32, 64), folds: int = 16, seeds: Iterable[int] = range(6)
) -> pd.DataFrame:
    """Loss against depth of every regime, in a few seconds: the book's first figure.

    Parameters
    ----------
    depths : sequence of int
    folds : int
        Folds of the compositional target; its threshold.
    seeds : iterable of int

    Returns
    -------
    pandas.DataFrame
        Columns ``regime``, ``setting``, ``depth``, ``seed``, ``loss`` and ``exponent``,
        the power that theory gives (nan for the compositional threshold, where ``depths``
        are completed with the depths about it).

    Examples
    --------
    >>> frame = measure_all(depths=(4, 8), folds=4, seeds=[0])
    >>> frame.groupby("regime")["setting"].nunique().to_dict()
    {'compositional': 1, 'ensemble': 1, 'procedural': 4}
    """
    frames = []
    for setting, (network, options, exponent) in SETTINGS.items():
        frame = measure(network, depths, seeds, **options)
        frames.append(frame.assign(regime=network.__name__, setting=setting, exponent=exponent))
    around = sorted({*depths, folds - 1, folds} - {0})
    frame = measure(compositional, around, seeds, folds=folds)
    frames.append(
        frame.assign(regime="compositional", setting=f"{folds} folds", exponent=float("nan"))
    )
    return pd.concat(frames, ignore_index=True)


def fit_exponent(depths: Any, losses: Any = None, stderr: Any = None) -> PowerLaw:
    """Fit a power of depth to losses, on logarithmic scales: :func:`depthutil.powerlaw.fit`.

    Parameters
    ----------
    depths : array or pandas.DataFrame
        Numbers of layers, three different ones at least; or what :func:`measure` returns.
    losses, stderr : array
        As in :func:`depthutil.powerlaw.fit`.

    Examples
    --------
    >>> print(fit_exponent(measure(ensemble, [2, 4, 8, 16], seeds=range(16))))
    exponent 1.01 ± 0.01 (a power law)
    """
    if isinstance(depths, pd.DataFrame):
        table = _checks.wide(depths, ["depth"], "seed", "loss")
        depths, losses = table.index.to_numpy(), table.to_numpy()
    return powerlaw.fit(depths, losses, stderr)
