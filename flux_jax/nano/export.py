"""A finished training run becomes the checkpoint that ships: `python -m flux_jax.nano.train export --run RUN OUT`; and
a finished student of it too: `python -m flux_jax.nano.train student STUDENT OUT`.

In: `RUN/vae`, `RUN/text`, `RUN/flow` and, where it was trained, `RUN/guidance` (the averaged weights of the last phase
that there is); or a checkpoint by `flux_jax.distill`. Out: a checkpoint (bf16; or the student's own weights) with
tokenizers, the phases' metrics and curves, a card, and SHA256SUMS of every file.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flux_jax.checkpoints import checkpoint, checksums, writer
from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.config import FluxConfig, nano
from flux_jax.errors import UserError
from flux_jax.io import atomic, reading
from flux_jax.io.library import library
from flux_jax.models.params import abstract_component, assemble, leaves
from flux_jax.models.vae import VAE
from flux_jax.nano import vocabulary
from flux_jax.nano.captions import VOCABULARY
from flux_jax.nano.card import AGAIN, EVALUATE, card, student_card
from flux_jax.nano.dataset import unpacked

LICENCE = "Apache-2.0"


def load_vae(folder: Path) -> tuple[FluxConfig, VAE]:
    """The trained autoencoder (float32), and nano's config with the shift and scale that give its latents mean 0 and
    standard deviation 1. UserError without a finished VAE in `folder`, and where it is damaged."""
    if not (folder / "vae.npz").exists():
        raise UserError(f"{folder} has no finished VAE: phase vae of flux_jax.nano.train comes first.")
    config, about = nano(), reading.read_object(folder / "vae.json", remedy=AGAIN)
    with library(f"{folder} does not hold what phase vae writes", AGAIN):
        scale = {"scaling_factor": round(1 / about["latent_std"], 4), "shift_factor": round(about["latent_mean"], 4)}
        config = dataclasses.replace(config, vae=dataclasses.replace(config.vae, **scale))
        arrays = unpacked(folder / "vae.npz")
        module = assemble(abstract_component("vae", config), lambda names: {name: arrays[name] for name in names})
    assert isinstance(module, VAE)
    return config, module


def trained(run: Path, phase: str, config: FluxConfig) -> Any:
    """A finished phase's averaged networks: `text.Readers` or `flow.Networks`. UserError before the phase has saved."""
    from flux_jax.nano import flow, text, training

    if phase == "text":
        networks = text.Readers(config, text.noun_ids(tokenizers(run, config)), nnx.Rngs(0))
    else:
        networks = flow.Networks(config, nnx.Rngs(0))
    if (found := training.averaged(run / phase, networks)) is None:
        raise UserError(f"{run / phase} holds no training: phase {phase} of flux_jax.nano.train comes first.")
    return found


def tokenizers(run: Path, config: FluxConfig) -> Tokenizers:
    """Nano's tokenizers, built in `RUN/tokenizers` from the grammar's words."""
    folder = run / "tokenizers"
    with atomic.WholeFolder(folder, overwrite=True) as whole:
        vocabulary.build(whole.working, VOCABULARY, config)
        whole.publish()
    return Tokenizers.load(folder, config)


def digests(components: Mapping[str, nnx.Module]) -> dict[str, str]:
    """SHA-256 of each component's weights, in order of their names: two trainings never look the same."""
    found = {}
    for component, module in components.items():
        digest = hashlib.sha256()
        for name, value in sorted(leaves(module), key=lambda item: item[0]):
            digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
        found[component] = digest.hexdigest()
    return found


def export(run: Path, out: Path, evaluation: Path | None = None, overwrite: bool = False) -> None:
    """Write the checkpoint; see the module's docstring. evaluation: a folder of `flux_jax.evaluate`, for the card."""
    config, vae = load_vae(run / "vae")
    tokenizers(run, config)
    phase = "guidance" if (run / "guidance").exists() else "flow"
    networks, encoders = trained(run, phase, config), trained(run, "text", config).encoders
    files = {
        f"training/{name}/{file}": reading.read_bytes(run / name / file, most=reading.LARGE)
        for name in ("vae", "text", "flow", "guidance")
        for file in ("metrics.jsonl", "curve.png", "vae.json", "understood.json", "recipe.json")
        if (run / name / file).exists()
    }
    components = {"transformer": networks.transformer, "t5": encoders.t5, "clip": encoders.clip, "vae": vae}
    components = {name: jax.tree.map(lambda x: x.astype(jnp.bfloat16), module) for name, module in components.items()}
    writer.save(
        out,
        config,
        components,
        tokenizers=run / "tokenizers",
        overwrite=overwrite,
        source={"from": f"flux_jax.nano.train, phase {phase}", "sha256": digests(components)},
        licence=LICENCE,
        files=files | card_files(card(run, evaluation), evaluation),
    )


def export_student(student: Path, out: Path, evaluation: Path | None = None, overwrite: bool = False) -> None:
    """A copy of the student's checkpoint with its card, whole or not at all; `out` may be the student itself. UserError
    where `student` was not distilled, or `out` is in the way."""
    stored = checkpoint.Checkpoint.open(student)
    quantization = stored.manifest["quantization"]
    if not (quantization and quantization.get("distilled")):
        raise UserError(f"{student} is no student of flux_jax.distill.")
    with atomic.WholeFolder(out, overwrite=overwrite, ours=writer.no_checkpoint) as folder:
        shutil.copytree(stored.directory, folder.working, dirs_exist_ok=True)
        for name, content in card_files(student_card(quantization, evaluation), evaluation).items():
            (folder.working / name).parent.mkdir(parents=True, exist_ok=True)
            (folder.working / name).write_bytes(content)
        checksums.write(folder.working)
        folder.publish()


def card_files(text: str, evaluation: Path | None) -> dict[str, bytes]:
    """Card, score and sheet, by their names in the checkpoint."""
    files = {"README.md": text.encode()}
    if evaluation is not None:
        for name, file in {"sheet.png": "sheet.png", "training/summary.json": "summary.json"}.items():
            files[name] = reading.read_bytes(evaluation / file, most=reading.LARGE, remedy=EVALUATE)
    return files
