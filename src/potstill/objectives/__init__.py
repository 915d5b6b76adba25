"""Objectives: what a paper brings."""

from .base import ByGroup, Needs, Net, Objective, Real, Sizes, Uniform
from .distribution import DistributionMatching
from .gradient import GradientMatching
from .ridge import KernelRidge
from .trajectory import TrajectoryMatching
from .unrolled import Unroll, Unrolled

OBJECTIVES: dict[str, type[Objective]] = {
    "distribution": DistributionMatching,
    "gradient": GradientMatching,
    "ridge": KernelRidge,
    "trajectory": TrajectoryMatching,
    "unrolled": Unrolled,
}

__all__ = [
    "OBJECTIVES",
    "ByGroup",
    "DistributionMatching",
    "GradientMatching",
    "KernelRidge",
    "Needs",
    "Net",
    "Objective",
    "Real",
    "Sizes",
    "TrajectoryMatching",
    "Uniform",
    "Unroll",
    "Unrolled",
]
