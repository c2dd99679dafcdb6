"""The minimiser behind :mod:`depthutil.scaling`: many fits of one law at once.

Everything works on a batch: B copies of a problem that share the inputs and
differ in weights (bootstrap, folds), losses (simulations) or starting point.
``theta`` is (B, 2K + 1): the size of each of K terms at the geometric mean of its
input, the exponents, the floor. Dividing inputs by their geometric means makes
the problem indifferent to units and takes most of the correlation out of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

ALPHA_MAX = 10.0  # steeper than any law of interest; a steeper fit is at the edge

GRID = (0.1, 0.3, 0.8, 2.0)  # exponents from which the search starts, in all combinations
LEAPS = (0.02, 0.1, 0.3, 0.6, 1.0, 1.6, 2.5, 4.0, 7.0, ALPHA_MAX)  # and to which one may leap
BEAM = 5  # minima from which leaps start


@dataclass(frozen=True)
class Problem:
    z: np.ndarray  # (K, n) log inputs, each row about its mean
    centre: np.ndarray  # (K,) those means; 0 where the coefficient is fixed in its own units
    fixed: np.ndarray  # (2K + 1,) value where held fixed, NaN where free
    delta: float  # Huber threshold on the log residual; inf for least squares

    @property
    def free(self) -> np.ndarray:
        return np.isnan(self.fixed)

    @property
    def upper(self) -> np.ndarray:
        k = len(self.z)
        steepest = min(ALPHA_MAX, 600 / np.abs(self.z).max())  # keeps exp() within range
        return np.r_[np.full(k, np.inf), np.full(k, steepest), np.inf]


def natural(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """From sizes at the geometric mean to the law's own coefficients."""
    k = len(problem.z)
    out = theta.copy()
    out[..., :k] *= np.exp(theta[..., k : 2 * k] * problem.centre)
    return out


def standard(problem: Problem, params: np.ndarray) -> np.ndarray:
    k = len(problem.z)
    out = np.array(params, dtype=float)
    out[..., :k] *= np.exp(-out[..., k : 2 * k] * problem.centre)
    return out


