"""Models by their name on the hub: only what is converted is fetched, and a refusal is one message. Nothing here uses a
network; the hub's answers are made up.
"""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from convert import hub
from convert.__main__ import main
from flux_jax.checkpoints.checkpoint import Checkpoint


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

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=broken))
    with pytest.raises(KeyError):
        command("somebody/FLUX")
