"""What a machine is, and what it lacks: each part a row, and one that cannot be told costs itself alone."""

import json
import shutil
import subprocess
from types import SimpleNamespace

import jax
import pytest

from bench import journal, machine
from flux_jax.errors import UserError

SAID = "NVIDIA H100 80GB HBM3, 580.159.04, 81559 MiB, 700.00 W, 1980 MHz, 345 MHz, 31\n"


def test_versions_host_device_and_what_is_absent_are_rows(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PACKAGES", ("jax", "no-such-package"))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    path = tmp_path / "rows.jsonl"
    machine.main(["--rows", str(path)])
    versions, absent, host, card, device, imports = journal.read(path)
    assert versions["versions"].endswith(f"jax {jax.__version__}") and absent["absent"] == "no-such-package"
    assert host["cores"] > 0 and host["free_disk_gb"] > 0
    assert card["skipped"] == "no nvidia-smi" and imports["imports"]
    assert device["device"] == jax.devices()[0].device_kind
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["versions"]["no-such-package"] is None


def test_the_card_is_told_by_name(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: "nvidia-smi")
    said = SimpleNamespace(run=lambda *_, **__: subprocess.CompletedProcess([], 0, SAID, ""))
    monkeypatch.setattr(machine, "subprocess", said)  # and not for everyone
    found = machine.card()
    assert found["name"] == "NVIDIA H100 80GB HBM3" and found["power.limit"] == "700.00 W"
    assert found["temperature.gpu"] == "31"


def test_what_cannot_be_imported_is_said(monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(machine.importlib, "import_module", missing)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match="not all is as it should be") as error:
        machine.main(["--rows", str(path)])
    assert error.value.exit_code == 1
    assert journal.read(path)[-1]["failure"] == "ModuleNotFoundError: No module named 'flux_jax.sampling.pipeline'"
