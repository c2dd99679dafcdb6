"""What a student's step costs: trained one by one as written down, and as a stacked grid.

    python benchmarks/toy.py                # the paper's sizes, 4 temperatures x 6 depths
    python benchmarks/toy.py --threads 2 --batch 256
    python benchmarks/toy.py --check        # on a GPU: are the kernels right, is tf32 enough?
    python benchmarks/toy.py --tune         # on a GPU: other block sizes

On a CPU all ways train the same students on the same data, in this one run, taking turns,
so that whatever else the machine does slows all. The first steps of each turn are not
counted. On a GPU, where there is one, the grid is the whole of figure 3b.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from depthutil import _arguments, toy
from depthutil.toy import kernels

NO_GPU = "There is no GPU here"
TARGET = "Target: figure 3b within 0.25 h on one H200, 100 times the rate of one by one."
FIG3B = toy.ToyConfig.paper("fig3b")


def precisions() -> tuple[str, ...]:
    """Those of this GPU."""
    return kernels.PRECISIONS if torch.cuda.get_device_capability() >= (8, 0) else ("ieee",)


class Watch:
    """Seconds a call, from some calls to some calls later, when the work is done."""

    def __init__(self, skip: int, device: str, every: int = 1):
        self.skip, self.device, self.every = skip, device, every
        self.calls, self.seconds = 0, []

    def __call__(self, *_) -> None:
        if self.calls % self.every == 0:
            if self.device == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.calls > self.skip:
                self.seconds.append((now - self.last) / self.every)
            self.last = now
        self.calls += 1


def one_by_one(config: toy.ToyConfig, depth: int, device: str) -> list[float]:
    """Seconds of the steps of one student, teacher's pass included, trained by itself."""
    *deep, head = toy.teacher_weights(config, 0, 0.0)
    deep, head = toy.Network(*deep).to(device), head.to(device)
    student = toy.Network(*toy.student_weights(config, 0, depth, 0)).to(device)
    adam = torch.optim.Adam(student.parameters(), lr=config.learning_rate)
    watch = Watch(1, device)
    for _ in range(config.steps):
        x = torch.randn(config.batch, config.width, device=device)
        with torch.no_grad():
            target = toy.targets(config, deep(x), head, config.temperatures[0])
        loss = toy.losses(config, student(x), student.head, config.temperatures[0], target)
        adam.zero_grad()
        loss.backward()
        adam.step()
        watch()
    return watch.seconds


def stacked(config: toy.ToyConfig, device: str, every: int = 1, **way) -> list[float]:
    """Seconds of the steps of the whole grid."""
    watch = Watch(every, device, every)
    toy.train(config, progress=watch, device=device, **way)
    return watch.seconds[:-1]  # a test follows the last step


def work(config: toy.ToyConfig, teachers: int = 1) -> float:
    """FLOP of a step of the grid that cannot be saved: nothing is computed twice."""
    c, layer = config, 4 * config.width * config.hidden * config.batch
    head = 2 * c.width * c.vocabulary * c.batch
    each = sum(3 * depth * layer + 3 * head for depth in c.depths) * len(c.temperatures)
    pairs = len(c.teachers) * len(c.rhos)
    return pairs * (each + teachers * (c.teacher_depth * layer + head))


