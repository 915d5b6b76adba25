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


def herding(preset: str = "paper") -> Recipe:
    """Real samples whose running mean stays closest to the class mean (Welling 2009). No steps."""
    return Recipe(method="herding", preset=preset, init="herding", looks=0)


def k_center(preset: str = "paper") -> Recipe:
    """Real samples, farthest first, from the one nearest to the class mean (Sener and Savarese 2018). No steps."""
    return Recipe(method="k-center", preset=preset, init="k-center", looks=0)


def k_means(preset: str = "paper") -> Recipe:
    """The real sample nearest to each centre of k-means (Lloyd 1982). No steps."""
    return Recipe(method="k-means", preset=preset, init="k-means", looks=0)


def k_means_centre(preset: str = "paper") -> Recipe:
    """The centres of k-means themselves, which are no real samples (Lloyd 1982). No steps."""
    return Recipe(method="k-means-centre", preset=preset, init="k-means-centre", looks=0)


def random_soft(preset: str = "paper") -> Recipe:
    """Random real samples, labelled with probabilities by a trained network: the baseline of sets with soft labels."""
    return Recipe(method="random-soft", preset=preset, labels="soft", looks=0)


METHODS: dict[str, Callable[[str], Recipe]] = {
    "dm": dm,
    "random": random,
    "random-soft": random_soft,
    "herding": herding,
    "k-center": k_center,
    "k-means": k_means,
    "k-means-centre": k_means_centre,
}
PRESETS = ("paper", "small")

LLOYD = "Stuart P. Lloyd. Least Squares Quantization in PCM. IEEE Transactions on Information Theory 28(2), 1982"
CITATIONS: dict[str, str] = {
    "dm": "Bo Zhao and Hakan Bilen. Dataset Condensation with Distribution Matching. WACV 2023. arXiv:2110.04181",
    "herding": "Max Welling. Herding Dynamical Weights to Learn. ICML 2009. doi:10.1145/1553374.1553517",
    "k-center": "Ozan Sener and Silvio Savarese. Active Learning for Convolutional Neural Networks: A Core-Set Approach. "
    "ICLR 2018. arXiv:1708.00489",
    "k-means": LLOYD,
    "k-means-centre": LLOYD,
}


def cite(method: str) -> str:
    """The paper that a method comes from.

    Raises:
        PotstillError: The method comes from no paper.
    """
    if method not in CITATIONS:
        raise PotstillError(f"method '{method}' comes from no single paper")
    return CITATIONS[method]
