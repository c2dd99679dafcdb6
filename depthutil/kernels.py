"""The former place of ``depthutil.toy.kernels``, for notebooks that import from here."""

from depthutil.toy.kernels import *  # noqa: F403
