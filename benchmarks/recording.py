"""What recording a language model costs: against its bare forward pass, and in memory.

    python benchmarks/recording.py            # GPT-NeoX, 24 layers of width 512, random weights
    python benchmarks/recording.py --decode   # and decoding every layer early
    python benchmarks/recording.py --device cuda --batch 32

Bare pass and recording take turns batch by batch in this one run, so that whatever else the
machine does slows both; each batch gives a ratio, and the table their median and quartiles. The
bare pass is the backbone without its head, which is what a recording runs: with the head
the shares would be smaller. Memory is the peak of a process of its own for each corpus.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from depthutil import _arguments, trajectory


def network(args: argparse.Namespace) -> torch.nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        num_hidden_layers=args.depth,
        num_attention_heads=8,
        intermediate_size=4 * args.width,
        max_position_embeddings=args.length,
    )
    return GPTNeoXForCausalLM(config).eval().to(args.device)


def corpus(args: argparse.Namespace, batches: int):
    """The same random tokens always, made as they are read."""
    for number in range(batches):
        generator = torch.Generator().manual_seed(number)
        shape = (args.batch, args.length)
        yield torch.randint(args.vocabulary, shape, generator=generator)


def turns(args: argparse.Namespace, model: torch.nn.Module, work) -> np.ndarray:
    """Seconds ``(batches, 2)`` of a bare pass over each batch, and of ``work`` on it.

    The bare passes run whenever ``work`` asks for its next batch. On a CPU the time is that which
    its cores worked for this process, which others do not lengthen.
    """
    times = []

    def clock() -> float:
        if args.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def batches():
        for batch in corpus(args, args.batches + 1):
            begin = clock()
            with torch.no_grad():
                model.base_model(batch.to(args.device), use_cache=False)
            middle = clock()
            yield batch
            times.append((middle - begin, clock() - middle))

    work(batches())
    return np.array(times[1:])  # the first warms up, and its writes are checked


def cost(args: argparse.Namespace) -> pd.DataFrame:
    """Median time of a token, and median ratio to the bare pass over the same batch."""
    model = network(args)
    works = {
        "block writes": lambda batches: trajectory.record(model, batches, "block"),
        "sublayer writes": lambda batches: trajectory.record(model, batches, "sublayer"),
    }
    if args.decode:
        works["decoding early"] = lambda batches: [
            trajectory.decode_early(model, [batch]) for batch in batches
        ]
    rows = []
    for name, work in works.items():
        times = turns(args, model, work)
        bare, mine = 1e6 * np.median(times, axis=0) / (args.batch * (args.length - 1))
        ratio = 100 * (times[:, 1] / times[:, 0] - 1)
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        rows.append((name, bare, mine, middle, low, high))
    columns = ["recorded", "bare µs a token", "µs a token", "over bare, %", "quartiles", "%"]
    return pd.DataFrame(rows, columns=columns)


def peak(args: argparse.Namespace) -> None:
    """Record a small corpus and print the peak memory of this process in MB."""
    model = network(args)
    trajectory.record(model, corpus(args, args.batches), args.writes)
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent in
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def memory(args: argparse.Namespace) -> pd.DataFrame:
    """Peak memory for a corpus and for four times as much, a process each."""
    rows = []
    for writes in ("block", "sublayer"):
        for batches in (4, 16):
            command = [sys.executable, __file__, "--peak", "--writes", writes]
            command += ["--batches", str(batches), "--batch", "2", "--depth", "8", "--width", "256"]
            command += ["--length", "128", "--vocabulary", "1000"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            tokens = batches * 2 * 127
            rows.append({"writes": writes, "tokens": tokens, "peak MB": float(done.stdout)})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=_arguments.count, default=24)
    parser.add_argument("--width", type=_arguments.count, default=512)
    parser.add_argument("--length", type=_arguments.count, default=256)
    parser.add_argument("--batch", type=_arguments.count, default=2)
    parser.add_argument("--batches", type=_arguments.count, default=16)
    parser.add_argument("--vocabulary", type=_arguments.count, default=50304)
    parser.add_argument("--threads", type=_arguments.count, default=1)
    parser.add_argument("--device", type=_arguments.device, default="cpu")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--writes", default="block", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        return peak(args)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} thread(s), {args.device}, "
        f"PyTorch {torch.__version__}; GPT-NeoX of {args.depth} layers, width {args.width}"
    )
    print(cost(args).round(2).to_string(index=False))
    if args.device == "cpu" and sys.platform == "linux":
        table = memory(args)
        print(table.round(1).to_string(index=False))
        grown = table["peak MB"].to_numpy().reshape(2, 2)
        print(f"four times the corpus: {np.diff(grown).ravel().round(1).tolist()} MB more")


if __name__ == "__main__":
    main()
