"""The former place of ``depthutil.toy.model``, for notebooks that import from here."""

from depthutil.toy.model import *  # noqa: F403
