"""A checkpoint that a stranger made, or that was damaged on the way: the same weights, or one sentence. Nothing outside
its folder is opened, and nothing is waited for."""

import json
import logging
import os
import shutil
import sys
import types
import zlib

import numpy as np
import pytest
import tiny_model
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from flux_jax.checkpoints import checksums, integrity, silence
from flux_jax.checkpoints.checkpoint import Checkpoint, is_checkpoint, resolve
from flux_jax.checkpoints.checksums import CRCS, SUMS
from flux_jax.checkpoints.manifest import MANIFEST
from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.errors import LONGEST, UserError
from flux_jax.models.params import leaves

CONFIG = tiny_model.config()
WEIGHT = "layers.0.fc1.weight"


@pytest.fixture
def saved(tiny_checkpoint, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny")


@pytest.fixture
def changed(saved):
    """A function that rewrites the manifest by hand: without sums, as whoever does that is told."""

    def change(edit):
        manifest = json.loads((saved / MANIFEST).read_text())
        edit(manifest)
        (saved / MANIFEST).write_text(json.dumps(manifest))
        (saved / SUMS).unlink(missing_ok=True)
        return saved

    return change


def rewritten(folder, value):
    """The files of CLIP with another value in one weight, as its bytes would be after damage that no reader notices."""
    tree = flatten_dict(ocp.load(folder.absolute() / "clip"), sep=".")
    tree[WEIGHT].flat[3] = value
    shutil.rmtree(folder / "clip")
    ocp.save(folder.absolute() / "clip", unflatten_dict(tree, sep="."))


def read_all(folder):
    opened = Checkpoint.open(folder)
    Tokenizers.load(opened.tokenizers, opened.config)
    return opened.load("clip")


DEEP = "[" * 5000 + "]" * 5000
BLOCKS = ("configs", "transformer", "num_double_blocks")


def put(*path, value):
    def edit(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (put("version", value=True), "version"),
        (put("version", value="1" * 5000), "version"),
        (put("name", value=["x"]), "name"),
        (put("licence", value=3), "licence"),
        (put("source", value="x"), "source"),
        (put("quantization", value={"layout": True}), "layout"),
        (put("parts", "clip", "weights", WEIGHT, value=["float32", [3, -1]]), WEIGHT),
        (put("parts", "clip", "weights", WEIGHT, value=["float32", [2**30, 2**30]]), WEIGHT),
        (put("parts", "clip", "weights", WEIGHT, value=["float32", [1.0]]), WEIGHT),
        (put("parts", "clip", "weights", WEIGHT, value=["float32", [True]]), WEIGHT),
        (put("parts", "clip", "weights", WEIGHT, value=["float32", [1] * 100]), WEIGHT),
        (put("parts", "clip", "weights", WEIGHT, value=["O", [1]]), WEIGHT),
        (put("parts", "clip", "weights", WEIGHT, value=[["float32"], [1]]), WEIGHT),
        (put("parts", "clip", "weights", WEIGHT, value="x" * 5000), WEIGHT),
        (put("parts", "clip", "path", value="\0"), "path"),
        (put("parts", "clip", "path", value="a" * 5000), "name too long"),
        (put("tokenizers", value="\ud800"), "JSON"),
        (put("tokenizers", value="loop"), "loop"),
        (put("x" * 5000, value=json.loads(DEEP[4900:5100])), "levels"),
        (put("configs", "t5", "num_layers", value=1000), "t5"),
        (put(*BLOCKS, value=1000), "transformer"),
        (put("configs", "vae", "layers_per_block", value=60), "vae"),
    ],
)
def test_a_manifest_is_checked_before_anything_is_built_from_it(changed, monkeypatch, edit, named):
    for name in ("abstract_component", "abstract_ternary"):
        monkeypatch.setattr(f"flux_jax.checkpoints.checkpoint.{name}", lambda *_, **__: pytest.fail("built"))
    saved = changed(edit)
    (saved / "loop").symlink_to("loop")
    with pytest.raises(UserError) as caught:
        read_all(saved)
    assert named in str(caught.value)
    assert str(caught.value).count("\n") == 0 and len(str(caught.value)) <= LONGEST


