"""Train toy students for many lengths of time, and put their losses into results/.

A run whose learning rate falls at its end is the run of constant rate up to there. So one
long run of constant rate, the trunk, is shared by runs of all lengths: at four fifths of
each length a branch leaves it and lets its rate fall, as if it had been alone from the
start. Seven lengths from 500 to 32,000 steps then cost 38,400 steps instead of 63,500.

    python tools/archive_toy_patience.py run --folder /scratch/patience
    python tools/archive_toy_patience.py run --folder /scratch/patience --shards 2 3
    python tools/archive_toy_patience.py assemble --folder /scratch/patience

A shard is one teacher at one rho; a killed run goes on from its checkpoints.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from archive_toy import ROOT

from depthutil import _arguments, _runs, archive, toy

LENGTHS = (500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000)
CONFIG = toy.ToyConfig.paper(
    "fig4",
    "demo",
    rhos=(1.0, 0.0),
    temperatures=(0.1, 1.0),
    batch=256,
    steps=LENGTHS[-1],
    test_every=100,
)


def trunk(shard: toy.ToyConfig, length: int) -> toy.ToyConfig:
    """The run of constant rate, as far as a branch of this length needs it."""
    return replace(shard, decay=False, steps=length * 4 // 5)


def branch(shard: toy.ToyConfig, length: int) -> toy.ToyConfig:
    """The run of this length, whose rate falls over its last fifth; tested at its end."""
    return replace(shard, steps=length, test_every=length)


def path(config: toy.ToyConfig, folder: Path) -> Path:
    return folder / f"{toy.slug(config)}.pt"


def leave(source: Path, config: toy.ToyConfig, target: Path) -> None:
    """Let a checkpoint of the trunk be one of a branch."""
    state = torch.load(source, weights_only=True)
    state |= {"config": json.dumps(asdict(config)), "records": []}
    with archive.replacing(target) as partial:
        torch.save(state, partial)


def run(folder: Path, wanted: list[int] | None) -> None:
    """Train those of the wanted shards that no other process is training."""
    options = {"checkpoint_seconds": 120, "progress": True, "threads": 1}
    for i, shard in enumerate(toy.shards(CONFIG)):
        if wanted is not None and i not in wanted:
            continue
        stem = path(trunk(shard, LENGTHS[0]), folder)
        with _runs.claimed(stem) as ours:
            print(f"shard {i}: {stem.stem}" + ("" if ours else " is taken"), flush=True)
            for length in LENGTHS if ours else ():
                end = path(branch(shard, length), folder)
                if not end.exists():
                    toy.train(trunk(shard, length), checkpoint=stem, **options)
                    leave(stem, branch(shard, length), end)
                toy.train(branch(shard, length), checkpoint=end, **options)


def assemble(folder: Path, output: Path) -> None:
    """Save trunk and branches of the shards that are done."""
    frames, seconds, done = [], 0.0, []
    for shard in toy.shards(CONFIG):
        ends = [path(branch(shard, length), folder) for length in LENGTHS]
        if not all(end.exists() for end in ends):
            continue
        results = [toy.ToyResult.from_checkpoint(end) for end in ends]
        if any(r.losses.empty for r in results):
            continue
        stem = toy.ToyResult.from_checkpoint(path(trunk(shard, LENGTHS[0]), folder))
        frames += [stem.losses.assign(annealed=False)]
        frames += [r.losses.assign(annealed=True) for r in results]
        # The last branch's time includes the trunk's; of the others, only their own fifth does.
        fifths = (r.wall_seconds / 5 for r in results[:-1])
        seconds += results[-1].wall_seconds + sum(fifths)
        done.append(shard)
    if not done:
        sys.exit(f"{folder} holds no finished shard")
    total, teachers = len(toy.shards(CONFIG)), sorted({t for s in done for t in s.teachers})
    table = pd.concat(frames).sort_values(["annealed", "step", *toy.GRID], ignore_index=True)
    saved = archive.save(
        table,
        output,
        config=asdict(CONFIG) | {"teachers": teachers, "steps": list(LENGTHS)},
        seeds={"teachers": teachers, "students": list(CONFIG.seeds)},
        scale=f"width {CONFIG.width}, teacher of {CONFIG.teacher_depth} layers, batch "
        f"{CONFIG.batch}, {len(teachers)} teachers, {len(CONFIG.temperatures)} temperatures, "
        f"{len(LENGTHS)} lengths of training up to {LENGTHS[-1]:,} steps"
        + (f"; {len(done)} of {total} parts of the grid" if len(done) < total else ""),
        wall_seconds=seconds,
    )
    print(f"{saved}: {len(table)} rows")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("run", "assemble"))
    parser.add_argument(
        "--folder", type=_arguments.folder, required=True, help="where checkpoints are"
    )
    parser.add_argument(
        "--shards", type=_arguments.index, nargs="*", help="numbers of shards; all by default"
    )
    parser.add_argument(
        "--output", type=_arguments.file, default=ROOT / "results" / "toy_patience.parquet"
    )
    args = parser.parse_args(arguments)
    _arguments.within(parser, "--shards", args.shards, len(toy.shards(CONFIG)))
    if args.action == "run":
        run(args.folder, args.shards)
    else:
        assemble(args.folder, args.output)


if __name__ == "__main__":
    main()
