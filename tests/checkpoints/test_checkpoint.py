"""Checkpoints: what is saved comes back, on any devices; what does not fit is one sentence, before an array is read."""

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from flux_jax.checkpoints import checkpoint, orbax_writer
from flux_jax.checkpoints.checkpoint import MANIFEST, Checkpoint, resolve
from flux_jax.checkpoints.checksums import SUMS
from flux_jax.checkpoints.writer import CheckpointWriter, save
from flux_jax.errors import UserError
from flux_jax.models.params import COMPONENTS, leaves

CONFIG = tiny_model.config()
ORBAX = r"(?<=again: )[\s\S]+"  # its own words, behind ours
# When one of its reads or writes fails, Orbax closes the event loop under the others, and each of them says so.
closing_loop = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def modules():
    return tiny_model.modules(CONFIG)


@pytest.fixture(scope="module")
def pristine(modules, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    words = tiny_model.tokenizers(folder / "words", CONFIG)
    return save(folder / "tiny", CONFIG, modules, tokenizers=words, licence="Apache-2.0", source={"from": "a test"})


@pytest.fixture
def saved(pristine, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(pristine, tmp_path / "tiny")


def edit(folder, change):
    """Rewrites the manifest after `change(manifest)`; whoever does that deletes the sums."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / SUMS).unlink(missing_ok=True)


def same(a, b):
    a, b = dict(leaves(a)), dict(leaves(b))
    return a.keys() == b.keys() and all(x.dtype == b[n].dtype and np.array_equal(x, b[n]) for n, x in a.items())


def test_round_trip(pristine, modules):
    opened = Checkpoint.open(pristine)
    assert opened.config == CONFIG
    assert opened.components == tuple(COMPONENTS)
    assert (opened.manifest["licence"], opened.manifest["source"]) == ("Apache-2.0", {"from": "a test"})
    assert (opened.tokenizers / "t5" / "tokenizer.json").is_file()
    assert all(same(opened.load(part), modules[part]) for part in COMPONENTS)
    assert not list(pristine.parent.glob(".*"))


def test_nothing_names_a_folder_of_this_machine(pristine):
    here = str(pristine.parent).encode()
    assert [p for p in pristine.rglob("*") if p.is_file() and here in p.read_bytes()] == []


def test_a_dtype_is_converted_only_when_asked_for(pristine, modules):
    loaded = dict(leaves(Checkpoint.open(pristine).load("clip", dtype=jnp.bfloat16)))
    for name, value in leaves(modules["clip"]):
        assert loaded[name].dtype == jnp.bfloat16
        assert np.array_equal(loaded[name], value.astype(jnp.bfloat16))


def test_anyone_reads_a_part_with_orbax_alone(pristine, modules):
    tree = flatten_dict(ocp.load(pristine.absolute() / "transformer"), sep=".")
    assert all(np.array_equal(tree[name], value) for name, value in leaves(modules["transformer"]))
    assert "single_blocks.1.linear1.weight" in tree


def test_only_the_part_asked_for_is_read(saved, modules):
    for part in ("transformer", "t5", "vae"):
        shutil.rmtree(saved / part)
    assert same(Checkpoint.open(saved).load("clip"), modules["clip"])


def test_single_weights_and_streams(pristine, modules, monkeypatch):
    monkeypatch.setattr(checkpoint, "READ_BYTES", 5000)
    opened, wanted = Checkpoint.open(pristine), dict(leaves(modules["t5"]))
    name = "layers.0.wo.weight"
    assert opened.read("t5", [name]).keys() == {name}
    streamed = list(opened.stream("t5", reversed(wanted)))
    assert [n for n, _ in streamed] == list(reversed(wanted))
    assert all(np.array_equal(value, wanted[n]) for n, value in streamed)


def test_a_part_larger_than_the_buffer_is_the_same_checkpoint(pristine, modules, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_writer, "FLUSH_BYTES", 100_000)
    save(tmp_path / "pieces", CONFIG, {"transformer": modules["transformer"]})
    pieces, whole = Checkpoint.open(tmp_path / "pieces"), Checkpoint.open(pristine)
    assert pieces.table("transformer") == whole.table("transformer")
    assert same(pieces.load("transformer"), modules["transformer"])


def test_read_only_directory(saved, modules):
    for path in [saved, *saved.rglob("*")]:
        path.chmod(stat.S_IRUSR | (stat.S_IXUSR if path.is_dir() else 0))
    try:
        assert same(Checkpoint.open(saved).load("vae"), modules["vae"])
    finally:
        for path in [saved, *saved.rglob("*")]:
            path.chmod(stat.S_IRWXU)


EIGHT = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from flux_jax.checkpoints import checkpoint, writer
from flux_jax.models.params import leaves
assert jax.device_count() == 8
opened = checkpoint.Checkpoint.open(sys.argv[1])
mesh = jax.make_mesh((8,), ("model",))
def place(path, shape):
    axis = next((i for i, n in enumerate(shape) if n % 8 == 0), None)
    return NamedSharding(mesh, P(*(None,) * axis, "model") if axis is not None else P())
split = opened.load("transformer", sharding=place)
weight = split.single_blocks.linear1.weight[...]
assert len(weight.sharding.device_set) == 8 and weight.addressable_shards[0].data.size * 8 == weight.size
copied = opened.load("transformer", sharding=mesh)
assert copied.img_in.weight[...].sharding.is_fully_replicated
assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(leaves(split), leaves(copied), strict=True))
writer.save(sys.argv[2], opened.config, {"transformer": split})
"""


@pytest.mark.slow
def test_one_device_to_eight_and_back(pristine, modules, tmp_path):
    script = tmp_path / "eight.py"
    script.write_text(EIGHT)
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    subprocess.run([sys.executable, script, pristine, tmp_path / "back"], env=env, check=True)
    assert jax.device_count() == 1
    assert same(Checkpoint.open(tmp_path / "back").load("transformer"), modules["transformer"])


def test_another_dtype_in_the_files_is_an_error_before_reading(saved, monkeypatch, snapshot_message):
    """Orbax itself would cast float32 to bfloat16 without a word."""
    monkeypatch.setattr(ocp, "load", lambda *_: pytest.fail("arrays were read"))
    edit(saved, lambda m: m["parts"]["clip"]["weights"]["final_norm.weight"].__setitem__(0, "bfloat16"))
    with snapshot_message.raises(UserError, "final_norm.weight", "float32", "bfloat16"):
        Checkpoint.open(saved).load("clip")


def test_integers_where_floats_belong(saved, snapshot_message):
    edit(saved, lambda m: m["parts"]["clip"]["weights"]["final_norm.weight"].__setitem__(0, "int8"))
    with snapshot_message.raises(UserError, "final_norm.weight", "int8"):
        Checkpoint.open(saved).load("clip")


def test_all_faults_of_a_table_in_one_message(saved, snapshot_message):
    def change(manifest):
        weights = manifest["parts"]["t5"]["weights"]
        weights["layers.0.q.weight"][1] = [3, 3]
        weights["stranger.weight"] = weights.pop("final_norm.weight")

    edit(saved, change)
    with snapshot_message.raises(UserError, "final_norm.weight", "stranger.weight", "layers.0.q.weight", "[3, 3]"):
        Checkpoint.open(saved).load("t5")


def test_files_that_lack_a_weight(saved, snapshot_message):
    tree = flatten_dict(ocp.load(saved.absolute() / "clip"), sep=".")
    del tree["final_norm.bias"]
    shutil.rmtree(saved / "clip")
    ocp.save(saved.absolute() / "clip", unflatten_dict(tree, sep="."))
    with snapshot_message.raises(UserError, "final_norm.bias"):
        Checkpoint.open(saved).load("clip")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_versions(saved, version, snapshot_message):
    edit(saved, lambda m: m.update(version=version))
    with snapshot_message.raises(UserError, version):
        Checkpoint.open(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 1}', "\0"])
def test_damaged_manifest(saved, content, snapshot_message):
    (saved / MANIFEST).write_text(content)
    with snapshot_message.raises(UserError, MANIFEST):
        Checkpoint.open(saved)


@pytest.mark.parametrize("parts", [[], {"clip": []}, {"clip": {"path": 3, "weights": {}}}, {"clip": {"path": "clip"}}])
def test_damaged_table_of_parts(saved, parts, snapshot_message):
    edit(saved, lambda m: m.update(parts=parts))
    with snapshot_message.raises(UserError, MANIFEST):
        Checkpoint.open(saved)


def test_damaged_row_and_unknown_part(saved, snapshot_message):
    edit(saved, lambda m: m["parts"]["clip"]["weights"].update({"final_norm.weight": "float32"}))
    with snapshot_message.raises(UserError, "clip", "final_norm.weight"):
        Checkpoint.open(saved)
    edit(saved, lambda m: m["parts"].update(clip={"path": "clip", "weights": {}}, unet=m["parts"]["vae"]))
    with snapshot_message.raises(UserError, "unet"):
        Checkpoint.open(saved)


def test_a_config_that_makes_no_sense(saved, snapshot_message):
    edit(saved, lambda m: m["configs"]["t5"].update(d_model="wide"))
    with snapshot_message.raises(UserError, "d_model"):
        Checkpoint.open(saved)


def test_quantized_checkpoints_are_not_read_as_if_they_were_not(saved, snapshot_message):
    edit(saved, lambda m: m.update(quantization={"method": "ternary"}))
    with snapshot_message.raises(UserError, "quantization"):
        Checkpoint.open(saved)


@pytest.mark.parametrize("path", ["../clip", "/etc", "t5/../../clip", "link"])
def test_paths_that_leave_the_directory(saved, path, snapshot_message):
    (saved / "link").symlink_to(saved.parent)
    edit(saved, lambda m: m["parts"]["clip"].update(path=path))
    with snapshot_message.raises(UserError, path):
        Checkpoint.open(saved)
    edit(saved, lambda m: (m["parts"]["clip"].update(path="clip"), m.update(tokenizers=path)))
    with snapshot_message.raises(UserError, path):
        Checkpoint.open(saved)


@closing_loop
def test_truncated_and_lost_data(saved, snapshot_message):
    data = max((saved / "clip").rglob("d/*"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    with snapshot_message.raises(UserError, "clip", volatile=ORBAX):
        Checkpoint.open(saved).load("clip")
    shutil.rmtree(saved / "t5")
    with snapshot_message.raises(UserError, "t5"):
        Checkpoint.open(saved).load("t5")


def test_names_of_checkpoints(tmp_path, monkeypatch, snapshot_message):
    with snapshot_message.raises(UserError, "flux-9", "nano-1.58bit", "nano-bf16") as caught:
        Checkpoint.open("flux-9")
    assert caught.value.exit_code == 3
    assert resolve("nano") == resolve("nano-1.58bit")
    assert resolve("nano-bf16").parts[-4:] == ("flux_jax", "nano", "data", "nano-bf16")
    with snapshot_message.raises(UserError, MANIFEST):
        Checkpoint.open(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with snapshot_message.raises(UserError, "python -m convert"):
        Checkpoint.open(tmp_path)


def test_parts_and_tokenizers_that_are_not_there(modules, tmp_path, snapshot_message):
    save(tmp_path / "few", CONFIG, {"clip": modules["clip"]})
    opened = Checkpoint.open(tmp_path / "few")
    with snapshot_message.raises(UserError, "vae", "clip"):
        opened.load("vae")
    with snapshot_message.raises(UserError, "tokenizers"):
        _ = opened.tokenizers


def test_overwriting(modules, tmp_path, snapshot_message):
    clip = {"clip": modules["clip"]}
    save(tmp_path / "out", CONFIG, clip)
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    with snapshot_message.raises(UserError, tmp_path / "out"):
        save(tmp_path / "out", CONFIG, {"t5": modules["t5"]})
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before
    save(tmp_path / "out", CONFIG, {"t5": modules["t5"]}, overwrite=True)
    assert Checkpoint.open(tmp_path / "out").components == ("t5",)
    (tmp_path / "precious").mkdir()
    with snapshot_message.raises(UserError, tmp_path / "precious"):
        save(tmp_path / "precious", CONFIG, clip, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "precious"]


def test_layers_of_one_kind_in_two_dtypes(saved, snapshot_message):
    """They are stacked in one array: a dtype of their own would be cast away."""
    name = "single_blocks.1.mod.weight"
    edit(saved, lambda m: m["parts"]["transformer"]["weights"][name].__setitem__(0, "bfloat16"))
    with snapshot_message.raises(UserError, name):
        Checkpoint.open(saved).load("transformer")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_nothing(tmp_path, stop):
    def stopped():
        with CheckpointWriter(tmp_path / "out") as writer:
            writer.add("clip", "a.weight", np.zeros(3, np.float32))
            raise stop

    with pytest.raises(stop):
        stopped()
    assert not list(tmp_path.iterdir())


def test_one_writes_at_a_time_and_after_a_crash_the_next_starts_clean(modules, tmp_path, snapshot_message):
    crashed = CheckpointWriter(tmp_path / "out")
    with crashed:
        crashed.add("clip", "a.weight", np.zeros(3, np.float32))
        with snapshot_message.raises(UserError, tmp_path / "out"):  # it lives: another one waits
            save(tmp_path / "out", CONFIG, {"clip": modules["clip"]})
    crashed.working.mkdir()  # and never renamed: the process was killed
    save(tmp_path / "out", CONFIG, {"clip": modules["clip"]})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk(modules, tmp_path, monkeypatch, snapshot_message):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp, "save", full)
    with snapshot_message.raises(UserError, "disk is full") as caught:
        save(tmp_path / "out", CONFIG, {"clip": modules["clip"]})
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


@closing_loop
@pytest.mark.parametrize("flushed", [2**28, 10**6], ids=["at the end", "on the way"])
def test_writes_that_fail_in_orbax_itself(flushed, tmp_path, monkeypatch, snapshot_message):
    """The same, with a real limit on the size of files instead of a full disk."""
    monkeypatch.setattr(orbax_writer, "FLUSH_BYTES", flushed)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the limit would cut it, and Python would keep it

    def write():
        with CheckpointWriter(tmp_path / "out") as writer:
            for name in ("a.weight", "b.weight"):
                writer.add("clip", name, np.random.default_rng(0).standard_normal(300_000))
            writer.finish(CONFIG)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with snapshot_message.raises(UserError, "disk"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
