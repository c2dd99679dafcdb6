"""The exact fit of the scaling law against the same law fitted by Adam in PyTorch.

Run ``python benchmarks/scaling.py``; ``--long`` adds 50,000 Adam steps. One process
times both on the 203 Chinchilla runs, with one thread for PyTorch. Adam minimises the
same objective in the same parametrisation as ``scaling.adam_path``, from the same
start, in double precision, after a warm-up of 100 steps. A bootstrap refit by Adam
costs what its fit costs: as many steps over as many runs.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
import torch

from depthutil import _arguments, scaling


def adam(runs: pd.DataFrame, steps: int) -> tuple[pd.Series, float]:
    """Estimates and objective after so many Adam steps in PyTorch."""
    x = torch.tensor(np.log(runs[["width", "depth", "tokens"]].to_numpy()).T)
    y = torch.tensor(np.log(runs["loss"].to_numpy()))
    log_c = torch.tensor(np.log([400.0, 4.0, 400.0]), requires_grad=True)
    alpha = torch.ones(3, dtype=torch.float64, requires_grad=True)
    floor = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([log_c, alpha, floor], lr=3e-3)

    def objective() -> torch.Tensor:
        terms = torch.exp(log_c[:, None] - alpha[:, None] * x)
        return ((torch.log(terms.sum(0) + floor) - y) ** 2).mean()

    for _ in range(steps):
        optimiser.zero_grad(set_to_none=True)
        objective().backward()
        optimiser.step()
    with torch.no_grad():
        values = torch.cat([log_c.exp(), alpha, floor[None]]).numpy()
        names = scaling.fit(runs).params.index
        return pd.Series(values, index=names), 100 * float(objective())


def timed(function, *args, repeats: int = 1):
    """The answer, and the median of the seconds it took."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        answer = function(*args)
        seconds.append(time.perf_counter() - start)
    return answer, float(np.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="also 50,000 Adam steps")
    parser.add_argument(
        "--draws", type=_arguments.count, default=200, help="bootstrap refits (200)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)

    runs = scaling.drop_highest(scaling.load_chinchilla())
    adam(runs, 100)
    exact = scaling.fit(runs)
    exact.bootstrap(10)

    exact, fit_seconds = timed(scaling.fit, runs, repeats=5)
    draws, seconds = timed(exact.bootstrap, args.draws, repeats=5)
    rows = {
        "exact fit": (1, fit_seconds, exact.objective, exact.params["alpha_depth"]),
        "bootstrap, exact": (args.draws, seconds, np.nan, draws["alpha_depth"].median()),
    }
    for steps in (10_000, 50_000) if args.long else (10_000,):
        (params, objective), slow = timed(adam, runs, steps)
        rows[f"Adam, {steps:,} steps"] = (1, slow, objective, params["alpha_depth"])
    table = pd.DataFrame.from_dict(
        rows, orient="index", columns=["fits", "seconds", "objective", "alpha_depth"]
    )
    table.insert(2, "seconds per fit", table["seconds"] / table["fits"])
    table["times the exact refit"] = (
        table["seconds per fit"] / table.loc["bootstrap, exact", "seconds per fit"]
    )
    print(table.to_string(float_format=lambda value: f"{value:.6g}"))
    ratio = table.loc["Adam, 10,000 steps", "times the exact refit"]
    print(f"\nExact refits are {ratio:,.0f} times faster than refits by 10,000 Adam steps;")
    excess = table.loc["Adam, 10,000 steps", "objective"] - exact.objective
    print(f"the objective they reach is lower by {excess:.7f}.")


if __name__ == "__main__":
    main()
