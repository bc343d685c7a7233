"""Models by their name on the hub: only what is converted is fetched, and a refusal is one message. Nothing here uses a
network; the hub's answers are made up.
"""

import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from convert import hub
from convert.__main__ import main
from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.errors import UserError


@pytest.fixture
def command(tmp_path, capsys):
    """Runs the converter into tmp_path/out: exit code, stderr."""

    def call(source):
        code = main([source, str(tmp_path / "out"), "-q"])
        assert (tmp_path / "out").exists() == (code == 0)
        return code, capsys.readouterr().err

    return call


FILES = {
    "model_index.json": 1000,
    "README.md": 10,
    "LICENSE.md": 10,
    "flux1-dev.safetensors": 23_800_000_000,
    "ae.safetensors": 335_000_000,
    "scheduler/scheduler_config.json": 100,
    "text_encoder/config.json": 100,
    "text_encoder/model.safetensors": 246_000_000,
    "text_encoder_2/config.json": 100,
    "text_encoder_2/model-00001-of-00002.safetensors": 5_000_000_000,
    "text_encoder_2/model-00002-of-00002.safetensors": 4_500_000_000,
    "text_encoder_2/model.safetensors.index.json": 20_000,
    "tokenizer/merges.txt": 500_000,
    "tokenizer/vocab.json": 1_000_000,
    "tokenizer_2/spiece.model": 800_000,
    "tokenizer_2/tokenizer.json": 2_000_000,
    "transformer/config.json": 100,
    "transformer/diffusion_pytorch_model-00001-of-00001.safetensors": 23_800_000_000,
    "transformer/diffusion_pytorch_model.fp16.safetensors": 23_800_000_000,
    "transformer/diffusion_pytorch_model.safetensors.index.json": 120_000,
    "vae/config.json": 100,
    "vae/diffusion_pytorch_model.safetensors": 168_000_000,
}


def test_only_what_is_needed_is_fetched():
    chosen = set(hub.wanted_files(FILES, ("transformer", "t5", "clip", "vae")))
    left = {
        "README.md",
        "flux1-dev.safetensors",
        "ae.safetensors",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
    }
    assert chosen == FILES.keys() - left
    assert {name.split("/")[0] for name in hub.wanted_files(FILES, ("vae",))} == {
        "LICENSE.md", "model_index.json", "scheduler", "vae",
    }  # fmt: skip


def test_a_variant_is_fetched_where_nothing_else_is_there():
    only = ("transformer/a.fp16.safetensors", "transformer/a.bf16.safetensors", "vae/b.safetensors.index.fp16.json")
    assert hub.wanted_files([*only, "text_encoder/c.fp16.bin"], ("transformer", "vae", "clip")) == list(only[1:])


def test_a_hub_name(command, tiny_published_checkpoint, tmp_path, capsys, monkeypatch, snapshot_message):
    folder = tmp_path / "cache"
    assert main(["--to", "diffusers", str(tiny_published_checkpoint), str(folder), "-q"]) == 0
    capsys.readouterr()
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in FILES.items()]
    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(folder)

    info = SimpleNamespace(siblings=siblings, sha="abc")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: info))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    code, err = command("somebody/FLUX")
    assert code == 0
    snapshot_message(err, "33.7 GB")
    assert (asked["repo"], asked["revision"]) == ("somebody/FLUX", "abc")
    assert "flux1-dev.safetensors" not in asked["allow_patterns"]
    assert Checkpoint.open(tmp_path / "out").manifest["source"]["from"] == "somebody/FLUX"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("GatedRepoError", 401),
        ("GatedRepoError", 403),
        ("RepositoryNotFoundError", 404),
        ("HfHubHTTPError", 403),
        ("HfHubHTTPError", 500),
    ],
)
def test_weights_that_are_gated_or_missing(command, monkeypatch, kind, status, snapshot_message):
    def refuse(*_, **__):
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        raise getattr(errors, kind)("a long message\nwith lines", response=response)

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=refuse))
    code, err = command("black-forest-labs/FLUX.1-dev")
    assert code == 3
    assert err.count("\n") == 1
    snapshot_message(err, "black-forest-labs/FLUX.1-dev")


@pytest.mark.parametrize(
    "error",
    [
        errors.OfflineModeIsEnabled("offline"),
        type("ConnectError", (Exception,), {"__module__": "httpx2"})("[Errno -2] Name or service not known"),
        TimeoutError("timed out"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_network(command, monkeypatch, error, snapshot_message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=refuse))
    code, err = command("somebody/FLUX")
    assert code == 3
    snapshot_message(err, "somebody/FLUX", error)


def test_a_mistake_of_ours_is_not_hidden(command, monkeypatch):
    def broken(*_, **__):
        raise KeyError("a bug")

    info = SimpleNamespace(siblings=[], sha="abc")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: info))
    monkeypatch.setattr(hub, "wanted_files", broken)
    with pytest.raises(KeyError):
        command("somebody/FLUX")


