"""`python -m convert`: folders and files to checkpoints and back; bad input is one report and leaves nothing behind."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import published
import pytest
import tiny_model
from safetensors.numpy import load_file, save_file

from convert import run
from convert.__main__ import main
from flux_jax.checkpoints import writer
from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.io import atomic, locks, places
from flux_jax.io.safetensors import FLOATS, file_header

BF16 = ml_dtypes.bfloat16
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
CONFIG = tiny_model.published_config()


@pytest.fixture(scope="module")
def original(tiny_published_checkpoint):
    """A float32 checkpoint of random weights."""
    return tiny_published_checkpoint


@pytest.fixture(scope="module")
def pristine(tiny_published_folder):
    """The same as a diffusers folder."""
    return tiny_published_folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(pristine, tmp_path / "source")


@pytest.fixture
def command(tmp_path, capsys):
    """Runs the converter into tmp_path/out: exit code, stdout, stderr; what failed has left nothing."""

    def call(*arguments):
        code = main([*map(str, arguments), "-q"])
        done = capsys.readouterr()
        if code:
            assert not (tmp_path / "out").exists()
            assert not list(tmp_path.glob(".*.flux-partial"))
            assert "Traceback" not in done.err
        return code, done.out.strip(), done.err

    return call


def weights(path, part="transformer"):
    opened = Checkpoint.open(path)
    return opened.read(part, opened.table(part))


def change(path, edit):
    """Rewrites a safetensors file after `edit(tensors)`."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_there_and_back_is_the_same_checkpoint(original, pristine, command, tmp_path):
    assert command(pristine, tmp_path / "out", "--dtype", "float32") == (0, str(tmp_path / "out"), "")
    one, other = Checkpoint.open(original), Checkpoint.open(tmp_path / "out")
    assert one.config == other.config  # the name and the defaults of sampling too, which diffusers has no place for
    for part in one.components:
        assert one.table(part) == other.table(part)
        a, b = weights(original, part), weights(tmp_path / "out", part)
        assert all(np.array_equal(a[name], b[name]) for name in a)
    for tokenizer in ("t5", "clip"):
        file = f"{tokenizer}/tokenizer.json"
        assert (one.tokenizers / file).read_bytes() == (other.tokenizers / file).read_bytes()
    hashes = other.manifest["source"]["sha256"]
    others = ("vae/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model")
    assert hashes.keys() == {TRANSFORMER, *(f"{name}.safetensors" for name in others)}
    checked = subprocess.run(["sha256sum", pristine / TRANSFORMER], capture_output=True, text=True, check=True)
    assert checked.stdout.split()[0] == hashes[TRANSFORMER]


