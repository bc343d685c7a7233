"""Scores of measured models as the paper's two tables, with measured rows below its own.

In: what the official evaluators wrote (`flux_jax.evaluate.results`). Out: Markdown tables: each measured score with its
95 % interval, and, where several models were measured on the same prompts, their differences to the first.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flux_jax.evaluate import paper
from flux_jax.evaluate.results import Measured
from flux_jax.evaluate.statistics import Estimate, average, mean, mean_difference, share


class Table(NamedTuple):
    """A table of the paper: column -> its heading, system -> its scores in the columns' order."""

    title: str
    columns: Mapping[str, str]
    published: Mapping[str, Sequence[float]]
    digits: int


TABLES = {
    "geneval": Table(paper.GENEVAL_TITLE, paper.GENEVAL_COLUMNS, paper.GENEVAL, 2),
    "t2i-compbench": Table(paper.T2I_TITLE, paper.T2I_COLUMNS, paper.T2I, 4),
}
ABSENT = "–"


def estimates(model: Measured, benchmark: str) -> dict[str, Estimate]:
    """Column -> score; `overall` only where every column is there and is what the paper's is."""
    found = {}
    for column, prompts in model.scores.items():
        groups = list(prompts.values())
        found[column] = (
            share([[bool(v) for v in group] for group in groups]) if benchmark == "geneval" else mean(groups)
        )
    columns = [column for column in TABLES[benchmark].columns if column != "overall"]
    if set(found) == set(columns) and model.comparable:
        return {"overall": average([found[column] for column in columns])} | found
    return found


def differences(first: Measured, other: Measured) -> dict[str, Estimate]:
    """Column -> other minus first on the prompts of both, with `overall` where no column lacks."""
    common = [column for column in first.scores if set(first.scores[column]) & set(other.scores.get(column, ()))]
    found = {column: mean_difference(other.scores[column], first.scores[column]) for column in common}
    if len(common) == len(first.scores) == len(other.scores) > 1:
        return {"overall": average(list(found.values()))} | found
    return found


def page(
    benchmark: str,
    scores: Mapping[str, Mapping[str, Estimate]],
    changes: Mapping[str, Mapping[str, Estimate]],
    first: str,
    notes: Sequence[str],
) -> str:
    """One benchmark as Markdown."""
    title, columns, published, digits = TABLES[benchmark]
    rows = [[f"{name} (paper)", *(f"{value:.{digits}f}" for value in row)] for name, row in published.items()]
    rows += [[f"**{name}**", *cells(row, columns, digits + (digits < 3), "")] for name, row in scores.items()]
    text = [f"### {title}", "", markdown(["model", *columns.values()], rows)]
    if changes:
        rows = [
            [f"{name} − {first}", *cells(row, columns, digits + (digits < 3), "+")] for name, row in changes.items()
        ]
        text += ["", "Same prompts, picture by picture:", "", markdown(["difference", *columns.values()], rows)]
    prompts = {sum(e.prompts for column, e in row.items() if column != "overall") for row in scores.values()}
    text += ["", f"In brackets: 95 % intervals over prompts ({', '.join(map(str, sorted(prompts)))} in all)."]
    return "\n".join([*text, *(f"- {note}." for note in notes)])


def cells(row: Mapping[str, Estimate], columns: Mapping[str, str], digits: int, sign: str) -> list[str]:
    """A column's score and interval; a dash where it was not measured."""
    texts = []
    for column in columns:
        if column not in row:
            texts.append(ABSENT)
            continue
        texts.append(cell(row[column].score, row[column].interval, digits, sign))
    return texts


def cell(score: float, interval: Sequence[float], digits: int, sign: str) -> str:
    low, high = interval
    return f"{score:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
