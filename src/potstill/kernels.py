"""Kernel ridge regression: the solve, the prediction, and the labels that serve it best.

The kernels of infinitely wide networks are made in `infinite`; any other Gram matrix will do as well.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import PotstillError
from .infinite import Kernel, kernel

__all__ = ["Kernel", "check_gram", "kernel", "label_solve", "predict", "regularised", "ridge_solve"]


def regularised(gram: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, "n n"]:
    """A Gram matrix plus `ridge` times its mean diagonal element on the diagonal."""
    scale = gram.diagonal().mean()  # trace / n: no unit of the kernel enters the ridge
    return gram + ridge * scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def ridge_solve(gram: Float[Tensor, "n n"], targets: Float[Tensor, "n c"], ridge: float) -> Float[Tensor, "n c"]:
    r"""Coefficients of kernel ridge regression, by Cholesky in the precision given.

    $$ \alpha = \big(K + \lambda \tfrac{\operatorname{tr} K}{n} I\big)^{-1} Y $$

    Nothing is raised for values, so that it can stand in a compiled or mapped step: where the matrix is not positive
    definite or not finite, every coefficient is NaN. `check_gram` says why.

    Args:
        gram: Kernel of the samples with themselves, best in float64: 1e-6 of the diagonal is near float32's rounding.
        targets: What is regressed on, one column each.
        ridge: Factor lambda of the mean diagonal element; 1e-6 in KIP and FRePo.

    Example:
        >>> ridge_solve(torch.eye(2) * 4, torch.ones(2, 1), ridge=1.0).T  # 1 / (4 + 1 * 4)
        tensor([[0.1250, 0.1250]])

    Reference: Nguyen, Chen and Lee 2021, Dataset Meta-Learning from Kernel Ridge-Regression (ICLR); the scale of the
    ridge as in its code.
    """
    factor, failed = torch.linalg.cholesky_ex(regularised(gram, ridge))
    coefficients = torch.cholesky_solve(targets, factor)
    return torch.where(failed == 0, coefficients, math.nan)


def predict(
    cross: Float[Tensor, "m n"], gram: Float[Tensor, "n n"], targets: Float[Tensor, "n c"], ridge: float
) -> Float[Tensor, "m c"]:
    """Kernel ridge regression at m others: `cross` (M, N) is their kernel with the n samples of `gram` and `targets`."""
    return cross @ ridge_solve(gram, targets, ridge)


def label_solve(
    cross: Float[Tensor, "m n"], gram: Float[Tensor, "n n"], targets: Float[Tensor, "m c"], ridge: float
) -> Float[Tensor, "n c"]:
    r"""The labels of the n samples with which kernel ridge regression is nearest the targets of the m others.

    $$ Y_s = \arg\min_Y \big\| K_{ts} \tilde K^{-1} Y - Y_t \big\|^2 = \tilde K \, K_{ts}^{+} \, Y_t,
       \qquad \tilde K = K_{ss} + \lambda \tfrac{\operatorname{tr} K_{ss}}{n} I $$

    in float64, by least squares for the coefficients $K_{ts}^+ Y_t$: no inverse is formed. No gradient flows.

    Args:
        cross: Kernel of the m others with the n samples.
        gram: Kernel of the n samples with themselves.
        targets: Labels of the m others.
        ridge: As `ridge_solve` will be given.

    Returns:
        Labels (n, c) in float64.

    Raises:
        PotstillError: A number that is not finite.

    Reference: Nguyen, Chen and Lee 2021, Dataset Meta-Learning from Kernel Ridge-Regression (ICLR), Label Solve. Where
    several labels are equally good, these have the smallest coefficients.
    """
    for what, values in (("cross", cross), ("gram", gram), ("targets", targets)):
        if not bool(values.isfinite().all()):
            raise PotstillError(f"label solve: {what} has numbers that are not finite; finite inputs are needed")
    k_ts, k_ss, y_t = (v.detach().double() for v in (cross, gram, targets))
    driver = "gelsd" if k_ts.device.type == "cpu" else "gels"  # singular values, where the device has them
    coefficients: Tensor = torch.linalg.lstsq(k_ts, y_t, driver=driver).solution
    return regularised(k_ss, ridge) @ coefficients


def check_gram(gram: Float[Tensor, "n n"], ridge: float) -> None:
    """Whether `ridge_solve` can solve with a Gram matrix; for outside of compiled steps.

    Raises:
        PotstillError: Numbers that are not finite, or a matrix that is not positive definite with this ridge.
    """
    if not bool(gram.isfinite().all()):
        raise PotstillError("kernel ridge regression: the kernel of S is not finite; the inputs of S have run away")
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise PotstillError(f"ridge = {ridge} is no finite number of 0 or more; 1e-6 is usual")
    if bool(torch.linalg.cholesky_ex(regularised(gram.detach(), ridge)).info):
        low, high = (float(v) for v in torch.linalg.eigvalsh(gram.detach().double())[[0, -1]])
        raise PotstillError(
            f"kernel ridge regression: with ridge = {ridge:g} in {str(gram.dtype).removeprefix('torch.')} the kernel of S is "
            f"not positive definite (eigenvalues {low:.3g} to {high:.3g}); give a larger ridge, float64, or fewer equal samples"
        )
