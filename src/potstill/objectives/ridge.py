"""Kernel ridge regression: the best linear fit to S, in a space of features, predicts T."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import PotstillError
from ..functional import Tree, cast
from ..kernels import check_gram, kernel, label_solve, predict
from ..networks import Network
from ..recompute import in_rows
from ..synthetic import Synthetic
from .base import Needs, Net, Objective, Real, Uniform

FEATURES = "features"


@dataclass(frozen=True)
class KernelRidge(Objective):
    r"""Squared error on real samples of kernel ridge regression from S.

    $$ L(S) = \frac1{2|B|} \big\| K_{BS} (K_{SS} + \lambda \tfrac{\operatorname{tr} K_{SS}}{|S|} I)^{-1} y_S - y_B \big\|^2 $$

    with centred labels. The kernel is that of infinitely wide networks (KIP), or the product of the features of a network
    of finite width (FRePo), whose real side is computed without a gradient.

    Args:
        kernel: `features`, or the name of an infinitely wide network such as `ntk-dense-d1`.
        real: Real samples per step.
        ridge: The factor lambda.
        margin: Add minus the margin of the learned labels, the largest less the second largest, up to 1/C (FRePo).
        mirror: Let mirrored samples of S stand beside the samples, with the same labels.
        solve: Real samples for which the labels of S, as it is judged and saved, are solved in closed form; 0 keeps them.

    Reference: Nguyen, Chen and Lee 2021, Dataset Meta-Learning from Kernel Ridge-Regression (ICLR), eq. 7; Zhou, Nezhadarya
    and Ba 2022, Dataset Distillation using Neural Feature Regression (NeurIPS), eq. 3 and section 3.
    """

    narrow_bf16: ClassVar[bool] = True

    kernel: str = FEATURES
    real: int = 1024
    ridge: float = 1e-6
    margin: bool = False
    mirror: bool = False
    solve: int = 0

    def __post_init__(self) -> None:
        if self.kernel != FEATURES:
            kernel(self.kernel)
        if not 0 <= self.ridge < math.inf:
            raise PotstillError(f"objective.ridge = {self.ridge:g} is no finite number of 0 or more; 1e-6 is usual")
        if self.solve < 0 or (self.solve and self.kernel == FEATURES):
            raise PotstillError(
                f"objective.solve = {self.solve}: 0 or more, and labels are solved for by a kernel in closed form"
            )

    @property
    def needs(self) -> Needs:
        finish = Uniform(self.solve) if self.solve else None
        return Needs(real=Uniform(self.real), network=self.kernel == FEATURES, finish=finish)

    def averaged(self, network: Network) -> str:
        return "loss"

    @property
    def target_parts(self) -> str | None:
        return "rows"

    def finish(self, x: Tensor, y: Tensor, real: Real) -> Tensor:
        gram = kernel(self.kernel)
        rows, x = real.inputs.double(), x.double()
        targets = self.task.centred(real.labels).double()
        return label_solve(gram(rows, x), gram(x, x), targets, self.ridge).to(y.dtype)

    def label_scale(self, classes: int) -> float:
        """In FRePo 1/sqrt(C/10), as in its authors' code: a row's length does not fall with the classes. In KIP 1."""
        return 1 / math.sqrt(classes / 10) if self.kernel == FEATURES else 1.0

    def target(self, real: Real, net: Net, draws: Tree) -> Tree:
        rows = real.inputs if self.kernel != FEATURES else net.network.features(net.state, real.inputs, "stored")
        return {"rows": rows, "labels": self.task.centred(real.labels)}

    def loss(self, s: Synthetic, target: Tree, net: Net, draws: Tree, own: Tree) -> tuple[Float[Tensor, ""], Tree]:
        x, y, extra = self._samples(s)
        fitted = self.fit(x, y, target["rows"], net)
        return 0.5 * (fitted - target["labels"].to(fitted.dtype)).square().sum(1).mean() + extra, own

    def _samples(self, s: Synthetic) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and centred labels, the mirrored ones too, and what the margin adds to the loss."""
        x, y = s.take(torch.arange(len(s), device=s.index.device))
        y = y - 1 / y.shape[1] if s.labels in ("soft", "logits") else self.task.centred(y)
        extra = _margin(y) if self.margin else torch.zeros((), dtype=y.dtype)
        if self.mirror:
            x, y = torch.cat([x, x.flip(-1)]), torch.cat([y, y])
        return x, y, extra

    def why(self, s: Synthetic, target: Tree, net: Net) -> str:
        with torch.no_grad():
            _, own = self._grams(self._samples(s)[0], target["rows"], net)
        try:
            check_gram(own, self.ridge)
        except PotstillError as error:
            return str(error)
        return ""

    def fit(self, x: Tensor, y: Tensor, rows: Tensor, net: Net) -> Float[Tensor, "n classes"]:
        """Predictions (N, C) for real rows from inputs (M, *shape) and centred labels (M, C); solved in float64.

        Args:
            x: Of S.
            y: Of S.
            rows: Real features (N, F), or real inputs (N, *shape) where the kernel is an infinitely wide network's.
            net: The network of the features.
        """
        cross, own = self._grams(x, rows, net)
        return predict(cross, own, y.double(), self.ridge)

    def _grams(self, x: Tensor, rows: Tensor, net: Net) -> tuple[Tensor, Tensor]:
        """Kernels of the real rows with S and of S with itself, in float64."""
        if self.kernel != FEATURES:
            x, gram = x.double(), kernel(self.kernel)
            return in_rows(lambda rows, x: gram(rows.double(), x), rows, self.rows, x), gram(x, x)
        x, rows = cast((net.network.features(net.state, x, "stored"), rows), torch.float64)
        return rows @ x.T, x @ x.T  # in float32 their rounding exceeds the ridge where S is large


def _margin(labels: Float[Tensor, "m classes"]) -> Float[Tensor, ""]:
    """Minus the mean margin of labels, no more than 1/C of it counting."""
    top = labels.topk(2, dim=1).values
    return -(top[:, 0] - top[:, 1]).clamp(max=1 / labels.shape[1]).mean()
