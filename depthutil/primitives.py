"""Reasoning primitives: copying, and looking a variable up through so many aliases.

Two tasks that need nothing but the text before them, after Saunshi et al. (arXiv 2409.19044) and
Kapl et al. (arXiv 2512.08819), who ask language models in five-shot prompts. Models as small as
the ladder's answer none of them until they are trained to: ``depthutil.ladder.learn`` does, and
:func:`accuracy` asks. In bytes, as the ladder reads them::

    wqf pjn dlo ... tsa|pjn dlo ... gks → the word that followed there
    h=4 q=9 a=0 m=7 c=2 ?m= → 7                                    assignment of depth 0
    h=4 q=9 a=0 m=7 c=2 b=q x=m ... ?x= → 7                        of depth 1

How fast they are learned can be compared between ways of using depth.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from depthutil import _checks
from depthutil.corpus import BOS

#: What is asked, and how often a guess among the options is right.
TASKS = {"copying": 0.1, "assignment 0": 0.2, "assignment 1": 0.2, "assignment 2": 0.2}
_WORDS, _SHOWN, _VARIABLES = 10, 5, 5


class Example(NamedTuple):
    """A question.

    Attributes
    ----------
    prompt : str
        All that comes before the answer.
    rest : str
        The answer, and more answers after it; in training all of it is read.
    options : tuple of str
        Characters that the answer can begin with, the right one first.
    """

    prompt: str
    rest: str
    options: tuple[str, ...]


def example(task: str, seed: int | np.random.Generator = 0) -> Example:
    """A random question of a task.

    Copying: ten words of three letters, no two beginning alike, then five of them again; which
    word comes next? Assignment: five variables with different digits; at each level of depth
    five more, each an alias of another one of the level below; what is the value of one of the
    last level?

    Parameters
    ----------
    task : str
        One of ``TASKS``, or ``"assignment d"`` of any depth up to 4.
    seed : int or numpy.random.Generator

    Examples
    --------
    >>> asked = example("assignment 1", seed=0)
    >>> name = asked.prompt[-2]
    >>> alias = asked.prompt[asked.prompt.index(name + "=") + 2]
    >>> asked.prompt[asked.prompt.index(alias + "=") + 2] == asked.rest[0] == asked.options[0]
    True
    >>> example("copying").prompt.count(" ")
    14
    """
    rng = np.random.default_rng(seed)
    kind, _, depth = task.partition(" ")
    letters = string.ascii_lowercase
    if kind == "copying" and not depth:
        first = rng.permutation(26)[:_WORDS]
        more = rng.integers(0, 26, (_WORDS, 2))
        words = [
            letters[f] + letters[a] + letters[b] for f, (a, b) in zip(first, more, strict=True)
        ]
        start = int(rng.integers(0, _WORDS - _SHOWN))
        after = start + _SHOWN
        prompt = f"{' '.join(words)}|{' '.join(words[start:after])} "
        others = [word[0] for i, word in enumerate(words) if i != after]
        return Example(prompt, " ".join(words[after:]) + "\n", (words[after][0], *others))
    if kind != "assignment" or depth not in ("0", "1", "2", "3", "4"):
        raise ValueError(f"there is no task {task!r}: take one of {', '.join(TASKS)}")
    levels = int(depth) + 1
    names = rng.permutation(26)[: levels * _VARIABLES].reshape(levels, _VARIABLES)
    digits = [str(d) for d in rng.permutation(10)[:_VARIABLES]]
    value = {letters[n]: d for n, d in zip(names[0], digits, strict=True)}
    said = [f"{name}={digit}" for name, digit in value.items()]
    for below, level in itertools.pairwise(names):
        for name, alias in zip(level, rng.permutation(below), strict=True):
            said.append(f"{letters[name]}={letters[alias]}")
            value[letters[name]] = value[letters[alias]]
    asked = [letters[n] for n in rng.permutation(names[-1])]
    answers = " ".join(f"{name}={value[name]}" for name in asked)
    right = value[asked[0]]
    return Example(
        f"{' '.join(said)} ?{asked[0]}=",
        answers[2:] + "\n",
        (right, *(d for d in digits if d != right)),
    )


def questions(tasks: Sequence[str], count: int, seed: Any = 0) -> tuple[Tensor, Tensor]:
    """Random questions with their answers, to train on.

    Parameters
    ----------
    tasks : sequence of str
        Each question is of one of them, at random.
    count : int
    seed : int or sequence of int

    Returns
    -------
    tuple of torch.Tensor
        Tokens, ``(count, length)``, filled up with zeros, and what is to be predicted from each,
        −100 where nothing is: answers alone are scored. Most of a question is random, and a
        small model that is made to predict it learns nothing else.

    Examples
    --------
    >>> ids, targets = questions(["copying"], 2)
    >>> ids.shape == targets.shape, int((targets >= 0).sum()) > 0
    (True, True)
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(tasks), size=_checks.count(count, "count"))
    asked = [example(tasks[number], rng) for number in chosen]
    lines = [(one.prompt + one.rest).encode() for one in asked]
    ids = torch.zeros(count, max(map(len, lines)), dtype=torch.long)
    targets = torch.full_like(ids, -100)
    ids[:, 0] = BOS
    for row, (one, line) in enumerate(zip(asked, lines, strict=True)):
        tokens = torch.tensor(list(line))
        # The newline that ends a line is read by nobody.
        ids[row, 1 : len(line)] = tokens[:-1]
        targets[row, len(one.prompt) : len(line)] = tokens[len(one.prompt) :]
    return ids, targets


