"""What n calibration pictures can promise."""

from __future__ import annotations

import math
from typing import Any

CONFIDENCE = 0.95


def attainable_alpha(alpha: float, n: int) -> float:
    """`alpha`, or the smallest false-alarm rate that n calibration scores can decide at, 1 / (n + 1)."""
    return max(alpha, 1.0 / (n + 1))


def needed_for(alpha: float) -> int:
    """How many calibration scores a false-alarm rate of `alpha` takes (99 for 0.01)."""
    return math.ceil(1.0 / alpha - 1e-9) - 1


def false_alarms(alpha: float, n: int, m: int) -> Any:
    """How many of m new normal pictures have p <= alpha, against n calibration scores: a frozen `scipy.stats` law.

    All m meet one threshold, so it is no binomial. Of n + m exchangeable scores without ties, those of the m that lie
    above the k-th largest of the n are beta-binomial(m, k, n + 1 - k), k being the greatest for which
    k / (n + 1) <= alpha; their mean is m k / (n + 1).
    """
    from scipy.stats import betabinom, binom

    allowed = math.floor(alpha * (n + 1) + 1e-9)
    if not 0 < allowed <= n:
        return binom(m, float(allowed > n))
    return betabinom(m, allowed, n + 1 - allowed)


def certificate(alpha: float, n: int) -> dict[str, Any]:
    """What can be said of this very calibration set with 95 % confidence, and what an alpha-certificate takes.

    P(p <= alpha) <= alpha holds on average over calibration sets. For the set at hand the false-alarm rate
    is a Beta(k + 1, n - k) variable, k the number of calibration scores allowed at or above a rejected one
    (Vovk 2012, "Conditional validity of inductive conformal predictors"), of which ``bound`` is the upper
    quantile. With the largest calibration score as threshold (k = 0) it is below alpha with that confidence
    from ``n_needed`` pictures on: 59 for 5 %, 299 for 1 %.
    """
    from scipy.stats import beta

    allowed = math.floor(alpha * (n + 1) + 1e-9) - 1
    bound = float(beta.ppf(CONFIDENCE, allowed + 1, n - allowed)) if 0 <= allowed < n else 1.0
    return {
        "confidence": CONFIDENCE,
        "bound": bound,
        "n_needed": math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - alpha)),
    }
