"""Train the depth ladder, a model at a time, and put finished models into models/ and results/.

Each model keeps a checkpoint in a folder outside the repository, so that a run can be killed at
any moment, continued, or shared: several processes, or machines with one file system, take
different models. One process for each core is fastest.

    python tools/train_ladder.py run --folder /scratch/ladder --jobs 2
    python tools/train_ladder.py run --folder /scratch/ladder --shards 2 3
    python tools/train_ladder.py run --folder /scratch/ladder --scale gpu
    python tools/train_ladder.py status --folder /scratch/ladder
    python tools/train_ladder.py assemble --folder /scratch/ladder

A ladder that was trained otherwise adds its losses under a name of its own, for
``depthutil.ladder.curves("short")``:

    python tools/train_ladder.py run --folder /scratch/ladder --steps 1500
    python tools/train_ladder.py assemble --folder /scratch/ladder --steps 1500 --losses short
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

# One process a core: the compiler of the blocks keeps to it too.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pandas as pd
from archive_toy import ROOT

from depthutil import _arguments, _runs, ladder


def run(config: ladder.LadderConfig, args: argparse.Namespace, text: ladder.Corpus) -> int:
    """Train those of the wanted models that no other process is training; say how many failed."""
    failed = 0
    options = {"text": text, "progress": True, "device": args.device, "threads": args.threads}
    options |= {"compiled": args.compiled, "autocast": args.autocast}
    for i, (depth, seed) in enumerate(ladder.shards(config)):
        if args.shards is not None and i not in args.shards:
            continue
        path = args.folder / f"{ladder.slug(config, depth, seed)}.pt"
        with _runs.claimed(path) as ours:
            name = config.name(depth, seed)
            print(f"shard {i}: {name}" + ("" if ours else " is taken"), flush=True)
            if not ours:
                continue
            try:
                rate = search(config, depth, args.folder, options)[0]
                ladder.train(config, depth, seed, learning_rate=rate, checkpoint=path, **options)
            except FloatingPointError as error:
                failed += 1
                print(f"shard {i}: {error}", file=sys.stderr, flush=True)
    return failed


def search(config: ladder.LadderConfig, depth: int, folder: Path, options: dict):
    """The best learning rate of a depth; whoever needs it while it is being sought waits."""
    with _runs.claimed(folder / f"search_{config.name(depth, 0)}.json", wait=True):
        return ladder.best_rate(config, depth, folder, **options)


def share(jobs: int, arguments: list[str]) -> int:
    """Run the same command in several processes."""
    command = [sys.executable, __file__, *arguments, "--jobs", "1"]
    processes = [subprocess.Popen(command) for _ in range(jobs)]
    try:
        return max(process.wait() for process in processes)
    except KeyboardInterrupt:  # which the processes got too; their checkpoints remain
        return max(process.wait() for process in processes)


def reached(config: ladder.LadderConfig, folder: Path, text: ladder.Corpus):
    """The models that have begun, by number."""
    shards = enumerate(ladder.shards(config))
    paths = {i: folder / f"{ladder.slug(config, *shard)}.pt" for i, shard in shards}
    return {
        i: ladder.LadderModel.from_checkpoint(path, text)
        for i, path in paths.items()
        if path.exists()
    }


def status(config: ladder.LadderConfig, found: dict[int, ladder.LadderModel]) -> None:
    for i, shard in enumerate(ladder.shards(config)):
        line = f"shard {i} ({config.name(*shard)}): "
        if i not in found:
            print(line + "not begun")
            continue
        model = found[i]
        loss = f"held-out loss {model.losses['held_out_loss'].iloc[-1]:.4f}, " if model.step else ""
        hours = model.wall_seconds / 3600
        print(f"{line}tested at step {model.step:,} of {config.steps:,}, {loss}{hours:.2f} h")


def assemble(config: ladder.LadderConfig, found: dict, args, text: ladder.Corpus) -> None:
    done = [model for model in found.values() if model.finished]
    if not done:
        sys.exit(f"no model in {args.folder} is finished: run goes on with them, status shows them")
    total = len(ladder.shards(config))
    scale = config.scale + (f"; {len(done)} of {total} models" if len(done) < total else "")
    searches = None
    if len(config.learning_rates) > 1:
        options = {"text": text, "device": args.device, "threads": args.threads}
        depths = sorted({model.settings["depth"] for model in done})
        tables = [search(config, depth, args.folder, options)[1] for depth in depths]
        searches = pd.concat(tables, ignore_index=True)
    about = {"scale": scale, "searches": searches, "label": args.losses or ""}
    models = None if args.losses else args.models
    for path in ladder.assemble(done, text, models, args.results, **about):
        print(path)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("run", "status", "assemble"))
    parser.add_argument(
        "--folder", type=_arguments.folder, required=True, help="where checkpoints are"
    )
    parser.add_argument("--scale", default="cpu", help="demo, cpu, gpu or gpu-wide")
    parser.add_argument("--depths", type=_arguments.count, nargs="+", help="instead of the scale's")
    parser.add_argument("--seeds", type=_arguments.index, nargs="+", help="instead of the scale's")
    parser.add_argument("--width", type=_arguments.count, help="instead of the scale's")
    parser.add_argument("--steps", type=_arguments.count, help="instead of the scale's")
    parser.add_argument(
        "--rates", type=_arguments.rate, nargs="+", help="learning rates to choose from"
    )
    parser.add_argument(
        "--shards", type=_arguments.index, nargs="*", help="numbers of models; all by default"
    )
    parser.add_argument(
        "--jobs", type=_arguments.count, default=1, help="processes that share the work"
    )
    parser.add_argument("--threads", type=_arguments.count, default=1)
    parser.add_argument(
        "--device", type=_arguments.device, help="a GPU where there is one, by default"
    )
    parser.add_argument("--autocast", action="store_true", help="products in bfloat16")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument(
        "--text", type=_arguments.folder, help="a folder instead of the standard library"
    )
    parser.add_argument("--losses", metavar="LABEL", help="assemble the losses alone, as LABEL")
    parser.add_argument("--models", type=_arguments.folder, default=ROOT / "models")
    parser.add_argument("--results", type=_arguments.folder, default=ROOT / "results")
    args = parser.parse_args(arguments)
    given = {"depths": args.depths, "seeds": args.seeds, "learning_rates": args.rates}
    changes = {name: tuple(value) for name, value in given.items() if value is not None}
    whole = {"width": args.width, "steps": args.steps}
    changes |= {name: value for name, value in whole.items() if value is not None}
    try:
        config = ladder.LadderConfig.at(args.scale, **changes)
        _arguments.within(parser, "--shards", args.shards, len(ladder.shards(config)))
        if args.action == "run" and args.jobs > 1:
            sys.exit(share(args.jobs, arguments))
        text = ladder.corpus(args.text)
        if args.action == "run":
            failed = run(config, args, text)
            sys.exit(f"{failed} models could not be trained, see above" if failed else 0)
        found = reached(config, args.folder, text)
        status(config, found)
        if args.action == "assemble":
            assemble(config, found, args, text)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
