"""What a student's step costs: trained one by one as written down, and as a stacked grid.

    python benchmarks/toy.py                # the paper's sizes, 4 temperatures x 6 depths
    python benchmarks/toy.py --threads 2 --batch 256

Both train the same students on the same data, in this one run, taking turns, so that
whatever else the machine does slows both. The first steps of each turn are not counted.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from depthutil import toy


class Watch:
    """Seconds between calls."""

    def __init__(self, skip: int):
        self.skip, self.calls, self.seconds = skip, 0, []

    def __call__(self, *_) -> None:
        now = time.perf_counter()
        if self.calls > self.skip:
            self.seconds.append(now - self.last)
        self.last, self.calls = now, self.calls + 1


def plain(config: toy.ToyConfig, depth: int) -> list[float]:
    """Seconds of the steps of one student, teacher's pass included, trained by itself."""
    watch = Watch(skip=1)
    temperature = config.temperatures[0]
    toy.train_plainly(config, teacher=0, rho=0.0, temperature=temperature, depth=depth, watch=watch)
    return watch.seconds


def stacked(config: toy.ToyConfig) -> list[float]:
    """Seconds of the steps of the whole grid."""
    watch = Watch(skip=1)
    toy.train(config, progress=watch, device="cpu")
    return watch.seconds[:-1]  # a test follows the last step


def table(config: toy.ToyConfig, rounds: int) -> pd.DataFrame:
    """Milliseconds a student-step for both, median and least disturbed."""
    alone = {depth: [] for depth in config.depths}
    grid = []
    for _ in range(rounds):
        for depth in config.depths:
            alone[depth] += plain(config, depth)
        grid += stacked(config)
    rows = []
    for name, pick in (("median", np.median), ("least disturbed", np.min)):
        # Every temperature costs a student of one depth the same: the mean over depths
        # is the mean over the grid.
        one = float(np.mean([pick(seconds) for seconds in alone.values()]))
        many = float(pick(grid)) / len(config.temperatures) / len(config.depths)
        rows.append(
            {
                "step": name,
                "one by one, ms": 1e3 * one,
                "stacked grid, ms": 1e3 * many,
                "times cheaper": one / many,
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, nargs="+", default=[1024])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    base = toy.ToyConfig.paper(
        "fig3b",
        rhos=(0.0,),
        teachers=(0,),
        temperatures=(0.01, 0.05, 0.2, 1.0),
        steps=7,
        test_every=1000,
        test_batches=1,
    )
    print(f"{platform.machine()}, {os.cpu_count()} cores, PyTorch {torch.__version__}")
    print(
        f"width {base.width}, teacher of {base.teacher_depth} layers, depths {base.depths}, "
        f"{len(base.temperatures)} temperatures; a step of one student:"
    )
    parts = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.batch:
            part = table(replace(base, batch=batch), args.rounds)
            part.insert(0, "batch", batch)
            part.insert(0, "threads", threads)
            parts.append(part)
    print(pd.concat(parts, ignore_index=True).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
