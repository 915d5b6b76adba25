"""The methods by their papers' names: a recipe each. The only place where a name meets numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .augment import Augment
from .errors import PotstillError
from .functional import SGD
from .objectives import DistributionMatching, GradientMatching
from .recipe import Recipe
from .sources import Pool

DSA = Augment(ops=("color", "crop", "cutout", "flip", "scale", "rotate"))


def dm(preset: str = "paper", ipc: int = 1) -> Recipe:
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


def loops(ipc: int) -> tuple[int, int]:
    """Steps of a network and passes over S after each, by images per class.

    The paper's where it gives them (its code: 1, 10, 20, 30, 40, 50 per class); between and beyond, as many steps as
    images, up to 50, and passes so that both together come to about 500.
    """
    known = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    outer = min(ipc, 50)
    return known.get(ipc, (outer, max(1, round(500 / outer))))


def dc(preset: str = "paper", ipc: int = 1) -> Recipe:
    """Gradient matching (Zhao, Mopuri and Bilen 2021, ICLR)."""
    outer, inner = loops(ipc)
    small = preset == "small"
    return Recipe(
        method="dc",
        preset=preset,
        objective=GradientMatching(real=64 if small else 256),
        source=Pool(size=1, lifetime=outer, epochs=inner, lr=0.01, batch=256),
        learn=("inputs",),
        init="real" if small else "noise",
        optimiser={"inputs": SGD(lr=0.1, momentum=0.5)},
        steps=200 if small else 1000 * outer,
        protocol="dc",
    )


def dsa(preset: str = "paper", ipc: int = 1) -> Recipe:
    """Gradient matching with differentiable Siamese augmentation (Zhao and Bilen 2021, ICML)."""
    return replace(dc(preset, ipc), method="dsa", init="real", augment=DSA, protocol="dsa")


def random(preset: str = "paper", ipc: int = 1) -> Recipe:
    """Random real samples: the baseline that every set is held against. No steps."""
    return Recipe(method="random", preset=preset, looks=0)


def herding(preset: str = "paper", ipc: int = 1) -> Recipe:
    """Real samples whose running mean stays closest to the class mean (Welling 2009). No steps."""
    return Recipe(method="herding", preset=preset, init="herding", looks=0)


def k_center(preset: str = "paper", ipc: int = 1) -> Recipe:
    """Real samples, farthest first, from the one nearest to the class mean (Sener and Savarese 2018). No steps."""
    return Recipe(method="k-center", preset=preset, init="k-center", looks=0)


def k_means(preset: str = "paper", ipc: int = 1) -> Recipe:
    """The real sample nearest to each centre of k-means (Lloyd 1982). No steps."""
    return Recipe(method="k-means", preset=preset, init="k-means", looks=0)


def k_means_centre(preset: str = "paper", ipc: int = 1) -> Recipe:
    """The centres of k-means themselves, which are no real samples (Lloyd 1982). No steps."""
    return Recipe(method="k-means-centre", preset=preset, init="k-means-centre", looks=0)


def random_soft(preset: str = "paper", ipc: int = 1) -> Recipe:
    """Random real samples, labelled with probabilities by a trained network: the baseline of sets with soft labels."""
    return Recipe(method="random-soft", preset=preset, labels="soft", looks=0)


METHODS: dict[str, Callable[[str, int], Recipe]] = {
    "dc": dc,
    "dm": dm,
    "dsa": dsa,
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
    "dc": "Bo Zhao, Konda Reddy Mopuri and Hakan Bilen. Dataset Condensation with Gradient Matching. ICLR 2021. arXiv:2006.05929",
    "dsa": "Bo Zhao and Hakan Bilen. Dataset Condensation with Differentiable Siamese Augmentation. ICML 2021. arXiv:2102.08259",
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
