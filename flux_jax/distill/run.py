"""A distillation from end to end: prompts -> trajectories -> blockwise -> end to end -> checkpoint.

In: a teacher's checkpoint, prompts, options, the words of a mesh. Out: the student's checkpoint `OUT`, whole or not at
all, and the run's folder `OUT.run`: trajectories, training states, `metrics.jsonl`, `curve.png`, `run.json`. Killed at
any moment, the same call goes on, and ends with the same checkpoint.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from flux_jax.checkpoints import checkpoint
from flux_jax.checkpoints.writer import no_checkpoint
from flux_jax.distill import end_to_end, export
from flux_jax.distill.blockwise import Blockwise
from flux_jax.distill.options import Options
from flux_jax.distill.run_context import RunContext, lasting, teacher_digest
from flux_jax.distill.trajectories import load_or_make
from flux_jax.errors import UserError
from flux_jax.io import atomic, places, prompts
from flux_jax.training import mesh as meshes

ABOUT = ("phases", "options", "prompts", "held_out_loss", "held_out_relative", "teacher")  # a run tells in a manifest


def prepare(teacher: str | Path, folder: Path, texts: Sequence[str], options: Options, mesh: str | None) -> RunContext:
    """A run in `folder`, to `begin`, after every check that can be made before anything is written. UserError for what
    cannot be done."""
    stored = checkpoint.Checkpoint.open(teacher)
    if stored.manifest["quantization"] is not None:
        raise UserError(f"{teacher} is ternary already: distil from the checkpoint that it was made from.")
    if missing := [component for component in ("transformer", "t5", "clip") if component not in stored.components]:
        raise UserError(f"{teacher} lacks the {missing[0]}, which a teacher needs.")
    training, held_out = prompts.split(texts)
    different = len(training) + len(held_out)
    if different < 2:
        raise UserError(f"The {len(texts)} prompts are {different} different ones: give more.")
    for kind, found in (("left for training", training), ("held out (one in 16 is, by its hash)", held_out)):
        if not found:
            raise UserError(f"None of the {different} different prompts is {kind}: give more.")
    batches = {"batch": options.batch // options.accumulate, "block_batch": options.block_batch}
    work = RunContext(folder, stored, options, meshes.make(mesh, batches), training, held_out)
    work.check_size()
    return work


def train_student(work: RunContext) -> tuple[Any, Any, dict[str, Any]]:
    """(graph, parameters) of the finished student, floats as they are stored, and what is to be reported of it."""
    options, metrics = work.options, work.metrics
    held_out = load_or_make(work, "held_out", work.held_out, options.held_out)
    losses = {}

    def measured(after: str, graph: Any, params: Any) -> dict[str, Any]:
        losses[after] = found = end_to_end.measure(work, graph, params, held_out)
        metrics.log(phase="held_out", after=after, step=len(losses) - 1, **found)
        metrics.plot()
        return found

    metrics.forget_after("held_out", -1)
    graph, params = end_to_end.build(work, end_to_end.read_rounded)
    before = measured("rounding", graph, params)
    if options.phase_list:
        trajectories = load_or_make(work, "trajectories", work.training, options.trajectories)
        if "blockwise" in options.phase_list:
            del params
            Blockwise(work, trajectories).run()
            graph, params = end_to_end.build(work, end_to_end.read_blockwise)
            measured("blockwise", graph, params)
        if "end_to_end" in options.phase_list:
            params = end_to_end.train(work, graph, params, trajectories, before["by_step"])
    params = export.round_to_storage(work, params)
    if "end_to_end" in options.phase_list:
        measured("end_to_end", graph, params)
    steps = {"blockwise": options.block_steps, "end_to_end": options.end_to_end_steps}
    about = {
        "phases": {phase: steps[phase] for phase in options.phase_list},
        "options": options.to_json(),
        "prompts": {
            "sha256": prompts.digest(work.training + work.held_out),
            "training": len(work.training),
            "held_out": len(work.held_out),
        },
        "held_out_loss": {after: found["loss"] for after, found in losses.items()},
        "held_out_relative": {after: found["relative"] for after, found in losses.items()},
        "teacher": teacher_digest(work.teacher),
    }
    return graph, params, about


def distill(
    teacher: str | Path,
    out: Path,
    texts: Sequence[str],
    options: Options,
    *,
    mesh: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes the checkpoint `out`; returns what its manifest says about it, also where `out` is this very run's student
    already: it was killed, perhaps, before it could say so. UserError for what cannot be done.

    Several processes train and stop there, because Orbax saves with all processes or none: a call in a single one then
    finds everything learned, and writes the checkpoint."""
    places.check_writable(out, folder=True)
    if not options.modulation:
        raise UserError(
            "A checkpoint has all block linears ternary: float modulation is for bench.distill_ablation only."
        )
    named = out if out.name not in ("", "..") else Path(os.path.abspath(out))
    work = prepare(teacher, named.with_name(named.name + ".run"), texts, options, mesh)
    with work.alone():
        if not overwrite and (about := finished(work, out)):
            return about
        atomic.WholeFolder(out, overwrite=overwrite, ours=no_checkpoint).check()
        work.begin()
        _, params, about = train_student(work)
        if jax.process_count() == 1:
            export.export(work, params, out, about, overwrite)
    return about


def finished(work: RunContext, out: Path) -> dict[str, Any] | None:
    """What the manifest of `out` says of how it was made, where it is the student of just this run, whose folder is
    still there; else None."""
    if not (out.is_dir() and work.begun() == work.record):
        return None
    try:
        about = checkpoint.Checkpoint.open(out).quantization or {}
        made = {
            "teacher": about["teacher"],
            "prompts": about["prompts"]["sha256"],
            "options": lasting(about["options"]),
        }
        return {key: about[key] for key in ABOUT} if made == work.record else None
    except (UserError, LookupError, TypeError, AttributeError):  # something else has that name
        return None
