"""Three longer runs of the toy networks at the size that the chapters train live.

``phase``: how does the exponent of depth change between independent and tied teacher
layers? Test losses for several ``rho`` and temperatures (figure 3 of arXiv 2602.05970 has
``rho`` of 0 and 1 only). About eight minutes on one core.

``budgets``: does the exponent stay where the live run finds it? Every number of steps is
a run of its own, whose learning rate decays at its own end. About three minutes.

``noise``: are students of peaked targets held back by too few steps, or by noisy
gradients? Four times the steps against four times the batch. About three minutes.

    python tools/archive_toy_phase.py phase --checkpoint /tmp/toy_phase.pt
    python tools/archive_toy_phase.py budgets
    python tools/archive_toy_phase.py noise

Each writes ``results/toy_NAME.parquet``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from depthutil import _arguments, archive, toy

RESULTS = Path(__file__).resolve().parent.parent / "results"
RHOS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
TEMPERATURES = tuple(np.logspace(-1, 0, 4).tolist())
BUDGETS = (500, 1_000, 2_000, 4_000, 8_000)
NOISE = ((128, 1), (512, 1), (128, 4), (512, 4))  # batch, and steps over those of the first


def describe(config: toy.ToyConfig) -> str:
    return (
        f"width {config.width}, teacher of {config.teacher_depth} layers, batch {config.batch}, "
        f"{len(config.teachers)} teachers"
    )


def phase(out: Path, steps: int, checkpoint: Path | None) -> Path:
    config = toy.ToyConfig.paper(
        "fig3b",
        "demo",
        rhos=RHOS,
        temperatures=TEMPERATURES,
        steps=steps,
        test_every=max(steps // 10, 1),
    )
    result = toy.train(config, checkpoint=checkpoint, progress=True, threads=1)
    grid = f"{len(RHOS)} values of ρ, {len(TEMPERATURES)} temperatures"
    return result.save(out, f"{describe(config)}, {steps:,} steps, {grid}")


def budgets(out: Path, steps: int) -> Path:
    frames, seconds = [], 0.0
    for budget in [b for b in BUDGETS if b <= steps]:
        config = toy.ToyConfig.paper(
            "fig3b", "demo", temperatures=(1.0,), steps=budget, test_every=budget
        )
        result = toy.train(config, progress=True, threads=1)
        frames.append(result.losses)
        seconds += result.wall_seconds
    return archive.save(
        pd.concat(frames, ignore_index=True),
        out,
        config=asdict(config) | {"steps": [int(frame["step"].max()) for frame in frames]},
        seeds={"teachers": list(config.teachers), "students": list(config.seeds)},
        scale=f"{describe(config)}, temperature 1, {len(frames)} numbers of steps",
        wall_seconds=seconds,
    )


def noise(out: Path, steps: int) -> Path:
    frames, seconds = [], 0.0
    for batch, longer in NOISE:
        config = toy.ToyConfig.paper(
            "fig3b",
            "demo",
            rhos=(0.0,),
            temperatures=(0.1,),
            depths=(2, 3, 5, 8),
            head="given",
            temperature_on="both",
            batch=batch,
            steps=longer * steps,
            test_every=longer * steps,
        )
        result = toy.train(config, progress=True, threads=1)
        frames.append(result.losses.assign(batch=batch))
        seconds += result.wall_seconds
    return archive.save(
        pd.concat(frames, ignore_index=True),
        out,
        config=asdict(config) | {"batch and steps": [[b, n * steps] for b, n in NOISE]},
        seeds={"teachers": list(config.teachers), "students": list(config.seeds)},
        scale=f"width {config.width}, teacher of {config.teacher_depth} layers, "
        f"{len(config.teachers)} teachers, temperature 0.1, the teacher's head given",
        wall_seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", choices=("phase", "budgets", "noise"))
    parser.add_argument(
        "--steps", type=_arguments.count, help="default: 3,000, for budgets 8,000, for noise 1,500"
    )
    parser.add_argument(
        "--checkpoint", type=_arguments.file, help="of phase, which goes on from it"
    )
    parser.add_argument("--out", type=_arguments.file)
    options = parser.parse_args()
    out = options.out or RESULTS / f"toy_{options.run}.parquet"
    if options.run == "phase":
        print(phase(out, options.steps or 3_000, options.checkpoint))
    elif options.run == "budgets":
        print(budgets(out, options.steps or 8_000))
    else:
        print(noise(out, options.steps or 1_500))


if __name__ == "__main__":
    main()
