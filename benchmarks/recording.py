"""What recording a language model costs: against its bare forward pass, and in memory.

    python benchmarks/recording.py            # GPT-NeoX, 24 layers of width 512, random weights
    python benchmarks/recording.py --decode   # and decoding every layer early
    python benchmarks/recording.py --peer     # against the procedure written plainly
    python benchmarks/recording.py --device cuda --batch 32

Bare pass and recording take turns batch by batch in this one run, so that whatever else the
machine does slows both; each batch gives a ratio, and the table their median and quartiles. The
bare pass is the backbone without its head, which is what a recording runs: with the head
the shares would be smaller. Memory is the peak of a process of its own for each corpus.

The plain procedure is what one writes down for the figures 2 a, c, e of arXiv 2602.05970 and the
loss decoded at each layer: ``output_hidden_states``, angles as arccosines of normalised states in
single precision, and for each layer the last block, the norm and the head. It takes turns with one
call that records and decodes in one pass, and has to give the same numbers.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from depthutil import _arguments, models, trajectory


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


def llama(depth: int, width: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=depth,
        num_attention_heads=8,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def plainly(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Angles of states, angles of updates and losses, a row each layer, ``(layers, tokens)``."""
    out = model(ids, output_hidden_states=True)
    states, body = torch.stack(out.hidden_states), model.model
    places = torch.arange(ids.shape[1])[None]

    def angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = (v / v.norm(dim=-1, keepdim=True) for v in (x, y))
        return (x * y).sum(-1).clamp(-1, 1).acos()

    inside = states[:-1, :, :-1]  # the last has been through the norm
    updates = inside.diff(dim=0)
    losses = []
    for h in [*out.hidden_states[:-2], None]:
        logits = out.logits
        if h is not None:
            turns = body.rotary_emb(h, places)
            h = body.layers[-1](h, attention_mask=None, position_embeddings=turns)
            logits = model.lm_head(body.norm(h if torch.is_tensor(h) else h[0]))
        flat = logits[:, :-1].flatten(0, 1).float()
        goal = ids[:, 1:].flatten()
        losses.append(torch.nn.functional.cross_entropy(flat, goal, reduction="none"))
    return angle(inside[:-1], inside[1:]), angle(updates[:-1], updates[1:]), torch.stack(losses)


def peer(args: argparse.Namespace) -> pd.DataFrame:
    """How much longer the plain procedure takes, and the largest difference of its numbers."""
    networks = {"24 layers, width 256, random": llama(24, 256)}
    names = [name for name in models.available() if name == "ladder-w64-d16-s0"]
    networks |= {name: models.load(name, device="cpu").model for name in names}
    rows = []
    for (name, model), size in itertools.product(networks.items(), (4, 1)):
        times, theirs = [], []

        def batches(model=model, size=size, times=times, theirs=theirs):
            for number in range(args.texts // 4 + 1):
                generator = torch.Generator().manual_seed(number)
                ids = torch.randint(256, (4, 128), generator=generator)
                begin = time.process_time()
                theirs.extend(plainly(model, some) for some in ids.split(size))
                middle = time.process_time()
                yield ids
                times.append((middle - begin, time.process_time() - middle))

        got = trajectory.record(model, batches(), decode="last")
        plain, ours = np.array(times[1:]).T  # the model is measured on the first
        low, middle, high = np.percentile(plain / ours, [25, 50, 75])
        whole = (torch.cat([t[i].flatten(1) for t in theirs], 1).double() for i in range(3))
        angles, updates, losses = (part.mean(1).numpy() for part in whole)
        gap = max(
            np.abs(got.angles()["mean"][:-1] - angles).max(),
            np.abs(got.update_angles()["mean"][:-1] - updates).max(),
            np.abs(got.decoded()["mean"] - losses).max(),
        )
        rows.append((name, size, plain.sum(), ours.sum(), middle, low, high, f"{gap:.0e}"))
    columns = ["model", "texts at a time", "plain s", "ours s", "plain / ours", "quartiles", ""]
    return pd.DataFrame(rows, columns=[*columns, "largest gap"])


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
    parser.add_argument("--peer", action="store_true", help="only this, on the CPU")
    parser.add_argument("--texts", type=_arguments.count, default=48, help="for --peer")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--writes", default="block", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        return peak(args)
    if args.peer:
        print(f"{platform.machine()}, {args.threads} thread(s), PyTorch {torch.__version__}")
        return print(peer(args).round(3).to_string(index=False))
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
