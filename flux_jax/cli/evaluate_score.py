"""`python -m flux_jax.evaluate score`: the official evaluators' results as the paper's Tables 1 and 2.

In: NAME=PATH of what an evaluator wrote, for each system. Out: the tables on stdout; with --json one object.
"""

import argparse
from collections.abc import Callable
from typing import Any

from flux_jax.cli.main import output, path
from flux_jax.errors import UserError
from flux_jax.evaluate import results
from flux_jax.evaluate.scoring import Measured, differences, estimates, page


def add_command(commands) -> None:
    """The subcommand `score`, on argparse's list of them."""
    parser = commands.add_parser("score", help="the official evaluators' results as the paper's Tables 1 and 2")
    parser.add_argument(
        "measured",
        nargs="+",
        metavar="NAME=PATH",
        help="GenEval's results.jsonl, or a folder with T2I-CompBench's results in a folder for each category",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Reads, prints the tables unless --json will print the report, and returns it."""
    found: dict[str, list[Measured]] = {}
    for argument in args.measured:
        name, separator, place = argument.partition("=")
        if not separator or not name or not place:
            raise UserError(f"{argument}: say what to call it, as in ours={argument}.")
        benchmark, measured = results.read(path(place), name)
        if any(other.name == name for other in found.get(benchmark, ())):
            raise UserError(f"{name} is named twice in {benchmark}; give each its own name.")
        found.setdefault(benchmark, []).append(measured)
    report: dict[str, Any] = {}
    pages = []
    for benchmark, models in found.items():
        scores = {model.name: estimates(model, benchmark) for model in models}
        changes = {model.name: differences(models[0], model) for model in models[1:]}
        notes = [note for model in models for note in model.notes]
        pages.append(page(benchmark, scores, changes, models[0].name, notes))
        report[benchmark] = {
            "scores": {name: results.as_json(each) for name, each in scores.items()},
            "differences_to_first": {name: results.as_json(each) for name, each in changes.items()},
            "notes": notes,
        }
    if not args.json:
        output("\n\n".join(pages))
    return report