PARTS = ("transformer", "t5", "clip", "vae")
SHARDS = {
    "metadata": {},
    "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Makes a revision of somebody/FLUX in the hub's cache: links to blobs, as the library does. Nothing answers."""
    store = tmp_path / "hub" / "models--somebody--FLUX"
    (store / "blobs").mkdir(parents=True)
    (store / "refs").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*_, **__):
        raise errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=refuse))

    def make(revision="abc", left_out=(), main=True):
        folder = store / "snapshots" / revision
        for name in set(FILES) - {"README.md", "flux1-dev.safetensors", "ae.safetensors", *left_out}:
            blob = store / "blobs" / name.replace("/", "+")
            blob.write_text(json.dumps(SHARDS if name == "text_encoder_2/model.safetensors.index.json" else {}))
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(blob)
        if main:
            (store / "refs" / "main").write_text(revision)
        return folder

    return make


def test_what_is_in_the_cache_needs_no_network(cache, capsys, snapshot_message):
    folder = cache(left_out=["LICENSE.md", "tokenizer_2/spiece.model"])  # neither is needed
    assert hub.fetch("somebody/FLUX", PARTS) == folder
    snapshot_message(capsys.readouterr().err, "somebody/FLUX", "abc")


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("timed out"),
        PermissionError(13, "Permission denied", "/cache/x.lock"),
        KeyError("id"),  # of an answer that is not the hub's
        errors.GatedRepoError("no", response=SimpleNamespace(status_code=401, headers={}, request=None)),
        type("PanicException", (BaseException,), {})("a panic"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_failure_falls_back_to_the_cache_or_is_a_sentence(cache, monkeypatch, capsys, error, snapshot_message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=refuse))
    with snapshot_message.raises(UserError, "somebody/FLUX") as caught:
        hub.fetch("somebody/FLUX", PARTS)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    folder = cache()
    assert hub.fetch("somebody/FLUX", PARTS) == folder


@pytest.mark.parametrize(
    "lost",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder_2/model-00002-of-00002.safetensors",
        "text_encoder/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/merges.txt",
    ],
)
def test_half_a_model_in_the_cache(cache, lost, snapshot_message):
    cache(left_out=[lost])
    with snapshot_message.raises(UserError, "somebody/FLUX") as caught:
        hub.fetch("somebody/FLUX", PARTS)
    assert caught.value.exit_code == 3
    if lost not in hub.SMALL:
        hub.fetch("somebody/FLUX", ["transformer"])  # what is not wanted may lack


def test_a_download_that_stops_half_way(cache, monkeypatch):
    """The library may return what it has."""
    folder = cache()
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in FILES.items()]
    info = SimpleNamespace(siblings=siblings, sha="abc")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: info))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert hub.fetch("somebody/FLUX", PARTS) == folder
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=re.escape("vae/config.json")):
        hub.fetch("somebody/FLUX", PARTS)


def test_the_revision_that_is_whole_is_taken(cache):
    whole = cache("old", main=False)
    cache("new", left_out=["vae/config.json"])
    assert hub.fetch("somebody/FLUX", PARTS) == whole
    other = cache("newest", main=False)
    os.utime(other, (2e9, 2e9))
    assert hub.fetch("somebody/FLUX", PARTS) == other
    (other.parents[1] / "refs" / "main").write_text("old\n")
    assert hub.fetch("somebody/FLUX", PARTS) == whole


@pytest.mark.parametrize("damage", ["ref", "blob", "file", "index", "denied"])
def test_a_damaged_cache(cache, damage, snapshot_message):
    folder = cache()
    store = folder.parents[1]
    if damage == "ref":
        (store / "refs" / "main").write_bytes(b"\xff\x00")
        assert hub.fetch("somebody/FLUX", PARTS) == folder
        return
    if damage == "blob":
        (store / "blobs" / "vae+config.json").unlink()
    elif damage == "file":
        shutil.rmtree(store)
        store.write_text("")
    elif damage == "index":
        weight_map = {"weight_map": {"a": 3, "b": "\0", "c": "../../x"}}
        (store / "blobs" / "text_encoder_2+model.safetensors.index.json").write_text(json.dumps(weight_map))
    elif damage == "denied":
        (store / "snapshots").rename(store / "s")
        (store / "snapshots").symlink_to("snapshots")
    with snapshot_message.raises(UserError, "somebody/FLUX") as caught:
        hub.fetch("somebody/FLUX", PARTS)
    assert caught.value.exit_code == 3


def test_a_home_that_is_not_there_and_numbers_that_are_none(cache, monkeypatch, snapshot_message):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")  # as the library leaves it
    with snapshot_message.raises(UserError, "HF_HOME"):
        hub.fetch("somebody/FLUX", PARTS)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "huggingface_hub.constants")
        patch.delattr(huggingface_hub, "constants")
        patch.setenv("HF_HUB_ETAG_TIMEOUT", "soon")
        with snapshot_message.raises(UserError, "HF_", "soon"):
            hub.fetch("somebody/FLUX", PARTS)
