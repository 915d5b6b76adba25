"""The methods by their papers' names: a recipe each. The only place where a name meets numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .augment import Augment
from .errors import PotstillError
from .functional import SGD, Adam, Lamb
from .objectives import DistributionMatching, GradientMatching, KernelRidge, TrajectoryMatching, Unrolled
from .recipe import Recipe
from .replay import Experts
from .sources import Pool, Source

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


def dd(preset: str = "paper", ipc: int = 1) -> Recipe:
    """Dataset distillation (Wang, Zhu, Torralba and Efros 2018), with the published review's momentum in the inner steps.

    `paper`: thirty steps, each on the next image of every class, with a learned rate each. `small`: all images in each of
    twenty steps, one rate, three times the paper's rate for the images, on a narrow network.
    """
    small = preset == "small"
    return Recipe(
        method="dd",
        preset=preset,
        objective=Unrolled(steps=20, rate=0.02, momentum=0.9, real=512)
        if small
        else Unrolled(steps=30, rate=0.02, rates="each", momentum=0.9, feed="sequence", real=1024),
        source=Pool(size=1, lifetime=1),
        learn=("inputs", "lr"),
        init="real" if small else "noise",
        optimiser={"inputs": Adam(lr=0.03 if small else 0.01, beta1=0.5), "lr": Adam(lr=0.01, beta1=0.5)},
        final=0.1,
        steps=300 if small else 23_600,
        network="convnet-w64" if small else "convnet",
        student="convnet-w64" if small else "convnet",
        protocol="unrolled",
    )


def kip(preset: str = "paper", ipc: int = 1) -> Recipe:
    """Kernel inducing points (Nguyen, Chen and Lee 2021, ICLR), with the tangent kernel of one hidden layer.

    `paper`: 5,000 real samples a step. `small`: 2,000, and labels learned with the images.
    """
    small = preset == "small"
    return Recipe(
        method="kip",
        preset=preset,
        objective=KernelRidge(kernel="ntk-dense-d1", real=2000 if small else 5000),
        source=Source(),
        learn=("inputs", "labels") if small else ("inputs",),
        init="real",
        labels="centred",
        optimiser={"inputs": Adam(lr=0.04), "labels": Adam(lr=0.01)} if small else {"inputs": Adam(lr=0.04)},
        steps=500 if small else 10_000,
        student="kernel",
        protocol="kip",
    )


def frepo(preset: str = "paper", ipc: int = 1) -> Recipe:
    """Neural feature regression with a pool of networks (Zhou, Nezhadarya and Ba 2022, NeurIPS).

    The pool's networks have batch norm, those that are trained on the set none, as in the authors' commands.

    `paper`: 1,024 real samples a step and LAMB. `small`: 256, a quarter of the width and Adam at a hundred times the rate.
    """
    small = preset == "small"
    slow = Lamb(lr=3e-4)
    return Recipe(
        method="frepo",
        preset=preset,
        objective=KernelRidge(real=256 if small else 1024, margin=True),
        source=Pool(size=10, lifetime=100, epochs=1, limit=1, rule="adam", lr=3e-4, batch=1000),
        learn=("inputs", "labels"),
        init="real",
        labels="centred",
        optimiser={"inputs": Adam(lr=0.03), "labels": Adam(lr=0.01)} if small else {"inputs": slow, "labels": slow},
        final=0.1,
        steps=500 if small else 500_000,
        network="widenet-batch-w32" if small else "widenet-batch",
        student="widenet-w32" if small else "widenet",
        protocol="frepo",
    )


def mtt(preset: str = "paper", ipc: int = 1) -> Recipe:
    """Trajectory matching (Cazenavette, Wang, Torralba, Efros and Zhu 2022, CVPR); needs recorded experts.

    `paper`: steps and stretches by images per class as the authors' successors list them for CIFAR-10. `small`: twenty
    steps towards where an expert is two epochs later, from its first epochs.
    """
    small = preset == "small"
    # what is learned is the rate's logarithm: its own rate is the authors' over the square of the learned rate
    steps, most, rate, slow, image = (
        (50, 2, 0.01, 1e-3, 100.0)
        if ipc == 1
        else (30, 20, 0.001, 10.0, 100.0)
        if ipc <= 10
        else (30, 40, 0.01, 0.1, 1000.0)
    )
    if small:
        steps, most, rate, slow, image = 20, 3 if ipc == 1 else 10, 0.01, 0.1, 100.0
    return Recipe(
        method="mtt",
        preset=preset,
        objective=TrajectoryMatching(steps=steps, rate=rate, feed="random", batch=256),
        source=Experts(max_start=most, span=2),
        learn=("inputs", "lr"),
        init="real",
        augment=DSA,
        optimiser={"inputs": SGD(lr=image, momentum=0.5), "lr": SGD(lr=slow, momentum=0.5)},
        steps=200 if small else 5000,
        protocol="mtt",
    )


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
    "dd": dd,
    "dm": dm,
    "dsa": dsa,
    "frepo": frepo,
    "kip": kip,
    "mtt": mtt,
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
    "dd": "Tongzhou Wang, Jun-Yan Zhu, Antonio Torralba and Alexei A. Efros. Dataset Distillation. 2018. arXiv:1811.10959",
    "kip": "Timothy Nguyen, Zhourong Chen and Jaehoon Lee. Dataset Meta-Learning from Kernel Ridge-Regression. ICLR 2021. "
    "arXiv:2011.00050",
    "frepo": "Yongchao Zhou, Ehsan Nezhadarya and Jimmy Ba. Dataset Distillation using Neural Feature Regression. NeurIPS 2022. "
    "arXiv:2206.00719",
    "mtt": "George Cazenavette, Tongzhou Wang, Antonio Torralba, Alexei A. Efros and Jun-Yan Zhu. Dataset Distillation by Matching "
    "Training Trajectories. CVPR 2022. arXiv:2203.11932",
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