@pytest.mark.parametrize("stored", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("asked", [None, "bfloat16"])
def test_source_precisions(folder, command, tmp_path, stored, asked, snapshot_message):
    """Each weight keeps its own; what another one takes from them is said."""

    def store(tensors):
        tensors |= {name: value.astype(stored) for name, value in tensors.items()}

    change(folder / TRANSFORMER, store)
    options = [] if asked is None else ["--dtype", asked]
    code, _, err = command(folder, tmp_path / "out", "--parts", "transformer", *options)
    assert code == 0
    tensors, wanted = load_file(folder / TRANSFORMER), np.dtype(stored if asked is None else BF16)
    converted = weights(tmp_path / "out")
    assert {value.dtype for value in converted.values()} == {wanted}
    assert np.array_equal(converted["img_in.weight"], tensors["x_embedder.weight"].astype(wanted))
    if wanted == stored:
        assert err == ""
    else:
        snapshot_message(err, np.dtype(stored).name, wanted)


def test_each_weight_keeps_its_own_precision(folder, command, tmp_path, snapshot_message):
    def store(tensors):
        tensors["x_embedder.weight"] = tensors["x_embedder.weight"].astype(np.float64)
        tensors["context_embedder.weight"] = tensors["context_embedder.weight"].astype(np.float16)
        name = "single_transformer_blocks.0.proj_out.weight"  # of one layer: the others are float32
        tensors[name] = tensors[name].astype(np.float16)
        for name, dtype in (("to_q", np.float16), ("to_k", BF16)):  # neither holds the other
            name = f"transformer_blocks.0.attn.{name}.weight"
            tensors[name] = tensors[name].astype(dtype)

    change(folder / TRANSFORMER, store)
    code, _, err = command(folder, tmp_path / "out", "--parts", "transformer")
    assert code == 0
    snapshot_message(err, "float64")
    tensors, converted = load_file(folder / TRANSFORMER), weights(tmp_path / "out")
    assert converted["img_in.weight"].dtype == np.float32
    assert converted["txt_in.weight"].dtype == np.float16
    assert converted["single_blocks.0.linear2.weight"].dtype == np.float32  # as its stack
    rows = converted["double_blocks.0.img.qkv.weight"]
    parts = [tensors[f"transformer_blocks.0.attn.to_{name}.weight"].astype(np.float32) for name in "qkv"]
    assert rows.dtype == np.float32 and np.array_equal(rows, np.concatenate(parts))


def test_shards(folder, command, tmp_path):
    tensors = load_file(folder / TRANSFORMER)
    (folder / TRANSFORMER).unlink()
    published.write_shards(folder / "transformer", tensors, 4)
    assert command(folder, tmp_path / "out", "--dtype", "float32", "--parts", "transformer")[0] == 0
    assert np.array_equal(weights(tmp_path / "out")["txt_in.weight"], tensors["context_embedder.weight"])


def bfl_files(folder, tmp_path):
    """BFL's layout of a folder's transformer and autoencoder, and the options that name the rest."""
    single = published.bfl_transformer(load_file(folder / TRANSFORMER), CONFIG.transformer)
    vae = published.bfl_vae(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"), CONFIG.vae)
    source = published.write(tmp_path / "bfl" / "flux1.safetensors", single)
    options = ["--vae", published.write(tmp_path / "bfl" / "ae.safetensors", vae), "--tokenizers", folder]
    options += ["--t5", folder / "text_encoder_2", "--clip", folder / "text_encoder" / "model.safetensors"]
    return source, options


def test_single_file_gives_the_same_as_the_folder(folder, command, tmp_path):
    source, options = bfl_files(folder, tmp_path)
    config = published.config_file(tmp_path / "config.json", CONFIG)
    assert command(source, tmp_path / "out", *options, "--config", config)[0] == 0
    assert command(folder, tmp_path / "again")[0] == 0
    for part in ("transformer", "t5", "clip", "vae"):
        a, b = weights(tmp_path / "out", part), weights(tmp_path / "again", part)
        assert list(a) == list(b)
        assert all(a[name].tobytes() == b[name].tobytes() for name in a)
    assert Checkpoint.open(tmp_path / "out").config == Checkpoint.open(tmp_path / "again").config


def test_single_file_of_an_unknown_width_asks_for_its_numbers(folder, command, tmp_path, snapshot_message):
    source, options = bfl_files(folder, tmp_path)
    code, _, err = command(source, tmp_path / "out", *options)
    assert code == 2
    snapshot_message(err, "--config")
    code, _, err = command(source, tmp_path / "out", "--vae", folder / "vae")
    assert code == 2
    snapshot_message(err, "--t5 PATH --clip PATH")


def test_out_exists(folder, command, tmp_path, snapshot_message):
    assert command(folder, tmp_path / "there", "--parts", "clip")[0] == 0
    before = (tmp_path / "there" / "flux_jax.json").read_bytes()
    code, _, err = command(folder, tmp_path / "there")
    assert code == 2
    snapshot_message(err, tmp_path / "there")
    assert (tmp_path / "there" / "flux_jax.json").read_bytes() == before
    assert command(folder, tmp_path / "there", "--parts", "vae", "--overwrite")[0] == 0
    assert Checkpoint.open(tmp_path / "there").components == ("vae",)


def test_while_another_process_writes_the_same(folder, command, tmp_path, snapshot_message):
    with locks.exclusive(tmp_path / "out"):
        code, _, err = command(folder, tmp_path / "out")
        assert code == 2
        snapshot_message(err, tmp_path / "out")
    assert command(folder, tmp_path / "out", "--parts", "clip")[0] == 0


def test_missing_shard(folder, command, tmp_path, snapshot_message):
    tensors = load_file(folder / TRANSFORMER)
    (folder / TRANSFORMER).unlink()
    published.write_shards(folder / "transformer", tensors, 3)
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    code, _, err = command(folder, tmp_path / "out")
    assert code == 2
    snapshot_message(err, "00002-of-00003", "1 fault\n")  # and not one for each of its tensors


def test_truncated_file(folder, command, tmp_path, snapshot_message):
    file = folder / TRANSFORMER
    whole = file.read_bytes()
    for length in (len(whole) - 1, 2000, 4):
        file.write_bytes(whole[:length])
        code, _, err = command(folder, tmp_path / "out")
        assert code == 2
        snapshot_message(err, file)


def test_a_file_that_ends_early_while_it_is_read(folder, command, tmp_path, monkeypatch, snapshot_message):
    """It was whole when its header was checked."""
    map_weights = run.map_weights

    def plan_then_lose(part, config, source):
        plan = map_weights(part, config, source)
        os.truncate(source.files[0], source.files[0].stat().st_size - 8)
        return plan

    monkeypatch.setattr(run, "map_weights", plan_then_lose)
    code, _, err = command(folder, tmp_path / "out")
    assert code == 2
    snapshot_message(err, TRANSFORMER)


def test_one_report_of_wrong_shapes_dtypes_missing_and_unknown_names(folder, command, tmp_path, snapshot_message):
    def damage(tensors):
        tensors["proj_out.weight"] = np.zeros((3, 3), np.float32)
        tensors["extra.weight"] = tensors.pop("x_embedder.weight")
        tensors["x_embedder.bias"] = np.zeros(32, np.int64)

    change(folder / TRANSFORMER, damage)
    change(folder / "text_encoder" / "model.safetensors", lambda t: t.pop("text_model.final_layer_norm.bias"))
    code, _, err = command(folder, tmp_path / "out")
    assert code == 2
    named = "[64, 32]", "x_embedder.weight", "extra.weight", "I64", "final_layer_norm.bias"
    snapshot_message(err, "5 faults", *named)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_float8_weights(folder, command, tmp_path, kind):
    """Each of its numbers is one of bfloat16's. safetensors of every numpy release does not write float8."""
    tensors = {name: value.astype(FLOATS[kind]) for name, value in load_file(folder / TRANSFORMER).items()}
    blob = file_header({name: (value.dtype, value.shape) for name, value in tensors.items()})
    (folder / TRANSFORMER).write_bytes(blob + b"".join(value.tobytes() for value in tensors.values()))
    assert command(folder, tmp_path / "out", "--parts", "transformer")[0] == 0
    converted = weights(tmp_path / "out")
    assert {value.dtype for value in converted.values()} == {np.dtype(BF16)}
    assert np.array_equal(converted["txt_in.weight"], tensors["context_embedder.weight"].astype(BF16))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_nan_is_named_in_a_warning(folder, command, tmp_path, value, dtype, snapshot_message):
    def spoil(tensors):
        tensors["transformer_blocks.0.attn.to_k.weight"][3, 5] = value

    change(folder / TRANSFORMER, spoil)
    code, _, err = command(folder, tmp_path / "out", "--parts", "transformer", "--dtype", dtype)
    assert code == 0
    assert err.count("NaN") == 1
    snapshot_message(err, "double_blocks.0.img.qkv.weight", "transformer_blocks.0.attn.to_k.weight")


def test_no_room_on_the_disk(folder, command, tmp_path, monkeypatch, snapshot_message):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    code, _, err = command(folder, tmp_path / "out")
    assert code == 2
    snapshot_message(err, "kB", volatile=r"\d+\.\d+")


def test_the_disk_runs_full_on_the_way(folder, command, tmp_path, monkeypatch, snapshot_message):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "sync_tree", full)  # the last thing before the checkpoint gets its name
    code, _, err = command(folder, tmp_path / "out")
    assert code == 2
    snapshot_message(err, "full")


def test_interrupted(folder, command, tmp_path, monkeypatch, snapshot_message):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "finite", stop)
    code, _, err = command(folder, tmp_path / "out")
    assert code == 130
    snapshot_message(err)


