"""The gates of the ladder: may a stage begin, and may its result replace the champion?

Both gates are pure functions of measurements. They read no file and no clock, and the same evidence gives
the same verdict whatever the order of its items. Every verdict states its reasons as sentences with numbers;
`evidence` holds the numbers alone. The rule that outranks all others: nothing is promoted without a
significant paired improvement of the primary metric on the same items, with every guard shown to be no worse
than its margin.
"""

from ascent.ladder.after import after_stage
from ascent.ladder.before import before_stage
from ascent.ladder.evidence import Evidence, Inventory, Probe, Spend, VerifierCheck

__all__ = ["Evidence", "Inventory", "Probe", "Spend", "VerifierCheck", "after_stage", "before_stage"]
