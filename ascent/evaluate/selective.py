"""Selective answering: the confidence below which a model hands over, so that what passes keeps to a stated risk."""

from __future__ import annotations

from collections.abc import Sequence

from ascent.records import Record
from ascent.records.errors import BadInput


class Abstention(Record):
    """A threshold with the evidence for it: of `passed` answers at least that confident, `wrong` were wrong.

    `bound` is the upper end of the one-sided interval of their error rate; `reached` tells whether it keeps to `risk`.
    """

    below: float
    risk: float
    items: int
    passed: int
    wrong: int
    bound: float
    reached: bool

    @property
    def sentence(self) -> str:
        """The threshold and its evidence in words."""
        kept = f"of {self.items} calibration answers {self.passed} pass and {self.wrong} of those are wrong"
        bound = f"at most {100 * self.bound:.1f} % with 95 % confidence"
        if self.reached:
            return f"Answers with a confidence below {self.below:.2f} are handed over: {kept}, {bound}."
        return (
            f"No confidence threshold shows an error rate below {100 * self.risk:.3g} %; that with the lowest bound, "
            f"{self.below:.2f}, is used: {kept}, {bound}. More validation items can show less."
        )


def upper_bound(wrong: int, n: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of an error rate: the p at which P(≤ wrong of n) = 1 − confidence (Clopper-Pearson)."""
    from scipy import special  # loads on use

    if not 0 <= wrong <= n:
        raise ValueError(f"wrong must lie between 0 and n, got {wrong} of {n}")
    return 1.0 if wrong == n else float(special.betaincinv(wrong + 1, n - wrong, confidence))


def abstention(confidence: Sequence[float], wrong: Sequence[bool], risk: float) -> Abstention:
    """Choose the lowest threshold at which the answers that pass keep to `risk`.

    Selective classification with a guaranteed risk (Geifman and El-Yaniv 2017, arXiv 1705.08500 §3), the bound taken at
    each threshold.

    Args:
        confidence: of each answer that passes without a threshold.
        wrong: whether that answer is wrong.
        risk: the error rate to stay below among what passes.

    Returns:
        The threshold; where none keeps to the risk, the one with the lowest bound, and `reached` is False.

    Raises:
        BadInput: there is no answer to calibrate on.
    """
    if not confidence:
        raise BadInput("no answer passes, so there is nothing to choose a threshold on; give more validation items")
    pairs = sorted(zip(confidence, wrong, strict=True), reverse=True)
    choices: list[Abstention] = []
    errors = 0
    for passed, (value, bad) in enumerate(pairs, 1):
        errors += bad
        if passed < len(pairs) and pairs[passed][0] == value:
            continue  # equal confidences pass together
        below = 0.0 if passed == len(pairs) else (value + pairs[passed][0]) / 2
        bound = upper_bound(errors, passed)
        choices.append(
            Abstention(
                below=below,
                risk=risk,
                items=len(pairs),
                passed=passed,
                wrong=errors,
                bound=bound,
                reached=bound <= risk,
            )
        )
    good = [choice for choice in choices if choice.reached]
    return good[-1] if good else min(choices, key=lambda choice: choice.bound)
