"""Distribution matching: synthetic and real samples alike in the feature space of random networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ..functional import Key, Tree
from ..networks import Network
from ..synthetic import Synthetic
from .base import ByGroup, Needs, Net, Objective, Real, Sizes


@dataclass(frozen=True)
class DistributionMatching(Objective):
    r"""Squared distance of the mean features of real and synthetic samples, summed over groups.

    $$ L(S) = \sum_c \Big\| \frac1{|B_c|}\sum_{x \in B_c} \psi_\theta(A_{\omega_c}(x))
        - \frac1{|S_c|}\sum_{s \in S_c} \psi_\theta(A_{\omega_c}(s)) \Big\|^2 $$

    with the flattened features psi before the head of a network with weights theta, and one augmentation omega per
    group, the same for both sides (Siamese).

    Args:
        real: Real samples per group and step.

    Example:
        >>> DistributionMatching(real=256).needs.real
        ByGroup(count=256)

    Reference: Zhao and Bilen 2023, Dataset Condensation with Distribution Matching (WACV), eq. 6.
    """

    narrow_bf16: ClassVar[bool] = True

    real: int = 256

    @property
    def needs(self) -> Needs:
        return Needs(real=ByGroup(self.real))

    def draws(self, key: Key, sizes: Sizes) -> Tree:
        return {"augment": self.augment.draws(key.fold("augment"), sizes.groups)}

    def separable(self, network: Network) -> bool:
        return not network.mixes_samples

    def averaged(self, network: Network) -> str | None:
        return None if network.mixes_samples else "target"

    @property
    def adds(self) -> bool:
        return True

    @property
    def target_parts(self) -> str | None:
        return "mean"

    def _means(
        self, x: Float[Tensor, "g n *shape"], mask: Float[Tensor, "g n"], net: Net, draws: Tree
    ) -> Float[Tensor, "g features"]:
        """Mean features (G, F) of samples (G, n, *shape) where the mask (G, n) is 1; all groups in one pass, so that
        batch norm sees the whole batch."""
        features = net.network.features(net.state, self.augment(x, draws["augment"]).flatten(0, 1))
        features = features.unflatten(0, mask.shape) * mask[..., None]
        return features.sum(1) / mask.sum(1, keepdim=True)

    def target(self, real: Real, net: Net, draws: Tree) -> Float[Tensor, "g features"]:
        return self._means(real.inputs, real.mask, net, draws)

    def loss(
        self, s: Synthetic, target: Float[Tensor, "g features"], net: Net, draws: Tree, own: Tree
    ) -> tuple[Float[Tensor, ""], Tree]:
        return (target - self._means(*s.by_group(), net, draws)).square().sum(), own
