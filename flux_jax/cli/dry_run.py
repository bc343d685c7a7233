"""`python -m flux_jax.generate --dry-run`: what would be drawn, with which weights, in how much memory.

In: arguments, an opened checkpoint, requests. Out: the report that --json prints; in words on stderr, and the paths
that would be written on stdout. Nothing is loaded.
"""

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flux_jax.cli.main import check_device, output, say
from flux_jax.cli.requests import Request
from flux_jax.config import FluxConfig
from flux_jax.errors import printable

if TYPE_CHECKING:
    from flux_jax.checkpoints.checkpoint import Checkpoint


def report(args: argparse.Namespace, stored: "Checkpoint", dtype: str, todo: Sequence[Request]) -> dict[str, Any]:
    """Says it, and returns it as numbers."""
    images = [{"path": str(each.output), "id": each.id, **each.settings()} for each in todo]
    found = {"dry_run": True, "parameters": parameter_counts(stored.config), "weights": weights(stored)}
    words = ""
    if todo:
        words, found["memory"] = memory_plan(args, stored, dtype, max(todo, key=lambda each: each.height * each.width))
    if not args.quiet:
        explain(stored.config.name, found, images, words)
    if not args.json:
        for image in images:
            output(str(image["path"]))
    return found | {"images": images}


def parameter_counts(config: FluxConfig) -> dict[str, int]:
    """Parameters of each component, from shapes alone."""
    from flux_jax.models.params import COMPONENTS, abstract_component, leaf_table

    tables = {component: leaf_table(abstract_component(component, config)) for component in COMPONENTS}
    return {component: sum(map(math.prod, table.values())) for component, table in tables.items()}


def weights(stored: "Checkpoint") -> dict[str, Any]:
    """The form of a checkpoint's weights, in words, and their bytes as stored."""
    from flux_jax.checkpoints.integrity import stored_bytes

    tables = [stored.table(component) for component in stored.components]
    floating = {d.name for table in tables for n, (d, _) in table.items() if not n.endswith((".packed", ".scale"))}
    form = " and ".join(sorted(floating))
    size = sum(stored_bytes(table, name) for table in tables for name in table)
    return {"form": form if stored.quantization is None else f"ternary, the rest {form}", "bytes": size}


def memory_plan(
    args: argparse.Namespace, stored: "Checkpoint", dtype: str, request: Request
) -> tuple[str, dict[str, Any]]:
    """What a picture would take on this machine, in words and in numbers."""
    from flux_jax.cli.plan import described
    from flux_jax.runtime.environment import resolve_dtype
    from flux_jax.sampling import planner

    check_device(args.device)
    model = planner.model_of(stored, resolve_dtype(dtype))
    sizes = {"height": request.height, "width": request.width}
    sizes |= {"steps": request.steps, "length": request.max_sequence_length}
    return described(planner.Planner(model, None, **sizes), args)


def explain(name: str, found: dict[str, Any], images: Sequence[dict[str, Any]], words: str) -> None:
    counts = found["parameters"]
    listed = ", ".join(f"{component} {count:,}" for component, count in counts.items())
    held = f"{found['weights']['bytes'] / 1e9:.2f} GB of weights ({found['weights']['form']})"
    say(f"{printable(name)}: {sum(counts.values()):,} parameters ({listed}), {held}.")
    for image in images:
        size, prompt = f"{image['width']}x{image['height']}", printable(image["prompt"])
        say(f"{size}, {image['steps']} steps, seed {image['seed']}: {prompt}")
    if words:
        say(words)
