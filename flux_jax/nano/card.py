"""The cards of FLUX-nano and of its 1.58-bit student, written from their own files: nothing in them is typed by hand.

In: a training's folder (recipes, metrics, `vae.json`) or a student's manifest, and, if there is one, an evaluation's
folder. Out: Markdown.
"""

from pathlib import Path
from typing import Any

from flux_jax.errors import UserError
from flux_jax.io import reading
from flux_jax.io.library import library

AGAIN = "run its phase of flux_jax.nano.train again"
EVALUATE = "evaluate the model into that folder again"

HEAD = """\
# FLUX-nano

A small FLUX: the classes, files and converter of FLUX.1-dev, a few million parameters, pictures of coloured shapes.
Trained in this repository from rendered scenes alone (`flux_jax/nano/scenes.py`), by `python -m flux_jax.nano.train`.
It exists to try every part of the software on any machine and to measure what a change of the weights does to
pictures, with a judge that knows the renderer. It knows {words} words, six shapes and eight colours, and nothing else.

- Weights: bf16, Apache-2.0. Data: drawn by the program; no pictures of people or of anyone's work.
- Prompts: `a red circle`, `a photo of a blue square and a yellow star`, `three green triangles`,
  `a cross above a diamond`. Words outside the grammar mean nothing to it.
- `training/` has the settings, losses and curves of each phase; `SHA256SUMS` the hash of every file here.
"""

STUDENT = """\
# FLUX-nano in 1.58 bits

FLUX-nano (`nano-bf16` beside this folder) with every linear of its blocks ternary: -1, 0 or +1 with a scale per output
channel. Made from it by `python -m flux_jax.distill`, from {training} captions and noise alone: no picture was read.

- Weights: two bits each in the blocks, bf16 elsewhere, Apache-2.0. Text encoders, autoencoder and tokenizers are the
  teacher's, byte for byte; so is what it understands.
- Made for {activations} activations, with seed {seed}.
- `training/` has the settings, losses and curves; `flux_jax.json` the hashes of teacher and prompts; `SHA256SUMS` the
  hash of every file here.

## Training

| phase | steps | batch |
|---|---|---|
"""


def card(run: Path, evaluation: Path | None = None) -> str:
    """The teacher's whole card."""
    from flux_jax.nano.captions import VOCABULARY

    with library(f"{run} does not hold what flux_jax.nano.train writes", AGAIN):
        lines = _phases(run)
    return "\n".join([HEAD.format(words=len(VOCABULARY)), *lines, *scores(evaluation)]) + "\n"


def _phases(run: Path) -> list[str]:
    vae = read(run / "vae" / "vae.json")
    lines = ["## Training", "", "| phase | steps | batch | seed | result |"]
    lines += ["|---|---|---|---|---|"]
    psnr = f"{vae['psnr']:.1f} dB on held-out pictures, worst {vae['psnr_worst']:.1f} dB"
    lines += [f"| vae | {vae['steps']} | 4 crops, then 2 pictures | {vae['seed']} | {psnr} |"]
    for phase in ("text", "flow", "guidance"):
        if (run / phase / "recipe.json").exists():
            recipe = read(run / phase / "recipe.json")
            metrics = run / phase / "metrics.jsonl"
            last = reading.parse_json(reading.read_text(metrics).splitlines()[-1], str(metrics), AGAIN)
            result = f"loss {last['loss']:.4f}"
            if phase == "text":
                shares = read(run / phase / "understood.json")
                result += f"; held-out captions understood: T5 {shares['t5']:.1%}, CLIP {shares['clip']:.1%}"
            columns = [phase, recipe["steps"], recipe["batch"], recipe["seed"], result]
            lines += [f"| {' | '.join(map(str, columns))} |"]
    return lines


def student_card(quantization: dict[str, Any], evaluation: Path | None = None) -> str:
    """The student's whole card, from its manifest's entry `quantization`."""
    with library("The student's manifest does not say how it was distilled", "distil it again"):
        text = _student(quantization)
    return "\n".join([text, *scores(evaluation)]) + "\n"


def _student(quantization: dict[str, Any]) -> str:
    options = quantization["options"]
    text = STUDENT.format(
        training=quantization["prompts"]["training"], activations=quantization["activations"], seed=options["seed"]
    )
    batches = {"blockwise": options["block_batch"], "end_to_end": options["batch"]}
    lines = [f"| {phase} | {steps} | {batches[phase]} |" for phase, steps in quantization["phases"].items()]
    after = {name.replace("_", " "): error for name, error in quantization["held_out_relative"].items()}
    errors = ", ".join(f"{error:.4f} after {name}" for name, error in after.items())
    lines += ["", f"Squared error of the velocity on held-out captions, over the velocity's mean square: {errors}."]
    return text + "\n".join(lines)


def scores(evaluation: Path | None) -> list[str]:
    """The section with the evaluation's table, as lines of Markdown; none without one. UserError where it is not
    finished."""
    if evaluation is None:
        return []
    if not (evaluation / "summary.json").exists():
        raise UserError(f"{evaluation} holds no finished evaluation: evaluate the model into that folder first.")
    with library(f"{evaluation / 'summary.json'} is not what an evaluation writes", EVALUATE):
        return _scores(read(evaluation / "summary.json", EVALUATE))


def _scores(summary: dict[str, Any]) -> list[str]:
    sampling = ", ".join(f"{key} {value}" for key, value in summary["sampling"].items())
    count = sum(tag["count"] for tag in summary["tags"].values())
    how = f"{sampling}, seeds from {summary['seed']}"
    entries = {"overall": summary["overall"], **summary["tags"]}
    return [
        "",
        "## Score",
        "",
        f"{count} held-out captions, one picture each ({how}), judged by the oracle:",
        "",
        "![one row of pictures for each tag](sheet.png)",
        "",
        "| tag | score | 95 % interval |",
        "|---|---|---|",
        *(f"| {n} | {e['score']:.3f} | {e['interval'][0]:.3f} to {e['interval'][1]:.3f} |" for n, e in entries.items()),
    ]


def read(path: Path, remedy: str = AGAIN) -> dict[str, Any]:
    return reading.read_object(path, remedy=remedy)
