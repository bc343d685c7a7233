"""Where the parts of a model come from: an all-in-one file, a transformer from elsewhere, a folder without an index;
what goes with them, and what does not."""

import dataclasses
import json
import os
import shutil

import numpy as np
import published
import pytest
import tiny_model
from safetensors.numpy import load_file, save_file

from convert import sources
from convert.__main__ import main
from convert.engine import map_weights
from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.config import dev, nano
from flux_jax.errors import UserError
from flux_jax.models.params import COMPONENTS

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
FILES = {
    "transformer": TRANSFORMER,
    "t5": "text_encoder_2/model.safetensors",
    "clip": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
CONFIG = tiny_model.published_config()


@pytest.fixture
def folder(tiny_published_folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(tiny_published_folder, tmp_path / "source")


def tensors_of(source):
    return {name: source.read(name) for name in source.entries}


def same(source, file):
    wanted, found = load_file(file), tensors_of(source)
    return wanted.keys() == found.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def all_in_one(folder, path, layout, without=()):
    """As ComfyUI writes it, with BFL's names of the transformer, and either names of the autoencoder."""
    parts = {component: load_file(folder / file) for component, file in FILES.items() if component not in without}
    prefixes = {"transformer": "model.diffusion_model.", "vae": "vae."}
    prefixes |= {"t5": "text_encoders.t5xxl.transformer.", "clip": "text_encoders.clip_l.transformer."}
    if layout == "BFL":
        parts["vae"] = published.bfl_vae(parts["vae"], CONFIG.vae)
        prefixes["vae"] = "first_stage_model."
    parts["transformer"] = published.bfl_transformer(parts["transformer"], CONFIG.transformer)
    whole = {prefixes[component] + name: value for component, each in parts.items() for name, value in each.items()}
    save_file(whole | {"text_encoders.clip_l.logit_scale": np.zeros((), np.float32)}, path)
    return path


@pytest.mark.parametrize("layout", ["diffusers", "BFL"])
def test_an_all_in_one_file(folder, tmp_path, layout):
    file = all_in_one(folder, tmp_path / "everything.safetensors", layout)
    config = published.config_file(tmp_path / "config.json", CONFIG)
    model = sources.find(file, tokenizers=folder, config=config)
    plain = sources.find(folder)
    for component in COMPONENTS:
        assert map_weights(component, model.config, model.sources[component]).faults == []
    assert same(model.sources["clip"], folder / FILES["clip"]) and same(model.sources["t5"], folder / FILES["t5"])
    assert set(model.sources["vae"].entries) != set(plain.sources["vae"].entries) or layout == "diffusers"
    one = sources.find(folder, options={"vae": file, "t5": file}, config=config)  # and where an option names it
    assert tensors_of(one.sources["vae"]).keys() == tensors_of(model.sources["vae"]).keys()


def test_an_all_in_one_file_without_a_part(folder, tmp_path, snapshot_message):
    file = all_in_one(folder, tmp_path / "most.safetensors", "BFL", without=("t5",))
    config = published.config_file(tmp_path / "config.json", CONFIG)
    with snapshot_message.raises(UserError, "--t5 PATH"):
        sources.find(file, config=config)
    with snapshot_message.raises(UserError, "T5"):
        sources.find(folder, options={"t5": file})
    model = sources.find(file, options={"t5": folder / "text_encoder_2"}, config=config)
    assert list(model.sources) == list(COMPONENTS)


@pytest.mark.parametrize("alone", ["folder", "file", "file of another name"])
def test_a_transformer_alone(folder, tmp_path, alone):
    """A fine-tune: as SOURCE with the rest by options, and by an option with the rest from its base."""
    mine = shutil.copytree(folder / "transformer", tmp_path / "mine")
    if alone != "folder":
        mine /= "diffusion_pytorch_model.safetensors"
    if alone == "file of another name":
        mine = mine.rename(mine.with_name("mine.safetensors"))
    shutil.copy(folder / TRANSFORMER, tmp_path / "base.safetensors")
    changed = load_file(mine if mine.is_file() else mine / "diffusion_pytorch_model.safetensors")
    changed["x_embedder.bias"] += 1
    save_file(changed, mine if mine.is_file() else mine / "diffusion_pytorch_model.safetensors")
    rest = {"t5": "text_encoder_2", "clip": "text_encoder", "vae": "vae"}
    by_options = sources.find(mine, options={name: folder / each for name, each in rest.items()}, tokenizers=folder)
    by_base = sources.find(folder, options={"transformer": mine})
    base = sources.find(folder)
    for model in (by_options, by_base):
        assert model.config.transformer == base.config.transformer
        assert np.array_equal(model.sources["transformer"].read("x_embedder.bias"), changed["x_embedder.bias"])
        assert same(model.sources["vae"], folder / FILES["vae"])
    assert by_base.config.sampling == base.config.sampling and by_base.tokenizers == base.tokenizers


def test_the_schedule_goes_with_the_transformer(folder, tmp_path, snapshot_message):
    """nano's transformer over a base of another kind of schedule: nano's own is taken, and said."""
    shallow = published.diffusers_transformer(nano().transformer)
    mine = published.write(tmp_path / "nano.safetensors", shallow)
    index = folder / "model_index.json"
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    edit(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False, shift=1.0)
    model = sources.find(folder, options={"transformer": mine}, components=["transformer"])
    assert model.config == dataclasses.replace(nano(), name="FLUX-nano")
    snapshot_message(model.notes[0], mine, "schedule")
    edit(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True, shift=3.0, base_shift=0.25)
    model = sources.find(folder, options={"transformer": mine}, components=["transformer"])
    assert model.config.sampling.base_shift == 0.25 and model.notes == []


def test_files_side_by_side(folder, tmp_path, snapshot_message):
    """Downloaded one by one into one folder, under any names."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for component, file in FILES.items():
        shutil.copy(folder / file, flat / f"my-{component}.safetensors")
    config = published.config_file(tmp_path / "config.json", CONFIG)
    model = sources.find(flat, config=config)
    assert all(same(model.sources[component], folder / file) for component, file in FILES.items())
    whole = (flat / "my-t5.safetensors").read_bytes()
    (flat / "my-t5.safetensors").write_bytes(whole[:-5])
    with snapshot_message.raises(UserError, "my-t5.safetensors is truncated", "--t5"):
        sources.find(flat, config=config)


def test_parts_of_different_models(folder, tmp_path, snapshot_message):
    edit(folder / "transformer" / "config.json", joint_attention_dim=48)
    with snapshot_message.raises(UserError, "text_dim"):
        sources.find(folder)


def test_the_config_of_another_component_does_not_count(folder):
    """An autoencoder's file in the folder of the transformer."""
    shutil.copy(folder / FILES["vae"], folder / "transformer" / "ae.safetensors")
    given = sources.find(folder, options={"vae": folder / "transformer" / "ae.safetensors"}, components=["vae"])
    assert given.config.vae == dev().vae


def test_licences_that_are_links(folder, tmp_path, snapshot_message):
    """A stranger's folder may name a file of the user's: it is not copied."""
    (tmp_path / "secret").write_text("of the user")
    (folder / "LICENSE.md").symlink_to(tmp_path / "secret")
    (folder / "LICENSE").write_text("a licence")
    (folder / "LICENSE.txt").symlink_to("LICENSE")
    model = sources.find(folder)
    assert model.licence_files == {"LICENSE": b"a licence", "LICENSE.txt": b"a licence"}
    snapshot_message(model.notes[0], folder / "LICENSE.md")
    blobs = tmp_path / "hub" / "blobs"  # as the hub's cache keeps it
    blobs.mkdir(parents=True)
    (blobs / "0123").write_text("a licence")
    snapshot = shutil.move(folder, tmp_path / "hub" / "snapshots" / "abc")
    (snapshot / "LICENSE.md").unlink()
    (snapshot / "LICENSE.md").symlink_to("../../blobs/0123")
    assert sources.find(snapshot).licence_files["LICENSE.md"] == b"a licence"


def test_names_of_files_that_no_text_can_hold(folder, tmp_path, capsys):
    """The record says them as well as it can, and the checkpoint opens."""
    source = tmp_path / os.fsdecode(b"caf\xe9\x1b")
    shutil.move(folder / "vae", source)
    file = (source / "diffusion_pytorch_model.safetensors").rename(source / os.fsdecode(b"\xff.safetensors"))
    assert main([str(file), str(tmp_path / "out"), "--parts", "vae", "-q"]) == 0
    assert "sha256" in Checkpoint.open(tmp_path / "out").manifest["source"]
    capsys.readouterr()
