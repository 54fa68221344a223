"""What goes into feature-based tuning, and the record of what came out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ascent.records import Estimate, Record


class FeatureConfig(Record):
    """Settings of `tune_features`.

    Attributes:
        folds: outer folds, which measure; at least 2.
        inner_folds: folds inside each training part, which choose the classifier and fit the calibration.
        gradient_boosting: whether boosted trees stand for choice beside logistic regression.
        calibration: how scores become probabilities. `auto` is isotonic with at least 1,000 rows and 100 of the
            rarest label (below that it over-fits: Niculescu-Mizil & Caruana 2005, ICML, section 5); else sigmoid for
            two labels (Platt 1999) and one temperature for more (Guo et al. 2017, arXiv 1706.04599, section 4.2).
        risk: the share of wrong answers allowed among those given; None answers always.
        confidence: how sure to be that the risk is kept.
        unreadable: what to do with an item that cannot be read: `error`, or `exclude` and count.
        seed: of the folds, the trees and the resampling.
    """

    folds: int = Field(5, ge=2)
    inner_folds: int = Field(3, ge=2)
    gradient_boosting: bool = True
    calibration: Literal["auto", "sigmoid", "isotonic", "temperature"] = "auto"
    risk: float | None = Field(0.05, gt=0, lt=1)
    confidence: float = Field(0.95, gt=0, lt=1)
    unreadable: Literal["error", "exclude"] = "error"
    seed: int = 0


class Reliability(Record):
    """How good the probabilities are, on rows that neither training nor calibration saw.

    Attributes:
        accuracy: share of right labels, answered always.
        log_loss: mean of -ln of the right label's probability, in nats.
        brier: mean of Σ over labels of (probability - [right])², between 0 and 2 (Brier 1950).
        ece: expected calibration error in ten bins of equal size (Guo et al. 2017, equation 3).
        ece_if_calibrated: the 2.5th and 97.5th percentile of `ece` if every probability were exact: with few rows it
            is above 0 by chance alone (Bröcker & Smith 2007), so only an `ece` above this range says anything.
    """

    accuracy: Estimate
    log_loss: Estimate
    brier: Estimate
    ece: float
    ece_if_calibrated: tuple[float, float]


class Abstention(Record):
    """The threshold on the highest probability below which the classifier gives no answer.

    Attributes:
        threshold: answer where the highest probability is at least this; None abstains on everything.
        risk: the share of wrong answers allowed; None where none was stated.
        confidence: of the upper bound.
        accepted: rows answered; `errors` of them wrongly.
        coverage: accepted / rows, with its interval.
        upper: Clopper–Pearson upper bound of the risk at the threshold.
        evidence: the rows that this rests on: held out from all training, or the outer folds of cross-validation, which
            speak of classifiers trained on a little less than the exported one.
        reason: the choice as a sentence.
    """

    threshold: float | None
    risk: float | None
    confidence: float
    accepted: int
    errors: int
    coverage: Estimate
    upper: float
    evidence: Literal["held_out", "nested_cv"] = "nested_cv"
    reason: str


class FeatureCard(Record):
    """How a feature classifier came about, and how good it is. It lies beside the artifact as `card.json`.

    Attributes:
        sha256: names the artifact's content.
        extractor: name, identity and dimensions of what reads the items.
        labels: label -> rows.
        groups: different groups among the rows; equal items without one count as a group.
        excluded: rows left out because their item could not be read.
        chosen: the classifier, and its inner log-loss beside the candidates'.
        chosen_in_folds: what each outer fold chose for itself: much variety says that the choice matters little.
        nested_cv: reliability over the outer folds.
        held_out: reliability of the exported classifier on the held-out rows, where there were any.
        majority: share of the most frequent label: the accuracy of always giving that.
    """

    sha256: str
    extractor: dict[str, str | int]
    labels: dict[str, int]
    groups: int
    excluded: tuple[str, ...] = ()
    chosen: str
    candidates: dict[str, float]
    chosen_in_folds: tuple[str, ...]
    calibration: str
    nested_cv: Reliability
    held_out: Reliability | None = None
    majority: float
    abstention: Abstention
    config: FeatureConfig
    versions: dict[str, str] = Field(default_factory=dict)
    seconds: float = 0.0
    created: str = ""
