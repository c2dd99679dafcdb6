"""Train the archived toy networks, a shard at a time, and put finished shards into results/.

A shard is one teacher at one rho. Each keeps a checkpoint in a folder outside the
repository, so that a run can be killed at any moment, continued, or shared: several
processes, or machines with one file system, take different shards.

    python tools/archive_toy.py run fig3b --folder /scratch/toy
    python tools/archive_toy.py run fig3b --folder /scratch/toy --shards 2 3
    python tools/archive_toy.py status fig3b --folder /scratch/toy
    python tools/archive_toy.py assemble fig3b --folder /scratch/toy
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from depthutil import _arguments, _runs, toy

ROOT = Path(__file__).resolve().parent.parent

# rho = 1 first, because it is the slow one to learn; teacher by teacher, because one
# teacher at both rhos is a result already.
RUNS = {
    "fig3b": toy.ToyConfig.paper("fig3b", "colab", rhos=(1.0, 0.0)),
    "fig4": toy.ToyConfig.paper("fig4", "colab", rhos=(1.0, 0.0), temperatures=(0.01, 0.1, 1.0)),
    "fig5": toy.ToyConfig.paper("fig5", "colab", rhos=(1.0, 0.0)),
    "second_order": toy.ToyConfig.paper("second_order", "colab", rhos=(1.0, 0.0)),
    "shallow_teacher": toy.ToyConfig.paper("shallow_teacher", "colab", rhos=(1.0, 0.0)),
}


def run(config: toy.ToyConfig, folder: Path, wanted: list[int] | None, threads: int) -> None:
    """Train those of the wanted shards that no other process is training."""
    for i, shard in enumerate(toy.shards(config)):
        path = folder / f"{toy.slug(shard)}.pt"
        if wanted is not None and i not in wanted:
            continue
        with _runs.claimed(path) as ours:
            print(f"shard {i}: {toy.slug(shard)}" + ("" if ours else " is taken"), flush=True)
            if ours:
                options = {"checkpoint_seconds": 120, "progress": True, "threads": threads}
                toy.train(shard, checkpoint=path, **options)


def reached(config: toy.ToyConfig, folder: Path) -> dict[int, toy.ToyResult]:
    """Results so far of the shards that have begun, by number."""
    paths = {i: folder / f"{toy.slug(shard)}.pt" for i, shard in enumerate(toy.shards(config))}
    return {i: toy.ToyResult.from_checkpoint(p) for i, p in paths.items() if p.exists()}


def assemble(config: toy.ToyConfig, results: dict[int, toy.ToyResult], output: Path) -> None:
    """Save the shards that got to the configuration's last step, and say how many."""
    done = [r for r in results.values() if config.steps in set(r.losses["step"])]
    if not done:
        sys.exit(f"no shard has reached step {config.steps:,}: give fewer --steps")
    result = toy.merge([r.until(config.steps) for r in done])
    c, total = result.config, len(toy.shards(config))
    scale = (
        f"width {c.width}, teacher of {c.teacher_depth} layers, batch {c.batch}, "
        f"{c.steps:,} steps, teachers {list(c.teachers)}, {len(c.temperatures)} temperatures"
        + (f"; {len(done)} of {total} parts of the grid" if len(done) < total else "")
    )
    print(f"{result.save(output, scale)}: {len(result.losses)} rows; {scale}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("run", "status", "assemble"))
    parser.add_argument("experiment", choices=RUNS)
    parser.add_argument(
        "--folder", type=_arguments.folder, required=True, help="where checkpoints are"
    )
    parser.add_argument(
        "--shards", type=_arguments.index, nargs="*", help="numbers of shards; all by default"
    )
    parser.add_argument(
        "--steps", type=_arguments.count, help="instead of the run's own number of steps"
    )
    parser.add_argument("--threads", type=_arguments.count, default=1)
    parser.add_argument(
        "--output", type=_arguments.file, help="default: results/toy_EXPERIMENT.parquet"
    )
    args = parser.parse_args(arguments)
    config = RUNS[args.experiment]
    if args.steps is not None:
        config = replace(config, steps=args.steps)
    _arguments.within(parser, "--shards", args.shards, len(toy.shards(config)))
    if args.action == "run":
        run(config, args.folder, args.shards, args.threads)
        return
    results = reached(config, args.folder)
    for i, shard in enumerate(toy.shards(config)):
        step = results[i].losses["step"].max() if i in results else 0
        hours = results[i].wall_seconds / 3600 if i in results else 0
        print(f"shard {i} ({toy.slug(shard)}): tested at step {step:,}, {hours:.1f} h")
    if args.action == "assemble":
        output = args.output or ROOT / "results" / f"toy_{args.experiment}.parquet"
        assemble(config, results, output)


if __name__ == "__main__":
    main()
