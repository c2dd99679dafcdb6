"""What a training step of the ladder costs, beside the same step with transformers alone.

    python benchmarks/ladder.py                     # width 64, depths 1, 4 and 16
    python benchmarks/ladder.py --depths 4 --rounds 20

Both train the same model on the same text with AdamW in this one run, taking turns, so that
whatever else the machine does slows both; processor time is less disturbed than wall time. The
ladder's figure includes cutting the text into batches; its tests and the compiler's time, which
is printed, are left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers

from depthutil import _arguments, _runs, corpus, ladder


def plain(config: ladder.LadderConfig, depth: int, text: ladder.Corpus) -> Callable[[], None]:
    """A step as one would write it with transformers."""
    model = ladder.model.new_model(config, depth, 0)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=config.weight_decay)
    windows = corpus.Windows(text.training, config.sequence, config.batch, 0)
    batches = [torch.from_numpy(windows(step)) for step in range(50)]
    count = 0

    def step() -> None:
        nonlocal count
        rows = batches[count % len(batches)]
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        loss.item()
        count += 1

    return step


def ours(
    config: ladder.LadderConfig, depth: int, text: ladder.Corpus, compiled: bool
) -> Callable[[], None]:
    """A step of the ladder."""
    device = torch.device("cpu")
    return ladder.training.Trainer(config, depth, 0, 1e-3, text, device, compiled, False).advance


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> pd.DataFrame:
    """Milliseconds a step: processor time, median and least, and least wall time."""
    clocks = (time.process_time, time.perf_counter)
    taken = {name: [] for name in steps}
    for name, step in steps.items():
        begin = time.perf_counter()
        step(), step()
        print(f"  {name}: {time.perf_counter() - begin:.1f} s for the first two steps", flush=True)
    for _ in range(rounds):
        for name, step in steps.items():
            begin = [clock() for clock in clocks]
            step(), step()
            both = [(clock() - at) / 2 for clock, at in zip(clocks, begin, strict=True)]
            taken[name].append(both)
    rows = []
    for name, values in taken.items():
        cpu, wall = 1e3 * np.array(values).T
        median, least = np.median(cpu), cpu.min()
        row = {"step": name, "median, ms": median, "least, ms": least, "wall, ms": wall.min()}
        rows.append(row)
    table = pd.DataFrame(rows)
    for column in ("median", "least"):
        times = table[f"{column}, ms"]
        table[f"times cheaper ({column})"] = times.iloc[0] / times
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=_arguments.count, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=_arguments.count, default=10)
    args = parser.parse_args()
    config = ladder.LadderConfig.at("cpu", test_every=10**6)
    text = ladder.corpus()
    print(
        f"{platform.machine()}, one thread, PyTorch {torch.__version__}, transformers "
        f"{transformers.__version__}; width {config.width}, batches of {config.batch} x "
        f"{config.sequence} tokens"
    )
    with _runs.cpu(1):
        for depth in args.depths:
            steps = {
                "transformers": plain(config, depth, text),
                "ladder, not compiled": ours(config, depth, text, False),
                "ladder": ours(config, depth, text, True),
            }
            print(f"depth {depth}, {config.parameters(depth):,} parameters:")
            print(measure(steps, args.rounds).round(2).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
