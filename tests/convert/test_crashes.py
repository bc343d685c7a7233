"""The converter, and a generation, killed between any two of their steps on the disk."""

from pathlib import Path

import crash_windows
import pytest
from orbax.checkpoint import v1  # noqa: F401 - what forked processes need is imported once, and used by none before

from convert import __main__ as program
from convert import export, run  # noqa: F401
from flux_jax.checkpoints import checksums
from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.io import png
from flux_jax.sampling import pipeline  # noqa: F401

TEXT = "what was there before"


class Conversion:
    """A checkpoint where there was none."""

    WORDS = ("nano-bf16", "out", "--ternary", "--parts", "transformer", "-q")

    @classmethod
    def work(cls, folder: Path) -> None:
        words = [str(folder / word) if word == "out" else word for word in cls.WORDS]
        there = cls.whole(folder) == "new" and "--overwrite" not in words
        assert program.main(words) == (2 if there else 0)

    @classmethod
    def whole(cls, folder: Path) -> str:
        if not (folder / "out").exists():
            return "nothing"
        assert checksums.check(folder / "out") > 5
        return "old" if Checkpoint.open(folder / "out").quantization is None else "new"


class Replacement(Conversion):
    """A checkpoint in place of another one."""

    WORDS = (*Conversion.WORDS, "--overwrite")

    @staticmethod
    def before(folder: Path) -> None:
        from flux_jax.checkpoints.writer import CheckpointWriter

        stored = Checkpoint.open("nano-bf16")
        with CheckpointWriter(folder / "out") as writer:
            for name, value in stored.read("clip", stored.table("clip")).items():
                writer.add("clip", name, value)
            writer.finish(stored.config)


class Export(Conversion):
    """A folder of diffusers."""

    WORDS = ("--to", "diffusers", "nano-bf16", "out", "-q")

    @classmethod
    def whole(cls, folder: Path) -> str:
        if not (folder / "out").exists():
            return "nothing"
        files = [path for path in (folder / "out").rglob("*") if path.is_file()]
        assert len(files) == 18 and all(path.stat().st_size for path in files)
        return "new"


class Picture:
    """A picture with its record, as a generation writes it."""

    @staticmethod
    def work(folder: Path) -> None:
        from PIL import Image

        record = png.Record(
            dtype="float32", model={"id": "nano", "name": "FLUX-nano", "sha256": "0" * 64}, versions={"flux_jax": "0"},
            prompt="a", seed=1, height=8, width=8, steps=1, guidance=1.0, true_cfg=1.0, max_sequence_length=4,
        )  # fmt: skip
        if Picture.whole(folder) == "nothing":
            png.write_png(folder / "out" / "a.png", Image.new("RGB", (8, 8)), record)

    @staticmethod
    def whole(folder: Path) -> str:
        path = folder / "out" / "a.png"
        if not path.exists():
            return "nothing"
        assert png.read_record(path)["prompt"] == "a"
        return "new"


def test_a_picture(tmp_path):
    assert crash_windows.survive(__file__, "Picture", tmp_path) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "every"), [("Conversion", 8), ("Replacement", 15), ("Export", 8)])
def test_a_conversion(name, every, tmp_path):
    assert crash_windows.survive(__file__, name, tmp_path, every) >= 30
