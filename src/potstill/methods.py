"""The methods by their papers' names: a recipe each. The only place where a name meets numbers."""

from __future__ import annotations

from collections.abc import Callable

from .augment import Augment
from .errors import PotstillError
from .functional import SGD
from .objectives import DistributionMatching
from .recipe import Recipe
from .sources import Pool

DSA = Augment(ops=("color", "crop", "cutout", "flip", "scale", "rotate"))


def dm(preset: str = "paper") -> Recipe:
    """Distribution matching (Zhao and Bilen 2023, WACV; their section 4 for the numbers).

    `paper`: 20,000 steps with 256 real samples per class. `small`: what a CPU reaches in minutes.
    """
    small = preset == "small"
    return Recipe(
        method="dm",
        preset=preset,
        objective=DistributionMatching(real=256),
        source=Pool(size=1, lifetime=1),
        learn=("inputs",),
        init="real",
        augment=DSA,
        optimiser={"inputs": SGD(lr=1.0, momentum=0.5)},
        steps=200 if small else 20_000,
    )


def random(preset: str = "paper") -> Recipe:
    """Random real samples: the baseline that every set is held against. No steps."""
    return Recipe(method="random", preset=preset, looks=0)


METHODS: dict[str, Callable[[str], Recipe]] = {"dm": dm, "random": random}
PRESETS = ("paper", "small")

CITATIONS: dict[str, str] = {
    "dm": "Bo Zhao and Hakan Bilen. Dataset Condensation with Distribution Matching. WACV 2023. arXiv:2110.04181",
}


def cite(method: str) -> str:
    """The paper that a method comes from.

    Raises:
        PotstillError: The method comes from no paper.
    """
    if method not in CITATIONS:
        raise PotstillError(f"method '{method}' comes from no single paper")
    return CITATIONS[method]
