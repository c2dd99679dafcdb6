"""Do narrow networks find folds by themselves, with more seeds and ten times the steps?

Writes ``results/nested_steps.parquet``: loss of every network by folds, depth, seed and
way of training. About five minutes on one core::

    python tools/archive_nested_steps.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
import torch

from depthutil import _arguments, archive
from depthutil.regimes import learn_folds

FOLDS = (2, 3, 4)
DEPTHS = (1, 2, 3, 4, 5, 6)
WAYS = {  # half the steps of a stage; from scratch, all stages' steps go to the full target
    "curriculum": {"curriculum": True, "steps": 250},
    "from scratch": {"curriculum": False, "steps": 250},
    "from scratch, 10 × steps": {"curriculum": False, "steps": 2500},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=_arguments.count, default=32, help="networks of each kind")
    parser.add_argument("--out", type=_arguments.file, default=Path("results/nested_steps.parquet"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    frames = []
    for way, settings in WAYS.items():
        for folds in FOLDS:
            learned = learn_folds(folds, DEPTHS, seeds=options.seeds, **settings)
            frames.append(learned.frame.assign(training=way))
            print(way, folds, f"{time.perf_counter() - start:.0f} s", flush=True)
    archive.save(
        pd.concat(frames, ignore_index=True),
        options.out,
        config={"folds": FOLDS, "depths": DEPTHS, "networks": options.seeds, "ways": WAYS},
        seeds=0,
        scale=f"{options.seeds} networks of each kind",
        wall_seconds=time.perf_counter() - start,
    )


if __name__ == "__main__":
    main()
