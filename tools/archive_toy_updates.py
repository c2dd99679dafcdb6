"""Train toy students, measure how each uses its depth, and put the tables into results/.

Students of independent (rho = 0) and tied (rho = 1) teachers learn by mean squared error.
At several moments of training each is measured from outside (loss), from inside (its
updates along depth, ``depthutil.signatures``) and by intervention (layers left out,
halved, shuffled). A part is one experiment; parts can run side by side.

    python tools/archive_toy_updates.py run main starts --folder /scratch/updates
    python tools/archive_toy_updates.py assemble --folder /scratch/updates

Students of the paper's size are trained by ``tools/archive_toy.py``, patient ones by
``tools/archive_toy_patience.py``; this measures those in their checkpoints that are done.

    python tools/archive_toy_updates.py finished --folder /scratch/toy
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import archive_toy
import archive_toy_patience
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from depthutil import _arguments, _grid, _runs, archive, toy
from depthutil.signatures import diagnose, signature
from depthutil.toy_model import Network, ToyConfig, rms, teacher_weights

ROOT = Path(__file__).resolve().parent.parent
INPUTS = 1000
LARGE = ("fig5", "second_order", "shallow_teacher")  # of tools/archive_toy.py

BASE = ToyConfig(
    width=16,
    vocabulary=1,  # no head: the loss compares states
    teacher_depth=64,
    depths=(4, 6, 8, 12, 16, 24),
    teachers=(0, 1, 2),
    loss="mse",
    head="none",
    batch=128,
    steps=5_000,
    learning_rate=6e-4,
    depth_factor=4.0,
    decay=True,
    test_every=10**9,  # this script tests on its own
    scale="width 16, teacher of 64 layers, batch 128, 5,000 steps",
)


@dataclass(frozen=True)
class Part:
    """One experiment: a grid, where its students start, and when they are measured."""

    config: ToyConfig
    starts: tuple[str, ...] = ("fresh",)
    marks: tuple[int, ...] = field(default=(30, 100, 300, 1_000, 2_000, 5_000))
    units: int | None = None  # hidden units of all layers together, if not 4 · width a layer


PARTS = {
    "main": Part(BASE),
    "starts": Part(
        replace(BASE, depths=(8, 16), rhos=(1.0,)),
        ("teacher", "tied"),
        (0, 100, 300, 1_000, 2_000, 5_000),
    ),
    "long": Part(
        replace(BASE, depths=(8, 16), rhos=(1.0,), teachers=(0, 1), steps=20_000),
        marks=(300, 1_000, 2_000, 5_000, 10_000, 15_000, 20_000),
    ),
    "second_order": Part(
        replace(BASE, depths=(3, 6, 8, 12), order=2, teachers=(0, 1)), marks=(2_000, 5_000)
    ),
    "shallow": Part(replace(BASE, rhos=(0.0,), teacher_depth=8), marks=(2_000, 5_000)),
    "shape": Part(
        replace(BASE, depths=(1, 4, 16), teachers=(0, 1)), marks=(2_000, 5_000), units=1024
    ),
}


def teacher(config: ToyConfig, seed: int, rho: float) -> Network:
    return Network(*teacher_weights(config, seed, rho)[:3])


def build(config: ToyConfig, start: str, hidden: int) -> _grid.Trainer:
    """A grid ready to train; students start fresh, tied to each other, or as the teacher."""
    wide = replace(config, expansion=hidden // config.width)
    grid = _grid.Trainer(wide, torch.device("cpu"))
    if wide != config:  # the teacher keeps its hidden size
        pairs = [(t, rho) for t in config.teachers for rho in config.rhos]
        parts = zip(*(teacher_weights(config, *pair)[:3] for pair in pairs), strict=True)
        grid.teachers = _grid.Stack(*(torch.stack(part, 1) for part in parts))
    for group in grid.groups:
        w1, b, w2 = group.weights
        for i, s in enumerate(group.students):
            if start == "tied":
                w1[:, i], b[:, i] = w1[0, i].clone(), b[0, i].clone()
            elif start == "teacher":  # Euler's method on the teacher's own flow
                own = teacher_weights(config, s["teacher"], s["rho"])
                layers = np.arange(group.depth) * config.teacher_depth // group.depth
                w1[:, i], b[:, i] = own[0][layers], own[1][layers]
                w2[:, i] = own[2][layers] * config.teacher_depth / group.depth
    return grid


@torch.no_grad()
def measure(config: ToyConfig, weights: list[Tensor], which: dict) -> tuple[dict, list[dict]]:
    """All that is kept of one student: a row of numbers, and profiles along depth or lag."""
    x = torch.randn((INPUTS, config.width), generator=_runs.generator("measure"))
    deep = torch.stack(teacher(config, which["teacher"], which["rho"]).states(x)).double()
    goal = rms(deep[-1])

    def states(w: list[Tensor]) -> Tensor:
        return torch.stack(Network(*w, order=config.order).states(x)).double()

    def error(last: Tensor) -> float:
        return float((rms(last) - goal).square().mean())

    h, depth = states(weights), which["depth"]
    nothing, loss = error(h[0]), error(h[-1])
    row = {"loss": loss, "relative_loss": loss / nothing}
    # The teacher's states at the same fractions of depth: does the student follow its path?
    at = np.round(np.arange(depth + 1) * config.teacher_depth / depth).astype(int)
    off = (rms(h) - rms(deep[at])).square().mean((1, 2)) / nothing
    line = h[0] + (h[-1] - h[0]) * torch.linspace(0, 1, depth + 1)[:, None, None]
    straight = (rms(line) - rms(deep[at])).square().mean((1, 2)) / nothing
    profiles = {"off_path": off.tolist(), "straight_off_path": straight.tolist()}
    row |= {"off_path": float(off[1:-1].mean()), "straight_off_path": float(straight[1:-1].mean())}
    if depth >= 2 and float((h[1:] - h[:-1]).abs().sum()) > 0:
        s = signature(h)
        d = diagnose(s)
        row |= {k: getattr(s, k) for k in ("agreement", "memory", "evenness", "finish_spread")}
        row |= {k: getattr(s, k) for k in ("agreement_stderr", "memory_stderr")}
        row |= {"neighbour": s.lag_cosine[0], "length": s.update_norms.sum(), "regime": d.regime}
        row["reason"] = d.reasons[-1]
        profiles |= {"update": s.update_norms, "lag": s.lag_cosine}
        # Errors of layers, if each were to write an equal share of the change.
        change = goal * (h[-1].norm(dim=-1) / goal.norm(dim=-1))[:, None] - h[0]
        errors = (h[1:] - h[:-1]) - change / depth
        row["cancellation"] = float(errors.sum(0).square().sum() / errors.square().sum())
        row |= interventions(weights, depth, config.order, lambda w: error(states(w)[-1]), nothing)
    long = [
        {"statistic": name, "index": i, "value": float(v)}
        for name, values in profiles.items()
        for i, v in enumerate(values, start=0 if "path" in name else 1)
    ]
    return row, long


def interventions(weights, depth: int, order: int, error, nothing: float) -> dict[str, float]:
    """Relative loss without a layer, with half of the layers, and with all in random order."""

    def only(layers, share: float) -> float:
        mlps = [order * layer + i for layer in layers for i in range(order)]
        w1, b, w2 = (w[mlps].clone() for w in weights)
        w2[order - 1 :: order] *= share  # what a layer writes to the stream
        return error([w1, b, w2]) / nothing

    rng = np.random.default_rng(0)
    halves = [sorted(rng.choice(depth, depth // 2, replace=False)) for _ in range(8)]
    orders = [rng.permutation(depth) for _ in range(8)]
    dropped = [only(np.delete(np.arange(depth), i), depth / (depth - 1)) for i in range(depth)]
    return {
        "without_one": float(np.mean(dropped)),
        "half": float(np.mean([only(h, depth / len(h)) for h in halves])),
        "shuffled": float(np.mean([only(o, 1.0) for o in orders])),
    }


def run(name: str, folder: Path) -> None:
    part, rows, profiles, begin = PARTS[name], [], [], time.perf_counter()
    shapes = [part.config]
    if part.units:  # the learning rate goes with the units, which are all the same
        c = part.config
        rate = c.depth_factor / np.sqrt(part.units / c.hidden)
        shapes = [
            replace(c, depths=(depth,), depth_factor=float(rate * np.sqrt(depth)))
            for depth in c.depths
        ]
    for start in part.starts:
        for config in shapes:
            hidden = part.units // config.depths[0] if part.units else config.hidden
            grid = build(config, start, hidden)
            for step in part.marks:
                while grid.step < step:
                    grid.advance()
                for group in grid.groups:
                    for i, s in enumerate(group.students):
                        which = {"part": name, "start": start, "order": config.order}
                        which |= {"teacher_depth": config.teacher_depth, "step": step}
                        which |= {k: s[k] for k in ("rho", "teacher", "depth")}
                        which["hidden"] = hidden
                        row, long = measure(config, [w[:, i] for w in group.weights], which)
                        rows.append(which | row)
                        profiles += [which | entry for entry in long]
                seconds = time.perf_counter() - begin
                print(f"{name}, {start}, step {step:,}, {seconds:.0f} s", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, table in {"students": rows, "profiles": profiles}.items():
        archive.save(
            pd.DataFrame(table),
            folder / f"{name}.{kind}.parquet",
            config=asdict(part.config),
            seeds={"teachers": list(part.config.teachers)},
            scale=part.config.scale,
            wall_seconds=time.perf_counter() - begin,
        )


def assemble(folder: Path) -> None:
    for kind, output in {"students": "toy_updates", "profiles": "toy_updates_profiles"}.items():
        done = [p for name in PARTS if (p := folder / f"{name}.{kind}.parquet").exists()]
        if not done:
            sys.exit(f"{folder} holds no finished part")
        parts = [archive.load(path) for path in done]
        path = archive.save(
            pd.concat([p.frame for p in parts], ignore_index=True),
            ROOT / "results" / f"{output}.parquet",
            config={
                path.name.split(".")[0]: p.provenance["config"]
                for path, p in zip(done, parts, strict=True)
            },
            seeds={"teachers": list(BASE.teachers)},
            scale=BASE.scale,
            wall_seconds=sum(p.provenance["wall_seconds"] for p in parts),
        )
        print(path)


def finished(folder: Path) -> Iterator[tuple[str, ToyConfig, Path]]:
    """Checkpoints of the other scripts whose training has reached its end."""
    runs = [(name, shard) for name in LARGE for shard in toy.shards(archive_toy.RUNS[name])]
    for shard in toy.shards(archive_toy_patience.CONFIG):
        lengths = archive_toy_patience.LENGTHS
        runs += [("patience", archive_toy_patience.branch(shard, length)) for length in lengths]
    for name, shard in runs:
        path = folder / f"{toy.slug(shard)}.pt"
        if path.exists() and shard.steps in set(toy.ToyResult.from_checkpoint(path).losses["step"]):
            yield name, shard, path
        else:
            print(f"{name}: {toy.slug(shard)} is not done", flush=True)


def measure_finished(folder: Path) -> None:
    """Measure the students in finished checkpoints, and save a pair of tables for each family."""
    families: dict[str, list] = {"toy_fig5": [], "toy_patience": []}
    for name, shard, path in finished(folder):
        families["toy_patience" if name == "patience" else "toy_fig5"].append((name, shard, path))
    for family, members in families.items():
        rows, profiles, configs, begin = [], [], {}, time.perf_counter()
        for name, shard, path in members:
            result = toy.ToyResult.from_checkpoint(path, students=True)
            configs[f"{name}, {toy.slug(shard)}"] = asdict(shard)
            for key, weights in result.weights.items():
                which = {"part": name, "order": shard.order, "teacher_depth": shard.teacher_depth}
                which |= {"step": shard.steps} | dict(zip(toy.GRID, key, strict=True))
                row, long = measure(shard, list(weights[:3]), which)
                rows.append(which | row)
                profiles += [which | entry for entry in long]
        for kind, table in {"updates": rows, "profiles": profiles}.items() if rows else ():
            teachers = sorted({row["teacher"] for row in rows})
            path = archive.save(
                pd.DataFrame(table),
                ROOT / "results" / f"{family}_{kind}.parquet",
                config=configs,
                seeds={"teachers": teachers},
                scale=f"width {shard.width}, batch {shard.batch}, up to "
                f"{max(m[1].steps for m in members):,} steps, teachers {teachers}, "
                "measured after training",
                wall_seconds=time.perf_counter() - begin,
            )
            print(f"{path}: {len(table)} rows")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    runner = actions.add_parser("run", help="train and measure parts")
    runner.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all by default")
    runner.add_argument("--steps", type=_arguments.count, help="fewer, to try it out")
    joiner = actions.add_parser("assemble", help="join what is there")
    others = actions.add_parser("finished", help="measure what the other scripts trained")
    for action in (runner, joiner, others):
        action.add_argument(
            "--folder", type=_arguments.folder, required=True, help="where parts are kept"
        )
    args = parser.parse_args(arguments)
    if args.action == "assemble":
        assemble(args.folder)
        return
    if args.action == "finished":
        measure_finished(args.folder)
        return
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    for name in args.parts or PARTS:
        if args.steps is not None:
            part = PARTS[name]
            marks = tuple(sorted({min(m, args.steps) for m in part.marks}))
            PARTS[name] = replace(part, config=replace(part.config, steps=args.steps), marks=marks)
        with _runs.cpu(1):
            run(name, args.folder)


if __name__ == "__main__":
    main()