FILES = [
    MANIFEST,
    SUMS,
    CRCS,
    "tokenizers/t5/tokenizer.json",
    "tokenizers/clip/tokenizer_config.json",
    "clip/state/manifest.ocdbt",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["link", "chain", "pipe", "device", "folder"])
def test_nothing_outside_is_opened_and_nothing_waited_for(saved, tmp_path, name, kind):
    """Whatever stands where a file should: elsewhere the same file lies, which would be read without a word."""
    file, elsewhere = saved / name, tmp_path / "elsewhere"
    file.rename(elsewhere)
    match kind:
        case "link":
            file.symlink_to(elsewhere)
        case "chain":
            (saved / "inner").symlink_to(os.path.relpath(elsewhere, saved))
            file.symlink_to(saved / "inner")
        case "pipe":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case "folder":
            file.mkdir()
    with pytest.raises(UserError, match=file.name if kind != "folder" else "tiny"):
        read_all(saved)
    with pytest.raises(UserError, match=file.name):
        checksums.check(saved)


def test_a_folder_by_a_link_is_looked_into(saved, tmp_path):
    """Inside it is the checkpoint's, and read; what leads out of it is refused, however deep it lies."""
    (saved / "clip" / "state").rename(saved / "moved")
    (saved / "clip" / "state").symlink_to("../moved")
    read_all(saved)
    shutil.move(saved / "moved" / "_METADATA", tmp_path / "elsewhere")
    (saved / "moved" / "_METADATA").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out"):
        read_all(saved)