def rates() -> dict[str, float]:
    """FLOP/s of a large product of matrices: in float32, and in tf32 where the card has it."""
    before, found = torch.backends.cuda.matmul.allow_tf32, {}
    a = torch.randn(8192, 8192, device="cuda")
    for name, tf32 in (("float32", False), ("tf32", True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        watch = Watch(2, "cuda")
        for _ in range(8):
            a @ a
            watch()
        found[name] = 2 * 8192**3 / min(watch.seconds)
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


def row(config, where, way, seconds, alone, own_teacher=False) -> dict:
    """A line of the table, from seconds a step of the grid, median and least disturbed."""
    students = len(config.students(0)) * len(config.depths)
    median, least = (1e3 * s / students for s in seconds)
    teachers = len(config.temperatures) * len(config.depths) if own_teacher else 1
    all_of_it = 96 * len(FIG3B.depths) * FIG3B.steps * median / 1e3 / 3600
    return {
        **where,
        "batch": config.batch,
        "way": way,
        "ms a student-step": median,
        "least disturbed": least,
        "times cheaper": alone[0] / seconds[0],
        "TFLOP/s": work(config, teachers=teachers) / seconds[0] / 1e12,
        "figure 3b, h": all_of_it * FIG3B.batch / config.batch,
    }


def table(config: toy.ToyConfig, rounds: int, device: str, where: dict) -> list[dict]:
    """All ways that this device has, taking turns."""
    ways = {"stacked": {}}
    if device == "cuda":
        ways = {"stacked, torch": {"kernel": "torch", "graph": False}}
        ways["stacked, torch, graph"] = {"kernel": "torch", "graph": True}
        for name in precisions():
            way = {"kernel": "triton", "precision": name, "graph": True}
            ways[f"stacked, triton {name}, graph"] = way
    alone = {depth: [] for depth in config.depths}
    grid = {way: [] for way in ways}
    longer = config if device == "cpu" else replace(config, steps=51)
    for _ in range(rounds):
        for depth in config.depths:
            alone[depth] += one_by_one(config, depth, device)
        for name, way in ways.items():
            grid[name] += stacked(longer, device, every=1 if device == "cpu" else 10, **way)
    # Every temperature costs a student of one depth the same.
    count = len(config.students(0))
    both = [count * sum(pick(s) for s in alone.values()) for pick in (np.median, np.min)]
    rows = [row(config, where, "one by one", both, both, own_teacher=True)]
    for name, seconds in grid.items():
        rows.append(row(config, where, name, (np.median(seconds), np.min(seconds)), both))
    return rows


# Checks that need a GPU -----------------------------------------------------------------


def accuracy(depth: int = 48, networks: int = 8, batch: int = 1000) -> pd.DataFrame:
    """The largest error of each way's last state and gradients, relative to the largest entry."""
    torch.manual_seed(0)
    d, h, options = FIG3B.width, FIG3B.hidden, {"device": "cuda", "dtype": torch.float64}
    weights = [
        torch.randn(depth, networks, h, d, **options) / d**0.5,
        torch.randn(depth, networks, h, **options) / d**0.5,
        torch.randn(depth, networks, d, h, **options) / h / depth**0.5,
    ]
    x, grad = torch.randn(2, networks, batch, d, **options)

    def results(make, dtype):
        stack = make(*(weight.to(dtype) for weight in weights))
        last = stack.forward(x.to(dtype), keep=True).clone()
        into = [torch.empty_like(w) for w in (stack.w1, stack.b, stack.w2)]
        stack.backward(grad.to(dtype), into)
        return [last, *into]

    exact, rows = results(kernels.Stack, torch.float64), []
    ways = {"torch": kernels.Stack}
    for precision in precisions():
        ways[f"triton, {precision}"] = kernels.choose("triton", "cuda", precision=precision)[0]
    for name, make in ways.items():
        pairs = zip(results(make, torch.float32), exact, strict=True)
        errors = [float((got - want).abs().max() / want.abs().max()) for got, want in pairs]
        rows.append(dict(zip(("way", "last state", "w1", "b", "w2"), (name, *errors), strict=True)))
    return pd.DataFrame(rows)


def evidence(steps: int) -> pd.DataFrame:
    """How far losses and exponents move, against what another order of additions does to them.

    Two runs in float32, one by each kernel, differ by rounding alone: tf32 is enough if it
    moves nothing further than that, and exponents by less than their standard error.
    """
    config = replace(FIG3B, temperatures=(0.01, 0.1, 1.0), steps=steps, test_every=steps)
    reference = toy.train(config, device="cuda", kernel="torch")
    alpha, rows = toy.exponent(reference), []
    for precision in precisions():
        run = toy.train(config, device="cuda", kernel="triton", precision=precision)
        moved = np.log(run.losses["loss"] / reference.losses["loss"]).abs()
        shift = (toy.exponent(run)["alpha"] - alpha["alpha"]).abs()
        rows.append(
            {
                "against torch": run.kernel,
                "log loss, median": moved.median(),
                "log loss, largest": moved.max(),
                "exponent, largest": shift.max(),
                "in standard errors": (shift / alpha["stderr"]).max(),
            }
        )
    return pd.DataFrame(rows)


def tune() -> pd.DataFrame:
    """Milliseconds forward and backward of 96 networks of 48 layers, for other blocks."""
    torch.manual_seed(0)
    d, h, rows = FIG3B.width, FIG3B.hidden, []
    shapes = [(48, 96, h, d), (48, 96, h), (48, 96, d, h)]
    weights = [torch.randn(shape, device="cuda") / h for shape in shapes]
    into = [torch.empty_like(weight) for weight in weights]
    x = torch.randn(96, FIG3B.batch, d, device="cuda")
    blocks = itertools.product(precisions(), (1024, 2048, 4096), (16, 32, 64, 128), (4, 8))
    for precision, kernels.TILE, kernels.UNITS, warps in blocks:
        kernels.OPTIONS = {"num_warps": warps, "num_stages": 2}
        stack, watches = kernels.FusedStack(*weights, precision=precision), []
        try:
            for step in (
                lambda s=stack: s.forward(x, keep=True),
                lambda s=stack: s.backward(x, into),
            ):
                watches.append(Watch(2, "cuda"))
                for _ in range(8):
                    step()
                    watches[-1]()
        except Exception as error:  # it does not fit: say so and go on
            print(precision, kernels.TILE, kernels.UNITS, warps, type(error).__name__)
            continue
        forward, backward = (1e3 * min(watch.seconds) for watch in watches)
        rows.append((precision, kernels.TILE, kernels.UNITS, warps, forward, backward))
    names = ["precision", "TILE", "UNITS", "warps", "forward, ms", "backward, ms"]
    return pd.DataFrame(rows, columns=names).sort_values(["precision", "backward, ms"])


def show(frame: pd.DataFrame) -> None:
    def text(value: float) -> str:
        return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"

    print(frame.to_string(index=False, float_format=text), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=_arguments.count, nargs="+", default=[1])
    parser.add_argument("--batch", type=_arguments.count, nargs="+", default=[1024])
    parser.add_argument("--rounds", type=_arguments.count, default=3)
    parser.add_argument("--check", action="store_true", help="check the kernels on a GPU")
    parser.add_argument(
        "--steps", type=_arguments.count, default=2000, help="of --check's training"
    )
    parser.add_argument("--tune", action="store_true", help="try other blocks on a GPU")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    print(f"{platform.machine()}, {os.cpu_count()} cores, PyTorch {torch.__version__}")
    print(torch.cuda.get_device_name() if gpu else f"{NO_GPU}: its rows are absent.")
    if args.check or args.tune:
        if not gpu:
            sys.exit(f"{NO_GPU}, and --check and --tune need one: tests/test_kernels.py does not.")
        if args.check:
            show(accuracy())
            show(evidence(args.steps))
        if args.tune:
            show(tune())
        return
    base = replace(FIG3B, steps=7, test_every=1000, test_batches=1)
    few = replace(base, rhos=(0.0,), teachers=(0,), temperatures=(0.01, 0.05, 0.2, 1.0))
    print(
        f"width {base.width}, teacher of {base.teacher_depth} layers, depths {base.depths}, "
        f"{len(few.temperatures)} temperatures{', on the GPU all of figure 3b' if gpu else ''}"
    )
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.batch:
            where = {"where": f"CPU, {threads} threads" if threads > 1 else "CPU, 1 thread"}
            rows += table(replace(few, batch=batch), args.rounds, "cpu", where)
    if gpu:
        for batch in args.batch:
            rows += table(replace(base, batch=batch), args.rounds, "cuda", {"where": "GPU"})
    show(pd.DataFrame(rows))
    print(f"Figure 3b: 96 teacher-temperature pairs, 6 depths, {FIG3B.steps:,} steps, no tests.")
    if gpu:
        named = ", ".join(f"{rate / 1e12:.1f} TFLOP/s in {name}" for name, rate in rates().items())
        print(f"{TARGET}\nThis card multiplies large matrices with {named}.")


if __name__ == "__main__":
    main()
