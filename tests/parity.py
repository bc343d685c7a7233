"""How far we are from the reference: one check for all parity tests, and the table that pytest prints at its end."""

import numpy as np

FLOAT32 = 2e-5  # of the reference's largest value: float32 sums in another order
ROWS: list[tuple[str, float, float]] = []


def check(case: str, actual, expected, limit: float = FLOAT32) -> None:
    """Asserts equal shapes and max |actual - expected| <= limit * max |expected|; notes the ratio for the table."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{case}: shape {actual.shape} instead of {expected.shape}"
    note(case, np.abs(actual - expected).max() / np.abs(expected).max(), limit)


def note(case: str, error: float, limit: float) -> None:
    """A row of the table; asserts error <= limit."""
    ROWS.append((case, float(error), limit))
    assert error <= limit, f"{case}: {error:.2e} of the reference's largest value, limit {limit:.0e}"


def table() -> str:
    """Markdown, the largest error of each case."""
    worst: dict[str, tuple[float, float]] = {}
    for case, error, limit in ROWS:
        worst[case] = max(worst.get(case, (0.0, limit)), (error, limit))
    lines = [f"| {case} | {error:.1e} | {limit:.0e} |" for case, (error, limit) in worst.items()]
    return "\n".join(["| case | error | limit |", "|---|---|---|", *lines])