def test_a_hub_cache_is_a_checkpoint(saved, tmp_path):
    """There every file is a link into the repository's blobs."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(saved.rglob("*"))):
        link = snapshot / file.relative_to(saved)
        if file.is_file():
            shutil.copyfile(file, blobs / str(number))
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    read_all(snapshot)
    assert checksums.check(snapshot) > 10
    (blobs.parent / "secret").write_bytes((saved / CRCS).read_bytes())
    (snapshot / CRCS).unlink()
    (snapshot / CRCS).symlink_to("../../secret")
    with pytest.raises(UserError, match=CRCS):
        read_all(snapshot)


def test_another_value_in_the_files_is_found_without_sums(saved, snapshot_message):
    """A flipped bit in a chunk decompresses to other weights, and no reader of the format says a word."""
    rewritten(saved, 7.0)
    (saved / SUMS).unlink()
    opened = Checkpoint.open(saved)
    with snapshot_message.raises(UserError, WEIGHT, "copy"):
        opened.load("clip")
    with pytest.raises(UserError, match=WEIGHT):
        opened.read("clip", [WEIGHT])
    with pytest.raises(UserError, match=WEIGHT):
        list(opened.stream("clip", opened.table("clip")))
    assert opened.read("clip", ["final_norm.bias"])  # of no other weight is that said
    (saved / CRCS).unlink()
    assert dict(leaves(Checkpoint.open(saved).load("clip")))[WEIGHT].flat[3] == 7.0  # as it was before there were any


def test_numbers_are_those_of_the_bytes(tiny_checkpoint):
    listed = json.loads((tiny_checkpoint / CRCS).read_text())
    opened = Checkpoint.open(tiny_checkpoint)
    assert {component: set(rows) for component, rows in listed.items()} == {
        component: set(opened.table(component)) for component in opened.components
    }
    value = opened.read("clip", [WEIGHT])[WEIGHT]
    assert listed["clip"][WEIGHT] == f"{zlib.crc32(value.tobytes()):08x}" == checksums.crc(value)
    assert checksums.crc(value.T) == checksums.crc(np.array(value.T)) != checksums.crc(value)


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("content", [None, "{}", '{"clip": {}}', '{"clip": []}', "zero", "[]"])
def test_damaged_numbers(saved, content, sums, snapshot_message):
    if content is None:
        (saved / CRCS).unlink()
    else:
        listed = json.loads((saved / CRCS).read_text())
        listed["clip"] |= {WEIGHT: 0}
        (saved / CRCS).write_text(json.dumps(listed) if content == "zero" else content)
    if not sums:
        (saved / SUMS).unlink()
    if content is None and not sums:
        read_all(saved)
        return
    with snapshot_message.raises(UserError, CRCS):
        read_all(saved)


def test_small_files_are_compared_with_their_sums(saved, snapshot_message):
    for file in (saved / MANIFEST, saved / "tokenizers" / "clip" / "tokenizer_config.json"):
        content = file.read_text()
        file.write_text(content + " ")
        with snapshot_message.raises(UserError, file, SUMS):
            read_all(saved)
        file.write_text(content)
    lines = (saved / SUMS).read_text().splitlines(keepends=True)
    (saved / SUMS).write_text("".join(line for line in lines if MANIFEST not in line))
    with snapshot_message.raises(UserError, MANIFEST, SUMS):
        read_all(saved)
    (saved / SUMS).unlink()
    read_all(saved)


@pytest.mark.parametrize("name", [MANIFEST, CRCS, "tokenizers/t5/tokenizer.json", "clip/state/_METADATA"])
def test_a_file_that_is_not_listed_is_not_verified(saved, name, snapshot_message):
    lines = (saved / SUMS).read_text().splitlines(keepends=True)
    (saved / SUMS).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))
    with snapshot_message.raises(UserError, name, SUMS):
        checksums.check(saved)


def test_what_nobody_reads_need_not_be_listed(saved):
    count = checksums.check(saved)
    (saved / "README.md").write_text("mine")
    (saved / SUMS).write_text((saved / SUMS).read_text().replace("  ", " *").replace("\n", "\r\n"))  # of another system
    assert checksums.check(saved) == count
    (saved / "clip" / "more").write_text("not mine")
    with pytest.raises(UserError, match="clip/more is not listed"):
        checksums.check(saved)


@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "state/_METADATA"])
@pytest.mark.parametrize("length", [0, 40])
def test_lost_metadata_is_one_sentence(saved, name, length, capfd):
    os.truncate(saved / "clip" / name, length)
    with pytest.raises(UserError, match="clip") as caught:
        Checkpoint.open(saved).load("clip")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_what_a_failed_read_leaves_behind_says_nothing_and_others_do(caplog, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    silence._mute_left_behind.cache_clear()
    with silence.silenced():
        logging.getLogger("absl").error("tried again")
    for text in ('DATA_LOSS: Error opening "zarr3" driver', "mine"):
        failed = ValueError(text)
        logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=failed)
    assert [record.exc_info[1] for record in caplog.records] == [failed]
    late, other = (types.SimpleNamespace(object=None, exc_value=RuntimeError(e)) for e in ("Event loop is closed", "x"))
    sys.unraisablehook(late)
    sys.unraisablehook(other)
    assert heard == [other]


@pytest.mark.parametrize("read", [lambda c: c.read("clip", [WEIGHT]), lambda c: list(c.stream("clip", [WEIGHT]))])
def test_reading_without_a_module_looks_at_the_files_too(changed, read):
    """Orbax would cast float32 to float16 without a word, in a conversion as in a picture."""
    opened = Checkpoint.open(changed(put("parts", "clip", "weights", WEIGHT, 0, value="float16")))
    with pytest.raises(UserError, match="float16"):
        read(opened)


def test_a_component_larger_than_the_memory_is_not_read(tiny_checkpoint, monkeypatch):
    from flux_jax.sampling.pipeline import FluxPipeline

    monkeypatch.setattr(ocp, "load", lambda *_: pytest.fail("arrays were read"))
    with monkeypatch.context() as patch:
        patch.setattr(integrity.memory, "free", lambda device: 10**4)
        with pytest.raises(UserError, match="loading the transformer .*needed, 0.0 GB free") as caught:
            FluxPipeline.from_pretrained(tiny_checkpoint)
    assert caught.value.exit_code == 4
    monkeypatch.setattr(integrity.memory, "host_memory", lambda field: 10**3)
    with pytest.raises(MemoryError):
        Checkpoint.open(tiny_checkpoint).read("t5", ["token_embedding.weight"])


@pytest.mark.parametrize("name", ["a\0b", "n" * 5000, "\ud800", "", "tests/../README.md/x", __file__])
def test_names_that_are_no_folders(name):
    assert not is_checkpoint(name)
    with pytest.raises(UserError, match="no checkpoint") as caught:
        resolve(name)
    assert caught.value.exit_code == 3
    assert len(str(caught.value)) <= LONGEST
