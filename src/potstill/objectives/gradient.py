"""Gradient matching: training on S moves a network as training on T does, at every step of the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..functional import Key, Tree
from ..networks import Network, State
from ..synthetic import Synthetic
from .base import ByGroup, Needs, Net, Objective, Real, Sizes


@dataclass(frozen=True)
class GradientMatching(Objective):
    r"""Distance of the gradients that real and synthetic samples of a class give a network's weights, summed over classes.

    $$ L(S) = \sum_c \sum_l \sum_i \Big( 1 - \frac{\langle g^T_{li}, g^S_{li} \rangle}{\|g^T_{li}\| \, \|g^S_{li}\| + \epsilon} \Big),
        \qquad g^X = \nabla_\theta \, \ell(X_c; \theta) $$

    over the layers l and, within each, the weights i of one output (a convolution's filter, a row of a linear layer).
    Biases and the scales and shifts of norms have one number per output and are left out. Augmentation, one draw per
    class, acts alike on both sides (Siamese); batch norm uses its stored statistics, which the source calibrates.

    Args:
        real: Real samples per class and step.
        eps: Added to the product of norms.

    Example:
        >>> GradientMatching(real=64).needs.calibrate
        16

    Reference: Zhao, Mopuri and Bilen 2021, Dataset Condensation with Gradient Matching (ICLR), eqs. 9 and 10;
    with augmentation, Zhao and Bilen 2021, Differentiable Siamese Augmentation (ICML), eq. 4.
    """

    real: int = 256
    eps: float = 1e-6

    @property
    def needs(self) -> Needs:
        return Needs(real=ByGroup(self.real), calibrate=16)

    def draws(self, key: Key, sizes: Sizes) -> Tree:
        return {"augment": self.augment.draws(key.fold("augment"), sizes.groups)}

    def separable(self, network: Network) -> bool:
        return True

    def averaged(self, network: Network) -> str:
        return "target"

    @property
    def in_parts(self) -> bool:
        return True

    @property
    def target_parts(self) -> str | None:
        return "mean"

    def _gradients(
        self,
        x: Float[Tensor, "g n *shape"],
        labels: Tensor,
        mask: Float[Tensor, "g n"],
        net: Net,
        draws: Tree,
    ) -> dict[str, Float[Tensor, "g ..."]]:
        """Gradients (G, *weight) of the mean loss of each group with respect to every weight that has rows."""
        x = self.augment(x, draws["augment"])

        def loss(params: dict[str, Tensor], x: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
            logits = net.network(State(params, net.state.buffers), x, "stored")
            return (self.task.losses(logits, labels) * mask).sum() / mask.sum()

        rows = [torch.func.grad(loss)(net.state.params, *parts) for parts in zip(x, labels, mask, strict=True)]
        return {k: torch.stack([r[k] for r in rows]) for k, p in net.state.params.items() if p.ndim > 1}

    def target(self, real: Real, net: Net, draws: Tree) -> dict[str, Tensor]:
        return self._gradients(*real, net, draws)

    def loss(
        self, s: Synthetic, target: dict[str, Tensor], net: Net, draws: Tree, own: Tree
    ) -> tuple[Float[Tensor, ""], Tree]:
        x, labels = s.take(s.index)
        gradients = self._gradients(x, labels, s.mask, net, draws)
        return sum((self._distance(target[k], g) for k, g in gradients.items()), torch.zeros((), dtype=x.dtype)), own

    def _distance(self, a: Float[Tensor, "g out *rest"], b: Float[Tensor, "g out *rest"]) -> Float[Tensor, ""]:
        """Sum over groups and outputs of one minus the cosine of the rows."""
        a, b = a.flatten(2), b.flatten(2)
        return (1 - (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2) + self.eps)).sum()
