"""The law of loss against width, depth and data: fitted exactly, then questioned.

``load_chinchilla``      245 published training runs
``drop_highest``         leave out the runs of highest loss
``fit``                  the exact minimum, as a :class:`ScalingFit`
``fit_many``             the same law for many sets of losses at once
``terms``, ``predict``   the law read forwards
``compare``              laws side by side: AIC, BIC, held-out error
``optimal_shape``        the best width and depth for a number of parameters
``adam_path``            the same objective by a fixed number of Adam steps
``DepthFamily``          models that differ in depth and seed alone: gains, noise, exponents

A law is a sum of falling power laws and a floor,
``L = c_width/width**alpha_width + c_depth/depth**alpha_depth + ... + L0``,
with coefficients and floor at least 0. It is fitted to the logarithm of the
loss by least squares. The law of width, depth and data, and the question what
it says about depth, are those of Liu et al. (arXiv 2602.05970, Figure 2f and
appendix B); the law in parameters and data is that of Hoffmann et al. (arXiv
2203.15556, section 3.3). This module needs numpy, scipy and pandas, not torch.
"""

from depthutil.scaling.family import DepthFamily
from depthutil.scaling.fits import Profile, ScalingFit, fit, fit_many
from depthutil.scaling.laws import LAWS, drop_highest, load_chinchilla, predict, terms
from depthutil.scaling.solver import ALPHA_MAX
from depthutil.scaling.uses import PUBLISHED, adam_path, compare, optimal_shape

__all__ = [
    "ALPHA_MAX",
    "LAWS",
    "PUBLISHED",
    "DepthFamily",
    "Profile",
    "ScalingFit",
    "adam_path",
    "compare",
    "drop_highest",
    "fit",
    "fit_many",
    "load_chinchilla",
    "optimal_shape",
    "predict",
    "terms",
]
