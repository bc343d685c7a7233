"""Which files of a folder are the weights: by name, then by content; what is there instead is said in words."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.files import candidates, in_folder, search, weights
from flux_jax.errors import UserError

NAMES = {  # of tensors that tell what a file holds
    "transformer": "transformer_blocks.0.attn.to_q.weight",
    "t5": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "clip": "text_model.encoder.layers.0.self_attn.q_proj.weight",
    "vae": "decoder.mid_block.attentions.0.to_q.weight",
    "lora": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
}
STEM = "diffusion_pytorch_model"


def put(path, kind="transformer", value=0.0, extra=0):
    """A file with one tensor of the kind, all of one value, and some more."""
    more = {f"transformer_blocks.{i + 1}.attn.to_q.weight": np.zeros(2, np.float32) for i in range(extra)}
    save_file({NAMES[kind]: np.full(2, value, np.float32)} | more, path)
    return path


def value(source, kind="transformer"):
    assert source.faults == []
    return float(source.read(NAMES[kind])[0])


def test_the_standard_name_comes_first(tmp_path):
    put(tmp_path / f"{STEM}.safetensors", value=1)
    put(tmp_path / f"{STEM}.fp16.safetensors", value=2)
    put(tmp_path / "another.safetensors", value=3)
    put(tmp_path / "pytorch_lora_weights.safetensors", "lora")
    (tmp_path / "junk.safetensors").write_bytes(b"<html>")
    (tmp_path / f"._{STEM}.safetensors").write_bytes(b"what a Mac leaves")
    source = in_folder(tmp_path, "transformer")
    assert value(source) == 1 and source.notes == []


@pytest.mark.parametrize("index", ["{0}.safetensors.index.fp16.json", "{0}.fp16.safetensors.index.json", None])
@pytest.mark.parametrize("shard", ["{0}-0000{1}-of-00002.fp16.safetensors", "{0}.fp16-0000{1}-of-00002.safetensors"])
def test_a_variant_in_shards(tmp_path, index, shard, snapshot_message):
    """As diffusers and transformers write them, now and formerly; without an index, too, where all shards are there."""
    where = {}
    for i in (1, 2):
        kind = ("transformer", "vae")[i - 1]
        put(tmp_path / shard.format(STEM, i), kind, value=i)
        where[NAMES[kind]] = shard.format(STEM, i)
    if index:
        (tmp_path / index.format(STEM)).write_text(json.dumps({"weight_map": where}))
    source = in_folder(tmp_path, "transformer")
    assert value(source) == 1 and len(source.files) == 2
    snapshot_message(source.notes[0], "fp16")


def test_of_several_variants_the_one_that_holds_most(tmp_path):
    for i, variant in enumerate(("fp8", "fp16", "bf16", "ema")):
        put(tmp_path / f"{STEM}.{variant}.safetensors", value=i)
    assert value(in_folder(tmp_path, "transformer")) == 2


@pytest.mark.parametrize("lost", [(2,), (3,), (1, 2)])
def test_shards_without_an_index_of_which_some_are_missing(tmp_path, lost, snapshot_message):
    for i in {1, 2, 3} - set(lost):
        put(tmp_path / f"{STEM}-0000{i}-of-00003.safetensors", extra=i)
    (fault,) = in_folder(tmp_path, "transformer").faults
    snapshot_message(fault, f"shard {lost[0]} of 3", "index")


def test_an_index_that_is_left_over(tmp_path):
    """Its shards are gone, the one file is there."""
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": f"{STEM}-1-of-1"}}))
    put(tmp_path / f"{STEM}.safetensors", value=1)
    assert value(in_folder(tmp_path, "transformer")) == 1
    (tmp_path / f"{STEM}.safetensors").unlink()
    assert "missing shard" in in_folder(tmp_path, "transformer").faults[0]


def test_any_name_by_its_content(tmp_path, snapshot_message):
    for kind in NAMES:
        put(tmp_path / f"{kind}-of-mine.safetensors", kind, value=1)
    for kind in ("transformer", "t5", "clip", "vae"):
        assert value(in_folder(tmp_path, kind), kind) == 1
        assert search(tmp_path, kind).where.endswith(f"{kind}-of-mine.safetensors")
    put(tmp_path / "second.safetensors", "vae")
    with snapshot_message.raises(UserError, "second", "vae-of-mine"):
        in_folder(tmp_path, "vae")


def test_a_standard_name_of_something_else(tmp_path):
    put(tmp_path / f"{STEM}.safetensors", "lora")
    put(tmp_path / "merged.safetensors", value=1)
    assert value(in_folder(tmp_path, "transformer")) == 1


def test_folders_without_the_component(tmp_path, snapshot_message):
    with snapshot_message.raises(UserError, tmp_path):
        in_folder(tmp_path, "transformer")
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04")
    with snapshot_message.raises(UserError, "model.ckpt"):
        in_folder(tmp_path, "transformer")
    put(tmp_path / f"{STEM}.safetensors", "lora")
    with snapshot_message.raises(UserError, "LoRA"):
        in_folder(tmp_path, "transformer")
    put(tmp_path / "ae.safetensors", "vae")
    with snapshot_message.raises(UserError, "LoRA", "nor does ae"):
        in_folder(tmp_path, "transformer")
    assert search(tmp_path, "t5") is None


def test_a_folder_with_the_name_of_a_file(tmp_path):
    (tmp_path / f"{STEM}.safetensors").mkdir()
    assert candidates(tmp_path) == []
    put(tmp_path / f"{STEM}.safetensors" / "ae.safetensors", "vae", value=1)
    assert value(weights(tmp_path / f"{STEM}.safetensors", "vae"), "vae") == 1


def test_paths_at_which_there_is_nothing_to_read(tmp_path, snapshot_message):
    (tmp_path / "gone").symlink_to("blobs/0123")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name, code in (("nothing", 3), ("gone", 3), ("itself", 2), ("device", 2), ("x" * 300, 2)):
        with pytest.raises(UserError) as caught:
            weights(tmp_path / name, "vae")
        assert caught.value.exit_code == code and name[:20] in str(caught.value)
        if len(name) < 300:  # else its middle is left out
            snapshot_message(str(caught.value))


def test_a_damaged_file_is_not_passed_over_for_a_variant(tmp_path):
    put(tmp_path / f"{STEM}.fp16.safetensors")
    whole = put(tmp_path / f"{STEM}.safetensors")
    whole.write_bytes(whole.read_bytes()[:-1])
    assert "is truncated" in in_folder(tmp_path, "transformer").faults[0]
    shutil.copyfile(tmp_path / f"{STEM}.fp16.safetensors", whole)
    whole.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git-lfs"):
        in_folder(tmp_path, "transformer")
