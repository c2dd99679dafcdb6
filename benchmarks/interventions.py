"""Effects of skipping, erasing and tracing, beside one full forward pass for each cell.

    OMP_NUM_THREADS=1 python benchmarks/interventions.py --rounds 3
    OMP_NUM_THREADS=1 python benchmarks/interventions.py --only trace --model smollm2-135m

Each round runs the plain loop and this package's function by turns in one process, on one thread
unless OMP_NUM_THREADS says otherwise, and makes sure that both give the same numbers. *skips* is
the whole matrix of :func:`depthutil.interventions.skip_effects`, against a pass with one block
skipped, by hooks, for each block; *erase* and *trace* are every layer and position, the plain loop
with all draws of noise in one batch. The model is a random one, of 24 blocks by default. What is
printed are seconds and the median ratio, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from depthutil import _arguments, models, stream
from depthutil import interventions as iv

TEXT, SUBJECT, TARGET = "The Colosseum is in the country of", "Colosseum", " Italy"


def random_model(blocks: int, width: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=3 * width,
    )
    return LlamaForCausalLM(config).eval()


class Words:
    """A tokenizer for a random model: nine words."""

    words = (*TEXT.split(), TARGET.strip())

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.words.index(word) for word in text.split()]}

    def decode(self, ids: Any, **options: Any) -> str:
        return " ".join(self.words[i] if i < len(self.words) else "…" for i in map(int, ids))


def plain_skips(model: Any, batches: torch.Tensor) -> np.ndarray:
    """Mean relative change of each later update, one forward pass for each block."""
    return np.mean([plain_batch(model, batch) for batch in batches], axis=0)


@torch.no_grad()
def plain_batch(model: Any, batch: torch.Tensor) -> np.ndarray:
    blocks = stream.anatomy(model).blocks
    depth = len(blocks)

    def updates() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []

        def keep(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            found.append(stream.tensor(output) - stream.hidden(args, kwargs))

        with stream.watched(blocks, keep):
            model(batch)
        return found

    clean, result = updates(), np.full((depth, depth), np.nan)
    for skipped in range(depth):
        with iv.skip(model, skipped):
            changed = updates()
        for block in range(skipped + 1, depth):
            change = (changed[block] - clean[block]).norm(dim=-1) / clean[block].norm(dim=-1)
            result[skipped, block] = change[:, :-1].mean()
    return result


def fast_skips(model: Any, batches: torch.Tensor) -> np.ndarray:
    table = iv.skip_effects(model, batches).query("effect == 'update'")
    depth = table["block"].max() + 1
    return (
        table.pivot(index="skipped", columns="block", values="mean")
        .reindex(index=range(depth), columns=range(depth))
        .to_numpy()
    )


@torch.no_grad()
def plain_erase(model: Any, batch: torch.Tensor, means: torch.Tensor) -> np.ndarray:
    clean = model(batch).logits[:, -1].softmax(-1)
    result = np.zeros((len(means), batch.shape[1]))
    for layer in range(len(means)):
        for position in range(batch.shape[1]):
            block = "embedding" if layer == 0 else layer - 1
            with iv.erase(model, block, position, means):
                odds = model(batch).logits[:, -1].softmax(-1)
            result[layer, position] = (odds - clean).norm(dim=-1).mean()
    return result


def fast_erase(model: Any, batch: torch.Tensor, means: torch.Tensor) -> np.ndarray:
    table = iv.erasure_effects(model, [batch], means)
    return table.pivot(index="layer", columns="position", values="mean").to_numpy()


@torch.no_grad()
def plain_trace(model: Any, tokenizer: Any, draws: int) -> np.ndarray:
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    whole = fast_trace(model, tokenizer, 1)
    first, last = whole.attrs["subject"]
    goal = tokenizer(TARGET, add_special_tokens=False)["input_ids"][0]
    depth, many = stream.anatomy(model).depth, ids.repeat(draws, 1)
    states: list[torch.Tensor] = []
    blocks = stream.anatomy(model).blocks
    with stream.hooked(
        before=[(blocks[0], states.append)], after=[(b, states.append) for b in blocks]
    ):
        model(ids)
    result = np.zeros((depth + 1, ids.shape[1]))
    with iv.noise(model, slice(first, last + 1), 3.0):
        for layer in range(depth + 1):
            for position in range(ids.shape[1]):
                block = "embedding" if layer == 0 else layer - 1
                with iv.patch(model, block, position, states[layer][:, position : position + 1]):
                    odds = model(many).logits[:, -1].float().softmax(-1)[:, goal]
                result[layer, position] = odds.double().mean()
    return result


def fast_trace(model: Any, tokenizer: Any, draws: int) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a random model knows nothing
        return iv.causal_trace(model, tokenizer, TEXT, SUBJECT, TARGET, draws=draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=_arguments.count, default=3)
    parser.add_argument("--blocks", type=_arguments.count, default=24)
    parser.add_argument("--width", type=_arguments.count, default=256)
    parser.add_argument("--model", help="instead of a random one")
    parser.add_argument("--only", choices=("skips", "erase", "trace"), nargs="*")
    args = parser.parse_args()
    tokenizer: Any = Words()
    if args.model:
        model, tokenizer = models.load(args.model, device="cpu")
    else:
        model = random_model(args.blocks, args.width)
    rng = torch.Generator().manual_seed(0)
    long = torch.randint(0, 1000, (3, 8, 128), generator=rng)
    short = torch.randint(0, 1000, (4, 12), generator=rng)
    means = iv.mean_states(model, long)

    def trace(model: Any, tokenizer: Any) -> np.ndarray:
        table = fast_trace(model, tokenizer, 8)
        return table.pivot(index="layer", columns="position", values="probability").to_numpy()

    pairs = {
        "skips": (lambda: plain_skips(model, long), lambda: fast_skips(model, long)),
        "erase": (
            lambda: plain_erase(model, short, means),
            lambda: fast_erase(model, short, means),
        ),
        "trace": (lambda: plain_trace(model, tokenizer, 8), lambda: trace(model, tokenizer)),
    }
    for name, ways in pairs.items():
        if args.only and name not in args.only:
            continue
        taken: list[tuple[float, float]] = []
        for _ in range(args.rounds):
            times, values = [], []
            for way in ways:
                begin = time.perf_counter()
                values.append(way())
                times.append(time.perf_counter() - begin)
            taken.append((times[0], times[1]))
            gap = np.nanmax(np.abs(values[0] - values[1]))
            if not gap < 1e-3 * max(1.0, np.nanmax(np.abs(values[0]))):
                raise SystemExit(f"{name}: the two ways differ by {gap:.2g}")
        ratios = sorted(plain / fast for plain, fast in taken)
        plain, fast = (statistics.median(t[i] for t in taken) for i in (0, 1))
        print(
            f"{name:6} plain {plain:7.2f} s, here {fast:7.2f} s, ratio "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
