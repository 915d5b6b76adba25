"""Coresets: which samples of a class stand for the rest. Pure functions on rows of numbers; they know no data set.

Each takes the rows X (N, F) of one class, float32 or float64, and a number k <= N. None holds a matrix of all pairs:
memory is O(N F), time is stated with each.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .errors import PotstillError

BLOCK = 1024  # rows whose differences from one point are in memory at a time
RESTARTS = 1  # of k-means: a second start takes as long again and gains little after k-means++


def herding(x: Float[Tensor, "n f"], count: int) -> Int64[Tensor, k]:
    """The rows whose running mean stays closest to the mean of all, chosen one after the other.

    With mu the mean of X and S the rows chosen so far, the k-th is, among those not chosen yet,

        argmin_x || mu - (sum(S) + x) / k ||

    The first k of a longer selection are the selection of k. O(k N F) time.

    Args:
        x: Rows (N, F).
        count: Rows to choose.

    Returns:
        Their numbers (k,) in order of choice; the lowest number where several are as close.

    Raises:
        PotstillError: More rows than there are, or none.

    Example:
        >>> herding(torch.tensor([[0.0], [4.0], [1.0], [7.0]]), 2)  # the mean is 3
        tensor([1, 2])

    Reference: Welling 2009, Herding Dynamical Weights to Learn; greedy on the mean itself, not on its weights: Rebuffi
    et al. 2017, iCaRL, algorithm 4. There a row may be chosen twice, here it may not.
    """
    _check(x, count)
    z = x - x.mean(0, dtype=torch.float64).to(x.dtype)  # so that no large common part cancels
    length = torch.einsum("nf,nf->n", z, z)
    drift = torch.zeros(x.shape[1], dtype=torch.float64)  # sum of the chosen rows, less as many means
    free, chosen = torch.ones(len(x), dtype=torch.bool), []
    for _ in range(count):
        gap = length + 2 * (z @ drift.to(z.dtype))  # || drift + z ||^2 less what is the same for all
        best = int(torch.where(free, gap, torch.inf).argmin())
        drift += z[best]
        free[best] = False
        chosen.append(best)
    return torch.tensor(chosen)


def k_center(x: Float[Tensor, "n f"], count: int) -> Int64[Tensor, k]:
    """Rows such that no row is far from the nearest chosen one: farthest first.

    The first is the row nearest to the mean, each next one that which is farthest from those chosen. The largest
    distance from a row to its nearest chosen one is at most twice the least that any k rows reach. O(k N F) time.

    Args:
        x: Rows (N, F).
        count: Rows to choose.

    Returns:
        Their numbers (k,) in order of choice; the lowest number where several are as far.

    Raises:
        PotstillError: More rows than there are, or none.

    Example:
        >>> k_center(torch.tensor([[0.0], [4.0], [1.0], [7.0]]), 3)
        tensor([1, 0, 3])

    Reference: Sener and Savarese 2018, algorithm 1, with nothing chosen beforehand; the bound: Gonzalez 1985.
    """
    _check(x, count)
    first = int(_distances(x, x.mean(0, dtype=torch.float64).to(x.dtype)).argmin())
    chosen, far = [first], _distances(x, x[first])
    far[first] = -1.0  # below every distance: rows that are alike are chosen last, but none twice
    for _ in range(count - 1):
        best = int(far.argmax())
        far = torch.minimum(far, _distances(x, x[best]))
        far[best] = -1.0
        chosen.append(best)
    return torch.tensor(chosen)


def k_means(x: Float[Tensor, "n f"], count: int, seed: int) -> Float[Tensor, "k f"]:
    """Points such that the squared distances from all rows to their nearest point sum to little: Lloyd's iteration.

        min_C sum_x min_(c in C) || x - c ||^2

    A local minimum, from a start by k-means++. O(k N F) time for each iteration, at most 300 of them.

    Args:
        x: Rows (N, F).
        count: Points.
        seed: Of the start, 0 to 2^32 - 1.

    Returns:
        The points (k, F): means of rows, in general none of them.

    Raises:
        PotstillError: More points than there are rows, or none.

    Reference: Lloyd 1982; the start: Arthur and Vassilvitskii 2007. Computed by scikit-learn, on one thread: several
    add their parts in the order in which they finish, and the last bits would differ from run to run.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    _check(x, count)
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than points: some are then equal
        fitted = KMeans(count, n_init=RESTARTS, random_state=seed).fit(x.numpy())
    return torch.from_numpy(fitted.cluster_centers_).to(x.dtype)


def nearest(x: Float[Tensor, "n f"], points: Float[Tensor, "k f"]) -> Int64[Tensor, k]:
    """For each point in turn the nearest row that no point before it has taken. O(k N F) time.

    Args:
        x: Rows (N, F).
        points: (k, F), at most N.

    Returns:
        Numbers of rows (k,), all different.

    Raises:
        PotstillError: More points than rows, or none.
    """
    _check(x, len(points))
    free, chosen = torch.ones(len(x), dtype=torch.bool), []
    for point in points:
        best = int(torch.where(free, _distances(x, point), torch.inf).argmin())
        free[best] = False
        chosen.append(best)
    return torch.tensor(chosen)


def _distances(x: Tensor, point: Tensor) -> Tensor:
    """Squared distances (N,) from a point: from differences, so that equal rows are at exactly 0."""
    return torch.cat([(rows - point).square().sum(1) for rows in x.split(BLOCK)])


def _check(x: Tensor, count: int) -> None:
    if not 1 <= count <= len(x):
        raise PotstillError(f"a coreset of {count} cannot be chosen from {len(x)} samples; 1 to {len(x)} can")
