"""Power: how many items a comparison needs before it can show what one hopes to see."""

from __future__ import annotations

import math

from scipy import special


def paired_items_needed(gain: float, discordance: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Return how many paired 0/1 items show a gain d when a share q of the items changes.

    Connor 1987, Biometrics 43:207: n = ((z_{1-alpha/2} √q + z_power √(q - d²)) / d)².
    """
    if not 0 < abs(gain) <= discordance <= 1:
        raise ValueError(
            f"the gain lies between 0 and the discordance, which is at most 1; got {gain} and {discordance}"
        )
    root = _quantile(1 - alpha / 2) * math.sqrt(discordance) + _quantile(power) * math.sqrt(discordance - gain * gain)
    return math.ceil((root / gain) ** 2)


def items_needed(p1: float, p2: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Return how many items *per arm* tell two rates apart on different items (Fleiss 1981, chapter 3).

    n = ((z_{1-alpha/2} √(2 p̄(1-p̄)) + z_power √(p1(1-p1) + p2(1-p2))) / (p1 - p2))² with p̄ the mean of p1
    and p2.
    """
    if not (0 <= p1 <= 1 and 0 <= p2 <= 1) or p1 == p2:
        raise ValueError(f"two different rates between 0 and 1 are needed, got {p1} and {p2}")
    mean = (p1 + p2) / 2
    spread = math.sqrt(p1 * (1 - p1) + p2 * (1 - p2))
    root = _quantile(1 - alpha / 2) * math.sqrt(2 * mean * (1 - mean)) + _quantile(power) * spread
    return math.ceil((root / (p1 - p2)) ** 2)


def _quantile(share: float) -> float:
    """The standard normal quantile."""
    return float(special.ndtri(share))
