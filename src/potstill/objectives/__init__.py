"""Objectives: what a paper brings."""

from .base import ByGroup, Needs, Net, Objective, Real, Sizes, Uniform
from .distribution import DistributionMatching
from .gradient import GradientMatching

OBJECTIVES: dict[str, type[Objective]] = {"distribution": DistributionMatching, "gradient": GradientMatching}

__all__ = [
    "OBJECTIVES",
    "ByGroup",
    "DistributionMatching",
    "GradientMatching",
    "Needs",
    "Net",
    "Objective",
    "Real",
    "Sizes",
    "Uniform",
]
