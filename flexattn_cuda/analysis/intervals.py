"""How far an accuracy can be trusted."""

from __future__ import annotations

import math


def wilson(right: int, questions: int) -> tuple[float, float]:
    """Return the lower and upper end of Wilson's 95 % interval of a share (E. B. Wilson, 1927)."""
    share, extra = right / questions, 1.959964**2 / questions
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(share * (1 - share) * extra + extra * extra / 4) / (1 + extra)
    return middle - half, middle + half
