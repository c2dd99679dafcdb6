"""Change what blocks write, and measure what becomes of it.

Edits are context managers that undo themselves; effects are functions that return tables with
errors over documents. Blocks count from 0, as in the model's list: block b turns the state
``h_b`` into ``h_{b+1}``, so that layers, which are states, count from 0 (before the first
block) to the number of blocks.

============= ==================================================================
file          holds
============= ==================================================================
``edits``     :func:`skip`, :func:`swap`, :func:`repeat`, :func:`patch`, :func:`erase`,
              :func:`noise`, :func:`scale`
``facts``     :data:`FACTS`, to trace, and which a model knows: :func:`known`
``places``    blocks, positions, write points and caches, as edits need them
``passes``    forward passes that begin at a block with states that are known
``skipping``  :func:`skip_effects`, :func:`local_effects`, :func:`depth_score`
``removing``  :func:`removal`, :func:`influence`
``tracing``   :func:`causal_trace`, :func:`erasure_effects`, :func:`integrated_gradients`,
              :func:`mean_states`
``reading``   :func:`lens`, :func:`spoken`, :func:`affine_lens`, :func:`linear_maps`
============= ==================================================================
"""

from depthutil.interventions.edits import erase, noise, patch, repeat, scale, skip, swap
from depthutil.interventions.facts import FACTS, Fact, known
from depthutil.interventions.reading import AffineLens, affine_lens, lens, linear_maps, spoken
from depthutil.interventions.removing import influence, removal
from depthutil.interventions.skipping import Score, depth_score, local_effects, skip_effects
from depthutil.interventions.tracing import (
    causal_trace,
    erasure_effects,
    integrated_gradients,
    mean_states,
)

__all__ = [
    "FACTS",
    "AffineLens",
    "Fact",
    "Score",
    "affine_lens",
    "causal_trace",
    "depth_score",
    "erase",
    "erasure_effects",
    "influence",
    "integrated_gradients",
    "known",
    "lens",
    "linear_maps",
    "local_effects",
    "mean_states",
    "noise",
    "patch",
    "removal",
    "repeat",
    "scale",
    "skip",
    "skip_effects",
    "spoken",
    "swap",
]
