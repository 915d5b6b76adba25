"""Fairness beside accuracy: what a set owes to itself and what to its labels, its augmentation and chance.

A cell is a record of `potstill benchmark`: plain values with `results`, each a `potstill.judge.Result` as a dict with its
`role` (`set`, or a baseline) and `variant` (`own`, `hard` labels, or `plain`: no augmentation). Accuracies lie in [0, 1]
here, as everywhere: the exponentials below mean something else in percent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

Cell = Mapping[str, Any]


def accuracies(cell: Cell, role: str = "set", variant: str = "own", network: str | None = None) -> list[float]:
    """The accuracies of all networks on all sets of a cell, in the order in which they were measured.

    Args:
        cell: Its record.
        role: `set`, `random`, `k-means`, `random-soft` or `whole`.
        variant: `own`, `hard` or `plain`.
        network: One student; the first that the cell was judged with if absent.
    """
    found = [r for r in cell.get("results", ()) if (r["role"], r["variant"]) == (role, variant)]
    wanted = network or next((r["network"] for r in found), None)
    return [a for r in found if r["network"] == wanted for a in r["accuracies"]]


def mean(cell: Cell, network: str | None = None) -> tuple[float, float, int] | None:
    """Mean, population standard deviation, as everywhere here and in the field, and number of a cell's accuracies; `None` where there are none."""
    scores = accuracies(cell, network=network)
    return (fmean(scores), pstdev(scores), len(scores)) if scores else None


def rival(cell: Cell, network: str | None = None) -> str:
    """The baseline that a cell's gain is over: `random-soft` where the set's labels are learned and random samples with a
    teacher's labels were measured, else `random`."""
    learned = any(
        r["role"] == "set" and r["variant"] == "own" and r["labels"] != "hard" for r in cell.get("results", ())
    )
    return "random-soft" if learned and accuracies(cell, "random-soft", "own", network) else "random"


def _difference(cell: Cell, variant: str, network: str | None) -> float | None:
    """The set's mean accuracy less that of random real samples, everything else alike."""
    own = accuracies(cell, "set", variant, network)
    # the same baseline for each variant, or a score of two would mix them
    chance = accuracies(cell, rival(cell, network), variant, network)
    return fmean(own) - fmean(chance) if own and chance else None


def gain(cell: Cell, network: str | None = None) -> float | None:
    """Mean accuracy over that of random real samples under the same protocol."""
    return _difference(cell, "own", network)


over_random = gain


def label_recovery(cell: Cell, whole: float | None = None) -> float | None:
    """What is lost against the whole training set when both have hard labels: less is better.

    Args:
        cell: Its record.
        whole: Accuracy of the whole set; that of the cell's own baseline if absent.

    Reference: DD-Ranking's hard-label recovery, Acc(real, hard) - Acc(set, hard).
    """
    best = accuracies(cell, "whole")
    best = [whole] if whole is not None else best
    hard = accuracies(cell, "set", "hard")
    if not hard and all(r["labels"] == "hard" for r in cell.get("results", ()) if r["role"] == "set"):
        hard = accuracies(cell)  # its own labels are hard ones
    return fmean(best) - fmean(hard) if best and hard else None


def _normalised(x: float) -> float:
    """[-1, 1] to [0, 1], exponentially."""
    return (math.exp(x) - math.exp(-1)) / (math.exp(1) - math.exp(-1))


def label_robust(cell: Cell, whole: float | None = None, weight: float = 0.5) -> float | None:
    """The label-robust score in [0, 1]: improvement over random, and hard-label recovery against it, in one number.

    Args:
        cell: Its record.
        whole: As for `label_recovery`.
        weight: Of the improvement.

    Reference: DD-Ranking; with accuracies in [0, 1], as its formula needs them.
    """
    over, lost = over_random(cell), label_recovery(cell, whole)
    return None if over is None or lost is None else _normalised(weight * over - (1 - weight) * lost)


def augmentation_robust(cell: Cell, weight: float = 0.5) -> float | None:
    """The augmentation-robust score in [0, 1]: improvement over random with the augmentation and without, in one number.

    Args:
        cell: Its record.
        weight: Of the improvement with augmentation.

    Reference: DD-Ranking.
    """
    augmented, bare = gain(cell), _difference(cell, "plain", None)
    return None if augmented is None or bare is None else _normalised(weight * augmented + (1 - weight) * bare)


def p_value(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of Welch's t-test that two samples have the same mean; `None` where one has too few to tell.

    Args:
        a: Accuracies.
        b: Accuracies.
    """
    if len(a) < 2 or len(b) < 2:
        return None
    if len(set(a)) == len(set(b)) == 1:  # no spread at all, as by a kernel: the test is not defined
        return 1.0 if a[0] == b[0] else 0.0
    from scipy.stats import ttest_ind

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where one of the two has no spread: the formula holds
        return float(ttest_ind(a, b, equal_var=False).pvalue)
