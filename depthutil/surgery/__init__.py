"""Lasting changes of a model's list of blocks: grow, insert, loop, tie, drop, fold.

Edits of :mod:`depthutil.interventions` undo themselves; these stay, and a model that was changed
is a model like any other: its configuration says how many blocks it has and of what kind, each
block uses its own place in a cache, ``save_pretrained`` and ``from_pretrained`` keep it, and an
optimizer that is given goes on with what it knew. Models are changed in place and returned; work
on a ``copy.deepcopy`` to keep the original. Blocks count from 0, as in the model's list.

============= ====================================================================
file          holds
============= ====================================================================
``arranging`` :func:`arrange`, on which everything else rests; :func:`drop`,
              :func:`early_layers`, :func:`loop`, :func:`tie`, :func:`sharing`
``growing``   :func:`grow` and its :func:`plan`; :func:`stages` of a schedule
``inserting`` :func:`insert`: new blocks, predicted from their neighbours or otherwise made
``folding``   :func:`fold`, and :func:`laco` which folds while outputs stay alike
``mixing``    :func:`mixed`: weights between those of two models; :func:`perturbed`, as far
              away in a random direction
============= ====================================================================
"""

from depthutil.surgery.arranging import arrange, drop, early_layers, loop, sharing, tie
from depthutil.surgery.folding import fold, laco
from depthutil.surgery.growing import METHODS, grow, plan, stages
from depthutil.surgery.inserting import insert
from depthutil.surgery.mixing import mixed, perturbed

__all__ = [
    "METHODS",
    "arrange",
    "drop",
    "early_layers",
    "fold",
    "grow",
    "insert",
    "laco",
    "loop",
    "mixed",
    "perturbed",
    "plan",
    "sharing",
    "stages",
    "tie",
]
