"""How long the packaged language model takes to load: from GGUF, converted once, and again.

    OMP_NUM_THREADS=1 python benchmarks/loading.py --rounds 3

Each round begins with an empty cache. The three ways take turns in one process, whose imports are
done before. *plain* is ``transformers`` reading tokenizer and weights from the GGUF file, as one
would without this package; *first* is ``models.load`` with an empty cache, which does that and
keeps the result; *again* is ``models.load`` after it, checksums included. What is printed are
seconds and the ratios of the medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import transformers

from depthutil import _arguments, gguf_file, models

NAME = "smollm2-135m"


def plain() -> None:
    path = gguf_file.PACKAGED[NAME].located()
    transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)


def seconds(way: Callable[[], object]) -> float:
    begin = time.perf_counter()
    way()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=_arguments.count, default=3)
    rounds = parser.parse_args().rounds
    transformers.utils.logging.disable_progress_bar()
    taken: dict[str, list[float]] = {"plain": [], "first": [], "again": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["DEPTHUTIL_CACHE"] = folder
            taken["plain"].append(seconds(plain))
            for name in ("first", "again"):
                taken[name].append(seconds(lambda: models.load(NAME)))
    for name, times in taken.items():
        print(f"{name:6} median {statistics.median(times):6.2f} s, of " + str(rounds))
    middle = {name: statistics.median(times) for name, times in taken.items()}
    print(f"first over plain {middle['first'] / middle['plain']:.2f}")
    print(f"plain over again {middle['plain'] / middle['again']:.1f}")


if __name__ == "__main__":
    main()
