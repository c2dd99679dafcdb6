"""The former place of ``depthutil.toy.kernels``, for notebooks that import from here."""

from depthutil.toy.kernels import PRECISIONS, FusedStack, Memory, Stack, choose

__all__ = ["PRECISIONS", "FusedStack", "Memory", "Stack", "choose"]
