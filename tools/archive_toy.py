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
import fcntl
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from depthutil import toy

ROOT = Path(__file__).resolve().parent.parent

# rho = 1 first, because it is the slow one to learn; teacher by teacher, because one
# teacher at both rhos is a result already.
RUNS = {
    "fig3b": toy.ToyConfig.paper("fig3b", "colab", rhos=(1.0, 0.0)),
    "fig4": toy.ToyConfig.paper("fig4", "colab"),
    "fig5": toy.ToyConfig.paper("fig5", "colab", rhos=(1.0, 0.0)),
    "second_order": toy.ToyConfig.paper("second_order", "colab", rhos=(1.0, 0.0)),
    "shallow_teacher": toy.ToyConfig.paper("shallow_teacher", "colab", rhos=(1.0, 0.0)),
}


@contextmanager
def claimed(path: Path):
    """Yield whether this process may train the shard; a claim ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def run(config: toy.ToyConfig, folder: Path, wanted: list[int] | None, threads: int) -> None:
    """Train those of the wanted shards that no other process is training."""
    for i, shard in enumerate(toy.shards(config)):
        path = folder / f"{toy.name(shard)}.pt"
        if wanted is not None and i not in wanted:
            continue
        with claimed(path) as ours:
            print(f"shard {i}: {toy.name(shard)}" + ("" if ours else " is taken"), flush=True)
            if ours:
                options = {"checkpoint_seconds": 120, "progress": True, "threads": threads}
                toy.train(shard, checkpoint=path, **options)


def finished(config: toy.ToyConfig, folder: Path, students: bool = False):
    """Results of the finished shards, and a line on each of the others."""
    done, rest = [], []
    for i, shard in enumerate(toy.shards(config)):
        path = folder / f"{toy.name(shard)}.pt"
        step = 0
        if path.exists():
            step = torch.load(path, map_location="cpu", weights_only=True)["step"]
        if step >= shard.steps:
            done.append(toy.train(shard, checkpoint=path, students=students))
        else:
            rest.append(f"shard {i} ({toy.name(shard)}): step {step:,} of {shard.steps:,}")
    return done, rest


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("run", "status", "assemble"))
    parser.add_argument("experiment", choices=RUNS)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are")
    parser.add_argument("--shards", type=int, nargs="*", help="numbers of shards; all by default")
    parser.add_argument("--steps", type=int, help="instead of the run's own number of steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: results/toy_EXPERIMENT.parquet")
    args = parser.parse_args(arguments)
    config = RUNS[args.experiment]
    if args.steps is not None:
        config = toy.replace(config, steps=args.steps)
    if args.action == "run":
        run(config, args.folder, args.shards, args.threads)
        return
    done, rest = finished(config, args.folder)
    print(f"{len(done)} of {len(done) + len(rest)} shards are finished", *rest, sep="\n")
    if args.action == "status":
        return
    if not done:
        sys.exit("nothing to assemble")
    result = toy.merge(done)
    c = result.config
    scale = (
        f"width {c.width}, teacher of {c.teacher_depth} layers, batch {c.batch}, "
        f"{c.steps:,} steps, {len(c.teachers)} teachers, {len(c.temperatures)} temperatures"
        + (f"; {len(done)} of {len(done) + len(rest)} parts of the grid" if rest else "")
    )
    path = result.save(args.output or ROOT / "results" / f"toy_{args.experiment}.parquet", scale)
    print(f"{path}: {len(result.losses)} rows")


if __name__ == "__main__":
    main()