@torch.no_grad()
def accuracy(
    model: Any, count: int = 500, *, seed: int = 0, tasks: Sequence[str] = tuple(TASKS)
) -> pd.DataFrame:
    """Ask a model whose tokens are bytes.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of the ladder.
    count : int
        Questions for each task.
    seed : int
        The same seed asks the same questions.
    tasks : sequence of str

    Returns
    -------
    pandas.DataFrame
        ``task, right, stderr, loss, loss_stderr, chance``: the share of questions in which the
        right option is the most probable of the options, and the mean loss of the answer's first
        byte, in nats, which moves before the share does. Errors over questions.

    Examples
    --------
    >>> from depthutil.ladder import LadderConfig
    >>> from depthutil.ladder.model import new_model
    >>> found = accuracy(new_model(LadderConfig(width=16), 1, 0).eval(), 200)
    >>> bool((abs(found["right"] - found["chance"]) < 5 * found["stderr"]).all())
    True
    """
    count, table = _checks.count(count, "count"), []
    for number, task in enumerate(tasks):
        rng = np.random.default_rng([seed, number])
        asked = [example(task, rng) for _ in range(count)]
        prompts = np.stack([np.frombuffer(one.prompt.encode(), np.uint8) for one in asked])
        options = torch.tensor([[ord(option) for option in one.options] for one in asked])
        ids = torch.from_numpy(np.concatenate([np.full((count, 1), BOS), prompts], 1)).long()
        logits = torch.cat(
            [
                model(part.to(model.device), use_cache=False, logits_to_keep=1)
                .logits[:, -1]
                .float()
                .cpu()
                for part in ids.split(125)
            ]
        )
        right = (logits.gather(1, options).argmax(1) == 0).double()
        loss = -logits.log_softmax(1).gather(1, options[:, :1])[:, 0].double()
        scale = max(count - 1, 1) ** -0.5
        table.append(
            {
                "task": task,
                "right": float(right.mean()),
                "stderr": float(right.std(correction=0)) * scale,
                "loss": float(loss.mean()),
                "loss_stderr": float(loss.std(correction=0)) * scale,
                "chance": 1 / options.shape[1],
            }
        )
    return pd.DataFrame(table)