def test_what_hashes_in_the_background():
    """Its result, its error; and a program that ends does not wait for it."""
    assert run.in_background(lambda: 3).result() == 3
    with pytest.raises(ZeroDivisionError):
        run.in_background(lambda: 1 / 0).result()
    code = "import time; from convert.run import in_background; in_background(lambda: time.sleep(1000))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("transformer", "patch_size", 2),
        ("transformer", "axes_dims_rope", [4, 4, 4]),
        ("text_encoder_2", "dense_act_fn", "relu"),
        ("text_encoder", "hidden_act", "relu"),
        ("text_encoder", "num_hidden_layers", "two"),
        ("vae", "use_quant_conv", True),
    ],
)
def test_configs_that_we_do_not_implement(folder, command, tmp_path, file, key, value, snapshot_message):
    path = folder / file / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    code, _, err = command(folder, tmp_path / "out")
    assert code == 2
    snapshot_message(err, path)


def test_a_schedule_that_we_do_not_have(folder, command, tmp_path, snapshot_message):
    path = folder / "scheduler" / "scheduler_config.json"
    index = folder / "model_index.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "_flux_jax"}))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dynamic_shifting": False, "shift": 3.0}))
    code, _, err = command(folder, tmp_path / "out")
    assert code == 2
    snapshot_message(err, "3.0")


