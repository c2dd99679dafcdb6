"""Make results/ and models/ again: measurements that take longer than a chapter may.

    python tools/archive.py fig3b run --folder /scratch/toy
    python tools/archive.py fig3b run --folder /scratch/toy --shards 2 3
    python tools/archive.py fig3b status --folder /scratch/toy
    python tools/archive.py fig3b assemble --folder /scratch/toy

A measurement is made of shards, and each keeps a checkpoint, or its result, in a folder outside
the repository: a run can be killed at any moment, continued, or shared. Several processes
(``--jobs``), or machines with one file system, take different shards. ``assemble`` puts what is
finished into ``results/``, and says in the caption if that is not all.

=================== ======================================================================
name                what is measured
=================== ======================================================================
fig3b, fig4, fig5,  grids of toy students with the paper's networks (arXiv 2602.05970,
second_order,       figures 3 to 5, appendix C), for hours of one core
shallow_teacher
phase               exponents of depth for rhos between 0 and 1; minutes, like the next two
budgets             does the exponent stay where the live run finds it? each number of steps
                    is a run of its own, whose rate decays at its own end
noise               are students of peaked targets held back by too few steps, or by noisy
                    gradients? four times the steps against four times the batch
patience            students trained for seven lengths of time, from one trunk
updates             how students use their depth, while they learn (``toy.probe``)
fig5_updates        the same of the finished students of fig5, second_order, shallow_teacher
patience_updates    the same of the finished students of patience
seeds               what toy students of one teacher have in common over seeds, and what they
                    leave out; 20 minutes
nested_steps        do narrow networks find folds, with more seeds and ten times the steps?
ladder              the language models of models/ and their losses; more options
smollm2             what SmolLM2's layers write, over all English prose that Python carries;
                    beside it shuffled, fresh and more coarsely rounded weights, and each
                    layer decoded early; an hour of one core
effects             what becomes of SmolLM2 when blocks are skipped, swapped, repeated, removed,
                    read through affine maps; where its facts are; an hour of one core
designs             models of twelve layers that grow, loop, share weights or scale their norms,
                    beside plain ones, and what they lose; minutes each, 23 of them
inside              what became of the layers of those models: skips, swaps, loops, lenses,
                    signatures, likeness of weights; a minute each
primitives          how fast those models learn to copy and to look up; minutes each
repeats             whether they copy better when layers run once more than in training
loops               layers that run several times beside layers of their own, and how much each
                    may write; up to ten minutes each, 63 of them
healing             models of the ladder trained on without one of their blocks; ten minutes
hops                networks of 1 to 6 blocks that learn to answer questions of 1 to 3 hops, and
                    their weights; a minute each
=================== ======================================================================

A ladder that was trained otherwise adds its losses under a name of its own, for
``depthutil.ladder.curves("short")``:

    python tools/archive.py ladder run --folder /scratch/ladder --steps 1500
    python tools/archive.py ladder assemble --folder /scratch/ladder --steps 1500 --losses short
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

# One process a core: the compiler of the ladder's blocks keeps to it too.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np
import pandas as pd
import torch

from depthutil import (
    _arguments,
    _runs,
    archive,
    corpus,
    gguf_file,
    hops,
    ladder,
    models,
    nulls,
    primitives,
    regimes,
    surgery,
    toy,
    trajectory,
)
from depthutil import interventions as iv
from depthutil.toy.grid import Trainer

ROOT = Path(__file__).resolve().parent.parent
Config = toy.ToyConfig


class Run(ABC):
    """A measurement in shards, each with a name and a file of its own."""

    names: Sequence[str]
    ending = ".parquet"

    def path(self, i: int, folder: Path) -> Path:
        return folder / f"{self.names[i]}{self.ending}"

    @abstractmethod
    def make(self, i: int, path: Path, args: argparse.Namespace) -> None:
        """Go on with a shard to its end."""

    def status(self, i: int, path: Path) -> str:
        about = archive.load(path).provenance
        return f"done in {about['wall_seconds'] / 3600:.2f} h"

    def finished(self, i: int, path: Path) -> bool:
        return True

    @abstractmethod
    def assemble(self, done: dict[int, Path], args: argparse.Namespace) -> list[Path]:
        """Write the archive from the shards that are finished."""

    def some(self, count: int) -> str:
        """What a caption adds if shards are missing."""
        return f"; {count} of {len(self.names)} parts" if count < len(self.names) else ""


class Tables(Run):
    """Shards that are tables, which the archive holds one below the other."""

    output: str
    keys: tuple[str, ...] = ()  # columns that tell shards apart, if others can be added to them

    def size(self, parts: Sequence[archive.Archived]) -> str:
        """What to call the size of the whole in captions."""
        return parts[0].provenance["scale"]

    def assemble(self, done, args):
        there, path, before = [archive.load(p) for p in done.values()], self.path_in(args), []
        if getattr(args, "add", False):
            old, shards = archived(path, self.keys)
            first = [next(a.frame[list(self.keys)].itertuples(index=False)) for a in there]
            there = [a for a, key in zip(there, first, strict=True) if tuple(key) not in shards]
            before, count = [old], len(shards) + len(there)
        else:
            count = len(there)
        every = before + there
        path = archive.save(
            pd.concat([a.frame for a in every], ignore_index=True),
            path,
            config={
                "shards": [
                    *(shard for a in before for shard in a.provenance["config"]["shards"]),
                    *(a.provenance["config"] for a in there),
                ]
            },
            seeds=self.seeds(every),
            scale=self.size(there or before).split(";")[0] + self.some(count),
            wall_seconds=sum(a.provenance["wall_seconds"] for a in every),
        )
        return [path]

    def path_in(self, args: argparse.Namespace) -> Path:
        return args.results / f"{self.output}.parquet"

    def seeds(self, parts: Sequence[archive.Archived]) -> Any:
        """The seeds of all shards."""
        return sorted({seed for part in parts for seed in part.provenance["seeds"]})


def archived(path: Path, keys: Sequence[str]) -> tuple[archive.Archived, set[tuple]]:
    """What an archive has, and of which shards."""
    old = archive.load(path)
    return old, set(old.frame[list(keys)].itertuples(index=False, name=None))


# Toy networks ---------------------------------------------------------------------------


def size(c: Config) -> str:
    return f"width {c.width}, teacher of {c.teacher_depth} layers, batch {c.batch}"


class Grids(Run):
    """Grids of students: the shards of one grid, or several with labels of their own."""

    ending = ".pt"

    def __init__(self, output: str, members: Sequence[tuple[Config, dict[str, Any]]], steps=None):
        longest = max(config.steps for config, _ in members)
        part = 1 if steps is None else steps / longest  # fewer, in proportion
        self.output = output
        self.members = [(replace(c, steps=round(c.steps * part) or 1), x) for c, x in members]
        self.names = [toy.slug(config) for config, _ in self.members]

    def make(self, i, path, args):
        toy.train(self.members[i][0], checkpoint=path, **options(args))

    def status(self, i, path):
        result = toy.ToyResult.from_checkpoint(path)
        step, hours = result.losses["step"].max(), result.wall_seconds / 3600
        return f"tested at step {0 if result.losses.empty else step:,}, {hours:.2f} h"

    def finished(self, i, path):
        tested = set(toy.ToyResult.from_checkpoint(path).losses["step"])
        return self.members[i][0].steps in tested

    def assemble(self, done, args):
        configs, labels = zip(*(self.members[i] for i in done), strict=True)
        results = [
            toy.ToyResult.from_checkpoint(path).until(config.steps)
            for path, config in zip(done.values(), configs, strict=True)
        ]
        output = args.results / f"{self.output}.parquet"
        if args.name in LABELLED:
            pairs = zip(results, labels, strict=True)
            first = configs[0]
            ways = [x | {"steps": c.steps} for c, x in zip(configs, labels, strict=True)]
            path = archive.save(
                pd.concat([r.losses.assign(**x) for r, x in pairs], ignore_index=True),
                output,
                config=asdict(first) | {"runs": ways},
                seeds={"teachers": list(first.teachers), "students": list(first.seeds)},
                scale=f"{size(first)}, {len(first.teachers)} teachers, {len(ways)} runs of up to "
                f"{max(c.steps for c in configs):,} steps" + self.some(len(done)),
                wall_seconds=sum(r.wall_seconds for r in results),
            )
            return [path]
        result = toy.merge(results)
        c = result.config
        scale = (
            f"{size(c)}, {c.steps:,} steps, teachers {list(c.teachers)}, {len(c.rhos)} values of "
            f"ρ, {len(c.temperatures)} temperatures" + self.some(len(done))
        )
        return [result.save(output, scale)]


def options(args: argparse.Namespace) -> dict[str, Any]:
    return {"checkpoint_seconds": 120, "progress": True, "threads": args.threads}


# rho = 1 first, because it is the slow one to learn; teacher by teacher, because one teacher at
# both rhos is a result already.
GRIDS = {
    "fig3b": Config.paper("fig3b", "colab", rhos=(1.0, 0.0)),
    "fig4": Config.paper("fig4", "colab", rhos=(1.0, 0.0), temperatures=(0.01, 0.1, 1.0)),
    "fig5": Config.paper("fig5", "colab", rhos=(1.0, 0.0)),
    "second_order": Config.paper("second_order", "colab", rhos=(1.0, 0.0)),
    "shallow_teacher": Config.paper("shallow_teacher", "colab", rhos=(1.0, 0.0)),
    "phase": Config.paper(
        "fig3b",
        "demo",
        rhos=(0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
        temperatures=tuple(np.logspace(-1, 0, 4).tolist()),
        steps=3_000,
        test_every=300,
    ),
}
LABELLED = {
    "budgets": [
        (
            Config.paper("fig3b", "demo", temperatures=(1.0,), steps=steps, test_every=steps),
            {},
        )
        for steps in (500, 1_000, 2_000, 4_000, 8_000)
    ],
    "noise": [
        (
            Config.paper(
                "fig3b",
                "demo",
                rhos=(0.0,),
                temperatures=(0.1,),
                depths=(2, 3, 5, 8),
                head="given",
                temperature_on="both",
                batch=batch,
                steps=steps,
                test_every=steps,
            ),
            {"batch": batch},
        )
        for batch, steps in ((128, 1_500), (512, 1_500), (128, 6_000), (512, 6_000))
    ],
}


class Patience(Run):
    """Runs of many lengths from one trunk.

    A run whose learning rate falls at its end is the run of constant rate up to there. So one
    long run of constant rate, the trunk, is shared by runs of all lengths: at four fifths of
    each length a branch leaves it and lets its rate fall, as if it had been alone from the
    start. Seven lengths from 500 to 32,000 steps then cost 38,400 steps instead of 63,500.
    """

    ending = ".pt"
    lengths: tuple[int, ...] = (500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000)
    config = Config.paper(
        "fig4",
        "demo",
        rhos=(1.0, 0.0),
        temperatures=(0.1, 1.0),
        batch=256,
        steps=32_000,
        test_every=100,
    )

    def __init__(self):
        self.shards = toy.shards(self.config)
        self.names = [toy.slug(self.trunk(shard, self.lengths[0])) for shard in self.shards]

    def trunk(self, shard: Config, length: int) -> Config:
        """The run of constant rate, as far as a branch of this length needs it."""
        return replace(shard, decay=False, steps=length * 4 // 5)

    def branch(self, shard: Config, length: int) -> Config:
        """The run of this length, whose rate falls over its last fifth; tested at its end."""
        return replace(shard, steps=length, test_every=length)

    def ends(self, i: int, folder: Path) -> dict[int, Path]:
        branches = {length: self.branch(self.shards[i], length) for length in self.lengths}
        return {length: folder / f"{toy.slug(c)}.pt" for length, c in branches.items()}

    def make(self, i, path, args):
        for length, end in self.ends(i, path.parent).items():
            branch = self.branch(self.shards[i], length)
            if not end.exists():
                toy.train(self.trunk(self.shards[i], length), checkpoint=path, **options(args))
                state = torch.load(path, weights_only=True)
                state |= {"config": json.dumps(asdict(branch)), "records": []}
                with archive.replacing(end) as partial:
                    torch.save(state, partial)
            toy.train(branch, checkpoint=end, **options(args))

    def results(self, i: int, folder: Path) -> dict[int, toy.ToyResult]:
        """Of the branches that are done, by length."""
        there = {length: end for length, end in self.ends(i, folder).items() if end.exists()}
        found = {length: toy.ToyResult.from_checkpoint(end) for length, end in there.items()}
        return {length: result for length, result in found.items() if len(result.losses)}

    def status(self, i, path):
        done = self.results(i, path.parent)
        return f"{len(done)} of {len(self.lengths)} lengths done" + (
            f", up to {max(done):,} steps" if done else ""
        )

    def finished(self, i, path):
        return len(self.results(i, path.parent)) == len(self.lengths)

    def assemble(self, done, args):
        frames, seconds = [], 0.0
        for i, path in done.items():
            frames.append(toy.ToyResult.from_checkpoint(path).losses.assign(annealed=False))
            results = list(self.results(i, path.parent).values())
            frames += [r.losses.assign(annealed=True) for r in results]
            # The last branch's time includes the trunk's; of the others only their own fifth.
            seconds += results[-1].wall_seconds + sum(r.wall_seconds / 5 for r in results[:-1])
        c, teachers = self.config, sorted({t for i in done for t in self.shards[i].teachers})
        table = pd.concat(frames).sort_values(["annealed", "step", *toy.GRID], ignore_index=True)
        path = archive.save(
            table,
            args.results / "toy_patience.parquet",
            config=asdict(c) | {"teachers": teachers, "steps": list(self.lengths)},
            seeds={"teachers": teachers, "students": list(c.seeds)},
            scale=f"{size(c)}, {len(teachers)} teachers, {len(c.temperatures)} temperatures, "
            f"{len(self.lengths)} lengths of training up to {self.lengths[-1]:,} steps"
            + self.some(len(done)),
            wall_seconds=seconds,
        )
        return [path]


# How students use their depth -----------------------------------------------------------

UPDATES = Config(
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
    test_every=10**9,  # nothing but probes
)


@dataclass(frozen=True)
class Part:
    """A grid, where its students start, and when they are measured."""

    config: Config
    starts: tuple[str, ...] = ("fresh",)
    marks: tuple[int, ...] = field(default=(30, 100, 300, 1_000, 2_000, 5_000))
    units: int | None = None  # hidden units of all layers together, if not 4 · width a layer


PARTS = {
    "main": Part(UPDATES),
    "starts": Part(
        replace(UPDATES, depths=(8, 16), rhos=(1.0,)),
        ("teacher", "tied"),
        (0, 100, 300, 1_000, 2_000, 5_000),
    ),
    "long": Part(
        replace(UPDATES, depths=(8, 16), rhos=(1.0,), teachers=(0, 1), steps=20_000),
        marks=(300, 1_000, 2_000, 5_000, 10_000, 15_000, 20_000),
    ),
    "second_order": Part(
        replace(UPDATES, depths=(3, 6, 8, 12), order=2, teachers=(0, 1)), marks=(2_000, 5_000)
    ),
    "shallow": Part(replace(UPDATES, rhos=(0.0,), teacher_depth=8), marks=(2_000, 5_000)),
    "shape": Part(
        replace(UPDATES, depths=(1, 4, 16), teachers=(0, 1)), marks=(2_000, 5_000), units=1024
    ),
}
INPUTS = 1000


class Probes(Run):
    """Students, measured: a table of numbers and one of profiles, for each shard."""

    ending = ".updates.parquet"
    output: str

    @abstractmethod
    def config(self, i: int) -> Config:
        """What a shard trains."""

    def save(self, path: Path, found: list[tuple[dict, toy.probing.Probed]], i: int, begin: float):
        config = self.config(i)
        tables = {
            "updates": pd.DataFrame([which | probed.numbers for which, probed in found]),
            "profiles": pd.concat(
                [probed.profiles.assign(**which) for which, probed in found], ignore_index=True
            ),
        }
        for kind, table in reversed(tables.items()):  # the one that says it is done comes last
            archive.save(
                table,
                path.with_name(path.name.replace(".updates.", f".{kind}.")),
                config=asdict(config),
                seeds={"teachers": list(config.teachers)},
                scale=f"{size(config)}, {config.steps:,} steps",
                wall_seconds=time.perf_counter() - begin,
            )

    def assemble(self, done, args):
        written = []
        for kind in ("updates", "profiles"):
            paths = [p.with_name(p.name.replace(".updates.", f".{kind}.")) for p in done.values()]
            parts = [archive.load(path) for path in paths]
            teachers = sorted({t for p in parts for t in p.provenance["seeds"]["teachers"]})
            configs = [p.provenance["config"] for p in parts]
            largest = max(configs, key=lambda c: c["steps"])
            written.append(
                archive.save(
                    pd.concat([p.frame for p in parts], ignore_index=True),
                    args.results / self.file(kind),
                    config={self.names[i]: c for i, c in zip(done, configs, strict=True)},
                    seeds={"teachers": teachers},
                    scale=f"width {largest['width']}, batch {largest['batch']}, up to "
                    f"{largest['steps']:,} steps, teachers {teachers}" + self.some(len(done)),
                    wall_seconds=sum(p.provenance["wall_seconds"] for p in parts),
                )
            )
        return written

    def file(self, kind: str) -> str:
        return f"{self.output}_{kind}.parquet"


class Updates(Probes):
    """Students measured at several moments of training."""

    def __init__(self, steps: int | None = None):
        self.parts = dict(PARTS)
        for name, part in PARTS.items() if steps is not None else ():
            marks = tuple(sorted({min(mark, steps) for mark in part.marks}))
            self.parts[name] = replace(part, config=replace(part.config, steps=steps), marks=marks)
        self.names = list(self.parts)

    def config(self, i):
        return self.parts[self.names[i]].config

    def file(self, kind):
        return "toy_updates.parquet" if kind == "updates" else "toy_updates_profiles.parquet"

    def make(self, i, path, args):
        if path.exists():
            return
        name, found, begin = self.names[i], [], time.perf_counter()
        part = self.parts[name]
        c, shapes = part.config, [part.config]
        if part.units:  # the learning rate goes with the units, which are all the same
            rate = c.depth_factor / np.sqrt(part.units / c.hidden)
            shapes = [
                replace(c, depths=(depth,), depth_factor=float(rate * np.sqrt(depth)))
                for depth in c.depths
            ]
        with _runs.cpu(args.threads):
            for start in part.starts:
                for config in shapes:
                    hidden = part.units // config.depths[0] if part.units else config.hidden
                    wide = replace(config, expansion=hidden // config.width)
                    grid = Trainer(wide, torch.device("cpu"), taught_by=config, start=start)
                    for step in part.marks:
                        while grid.step < step:
                            grid.advance()
                        which = {"part": name, "start": start, "order": config.order}
                        which |= {"teacher_depth": config.teacher_depth, "step": step}
                        for group in grid.groups:
                            for j, s in enumerate(group.students):
                                own = which | {k: s[k] for k in ("rho", "teacher", "depth")}
                                own["hidden"] = hidden
                                weights = [w[:, j] for w in group.weights]
                                probed = toy.probe(
                                    config,
                                    weights,
                                    teacher=s["teacher"],
                                    rho=s["rho"],
                                    inputs=INPUTS,
                                )
                                found.append((own, probed))
                        seconds = time.perf_counter() - begin
                        print(f"{name}, {start}, step {step:,}, {seconds:.0f} s", flush=True)
        self.save(path, found, i, begin)


class Finished(Probes):
    """Students measured in the checkpoints of other runs, which are in the same folder."""

    def __init__(self, output: str, members: Sequence[tuple[str, Config]]):
        self.output, self.members = output, list(members)
        self.names = [f"{name}_{toy.slug(config)}" for name, config in self.members]

    def config(self, i):
        return self.members[i][1]

    def make(self, i, path, args):
        name, config = self.members[i]
        source, begin = path.parent / f"{toy.slug(config)}.pt", time.perf_counter()
        result = toy.ToyResult.from_checkpoint(source, students=True) if source.exists() else None
        if result is None or config.steps not in set(result.losses["step"]):
            print(f"{name}: {toy.slug(config)} is not done", flush=True)
            return
        found = []
        for key, weights in result.weights.items():
            which = {"part": name, "order": config.order, "teacher_depth": config.teacher_depth}
            which |= {"step": config.steps} | dict(zip(toy.GRID, key, strict=True))
            whose = {"teacher": which["teacher"], "rho": which["rho"]}
            found.append((which, toy.probe(config, weights[:3], **whose, inputs=INPUTS)))
        self.save(path, found, i, begin)


def finished_of(name: str) -> Finished:
    if name == "patience_updates":
        run = Patience()
        members = [("patience", run.branch(s, n)) for s in run.shards for n in run.lengths]
    else:
        grids = ("fig5", "second_order", "shallow_teacher")
        members = [(grid, shard) for grid in grids for shard in toy.shards(GRIDS[grid])]
    return Finished(f"toy_{name.removesuffix('_updates')}", members)


# What trainings have in common -----------------------------------------------------------

SEEDS = Config(
    width=16,
    vocabulary=1,  # no head: the loss compares states
    teacher_depth=64,
    depths=(1, 2, 4, 8, 16),
    seeds=(0, 1, 2, 3),
    rhos=(0.0,),
    loss="mse",
    head="none",
    batch=128,
    steps=5_000,
    learning_rate=6e-4,
    depth_factor=4.0,
    decay=True,
    test_every=10**9,  # nothing but what is measured here
)
NARROW = replace(SEEDS, depths=(2, 4, 8, 16), seeds=(0, 1), steps=8_000, depth_factor=8.0)


class Seeds(Tables):
    """What students of one teacher have in common, and what differs from seed to seed."""

    output = "toy_seeds"
    marks = (30, 100, 300, 1_000, 5_000)
    # All layers of the narrow ones have 16 hidden units.
    parts = {  # noqa: RUF012
        "independent": replace(SEEDS, depths=(1, 2, 4, 8, 16, 32), seeds=(0, 1, 2)),
        **{f"width {w}": replace(NARROW, width=w, expansion=16 // w) for w in (16, 8, 4)},
        "long": replace(SEEDS, depths=(4, 16), teachers=(0,), steps=20_000),
        "tied": replace(SEEDS, rhos=(1.0,), teachers=(0, 1)),
    }

    def __init__(self, steps: int | None):
        cut = {} if steps is None else {"steps": steps}
        self.configs = {name: replace(config, **cut) for name, config in self.parts.items()}
        self.names = [f"seeds-{name.replace(' ', '-')}" for name in self.configs]

    def make(self, i, path, args):
        if path.exists():
            return
        (part, c), begin, rows = list(self.configs.items())[i], time.perf_counter(), []
        with _runs.cpu(args.threads):
            grid = Trainer(c, torch.device("cpu"))
            for mark in sorted({m for m in self.marks if m < c.steps} | {c.steps}):
                while grid.step < mark:
                    grid.advance()
                rows += self.measured(c, toy.grid.by_student(grid), part, mark)
                seconds = time.perf_counter() - begin
                print(f"{part}, step {mark:,}, {seconds:.0f} s", file=sys.stderr, flush=True)
        archive.save(
            pd.DataFrame(rows),
            path,
            config=asdict(c),
            seeds={"teachers": list(c.teachers), "students": list(c.seeds)},
            scale=f"{size(c)}, {c.steps:,} steps",
            wall_seconds=time.perf_counter() - begin,
        )

    @torch.no_grad()
    def measured(self, c, weights, part, step):
        """One row for each teacher and depth; losses relative to doing nothing."""
        rows, x = [], torch.randn((16_000, c.width), generator=_runs.generator("seeds"))
        profile = part == "independent" and step in (30, c.steps)
        fits = polynomials(toy.rms(x).double()) if profile else []
        for teacher in c.teachers:
            goal = toy.rms(toy.Network(*toy.teacher_weights(c, teacher, c.rhos[0])[:3])(x))
            change = (toy.rms(x) - goal).double()  # the error of no layers at all
            nothing = change.square().mean()
            own = {f"beyond_{d}": fit(change) / float(nothing) for d, fit in enumerate(fits, 1)}
            about = {"part": part, "width": c.width, "hidden": c.hidden, "rho": c.rhos[0]}
            about |= {"teacher": teacher, "step": step, "seeds": len(c.seeds)}
            if profile:
                rows.append(about | {"depth": 0, "loss": 1.0, "variance": 0.0} | own)
            for depth in c.depths:
                stacks = [w[:3] for k, w in weights.items() if (k[0], k[3]) == (teacher, depth)]

                def errors(stacks, count, goal=goal):
                    ends = [toy.rms(toy.Network(*w)(x[:count])) for w in stacks]
                    return (torch.stack(ends) - goal[:count]).double()

                each = errors(stacks, 16_000 if profile else 4_000)
                # Every second layer is another seed's.
                mixed = [
                    [torch.where(odd(a), b, a) for a, b in zip(one, other, strict=True)]
                    for one, other in zip(stacks, stacks[1:] + stacks[:1], strict=True)
                ]
                found = {"loss": each.square().mean()}
                found["variance"] = each.var(0).mean()  # over seeds, unbiased
                found["spliced"] = errors(mixed, 4_000).square().mean()
                if depth > 1:
                    shorter = [without(w, layer) for w in stacks for layer in range(depth)]
                    found["without_one"] = errors(shorter, 1_000).square().mean()
                for degree, fit in enumerate(fits, 1):
                    found[f"beyond_{degree}"] = np.mean([fit(e) for e in each])
                relative = {name: float(value / nothing) for name, value in found.items()}
                rows.append(about | {"depth": depth} | relative)
        return rows

    def size(self, parts):
        return f"{size(SEEDS)}, 2 to 4 students of each kind"

    def seeds(self, parts):
        return {"teachers": list(SEEDS.teachers), "students": list(SEEDS.seeds)}


def odd(stack):
    """Whether a weight is in every second layer, shaped to choose among weights."""
    layers = torch.arange(len(stack)) % 2 == 1
    return layers.reshape(-1, *[1] * (stack.dim() - 1))


def without(weights, layer):
    """All layers but one, which write more for it."""
    w1, b, w2 = (torch.cat([w[:layer], w[layer + 1 :]]) for w in weights)
    return [w1, b, w2 * len(weights[0]) / len(w2)]


def polynomials(x):
    """For each degree from 1 to 3: the mean square that no polynomial of the input explains.

    Coefficients are found on three quarters of the inputs, and judged on the rest.
    """
    fits, columns, part = [], [x.new_ones(len(x), 1)], len(x) * 3 // 4
    for degree in (1, 2, 3):
        which = itertools.combinations_with_replacement(range(x.shape[1]), degree)
        columns.append(torch.stack([x[:, list(one)].prod(1) for one in which], 1))
        design = torch.cat(columns, 1)
        seen = design[:part]
        gram = seen.T @ seen
        gram += 1e-8 * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype)
        factor = torch.linalg.cholesky(gram)

        def fit(error, seen=seen, factor=factor, rest=design[part:]):
            found = torch.cholesky_solve(seen.T @ error[:part], factor)
            return float((error[part:] - rest @ found).square().mean())

        fits.append(fit)
    return fits


# Folds ----------------------------------------------------------------------------------


class NestedSteps(Run):
    """Loss of every network by folds, depth, seed and way of training."""

    folds: tuple[int, ...] = (2, 3, 4)
    depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    # Half the steps of a stage; from scratch, all stages' steps go to the full target.
    ways: dict[str, dict[str, Any]] = {  # noqa: RUF012
        "curriculum": {"curriculum": True, "steps": 250},
        "from scratch": {"curriculum": False, "steps": 250},
        "from scratch, 10 × steps": {"curriculum": False, "steps": 2500},
    }

    def __init__(self, seeds: int):
        self.seeds = seeds
        self.members = [(way, folds) for way in self.ways for folds in self.folds]
        words = {way: way.replace(", 10 × steps", " long").replace(" ", "-") for way in self.ways}
        self.names = [f"nested_{words[way]}_{folds}_{seeds}" for way, folds in self.members]

    def make(self, i, path, args):
        if path.exists():
            return
        (way, folds), begin = self.members[i], time.perf_counter()
        with _runs.cpu(args.threads):
            learned = regimes.learn_folds(folds, self.depths, seeds=self.seeds, **self.ways[way])
        archive.save(
            learned.frame.assign(training=way),
            path,
            config={"folds": folds, "depths": self.depths, **self.ways[way]},
            seeds=0,
            scale=f"{self.seeds} networks of each kind",
            wall_seconds=time.perf_counter() - begin,
        )

    def assemble(self, done, args):
        parts = [archive.load(path) for path in done.values()]
        about = {"folds": self.folds, "depths": self.depths, "networks": self.seeds}
        path = archive.save(
            pd.concat([p.frame for p in parts], ignore_index=True),
            args.results / "nested_steps.parquet",
            config=about | {"ways": self.ways},
            seeds=0,
            scale=f"{self.seeds} networks of each kind" + self.some(len(done)),
            wall_seconds=sum(p.provenance["wall_seconds"] for p in parts),
        )
        return [path]


# The depth ladder -----------------------------------------------------------------------


class Ladder(Run):
    """One model a shard."""

    def __init__(self, args: argparse.Namespace):
        given = {"depths": args.depths, "seeds": args.seeds, "learning_rates": args.rates}
        changes: dict[str, Any] = {k: tuple(v) for k, v in given.items() if v is not None}
        whole = {"width": args.width, "steps": args.steps}
        changes |= {name: value for name, value in whole.items() if value is not None}
        self.recipe = ladder.LadderConfig.at(args.scale, **changes)
        self.shards = ladder.shards(self.recipe)
        self.names = [self.recipe.name(*shard) for shard in self.shards]
        self.args, self._text = args, None

    @property
    def text(self) -> ladder.Corpus:
        if self._text is None:
            self._text = ladder.corpus(self.args.text)
        return self._text

    def options(self) -> dict[str, Any]:
        names = ("device", "threads", "compiled", "autocast")
        return {"text": self.text, "progress": True} | {n: getattr(self.args, n) for n in names}

    def path(self, i, folder):
        return folder / f"{ladder.slug(self.recipe, *self.shards[i])}.pt"

    def search(self, depth: int, folder: Path):
        """The best learning rate of a depth; whoever needs it while it is being sought waits."""
        with _runs.claimed(folder / f"search_{self.recipe.name(depth, 0)}.json", wait=True):
            return ladder.best_rate(self.recipe, depth, folder, **self.options())

    def make(self, i, path, args):
        depth, seed = self.shards[i]
        rate = self.search(depth, path.parent)[0]
        more = {"learning_rate": rate, "checkpoint": path}
        ladder.train(self.recipe, depth, seed, **more, **self.options())

    def status(self, i, path):
        model = ladder.LadderModel.from_checkpoint(path)
        loss = f"held-out loss {model.losses['held_out_loss'].iloc[-1]:.4f}, " if model.step else ""
        hours = model.wall_seconds / 3600
        return f"tested at step {model.step:,} of {self.recipe.steps:,}, {loss}{hours:.2f} h"

    def finished(self, i, path):
        return ladder.LadderModel.from_checkpoint(path).finished

    def assemble(self, done, args):
        models = [ladder.LadderModel.from_checkpoint(path, self.text) for path in done.values()]
        searches = None
        if len(self.recipe.learning_rates) > 1:
            depths = sorted({model.settings["depth"] for model in models})
            tables = [self.search(depth, args.folder)[1] for depth in depths]
            searches = pd.concat(tables, ignore_index=True)
        about = {"scale": self.recipe.scale + self.some(len(done)), "searches": searches}
        folder = None if args.losses else args.models
        more = about | {"label": args.losses or ""}
        return ladder.assemble(models, self.text, folder, args.results, **more)


# A real language model ------------------------------------------------------------------


FEW = 128  # texts that all networks read, the first of those that the model reads


@dataclass(frozen=True)
class Reading:
    """A network, and what is recorded of it on how much text."""

    network: str = "trained"
    seed: int = 0
    documents: int | None = None  # all
    length: int = 1024
    mask: str = "next"
    decode: str | None = None
    per_token: bool = False


class Recordings(Run):
    """What the layers of a model write, one recording a shard."""

    ending = ".npz"
    model = "smollm2-135m"
    readings: dict[str, Reading] = {  # noqa: RUF012
        "trained": Reading(per_token=True),
        "trained, fewer texts": Reading(documents=FEW),
        "trained, without first tokens": Reading(documents=FEW, mask="inner"),
        **{
            f"{network}, seed {seed}": Reading(network, seed, FEW)
            for network in ("shuffled", "untrained")
            for seed in (0, 1, 2)
        },
        **{f"rounded to {k}": Reading(k, documents=FEW) for k in ("Q8_0", "Q5_0", "Q4_0")},
        **{f"decoded, {w}": Reading("trained", 0, 64, 256, decode=w) for w in ("lens", "last")},
    }

    def __init__(self, documents: int | None):
        self.documents = documents  # for tests
        self.names = [name.replace(", ", "_").replace(" ", "-") for name in self.readings]

    def reading(self, i: int) -> Reading:
        one = list(self.readings.values())[i]
        return one if self.documents is None else replace(one, documents=self.documents)

    def network(self, model: Any, one: Reading) -> Any:
        if one.network == "shuffled":
            return nulls.shuffled(model, one.seed)
        if one.network == "untrained":
            return nulls.untrained(model, one.seed, std=model.config.hidden_size**-0.5)
        return model if one.network == "trained" else gguf_file.quantized(model, one.network)

    def make(self, i, path, args):
        if path.exists():
            return
        one, checkpoint, begin = self.reading(i), path.with_suffix(".part"), time.perf_counter()
        model, tokenizer = models.load(self.model, device="cpu")
        texts = models.texts(self.model, one.documents or 10**9)
        some = models.batches(tokenizer, texts, length=one.length, size=4)
        with _runs.cpu(args.threads):
            found = trajectory.record(
                self.network(model, one),
                some,
                "sublayer",
                mask=one.mask,
                null=True,
                per_token=one.per_token,
                sample=0,
                decode=one.decode,
                top=5,
                checkpoint=checkpoint,
                progress=True,
            )
        found.save(path)
        seconds = {"seconds": time.perf_counter() - begin}
        path.with_suffix(".json").write_text(json.dumps(seconds))
        checkpoint.unlink(missing_ok=True)

    def status(self, i, path):
        return repr(trajectory.Trajectory.load(path))

    def assemble(self, done, args):
        tables, tokens, seconds = [], None, 0.0
        for i, path in done.items():
            name, found = list(self.readings)[i], trajectory.Trajectory.load(path)
            about = {"recording": name, "documents": found.documents, "tokens": found.tokens}
            tables.append(found.table().assign(**about))
            seconds += json.loads(path.with_suffix(".json").read_text())["seconds"]
            if self.readings[name].decode:
                tables += [t.assign(**about) for t in self.decoded(found.decoded())]
            if found.per_token is not None:
                tokens = self.tokens(found.per_token)
        text = corpus.summary(corpus.prose())
        source = f"English prose that Python {platform.python_version()} carries"
        given: dict[str, Any] = {
            "config": {
                "model": asdict(gguf_file.PACKAGED[self.model]),
                "libraries": gguf_file.versions(),
                "text": {"source": source} | text,
                "recordings": {name: asdict(self.readings[name]) for name in self.readings},
            },
            "seeds": [0, 1, 2],
            "wall_seconds": seconds,
            "scale": f"{self.model}, up to {max(t['tokens'].max() for t in tables):,} tokens of "
            f"{max(t['documents'].max() for t in tables)} texts" + self.some(len(done)),
        }
        parts = {"layers": pd.concat(tables, ignore_index=True), "tokens": tokens}
        folder, stem = args.results, self.model.replace("-", "_")
        return [
            archive.save(part, folder / f"{stem}_{kind}.parquet", **given)
            for kind, part in parts.items()
            if part is not None
        ]

    def decoded(self, table: pd.DataFrame) -> list[pd.DataFrame]:
        """What was decoded early, as further statistics."""
        columns = {"loss": ("mean", "stderr")} | {n: (n, f"{n}_stderr") for n in ("kl", "overlap")}
        return [
            table[["layer", *pair]]
            .set_axis(["layer", "mean", "stderr"], axis=1)
            .assign(statistic=f"decoded_{name}", lag=1)
            for name, pair in columns.items()
        ]

    def tokens(self, kept: dict[str, np.ndarray]) -> pd.DataFrame:
        """One token in sixteen at random, and the first four of each text, in few digits."""
        which = np.random.default_rng(0).random(len(kept["token"])) < 1 / 16
        rows = which | (kept["position"] < 4)
        table = {name: kept[name][rows] for name in ("document", "position", "token")}
        table["random"] = which[rows]
        for name, first in (("angles", 1), ("norms", 0)):
            few = kept[name][rows].astype(np.float16).astype(np.float32)
            table |= {f"{name}_{first + i}": column for i, column in enumerate(few.T)}
        return pd.DataFrame(table)


# Depth under intervention ---------------------------------------------------------------


class Effects(Run):
    """Effects of edits on SmolLM2, each a table; those of one kind go into one archive."""

    model, length = "smollm2-135m", 128
    # Names, and the archive that each belongs to; in the order in which they are worth most.
    shards: dict[str, str] = {  # noqa: RUF012
        "skipped": "skips",
        "removed": "removal",
        "facts": "facts",
        "edited": "edits",
        "lens": "lens",
        "direct": "skips",
        "rescaled": "removal",
        "future": "skips",
        "skipped, shuffled": "skips",
    }

    def __init__(self, documents: int | None):
        self.documents = documents  # for tests
        self.names = [name.replace(", ", "_") for name in self.shards]

    def texts(self, tokenizer: Any, count: int) -> list[dict]:
        """Texts evenly spaced over all, whose sources differ."""
        whole = models.texts(self.model, 10**9)
        count = self.documents or count
        some = [whole[(i * len(whole)) // count] for i in range(count)]
        return models.batches(tokenizer, some, length=self.length, size=8)

    def table(self, name: str, model: Any, tokenizer: Any) -> pd.DataFrame:
        what, _, null = name.partition(", ")
        show: dict[str, Any] = {"progress": True}
        if null:
            model = nulls.shuffled(model)
        if what in ("skipped", "direct", "future"):
            some = self.texts(tokenizer, 16 if null else 48)
            if what == "direct":
                return iv.local_effects(model, some, per_document=True, **show)
            future = what == "future"
            return iv.skip_effects(model, some, future=future, per_document=True, **show)
        if what in ("removed", "rescaled"):
            some, middle = self.texts(tokenizer, 24), [*range(3, 11), *range(12, 23)]
            given = {"among": middle, "most": 8, "rescaled": what == "rescaled", **show}
            orders = ("random", "influence", "end")
            return pd.concat(iv.removal(model, some, order, **given) for order in orders)
        if what == "edited":
            return self.edited(model, self.texts(tokenizer, 24))
        if what == "lens":
            return self.lenses(model, tokenizer)
        return self.facts(model, tokenizer)

    def edited(self, model: Any, some: list[dict]) -> pd.DataFrame:
        """Losses of texts with one edit at each place."""
        depth = len(models.anatomy(model).blocks)
        edits = {
            **{("without attention", b): iv.skip(model, b, "attention") for b in range(depth)},
            **{("without MLP", b): iv.skip(model, b, "mlp") for b in range(depth)},
            **{("twice", b): iv.repeat(model, b) for b in range(depth)},
            **{("swapped", b): iv.swap(model, b, b + 1) for b in range(depth - 1)},
            **{
                ("runs of 2 swapped", b): iv.swap(model, [b, b + 1], [b + 2, b + 3])
                for b in range(depth - 3)
            },
        }
        clean, rows = models.losses(model, some), []
        report = _runs.Progress(True, len(edits), of="edit")
        for number, ((edit, block), context) in enumerate(edits.items()):
            with context:
                gained = models.losses(model, some) - clean
            rows.append(
                pd.DataFrame({"edit": edit, "block": block, "document": range(len(gained))}).assign(
                    gained=gained, loss=clean
                )
            )
            report(number + 1)
        return pd.concat(rows)

    def lenses(self, model: Any, tokenizer: Any) -> pd.DataFrame:
        """Early readings as they are and through affine maps, found on other texts."""
        whole = models.texts(self.model, 10**9)
        each = len(whole) // (self.documents or 48)
        judged, learned = whole[::each], [t for i, t in enumerate(whole) if i % each]
        learned = learned[: self.documents or len(learned) : 3]
        some = models.batches(tokenizer, judged, length=self.length // 2, size=16)
        found = {"as it is": iv.lens(model, some, progress=True)}
        for step in (8, 1):
            batches = models.batches(tokenizer, learned[::step], length=256, size=4)
            tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
            reader = iv.affine_lens(model, batches)
            found[f"through maps, {tokens:,} tokens"] = iv.lens(model, some, reader=reader)
        return pd.concat([t.assign(reader=name) for name, t in found.items()])

    def facts(self, model: Any, tokenizer: Any) -> pd.DataFrame:
        tables = []
        known = list(iv.known(model, tokenizer))[: self.documents]
        for number, fact in enumerate(known):
            table = iv.causal_trace(model, tokenizer, *fact)
            about = {n: table.attrs[n] for n in ("clean", "corrupted", "corrupted_stderr")}
            first, last = table.attrs["subject"]
            tables.append(table.assign(**fact._asdict(), **about, first=first, last=last))
            print(f"fact {number + 1} of {len(known)}", file=sys.stderr, flush=True)
        return pd.concat(tables)

    def make(self, i, path, args):
        if path.exists():
            return
        begin, name = time.perf_counter(), list(self.shards)[i]
        model, tokenizer = models.load(self.model, device="cpu")
        with _runs.cpu(args.threads):
            table = self.table(name, model, tokenizer)
        kept = {k: v for k, v in table.attrs.items() if k in ("blocks", "loss", "loss_stderr")}
        archive.save(
            table.assign(shard=name).reset_index(drop=True),
            path,
            config={"model": asdict(gguf_file.PACKAGED[self.model]), "shard": name, **kept},
            seeds=[0],
            scale=f"{self.model}",
            wall_seconds=time.perf_counter() - begin,
        )

    def assemble(self, done, args):
        paths = []
        for kind in dict.fromkeys(self.shards.values()):
            of_kind = [i for i, name in enumerate(self.shards) if self.shards[name] == kind]
            there = [archive.load(done[i]) for i in of_kind if i in done]
            if not there:
                continue
            table = pd.concat([a.frame for a in there], ignore_index=True)
            units = "texts" if "document" in table else "facts" if kind == "facts" else ""
            count = table["document" if units == "texts" else "text"].nunique() if units else 0
            part = f"; {len(there)} of {len(of_kind)} parts" if len(there) < len(of_kind) else ""
            path = archive.save(
                table,
                args.results / f"{self.model.replace('-', '_')}_{kind}.parquet",
                config={
                    "model": asdict(gguf_file.PACKAGED[self.model]),
                    "libraries": gguf_file.versions(),
                    "shards": [a.provenance["config"] for a in there],
                },
                seeds=[0],
                scale=f"{self.model}" + (f", {count} {units}" if units else "") + part,
                wall_seconds=sum(a.provenance["wall_seconds"] for a in there),
            )
            paths.append(path)
        return paths


class Healing(Tables):
    """Models of the ladder without one block, trained on; and as they are, for comparison."""

    output = "ladder_healing"
    keys = ("depth", "block")
    marks = (0, 25, 50, 100, 200)

    def __init__(self, steps: int | None):
        self.steps = self.marks[-1] if steps is None else steps
        blocks = {4: (None, 1, 2), 8: (None, 3, 5), 16: (None, 5, 10)}
        self.shards = [(depth, block) for depth in (8, 16, 4) for block in blocks[depth]]
        self.names = [
            f"ladder-d{d:02d}-{'whole' if b is None else f'without-{b}'}-n{self.steps}"
            for d, b in self.shards
        ]

    def make(self, i, path, args):
        if path.exists():
            return
        (depth, block), begin = self.shards[i], time.perf_counter()
        name = f"ladder-w64-d{depth:02d}-s0"
        model, _ = models.load(name, device="cpu")
        edit = nullcontext() if block is None else iv.skip(model, block)
        with _runs.cpu(args.threads), edit:
            table = ladder.fine_tune(model, self.steps, test_at=self.marks, progress=True)
        archive.save(
            table.assign(depth=depth, block=-1 if block is None else block),
            path,
            config={"model": name, "block": block, "steps": self.steps},
            seeds=[0],
            scale=name,
            wall_seconds=time.perf_counter() - begin,
        )

    def size(self, parts):
        return f"ladder of width 64, {self.steps} steps of fine-tuning"


class Designs(Run):
    """Models of one size that use their depth in different ways.

    A baseline of fewer steps costs what a grown model costs. Up to where its learning rate
    falls it is the long baseline, so that the two share a trunk.
    """

    ending = ".pt"
    depth = 12
    base = ladder.LadderConfig(steps=4_000, cooldown=0.15)

    def __init__(self, steps: int | None):
        steps = self.base.steps if steps is None else steps
        warmup = min(self.base.warmup, steps // 4)
        self.long = replace(self.base, depths=(self.depth,), steps=steps, warmup=warmup)
        grown = replace(self.long, design=ladder.DESIGNS["midas"])
        cost = grown.flops(self.depth) / self.long.flops(self.depth)
        self.short = replace(self.long, steps=round(cost * steps))
        once = ["loop-2-2x4-2", "loop-6x2", "loop-2x6", "tied", "random", "last"]
        always = ["baseline", "midas", "lidas", "lns", "short"]
        self.shards = [
            (label, seed) for seed in (0, 1, 2) for label in always + (once if seed == 0 else [])
        ]
        # Behind the others, so that a shard that somebody has keeps its number.
        self.shards += [("random", seed) for seed in (1, 2)]
        self.names = [f"{label}-s{seed}-n{steps}" for label, seed in self.shards]
        self._text: ladder.Corpus | None = None

    @property
    def text(self) -> ladder.Corpus:
        if self._text is None:
            self._text = ladder.corpus()
        return self._text

    def config(self, label: str) -> ladder.LadderConfig:
        if label == "short":
            return replace(self.short, design=ladder.Design("short"))
        return replace(self.long, design=ladder.DESIGNS[label])

    def make(self, i, path, args):
        label, seed = self.shards[i]
        if label == "short" and not path.exists():
            trunk = self.path(self.shards.index(("baseline", seed)), path.parent)
            fork = trunk.with_name(trunk.stem + "-fork.pt")
            if not fork.exists():
                print(f"{self.names[i]}: the baseline has not come to its fork", flush=True)
                return
            config = self.config("short")
            state = torch.load(fork, map_location="cpu", weights_only=True)
            state["settings"] |= ladder.recipe.recipe(config)
            with archive.replacing(path) as partial:
                torch.save(state, partial)
        config, more = self.config(label), {"text": self.text, "progress": True, "checkpoint": path}
        more |= {"threads": args.threads}
        if label == "baseline":
            fork = path.with_name(path.stem + "-fork.pt")
            if not fork.exists():
                stop = int(self.short.steps * (1 - self.short.cooldown))
                ladder.train(config, self.depth, seed, stop=stop, **more)
                with archive.replacing(fork) as partial:
                    shutil.copy(path, partial)
        ladder.train(config, self.depth, seed, **more)

    def status(self, i, path):
        model = ladder.LadderModel.from_checkpoint(path)
        loss = f"held-out loss {model.losses['held_out_loss'].iloc[-1]:.4f}, " if model.step else ""
        return f"tested at step {model.step:,}, {loss}{model.wall_seconds / 3600:.2f} h"

    def finished(self, i, path):
        return ladder.LadderModel.from_checkpoint(path).finished

    #: Of these, and no others, weights are kept, in 16 bits.
    kept = (
        *((design, seed) for design in ("baseline", "midas", "lidas") for seed in (0, 1)),
        *((design, 0) for design in ("lns", "loop-2-2x4-2", "tied")),
    )

    def assemble(self, done, args):
        curves, ends, seconds, written = [], [], 0.0, []
        there: set[tuple] = set()
        if args.add:
            old, there = archived(args.results / "ladder_designs.parquet", ("design", "seed"))
            seconds = old.provenance["wall_seconds"]
        done = {i: path for i, path in done.items() if self.shards[i] not in there}
        for i, path in done.items():
            label, seed = self.shards[i]
            found = ladder.LadderModel.from_checkpoint(path, self.text)
            config = self.config(label)
            flops = [config.flops(self.depth, step) for step in found.losses["step"]]
            layers = [
                config.design.depth_at(self.depth, step - 1, config.steps)
                for step in found.losses["step"]
            ]
            about = found.losses.assign(flops=flops, layers=layers)
            curves.append(about.assign(design=label))
            ends.append(found.documents.assign(design=label))
            # The short baseline's trunk is the long one's.
            share = 1 - int(self.short.steps * (1 - self.short.cooldown)) / self.short.steps
            seconds += found.wall_seconds * (share if label == "short" else 1)
            if (label, seed) in self.kept:
                written.append(found.save(args.models, dtype="float16"))
        some = {label: asdict(self.config(label)) for label in {x for x, _ in self.shards}}
        about = {
            "config": {"depth": self.depth, "text": self.text.summary, "designs": some},
            "seeds": sorted({*(seed for _, seed in there), *(self.shards[i][1] for i in done)}),
            "scale": f"width {self.long.width}, {self.depth} layers, {self.long.steps:,} steps"
            + self.some(len(there) + len(done)),
            "wall_seconds": seconds,
        }
        for name, tables in (("designs", curves), ("designs_documents", ends)):
            path = args.results / f"ladder_{name}.parquet"
            before = [archive.load(path).frame] if there else []
            table = pd.concat([*before, *tables], ignore_index=True)
            first = ["design", "depth", "seed"]
            table = table[first + [c for c in table if c not in first]]
            written.append(archive.save(table, path, **about))
        return written


class OfDesigns(Tables):
    """Tables about the models that :class:`Designs` has trained, in the same folder.

    Of a model that is not there, the weights that were kept, in 16 bits.
    """

    keys = ("design", "seed")

    def __init__(self, steps: int | None, shards: Sequence[tuple[str, int]], what: str):
        self.designs, self.shards = Designs(steps), list(shards)
        self.names = [f"{what}-{label}-s{seed}" for label, seed in self.shards]

    def make(self, i, path, args):
        if path.exists():
            return
        label, seed = self.shards[i]
        number = self.designs.shards.index((label, seed))
        source, begin = self.designs.path(number, path.parent), time.perf_counter()
        kept = f"ladder-w{self.designs.long.width}-d{self.designs.depth}-{label}-s{seed}"
        weights = "of training"
        if source.exists() and self.designs.finished(number, source):
            model = ladder.LadderModel.from_checkpoint(source).model
        elif not source.exists() and kept in models.available():
            weights, (model, _) = "kept in 16 bits", models.load(kept, device="cpu")
            if self.designs.config(label).design.loop is not None:
                surgery.tie(model)
        else:
            print(f"{self.names[i]}: {source.name} is not done", flush=True)
            return
        with _runs.cpu(args.threads):
            table, config, scale = self.table(model, seed)
        archive.save(
            table.assign(design=label, seed=seed),
            path,
            config={"design": label, "weights": weights, **config},
            seeds=[seed],
            scale=scale,
            wall_seconds=time.perf_counter() - begin,
        )

    @abstractmethod
    def table(self, model: Any, seed: int) -> tuple[pd.DataFrame, dict[str, Any], str]:
        """What is found of a model, how, and on how much."""


class Inside(OfDesigns):
    """What became of the layers of each of those models, read off their checkpoints."""

    output = "ladder_designs_inside"
    texts = 114  # to measure on: three pieces of most held-out documents
    step = 6  # every so many documents of the training text, for the lens

    def __init__(self, steps: int | None):
        every = [shard for shard in Designs(steps).shards if shard[0] != "short"]
        super().__init__(steps, every, "inside")

    def table(self, model, seed):
        _, tokenizer = models.load("ladder-w64-d01-s0", device="cpu")  # one for all
        texts = models.texts("ladder-w64-d01-s0", self.texts)
        learned = [d.text[:127] for d in ladder.corpus().training[:: self.step]]
        some, others = (
            models.batches(tokenizer, each, length=128, size=64) for each in (texts, learned)
        )
        config = {"texts": len(texts), "length": 128, "texts of the lens": len(learned)}
        return self.measures(model, some, others), config, f"{len(texts)} texts of 128 bytes"

    def measures(self, model: Any, batches: list[dict], learned: list[dict]) -> pd.DataFrame:
        """``measure, a, b, mean, stderr``: a and b are blocks, or layers where states are read."""
        depth, rows = models.anatomy(model).depth, []
        clean = models.losses(model, batches)

        def gained(measure: str, a: int, losses: np.ndarray) -> None:
            gain = losses - clean
            error = gain.std(ddof=1) / len(gain) ** 0.5
            rows.append((measure, a, -1, gain.mean(), error))

        rows.append(("loss", -1, -1, clean.mean(), clean.std(ddof=1) / len(clean) ** 0.5))
        for run in (1, 2, 3, 4):
            for a in range(depth - 2 * run + 1):
                ones, others = list(range(a, a + run)), list(range(a + run, a + 2 * run))
                with iv.swap(model, ones, others):
                    gained(f"swapped, runs of {run}", a, models.losses(model, batches))
            for a in range(depth - run + 1):
                looped = surgery.loop(copy.deepcopy(model), a, a + run - 1, 2)
                gained(f"twice, runs of {run}", a, models.losses(looped, batches))
                with iv.skip(model, list(range(a, a + run))):
                    gained(f"skipped, runs of {run}", a, models.losses(model, batches))
        for name, future in (("skip", False), ("future skip", True)):
            effects = iv.skip_effects(model, batches, future, per_document=True)
            for of in ("output", "loss", "update"):
                score = iv.depth_score(effects, of)
                rows.append((f"depth score, {name}, {of}", -1, -1, *score))
            effects = iv.skip_effects(model, batches, future)
            for row in effects.itertuples():
                rows.append((f"{name}, {row.effect}", row.skipped, row.block, row.mean, row.stderr))
        for row in iv.local_effects(model, batches).itertuples():
            rows.append((f"direct, {row.effect}", row.skipped, row.block, row.mean, row.stderr))
        for name, reader in (("lens", None), ("affine lens", iv.affine_lens(model, learned))):
            for row in iv.lens(model, batches, reader=reader).itertuples():
                rows.append((f"{name}, {row.reading}", row.layer, -1, row.mean, row.stderr))
        recorded = trajectory.record(model, batches, "sublayer", null=True)
        for row in recorded.table().itertuples():
            lag = "" if row.lag == 1 else f", lag {row.lag}"
            rows.append((f"{row.statistic}{lag}", row.layer, -1, row.mean, row.stderr))
        parts = models.anatomy(model).blocks
        for name in ("mlp", "self_attn"):
            flat = [
                torch.cat([w.detach().flatten() for w in block.get_submodule(name).parameters()])
                for block in parts
            ]
            unit = torch.stack([w / w.norm() for w in flat]).double()
            for a, line in enumerate((unit @ unit.T).tolist()):
                rows += [(f"similarity, {name}", a, b, value, 0.0) for b, value in enumerate(line)]
        return pd.DataFrame(rows, columns=["measure", "a", "b", "mean", "stderr"])


class Primitives(OfDesigns):
    """How fast each of those models learns to copy and to look variables up."""

    output = "ladder_primitives"
    marks = (0, 50, 100, 150, 200, 300, 400, 500)
    most = 500  # steps
    tasks = ("copying", "assignment 0", "assignment 1", "assignment 2")

    def __init__(self, steps: int | None):
        some = [shard for shard in Designs(steps).shards if shard[0] not in ("short", "last")]
        super().__init__(steps, some, "primitives")

    def table(self, model, seed):
        asked = ladder.learn(
            model, self.tasks, self.most, seed=seed, test_at=self.marks, progress=True
        )
        config = {"steps": self.most, "tasks": list(self.tasks)}
        return asked, config, f"{self.most} steps of 32 questions"


class Repeats(OfDesigns):
    """Whether a model copies better if some of its layers run once more than in training.

    No model of this size copies in a prompt. Each learns it for a few steps, so that it can do
    so in part. Both passes write in full, or half as much.
    """

    output = "ladder_repeats"
    marks = (40, 60, 80)
    runs = (2, 4)
    questions = 500

    def __init__(self, steps: int | None):
        which = ("baseline", "midas", "lidas", "random", "loop-2-2x4-2")
        some = [shard for shard in Designs(steps).shards if shard[0] in which]
        super().__init__(steps, some, "repeats")

    def table(self, model, seed):
        depth, rows = models.anatomy(model).depth, []
        for steps in self.marks:
            tuned = copy.deepcopy(model)
            ladder.learn(tuned, "copying", steps, seed=seed, questions=2, progress=True)
            places = [(run, a) for run in self.runs for a in range(depth - run + 1)]
            for run, a, factor in [(0, -1, 1.0), *((*p, f) for f in (1.0, 0.5) for p in places)]:
                asked = tuned
                if run:
                    asked = surgery.loop(copy.deepcopy(tuned), a, a + run - 1, 2)
                with ExitStack() as edits:
                    for block in range(a, a + 2 * run) if factor < 1 else ():
                        edits.enter_context(iv.scale(asked, block, factor))
                    found = primitives.accuracy(
                        asked, self.questions, seed=10_000 + seed, tasks=("copying",)
                    ).iloc[0]
                answers = found[["right", "stderr", "loss", "loss_stderr"]]
                rows.append((steps, run, a, factor, *answers))
        names = ["step", "run", "first", "factor", "right", "stderr", "loss", "loss_stderr"]
        config = {"steps": list(self.marks), "questions": self.questions}
        scale = f"{' or '.join(map(str, self.marks))} steps of 32 questions"
        return pd.DataFrame(rows, columns=names), config, scale


class Loops(Tables):
    """Layers that run several times beside layers of their own, and how much each may write.

    The recipe is the ladder's shortest. A model is named by its loop, its depth and the power p
    of the depth N by which all writes are divided, N^p.
    """

    output = "ladder_loops"
    keys = ("layers", "times", "power", "seed")
    text_count = 114  # three pieces of most held-out documents
    powers = (0.5, 1.0)

    def __init__(self, steps: int | None):
        base = ladder.LadderConfig()
        steps = 1_500 if steps is None else steps
        self.base = replace(base, steps=steps, warmup=min(base.warmup, steps // 4))
        looped = [(1, 2), (1, 4), (1, 8), (1, 12), (2, 2), (2, 4)]
        alone = [(depth, 1) for depth in (1, 2, 3, 4, 6, 8, 12)]
        scaled = [(layers, depth // layers) for depth in (4, 12) for layers in (1, depth)]
        each = [(*one, 0.0) for one in looped + alone]
        each += [(*one, power) for one in scaled for power in self.powers]
        self.shards = [(*one, seed) for seed in (0, 1, 2) for one in each]
        self.names = [
            f"{self.label(i)}-s{shard[3]}-n{steps}" for i, shard in enumerate(self.shards)
        ]

    def label(self, i: int) -> str:
        layers, times, power, _ = self.shards[i]
        return f"loop-{layers}x{times}-p{power:g}"

    def config(self, i: int) -> ladder.LadderConfig:
        layers, times, power, _ = self.shards[i]
        loop = None if times == 1 else (0, layers, times, 0)
        scale = (layers * times) ** -power
        design = ladder.Design(self.label(i), loop=loop, write_scale=scale)
        return replace(self.base, design=design)

    def make(self, i, path, args):
        if path.exists():
            return
        layers, times, power, seed = self.shards[i]
        depth, checkpoint, config = layers * times, path.with_suffix(".pt"), self.config(i)
        more = {"checkpoint": checkpoint, "threads": args.threads, "progress": True}
        found = ladder.train(config, depth, seed, **more)
        name = "ladder-w64-d01-s0"  # its tokenizer and texts are those of every model
        _, tokenizer = models.load(name, device="cpu")
        texts, length = models.texts(name, self.text_count), config.sequence
        some = models.batches(tokenizer, texts, length=length, size=64)
        with _runs.cpu(args.threads):
            recorded = trajectory.record(found.model, some, "block", null=True)
        last = found.losses.iloc[-1]
        rows = [("loss", 0, 1, last["held_out_loss"], last["stderr"])]
        for row in recorded.table().itertuples():
            rows.append((row.statistic, row.layer, row.lag, row.mean, row.stderr))
        table = pd.DataFrame(rows, columns=["measure", "layer", "lag", "mean", "stderr"])
        archive.save(
            table.assign(layers=layers, times=times, power=power, seed=seed),
            path,
            config={**ladder.recipe.recipe(config), "depth": depth},
            seeds=[seed],
            scale=f"width {config.width}, {config.steps:,} steps",
            wall_seconds=found.wall_seconds,
        )
        checkpoint.unlink()


class Hops(Run):
    """Small networks that learn questions of several hops: depths times seeds."""

    ending = ".pt"
    kept = (0,)  # seeds of those whose weights are archived

    def __init__(self, steps: int | None):
        narrow = [
            hops.HopConfig(depth=depth, seed=seed)
            for seed in (0, 1, 2)
            for depth in (3, 2, 1, 4, 6)
        ]
        wide = {"width": 64, "heads": 4, "rate": 2e-3, "steps": 5_000}
        self.configs = [*narrow, *(hops.HopConfig(depth=d, **wide) for d in (1, 2, 3, 4))]
        if steps is not None:
            self.configs = [replace(config, steps=steps) for config in self.configs]
        self.names = [f"hops-w{c.width}-d{c.depth}-s{c.seed}-n{c.steps}" for c in self.configs]

    def make(self, i, path, args):
        begin = time.perf_counter()
        with _runs.cpu(args.threads):
            hops.train(self.configs[i], path, progress=True)
        seconds = {"seconds": time.perf_counter() - begin}
        path.with_suffix(".json").write_text(json.dumps(seconds))

    def status(self, i, path):
        kept = torch.load(path, weights_only=True)
        right = ", ".join(f"{share:.2f}" for _, _, share in kept["rows"][-4:])
        return f"step {kept['step']:,}, right: {right}"

    def finished(self, i, path):
        return torch.load(path, weights_only=True)["step"] == self.configs[i].steps

    def assemble(self, done, args):
        tables, networks, seconds = [], [], 0.0
        for i, path in done.items():
            config = self.configs[i]
            network, tests = hops.train(config, path)  # is trained already
            about = {name: getattr(config, name) for name in ("width", "depth", "seed")}
            tables.append(tests.assign(**about))
            if config.seed in self.kept:
                networks.append((config, network))
            seconds += json.loads(path.with_suffix(".json").read_text())["seconds"]
        first, seeds = self.configs[0], sorted({self.configs[i].seed for i in done})
        table = archive.save(
            pd.concat(tables, ignore_index=True),
            args.results / "hops.parquet",
            config=asdict(first) | {"depth": sorted({self.configs[i].depth for i in done})},
            seeds=seeds,
            scale=f"rings of {first.nodes} places, widths "
            f"{sorted({self.configs[i].width for i in done})}, {first.steps:,} steps"
            + self.some(len(done)),
            wall_seconds=seconds,
        )
        return [table, hops.save(networks, args.results / "hops_networks.safetensors")]


# The command ----------------------------------------------------------------------------

NAMES = (*GRIDS, *LABELLED, "patience", "updates", "fig5_updates", "patience_updates")
NAMES += ("seeds", "nested_steps", "smollm2", "effects", "hops", "healing")
NAMES += ("designs", "inside", "primitives", "repeats", "loops", "ladder")
STEPPED = {*GRIDS, *LABELLED, "updates", "seeds", "hops", "healing"}  # may have other --steps
STEPPED |= {"designs", "inside", "primitives", "repeats", "loops", "ladder"}
ADDED = {"designs", "inside", "primitives", "repeats", "loops", "healing"}  # may be added to


def build(args: argparse.Namespace) -> Run:
    name = args.name
    if name in GRIDS:
        shards = toy.shards(GRIDS[name])
        return Grids(f"toy_{name}", [(shard, {}) for shard in shards], args.steps)
    if name in LABELLED:
        return Grids(f"toy_{name}", LABELLED[name], args.steps)
    if name == "updates":
        return Updates(args.steps)
    if name.endswith("_updates"):
        return finished_of(name)
    if name == "patience":
        return Patience()
    if name == "smollm2":
        return Recordings(args.documents)
    for kind in (Seeds, Healing, Hops, Designs, Inside, Primitives, Repeats, Loops):
        if name == kind.__name__.lower():
            return kind(args.steps)
    if name == "effects":
        return Effects(args.documents)
    return NestedSteps(args.seeds) if name == "nested_steps" else Ladder(args)


def parser() -> argparse.ArgumentParser:
    first, _, _ = __doc__.partition("\n\n")
    whole = argparse.ArgumentParser(description=first)
    names = whole.add_subparsers(dest="name", required=True, metavar="name")
    for name in NAMES:
        one = names.add_parser(name)
        one.add_argument("action", choices=("run", "status", "assemble"))
        one.add_argument("--folder", type=_arguments.folder, required=True, help="where shards are")
        one.add_argument("--shards", type=_arguments.index, nargs="*", help="numbers; all if none")
        one.add_argument("--jobs", type=_arguments.count, default=1, help="processes that share")
        one.add_argument("--threads", type=_arguments.count, default=1)
        one.add_argument("--results", type=_arguments.folder, default=ROOT / "results")
        if name in ADDED:
            one.add_argument("--add", action="store_true", help="to the shards in the archive")
        if name in STEPPED:
            one.add_argument("--steps", type=_arguments.count, help="instead of its own")
        if name in ("smollm2", "effects"):
            one.add_argument("--documents", type=_arguments.count, help="instead of its own")
        if name == "nested_steps":
            one.add_argument("--seeds", type=_arguments.count, default=32, help="of each kind")
    one.add_argument("--scale", default="cpu", help="demo, cpu, gpu or gpu-wide")
    one.add_argument("--depths", type=_arguments.count, nargs="+", help="instead of the scale's")
    one.add_argument("--seeds", type=_arguments.index, nargs="+", help="instead of the scale's")
    one.add_argument("--width", type=_arguments.count, help="instead of the scale's")
    one.add_argument("--rates", type=_arguments.rate, nargs="+", help="learning rates to try")
    one.add_argument("--device", type=_arguments.device, help="a GPU where there is one if none")
    one.add_argument("--autocast", action="store_true", help="products in bfloat16")
    one.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=None)
    one.add_argument("--text", type=_arguments.folder, help="instead of the standard library")
    one.add_argument("--losses", metavar="LABEL", help="assemble the losses alone, as LABEL")
    one.add_argument("--models", type=_arguments.folder, default=ROOT / "models")
    names.choices["designs"].add_argument(
        "--models", type=_arguments.folder, default=ROOT / "models", help="where models are kept"
    )
    return whole


def share(jobs: int, arguments: list[str]) -> int:
    """Run the same command in several processes."""
    command = [sys.executable, __file__, *arguments, "--jobs", "1"]
    processes = [subprocess.Popen(command) for _ in range(jobs)]
    try:
        return max(process.wait() for process in processes)
    except KeyboardInterrupt:  # which the processes got too; their checkpoints remain
        return max(process.wait() for process in processes)


def make(run: Run, args: argparse.Namespace) -> None:
    """Make those of the wanted shards that no other process is making."""
    failed = 0
    for i, name in enumerate(run.names):
        if args.shards is not None and i not in args.shards:
            continue
        path = run.path(i, args.folder)
        with _runs.claimed(path) as ours:
            print(f"shard {i}: {name}" + ("" if ours else " is taken"), flush=True)
            try:
                if ours:
                    run.make(i, path, args)
            except FloatingPointError as error:
                failed += 1
                print(f"shard {i}: {error}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"{failed} shards could not be made, see above")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    whole = parser()
    args = whole.parse_args(arguments)
    try:
        run = build(args)
        _arguments.within(whole, "--shards", args.shards, len(run.names))
        if args.action == "run" and args.jobs > 1:
            sys.exit(share(args.jobs, arguments))
        if args.action == "run":
            return make(run, args)
        paths = {i: run.path(i, args.folder) for i in range(len(run.names))}
        for i, path in paths.items():
            said = run.status(i, path) if path.exists() else "not begun"
            print(f"shard {i} ({run.names[i]}): {said}")
        if args.action == "assemble":
            done = {i: p for i, p in paths.items() if p.exists() and run.finished(i, p)}
            if not done:
                sys.exit(f"no shard of {args.name} in {args.folder} is finished: run goes on")
            for path in run.assemble(done, args):
                print(path)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
