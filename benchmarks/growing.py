"""Does growing reach the baseline's loss with less compute? Operations, time and loss.

    OMP_NUM_THREADS=1 python benchmarks/growing.py --rounds 3

*Time*: each round trains a few steps at every depth that a growing model passes through, and at
full depth, by turns in one process, and adds them up with the lengths of the stages. *Operations*
are counted. *Loss* is read from the archive ``results/ladder_designs.parquet``: two baselines, of
which the short one has the operations of a grown model, span a line of loss against the logarithm
of operations; how many operations would the baseline have needed for a grown model's loss? Each
seed gives one such ratio; printed are the median, the smallest and the largest.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import replace

import torch

from depthutil import _arguments, archive, ladder
from depthutil.ladder.training import Trainer, compiler


def seconds(trainer: Trainer, steps: int) -> float:
    """Of one step, in the mean."""
    begin = time.perf_counter()
    for _ in range(steps):
        trainer.advance()
    return (time.perf_counter() - begin) / steps


def measure(rounds: int, steps: int, depth: int) -> list[float]:
    """Time at full depth over time of the whole schedule, in each round."""
    config = ladder.LadderConfig(
        depths=(depth,), steps=10**6, test_every=10**6, cooldown=0.15, warmup=10
    )
    design, text = ladder.DESIGNS["midas"], ladder.corpus()
    depths = design.depths(depth)
    ends = design.ends(depth, config.steps)
    shares = [(e - b) / ends[-1] for b, e in zip([0, *ends], ends, strict=False)]
    trainers = [
        Trainer(
            replace(config, depths=(d,)), d, 0, 3e-3, text, torch.device("cpu"), compiler(), False
        )
        for d in depths
    ]
    for trainer in trainers:  # compiled, and the memory found
        seconds(trainer, 2)
    ratios = []
    for _ in range(rounds):
        each = [seconds(trainer, steps) for trainer in trainers]
        ratios.append(each[-1] / sum(s * t for s, t in zip(shares, each, strict=True)))
    return ratios


def equivalents(way: str) -> list[float]:
    """Operations that the baseline needs for a grown model's loss, over those it had; by seed."""
    last = archive.load("results/ladder_designs.parquet").frame.sort_values("step")
    at = last.groupby(["seed", "design"]).last()[["held_out_loss", "flops"]]
    found = []
    for _, some in at.groupby("seed"):
        here = some.droplevel("seed")
        if {way, "short", "baseline"} <= set(here.index):
            loss, spent = here["held_out_loss"], here["flops"]
            slope = (loss["baseline"] - loss["short"]) / math.log(
                spent["baseline"] / spent["short"]
            )
            more = (loss[way] - loss["baseline"]) / slope
            found.append(spent["baseline"] * math.exp(more) / spent[way])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=_arguments.count, default=3)
    parser.add_argument("--steps", type=_arguments.count, default=10, help="in each round")
    parser.add_argument("--depth", type=_arguments.count, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain = ladder.LadderConfig(depths=(args.depth,), cooldown=0.15)
    grown = replace(plain, design=ladder.DESIGNS["midas"])
    counted = plain.flops(args.depth) / grown.flops(args.depth)
    print(f"operations: full depth over growing {counted:.2f}")
    for name, ratios in (
        ("time", measure(args.rounds, args.steps, args.depth)),
        *((f"equal loss, {way}", equivalents(way)) for way in ("midas", "lidas")),
    ):
        ratios = sorted(ratios)
        print(
            f"{name}: ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}; "
            f"{len(ratios)} {'rounds' if name == 'time' else 'seeds'})"
        )


if __name__ == "__main__":
    main()
