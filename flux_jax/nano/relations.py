"""Where one box lies of another, by the rule of GenEval's evaluator: for its own benchmark and for FLUX-nano's oracle.

In: two boxes in any unit. Out: names of relations, keys of `captions.RELATIONS`.
"""

import math

THRESHOLD = 0.1  # share of the summed sides that an offset must exceed to count
NOTHING = 1e-3  # pixels: what is less says nothing. (In units of a picture, no less is left of boxes that can be seen.)

Number = int | float
Box = tuple[Number, Number, Number, Number]  # x0, y0, x1, y1; y downwards


def relations(a: Box, b: Box, threshold: Number = THRESHOLD) -> set[str]:
    """Where a lies of b: of "left of", "right of", "above", "below". From the offset of the centres, `threshold` times
    the summed widths (heights) is taken off; what is left must exceed half of the whole offset's length."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a, b
    across, down = (ax0 + ax1 - bx0 - bx1) / 2, (ay0 + ay1 - by0 - by1) / 2
    left_across = max(abs(across) - threshold * (abs(ax1 - ax0) + abs(bx1 - bx0)), 0.0)
    left_down = max(abs(down) - threshold * (abs(ay1 - ay0) + abs(by1 - by0)), 0.0)
    if max(left_across, left_down) < NOTHING:
        return set()
    half = math.hypot(across, down) / 2
    found = set()
    if left_across > half:
        found.add("left of" if across < 0 else "right of")
    if left_down > half:
        found.add("above" if down < 0 else "below")
    return found
