"""Fairness scores: against the formulas typed out, and SciPy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.stats

from potstill import scores


def result(
    role: str, variant: str, values: list[float], network: str = "convnet", labels: str = "hard"
) -> dict[str, Any]:
    return {"role": role, "variant": variant, "network": network, "accuracies": values, "labels": labels}


CELL = {
    "results": [
        result("set", "own", [0.80, 0.82, 0.81]),
        result("set", "own", [0.60], "mlp"),
        result("random", "own", [0.70, 0.72]),
        result("random", "own", [0.55], "mlp"),
        result("set", "hard", [0.78, 0.80]),
        result("set", "plain", [0.75]),
        result("random", "plain", [0.69]),
        result("whole", "own", [0.93]),
    ]
}


def test_numbers_of_the_first_network_and_of_a_named_one() -> None:
    assert scores.mean(CELL) == (pytest.approx(0.81), pytest.approx(0.01 * (2 / 3) ** 0.5), 3)
    assert scores.mean(CELL, "mlp") == (0.60, 0.0, 1)
    assert scores.gain(CELL) == pytest.approx(0.10)
    assert scores.gain(CELL, "mlp") == pytest.approx(0.05)


def test_robust_scores_are_the_published_formulas_on_fractions() -> None:
    lost = 0.93 - 0.79
    assert scores.label_recovery(CELL) == pytest.approx(lost)
    alpha = 0.5 * 0.10 - 0.5 * lost
    assert scores.label_robust(CELL) == pytest.approx((math.e**alpha - math.e**-1) / (math.e - math.e**-1))
    beta = 0.3 * 0.10 + 0.7 * 0.06
    assert scores.augmentation_robust(CELL, 0.3) == pytest.approx((math.e**beta - 1 / math.e) / (math.e - 1 / math.e))
    assert scores.label_recovery(CELL, whole=0.95) == pytest.approx(lost + 0.02)


def test_what_was_not_measured_is_none() -> None:
    bare = {"results": [result("set", "own", [0.5], labels="centred")]}
    assert scores.mean({"results": []}) is None
    assert [f(bare) for f in (scores.gain, scores.label_recovery, scores.label_robust)] == [None] * 3
    assert scores.augmentation_robust(bare) is None


def test_hard_labels_need_no_second_measurement_but_learned_ones_do() -> None:
    rows = [result("set", "own", [0.8]), result("whole", "own", [0.9])]
    assert scores.label_recovery({"results": rows}) == pytest.approx(0.1)
    rows[0]["labels"] = "soft"
    assert scores.label_recovery({"results": rows}) is None


def test_a_set_with_learned_labels_is_held_against_random_samples_with_a_teachers() -> None:
    rows = [
        result("set", "own", [0.8], labels="soft"),
        result("random", "own", [0.6]),
        result("random-soft", "own", [0.7]),
    ]
    assert scores.gain({"results": rows}) == pytest.approx(0.1)
    assert scores.gain({"results": rows[:2]}) == pytest.approx(0.2)
    plain = [result("set", "plain", [0.7], labels="soft"), result("random", "plain", [0.5])]
    assert scores.augmentation_robust({"results": [*rows, *plain]}) is None  # no number of two baselines
    plain.append(result("random-soft", "plain", [0.68]))
    x = 0.5 * 0.1 + 0.5 * 0.02
    wanted = (math.exp(x) - math.exp(-1)) / (math.e - math.exp(-1))
    assert scores.augmentation_robust({"results": [*rows, *plain]}) == pytest.approx(wanted)


def test_p_where_one_of_two_has_no_spread() -> None:
    assert scores.p_value([0.5, 0.5, 0.5], [0.7, 0.71, 0.72]) < 0.01


def test_p_is_that_of_scipy_from_summaries() -> None:
    a, b = [0.81, 0.82, 0.84], [0.78, 0.80, 0.79, 0.80]
    import statistics as s

    wanted = scipy.stats.ttest_ind_from_stats(
        s.mean(a), s.stdev(a), 3, s.mean(b), s.stdev(b), 4, equal_var=False
    ).pvalue
    assert scores.p_value(a, b) == pytest.approx(wanted)
    assert scores.p_value([0.8], b) is None
    assert (scores.p_value([0.8, 0.8], [0.8, 0.8]), scores.p_value([0.8, 0.8], [0.7, 0.7])) == (1, 0)
