"""The rows of a visit in few lines: first what is wrong, then what failed or was not begun, then the figures.

In: rows as `bench.journal` writes them, and the stderr of processes for whose rows the disk had no room. Out: lines of
text; all of them, or as many of each step as fit into what comes back of a machine's output.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

LIMIT = 9000  # characters of `brief`
WIDTH = 250  # of a line
UNWRITTEN = "not written to "  # as `journal.append` says it on stderr
LEFT_OUT = ("step", "time", "correct", "largest")
NAMED = ("failure", "skipped", "wrong", "in_it", "not_in_it")  # words that say nothing without their name
CUT = "..."


def unwritten(stderr: Iterable[str]) -> list[dict[str, Any]]:
    """The rows that a process said on stderr, since the disk had no room for them."""
    found = []
    for line in stderr:
        if line.startswith(UNWRITTEN):
            try:
                found.append(json.loads("{" + line.partition("): {")[2]))
            except ValueError:  # other output got between
                continue
    return found


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a row is a result that is not right."""
    return bool(row.get("wrong")) or row.get("correct") is False


def is_problem(row: dict[str, Any]) -> bool:
    """Whether a row is a wrong result, a failure, or a step that did not end with 0. What was skipped is none."""
    return is_wrong(row) or "failure" in row or row.get("exit", 0) != 0


def text(row: dict[str, Any]) -> str:
    """A row's values: words as they are, numbers behind their names; no lists."""
    found = []
    for key, value in row.items():
        if key not in LEFT_OUT and isinstance(value, str | int | float):
            found.append(value if isinstance(value, str) and key not in NAMED else f"{key} {short(value)}")
    return ", ".join(found)


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def line(row: dict[str, Any]) -> str:
    """A row by itself, with its step."""
    return f"{row.get('step')}: {text(row)}"[:WIDTH]


def problems(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Heading -> lines: wrong results, failures, what was not done."""
    found = {
        "WRONG": [row for row in rows if is_wrong(row)],
        "FAILED": [row for row in rows if is_problem(row) and not is_wrong(row)],
        "not done": [row for row in rows if "skipped" in row],
    }
    return {name: list(map(line, kept)) for name, kept in found.items() if kept}


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Step -> lines of its other rows; cases that are as they should be are only counted."""
    found: dict[str, list[str]] = {}
    right: dict[str, int] = {}
    for row in rows:
        name = str(row.get("step"))
        if "case" in row and not is_problem(row):
            right[name] = right.get(name, 0) + 1
        elif not is_problem(row) and "skipped" not in row:
            found.setdefault(name, []).append(text(row)[:WIDTH])
    for name, count in right.items():
        found[name] = [f"{count} cases are right", *found.get(name, [])]
    return found


def blocks(parts: dict[str, list[str]]) -> list[str]:
    return ["\n".join([f"== {heading} ({len(lines)})", *lines]) for heading, lines in parts.items()]


def whole(rows: Sequence[dict[str, Any]]) -> str:
    """All lines under their headings."""
    return "\n".join([*blocks(problems(rows)), *blocks(figures(rows))])


def brief(rows: Sequence[dict[str, Any]]) -> str:
    """At most `LIMIT` characters of them, half of them at most for problems."""
    first = fit(blocks(problems(rows)), LIMIT // 2)
    return "\n".join([*first, *fit(blocks(figures(rows)), LIMIT - sum(len(block) + 1 for block in first))])


def fit(blocks: Sequence[str], most: int) -> list[str]:
    """Blocks that take so many characters together: what the short ones leave, the long ones share."""
    found = list(blocks)
    for done, i in enumerate(sorted(range(len(blocks)), key=lambda i: len(blocks[i]))):
        found[i] = cut(blocks[i], most // (len(blocks) - done) - 1)
        most -= len(found[i]) + 1
    return found


def cut(lines: str, most: int) -> str:
    """At most so many characters of a block: whole lines from both ends."""
    if len(lines) <= most:
        return lines
    half = (most - len(CUT) - 2) // 2
    first, last = lines[:half], lines[-half:]
    return "\n".join([first[: first.rfind("\n")] if "\n" in first else first, CUT, last[last.find("\n") + 1 :]])