def evaluate(
    problem: Problem, theta: np.ndarray, y: np.ndarray, w: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Unit terms, terms, prediction, log residual and objective of each member."""
    k = len(problem.z)
    unit = np.exp(-theta[:, k : 2 * k, None] * problem.z)
    term = theta[:, :k, None] * unit
    prediction = np.maximum(term.sum(1) + theta[:, -1:], 1e-300)
    r = np.log(prediction) - y
    size = np.abs(r)
    d = problem.delta
    rho = r * r if np.isinf(d) else np.where(size <= d, r * r, 2 * d * size - d * d)
    return unit, term, prediction, r, (w * rho).sum(1)


def jacobian(
    problem: Problem, unit: np.ndarray, term: np.ndarray, prediction: np.ndarray
) -> np.ndarray:
    """Derivatives of the log prediction, (B, 2K + 1, n)."""
    ones = np.ones_like(prediction)[:, None]
    return np.concatenate([unit, -term * problem.z, ones], axis=1) / prediction[:, None]


def curvature(
    problem: Problem,
    unit: np.ndarray,
    term: np.ndarray,
    prediction: np.ndarray,
    r: np.ndarray,
    w: np.ndarray,
    exact: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradient and Hessian of half the objective.

    Far from the minimum the Hessian is Gauss and Newton's, which is never
    negative. Where ``exact``, it has the second derivatives too: width and depth
    are so nearly collinear that without them the last digits take 100 steps.
    """
    k = len(problem.z)
    slopes = jacobian(problem, unit, term, prediction)
    d = problem.delta
    shrink = 1.0 if np.isinf(d) else d / np.maximum(np.abs(r), d)
    psi = w * shrink * r
    inlier = w * np.where(exact[:, None], shrink == 1.0, shrink)
    weight = inlier - np.where(exact[:, None], psi, 0)
    hessian = (slopes * weight[:, None]) @ slopes.transpose(0, 2, 1)
    scale = (w[:, None] * slopes * slopes).sum(2)
    q = (np.where(exact[:, None], psi, 0) / prediction)[:, :, None]
    c, a = np.arange(k), np.arange(k, 2 * k)
    mixed = -((unit * problem.z) @ q)[:, :, 0]
    hessian[:, c, a] += mixed
    hessian[:, a, c] += mixed
    hessian[:, a, a] += ((term * problem.z**2) @ q)[:, :, 0]
    return (slopes @ psi[:, :, None])[:, :, 0], hessian, scale


def minimise(
    problem: Problem, theta: np.ndarray, y: np.ndarray, w: np.ndarray, max_steps: int = 500
) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt for the whole batch, ending in exact Newton steps.

    Coefficients and floor stay at or above 0, exponents in [0, ``upper``]: a
    parameter at an edge that the gradient pushes outwards is left out of the step.
    """
    batch, size = theta.shape
    y, w = (np.broadcast_to(v, (batch, problem.z.shape[1])) for v in (y, w))
    theta = np.where(problem.free, np.clip(theta, 0, problem.upper), theta)
    best, value = theta.copy(), np.full(batch, np.inf)
    alive = np.arange(batch)  # members that still move; the rest are finished
    damping, exact = np.full(batch, 1e-2), np.zeros(batch, bool)
    state = [theta, *evaluate(problem, theta, y, w)]
    diagonal, upper = np.arange(size), problem.upper
    for _ in range(max_steps):
        theta, unit, term, prediction, r, f = state
        gradient, hessian, scale = curvature(problem, unit, term, prediction, r, w[alive], exact)
        outwards = ((theta <= 0) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))
        move = problem.free & ~outwards
        # In units of each parameter's own curvature: they differ by many powers of ten.
        own = 1 / np.sqrt(np.where(move & (scale > 1e-100), scale, 1))
        hessian *= (move * own)[:, :, None] * (move * own)[:, None, :]
        hessian[:, diagonal, diagonal] += np.where(move, damping[:, None] + 1e-14, 1)
        step = np.linalg.solve(hessian, -(gradient * move * own)[:, :, None])[:, :, 0] * own
        new = np.where(problem.free, np.clip(theta + step, 0, upper), theta)
        trial = [new, *evaluate(problem, new, y[alive], w[alive])]
        gain = f - trial[-1]
        better = gain >= 0
        slope = np.abs((gradient * move * step).sum(1))
        still = (np.abs(gain) <= 1e-13 * f) & (slope <= 1e-12 * f) & (damping < 1)
        done = still | (damping > 1e12) | (f <= 1e-28)  # noise-free data fit to rounding
        # Newton's steps once an undamped one gains little; Gauss-Newton's when they fail.
        exact = np.where(better, gain < 0.1 * f, exact & (damping < 1e3))
        damping = np.where(better, damping / 20, np.maximum(damping, 1e-6) * 10)
        state = [
            np.where(better.reshape(-1, *[1] * (old.ndim - 1)), fresh, old)
            for old, fresh in zip(state, trial, strict=True)
        ]
        best[alive], value[alive] = state[0], state[-1]
        if done.any():
            alive, damping, exact = alive[~done], damping[~done], exact[~done]
            state = [v[~done] for v in state]
            if not len(alive):
                break
    return best, value


def screen(problem: Problem, y: np.ndarray, w: np.ndarray, keep: int) -> np.ndarray:
    """Starting points, (B, keep, 2K + 1): good exponents from a coarse grid.

    With the exponents given, relative error is linear in the rest, so each point of
    the grid is a small linear least-squares problem; all are solved at once.
    """
    k, n = problem.z.shape
    y, w = np.atleast_2d(y), np.atleast_2d(w)
    free = problem.free
    grid = np.array(
        list(
            itertools.product(*[GRID if free[k + j] else [problem.fixed[k + j]] for j in range(k)])
        )
    )
    basis = np.concatenate(
        [np.exp(-grid[:, :, None] * problem.z), np.ones((len(grid), 1, n))], axis=1
    )
    linear = np.r_[np.arange(k), 2 * k]
    loose = free[linear]
    held = np.nan_to_num(problem.fixed[linear]) @ basis  # (G, n): what fixed terms contribute
    basis = basis[:, loose]
    inverse = np.exp(-y)
    v, u = w * inverse**2, w * inverse
    if y.shape[0] != w.shape[0]:
        v, u = np.broadcast_arrays(v, u)
    products = basis[:, :, None] * basis[:, None]
    gram = np.tensordot(v, products, (1, 3))  # (B, G, q, q)
    right = np.tensordot(u, basis, (1, 2)) - np.tensordot(v, held[:, None] * basis, (1, 2))
    q = right.shape[-1]
    solution = np.zeros_like(right)
    if q:
        ridge = 1e-9 * np.einsum("bgii->bg", gram)[..., None, None] * np.eye(q)
        keep_positive = np.ones(right.shape, bool)
        for _ in range(3):  # drop what came out negative, solve again
            mask = keep_positive[..., :, None] & keep_positive[..., None, :]
            matrix = np.where(mask, gram + ridge, np.eye(q))
            solution = np.linalg.solve(matrix, (right * keep_positive)[..., None])[..., 0]
            keep_positive &= solution > 0
        solution = np.maximum(solution, 1e-3 * np.exp(y.mean(1))[:, None, None])
    quadratic = np.einsum("bgi,bgij,bgj->bg", solution, gram, solution)
    offset = (v[:, None] * held**2).sum(2) - 2 * (u[:, None] * held).sum(2)
    error = quadratic - 2 * (solution * right).sum(-1) + offset
    order = np.argsort(error, axis=1, kind="stable")[:, :keep]
    theta = np.empty((*order.shape, 2 * k + 1))
    theta[..., linear] = np.nan_to_num(problem.fixed[linear])
    theta[..., linear[loose]] = np.take_along_axis(solution, order[..., None], axis=1)
    theta[..., k : 2 * k] = grid[order]
    return theta


def search(
    problem: Problem,
    y: np.ndarray,
    w: np.ndarray,
    starts: int,
    warm: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Polish the ``starts`` best points of the grid, and ``warm``; keep the best of each."""
    y, w = np.atleast_2d(y), np.atleast_2d(w)
    theta = screen(problem, y, w, starts)
    if warm is not None:
        extra = np.broadcast_to(warm, (len(theta), 1, warm.shape[-1]))
        theta = np.concatenate([extra, theta], axis=1)
    batch, each, size = theta.shape
    y, w = (np.repeat(np.broadcast_to(v, (batch, v.shape[1])), each, axis=0) for v in (y, w))
    theta, value = minimise(problem, theta.reshape(-1, size), y, w)
    value = value.reshape(batch, each)
    chosen = value.argmin(1)
    rows = np.arange(batch)
    return theta.reshape(batch, each, size)[rows, chosen], value[rows, chosen]


def search_wide(problem: Problem, y: np.ndarray) -> tuple[np.ndarray, float]:
    """The best fit to one set of losses, (2K + 1,), and its objective.

    All points of the grid are polished. Then, from each of the lowest minima found, one
    exponent at a time leaps to each value of ``LEAPS``, until no leap helps: data that
    follow a law have one minimum, but data that follow none have many.
    """
    w = np.ones((1, len(y)))
    k = len(problem.z)
    exponents = k + np.flatnonzero(problem.free[k : 2 * k])
    trial = screen(problem, y, w, keep=len(GRID) ** k)[0]
    lowest, minima = np.inf, np.empty((0, trial.shape[1]))
    for _ in range(10):
        found, error = minimise(problem, trial, y, w)
        order = np.argsort(error)
        if error[order[0]] >= lowest * (1 - 1e-9):
            break
        lowest = float(error[order[0]])
        apart = np.r_[True, np.diff(error[order]) > 1e-4 * lowest]
        minima = found[order[apart]][:BEAM]
        if not len(exponents):
            break
        leaps = len(exponents) * len(LEAPS)
        trial = np.repeat(minima, leaps, axis=0)
        rows, moved = np.arange(len(trial)), np.tile(np.repeat(exponents, len(LEAPS)), len(minima))
        trial[rows, moved] = np.tile(LEAPS, len(exponents) * len(minima))
        absent = problem.free[moved - k] & (trial[rows, moved - k] <= 0)
        trial[rows[absent], moved[absent] - k] = 0.05 * np.exp(y.mean())
    return minima[0], lowest


def covariance(problem: Problem, theta: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Covariance of the law's own parameters; 0 for fixed ones, NaN at an edge."""
    k, n = problem.z.shape
    unit, term, prediction, r, _ = evaluate(problem, theta[None], y, np.ones((1, n)))
    slopes = jacobian(problem, unit, term, prediction)[0]
    edge = problem.free & ((theta <= 0) | (theta >= problem.upper))
    edge[k : 2 * k] |= problem.free[k : 2 * k] & (theta[:k] <= 0)  # no term, no exponent
    used = problem.free & ~edge
    cov = np.zeros((len(theta), len(theta)))
    dof = n - used.sum()
    inlier = np.abs(r[0]) <= problem.delta
    if used.any() and dof > 0 and inlier.any():
        # For the Huber loss, the usual M-estimate: E[psi^2] / E[psi']^2.
        psi = np.clip(r[0], -problem.delta, problem.delta)
        scale = (psi**2).sum() / dof / inlier.mean() ** 2
        part = slopes[used]
        norm = np.linalg.norm(part, axis=1)
        scaled = (part / norm[:, None]) @ (part / norm[:, None]).T
        singular = np.linalg.cond(scaled) > 1e13
        inverse = np.full_like(scaled, np.inf) if singular else np.linalg.inv(scaled)
        cov[np.ix_(used, used)] = scale * inverse / np.outer(norm, norm)
    else:
        cov[np.ix_(used, used)] = np.nan
    change = np.eye(len(theta))
    size = np.exp(theta[k : 2 * k] * problem.centre)
    c, a = np.arange(k), np.arange(k, 2 * k)
    change[c, c], change[c, a] = size, theta[:k] * size * problem.centre
    with np.errstate(invalid="ignore"):
        cov = change @ cov @ change.T
    cov[edge], cov[:, edge] = np.nan, np.nan
    return cov
