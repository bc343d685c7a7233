"""Training of the autoencoder: it learns, a resumed run is the same run, and what it writes can be loaded."""

import json

import numpy as np
import pytest

from flux_jax.config import VAEConfig
from flux_jax.nano import autoencoder

pytestmark = pytest.mark.usefixtures("hasty_compiler")
TINY = VAEConfig(latent_channels=4, channels=(4, 4), layers_per_block=1, norm_groups=2)


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    for name, value in {"CROP": 16, "SAVE_EVERY": 2, "LOG_EVERY": 1, "HELD_OUT": 8, "MEASURED": 8}.items():
        monkeypatch.setattr(autoencoder, name, value)
    settings = {"steps": 5, "seed": 1, "config": TINY, "size": 32}
    autoencoder.train(tmp_path / "whole", **settings)

    class Killed(BaseException):
        pass

    batch = autoencoder.batch

    def dying_batch(seed, step, *rest):
        if step == 3:
            raise Killed
        return batch(seed, step, *rest)

    with monkeypatch.context() as context:
        context.setattr(autoencoder, "batch", dying_batch)
        with pytest.raises(Killed):
            autoencoder.train(tmp_path / "killed", **settings)
    autoencoder.train(tmp_path / "killed", **settings)
    whole, resumed = (dict(np.load(tmp_path / name / "vae.npz")) for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    for name, weights in whole.items():
        np.testing.assert_array_equal(weights, resumed[name])
    rows = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0].keys() == {"phase", "step", "loss", "psnr", "kl", "seconds_per_step", "time"}
    about = json.loads((tmp_path / "killed" / "vae.json").read_text())
    assert about["latent_std"] > 0
    assert len(about["channel_mean"]) == 4


def test_crops_first_then_whole_pictures():
    assert autoencoder.batch(0, 0, 10, 128).shape == (4, 64, 64, 3)
    assert autoencoder.batch(0, 9, 10, 128).shape == (2, 128, 128, 3)
    np.testing.assert_array_equal(autoencoder.batch(0, 3, 10, 128), autoencoder.batch(0, 3, 10, 128))


def test_psnr_of_a_known_error():
    assert autoencoder.psnr(np.square(2 / 255)) == pytest.approx(20 * np.log10(255), rel=1e-5)