def test_sources_that_are_none(folder, original, command, tmp_path, snapshot_message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for source, code in (("./nowhere", 3), (tmp_path / "empty", 2), (tmp_path / "model.gguf", 2), (original, 2)):
        got, _, err = command(source, tmp_path / "out")
        assert got == code, err
        snapshot_message(err, Path(source).name)
    shutil.rmtree(folder / "vae")
    snapshot_message(command(folder, tmp_path / "out")[2], "vae")
    snapshot_message(command(folder, tmp_path / "out", "--parts", "unet")[2], "--parts", "unet")


def test_pickled_weights_are_not_read(folder, command, tmp_path, snapshot_message):
    (folder / TRANSFORMER).rename(folder / "transformer" / "diffusion_pytorch_model.bin")
    code, _, err = command(folder, tmp_path / "out")
    assert code == 2
    snapshot_message(err, ".bin")


def test_tokenizers_of_another_model(folder, command, tmp_path, snapshot_message):
    shutil.rmtree(folder / "tokenizer")
    snapshot_message(command(folder, tmp_path / "out")[2], "tokenizer")
    bigger = dataclasses.replace(CONFIG, t5=dataclasses.replace(CONFIG.t5, vocab_size=100_000))
    tiny_model.tokenizers(tmp_path / "words", bigger)
    path = tmp_path / "words" / "t5" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] += [[f"word{i}", -5.0] for i in range(CONFIG.t5.vocab_size)]
    path.write_text(json.dumps(data))
    code, _, err = command(folder, tmp_path / "out", "--tokenizers", tmp_path / "words")
    assert code == 2
    snapshot_message(err, 160)


def test_the_command_itself(folder, tmp_path):
    """As a process: paths on stdout, the progress bar on stderr, exit codes."""
    call = [sys.executable, "-m", "convert", folder, tmp_path / "out"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert "transformer" in done.stderr
    assert "MB/s" in done.stderr or "kB/s" in done.stderr or "B/s" in done.stderr
    done = subprocess.run(call, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(str(tmp_path / "out"))


def test_exporting_what_diffusers_cannot_hold(tmp_path, command, snapshot_message):
    odd = tiny_model.config()
    writer.save(tmp_path / "odd", odd, tiny_model.modules(odd), tokenizers=tiny_model.tokenizers(tmp_path / "w", odd))
    code, _, err = command("--to", "diffusers", tmp_path / "odd", tmp_path / "out")
    assert code == 2
    snapshot_message(err, "timestep_dim")
    writer.save(tmp_path / "few", CONFIG, {})
    code, _, err = command("--to", "diffusers", tmp_path / "few", tmp_path / "out")
    assert code == 2
    snapshot_message(err, tmp_path / "few")
    assert command("--to", "diffusers", tmp_path / "nothing", tmp_path / "out")[0] == 3


def test_an_export_that_fails_or_crashed(original, tmp_path, command, monkeypatch, snapshot_message):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "sync_tree", full)
        code, _, err = command("--to", "diffusers", original, tmp_path / "out")
    assert code == 2
    snapshot_message(err, "full")
    places.beside(tmp_path / "out", "partial").mkdir()  # as a killed run leaves it
    assert command("--to", "diffusers", original, tmp_path / "out")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert main(["--to", "diffusers", str(original), str(tmp_path / "out"), "-q"]) == 2  # it exists
