"""Objectives: what a paper brings."""

from .base import ByGroup, Needs, Net, Objective, Real, Sizes, Uniform
from .distribution import DistributionMatching

OBJECTIVES: dict[str, type[Objective]] = {"distribution": DistributionMatching}

__all__ = ["OBJECTIVES", "ByGroup", "DistributionMatching", "Needs", "Net", "Objective", "Real", "Sizes", "Uniform"]
