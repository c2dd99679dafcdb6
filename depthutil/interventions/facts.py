"""Facts to trace: sentences that end before a one-token answer, written for this book."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from depthutil import _checks
from depthutil.interventions.passes import opened


class Fact(NamedTuple):
    """A sentence up to its answer, whom it is about, and the answer with the space before it."""

    text: str
    subject: str
    target: str


#: What SmolLM2-135M-Instruct (4 bits) knew with a probability of at least 0.3 when the list was
#: made, of 70 sentences tried. None begins with its subject: the first token is a sink of
#: attention in many models, and noise there does something else.
FACTS = tuple(
    Fact(*fact)
    for fact in (
        ("The Colosseum is in the country of", "Colosseum", " Italy"),
        ("The Great Wall is in the country of", "Great Wall", " China"),
        ("The Taj Mahal is in the country of", "Taj Mahal", " India"),
        ("The pyramids of Giza are in the country of", "pyramids of Giza", " Egypt"),
        ("The Great Barrier Reef is in the country of", "Great Barrier Reef", " Australia"),
        ("The Eiffel Tower is in the city of", "Eiffel Tower", " Paris"),
        ("The Louvre is in the city of", "Louvre", " Paris"),
        ("The Acropolis is in the city of", "Acropolis", " Athens"),
        ("The Sagrada Familia is in the city of", "Sagrada Familia", " Barcelona"),
        ("The Statue of Liberty is in the city of", "Statue of Liberty", " New"),
        ("The Vatican is in the city of", "Vatican", " Rome"),
        ("The Thames flows through the city of", "Thames", " London"),
        ("The Sahara is on the continent of", "Sahara", " Africa"),
        ("The Nile is on the continent of", "Nile", " Africa"),
        ("The Amazon rainforest is on the continent of", "Amazon rainforest", " South"),
        ("The capital of France is", "France", " Paris"),
        ("The capital of Japan is", "Japan", " Tokyo"),
        ("The capital of Germany is", "Germany", " Berlin"),
        ("The capital of Russia is", "Russia", " Moscow"),
        ("The capital of Spain is", "Spain", " Madrid"),
        ("The capital of Greece is", "Greece", " Athens"),
        ("The capital of Portugal is", "Portugal", " Lisbon"),
        ("The official language of Mexico is", "Mexico", " Spanish"),
        ("The chemical symbol for gold is", "gold", " Au"),
        ("The opposite of hot is", "hot", " cold"),
    )
)


def known(
    model: nn.Module, tokenizer: Any, facts: Iterable[Fact] = FACTS, *, least: float = 0.3
) -> dict[Fact, float]:
    """Which facts a model knows: its most probable next token is the answer, and how probable.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode.
    tokenizer : callable
    facts : iterable of Fact
    least : float
        Leave out those with a smaller probability, and those whose answer is several tokens.

    Returns
    -------
    dict of Fact to float

    Examples
    --------
    >>> from depthutil import models
    >>> model, tokenizer = models.load("ladder-w64-d02-s0")  # reads letters, and code
    >>> known(model, tokenizer, [Fact("impor", "imp", "t"), Fact("impor", "imp", "x")]).keys()
    dict_keys([Fact(text='impor', subject='imp', target='t')])
    """
    live, found = opened(model), {}
    least = _checks.number(least, "least", low=0, high=1)
    with live.open():
        for fact in facts:
            goal = list(tokenizer(fact.target, add_special_tokens=False)["input_ids"])
            ids = torch.tensor([list(tokenizer(fact.text)["input_ids"])], device=live.device)
            odds = model(ids).logits[0, -1].float().softmax(-1)
            if len(goal) == 1 and int(odds.argmax()) == goal[0] and odds[goal[0]] >= least:
                found[fact] = float(odds[goal[0]])
    return found
