"""The depth ladder: small language models of one width and several depths, all else equal.

Published families change width and depth together. Here every model has the same width and
sees the same text in the same order, so that a difference in loss is one of depth alone. They
are ``LlamaForCausalLM`` of ``transformers`` (Touvron et al., arXiv 2302.13971: norms before the
blocks, rotary positions, SwiGLU), with bytes as tokens, trained on what every machine with
Python has: :func:`depthutil.corpus.corpus`.

:func:`members`, :func:`depthutil.corpus.held_out`, :func:`curves` and :func:`documents` read the
ladder that comes with the book, ``depthutil.models.load`` loads its models; ``make ladder``
trains it again, through :func:`train` and :func:`assemble`. Training needs the ``models`` extra.

============ ===================================================================
file         holds
============ ===================================================================
``recipe``   every setting, and the order in which to train
``model``    one model: how it begins, what it reached, its card
``training`` :func:`train`, :func:`best_rate`
``designs``  :class:`Design`: growing, looping, tying, scaled norms and writes
``tuning``   :func:`fine_tune`, of a model that has been changed; :func:`learn`, a task
``family``   all models together: :func:`assemble`, and reading what it wrote
============ ===================================================================
"""

from depthutil.corpus import (
    BOS,
    VOCABULARY,
    Corpus,
    Document,
    corpus,
    held_out,
    write_tokenizer,
)
from depthutil.ladder.designs import DESIGNS, Design
from depthutil.ladder.family import assemble, curves, documents, losses, members
from depthutil.ladder.model import LadderModel
from depthutil.ladder.recipe import LadderConfig, Shard, shards, slug
from depthutil.ladder.training import best_rate, train
from depthutil.ladder.tuning import fine_tune, learn

__all__ = [
    "BOS",
    "DESIGNS",
    "VOCABULARY",
    "Corpus",
    "Design",
    "Document",
    "LadderConfig",
    "LadderModel",
    "Shard",
    "assemble",
    "best_rate",
    "corpus",
    "curves",
    "documents",
    "fine_tune",
    "held_out",
    "learn",
    "losses",
    "members",
    "shards",
    "slug",
    "train",
    "write_tokenizer",
]
