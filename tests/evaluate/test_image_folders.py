"""Runs that are killed go on, finished pictures are never made twice, other settings never mix."""

import json
import signal
import threading
import time
from pathlib import Path
from typing import ClassVar

import crash_windows
import pytest
from PIL import Image
from tqdm import tqdm

from flux_jax.errors import UserError
from flux_jax.evaluate import benchmarks, image_folders
from flux_jax.evaluate.benchmarks import Prompt
from flux_jax.io import locks

PROMPTS = [Prompt(i, f"prompt {i}", "", {"prompt": f"prompt {i}"}) for i in range(5)]
PICTURES = benchmarks.folder_pictures(PROMPTS, 2)
RECORD = {"steps": 1, "true_cfg": 1.0, "guidance": 1.0, "width": 4, "height": 4, "model": {"sha256": "", "name": ""},
          "versions": {"flux_jax": ""}, "negative_prompt": None}  # fmt: skip


class Painter:
    """Draws a picture's seed and prompt as a colour, and remembers what it drew."""

    def __init__(self, fail_at=None):
        self.drawn, self.devices, self.fail_at = [], [], fail_at

    def __call__(self, device):
        self.devices.append(device)

        def draw(picture):
            if len(self.drawn) == self.fail_at:
                raise RuntimeError("out of luck")
            self.drawn.append(picture)
            return Image.new("RGB", (4, 4), (picture.seed, len(picture.prompt), int(picture.prompt[-1])))

        return draw


def record(picture, image):
    return {"prompt": picture.prompt, "seed": picture.seed, **RECORD}


def make(painter, out, pictures=PICTURES, devices=("one",)):
    return image_folders.make(pictures, out, painter, record, devices)


def files(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_every_file_is_where_geneval_looks(tmp_path):
    painter = Painter()
    assert make(painter, tmp_path) == 10
    expected = {f"{p:05d}/samples/{k:04d}.png" for p in range(5) for k in range(2)}
    assert set(files(tmp_path)) == expected | {f"{p:05d}/metadata.jsonl" for p in range(5)}
    assert json.loads((tmp_path / "00003/metadata.jsonl").read_text()) == {"prompt": "prompt 3"}
    with Image.open(tmp_path / "00003/samples/0001.png") as image:
        assert image.getpixel((0, 0)) == (43, 8, 3)
        assert json.loads(image.text["flux_jax"])["seed"] == 43
    assert make(painter, tmp_path) == 0
    assert len(painter.drawn) == 10 and painter.devices == ["one"]  # nothing to do loads no model


def test_shards_and_devices_together_make_one_run(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make(Painter(), whole)
    painter = Painter()
    for part in (1, 2):
        make(painter, parts, benchmarks.folder_pictures(benchmarks.shard(PROMPTS, part, 2), 2), ("one", "two", "three"))
    assert files(whole) == files(parts)
    assert len(painter.drawn) == len(set(map(str, painter.drawn))) == 10


class Folder:
    """Ten pictures with their sidecars and `run.json`."""

    SETTINGS: ClassVar = {"seed": 42}

    @staticmethod
    def work(folder: Path) -> None:
        image_folders.stamp(folder / "out", Folder.SETTINGS)
        before = len(list(folder.rglob("*.png")))
        painter = Painter()
        assert make(painter, folder / "out", devices=("one",)) == len(painter.drawn) == 10 - before
        locks.sweep(folder / "out")

    @staticmethod
    def whole(folder: Path) -> str:
        for path in folder.rglob("*.png"):
            assert (path.parents[1] / "metadata.jsonl").read_text().endswith("}")
            with Image.open(path) as image:
                assert image.getpixel((0, 0))[0] == 42 + int(path.stem)
        return "new" if len(list(folder.rglob("*.png"))) == 10 else "nothing"


def test_a_killed_run_goes_on(tmp_path):
    assert crash_windows.survive(__file__, "Folder", tmp_path, every=7) > 40


def test_what_a_living_process_writes_is_not_swept(tmp_path):
    path = tmp_path / "00000" / "samples" / "0000.png"
    path.parent.mkdir(parents=True)
    for name in ("0000", "0001"):
        path.with_name(f".{name}.png.flux-partial").touch()
    with locks.exclusive(path):
        locks.sweep(tmp_path)
        assert {each.name for each in path.parent.iterdir()} == {".0000.png.flux-partial", ".0000.png.flux-lock"}
    locks.sweep(tmp_path)
    assert not list(path.parent.iterdir())


def test_a_failure_stops_all_devices_and_keeps_what_is_finished(tmp_path):
    with pytest.raises(RuntimeError, match="out of luck"):
        make(Painter(fail_at=3), tmp_path, devices=("one", "two"))
    finished = len(list(tmp_path.rglob("*.png")))
    assert 3 <= finished <= 4
    assert make(Painter(), tmp_path) == 10 - finished


def test_a_failure_stops_its_own_device_while_another_still_draws(tmp_path):
    """Whose later pictures would succeed; the other device is at the first one all the while."""
    painter, begun, failed = Painter(), threading.Event(), threading.Event()

    def on(device):
        draw = painter(device)

        def slowly(picture):
            begun.set()
            assert failed.wait(10)
            time.sleep(0.3)
            return draw(picture)

        def fails_once(picture):
            if failed.is_set():
                return draw(picture)
            assert begun.wait(10)
            failed.set()
            raise RuntimeError("out of luck")

        return slowly if device == "slow" else fails_once

    with pytest.raises(RuntimeError, match="out of luck"):
        image_folders.make(PICTURES, tmp_path, on, record, ["slow", "fails once"])
    assert len(painter.drawn) == len(list(tmp_path.rglob("*.png"))) == 1  # what was begun was finished


def test_ctrl_c_stops_after_the_picture_that_is_being_drawn(tmp_path, monkeypatch):
    """The signal reaches the main thread, which waits for the others, and is in no progress bar, however slow."""
    monkeypatch.setattr(tqdm, "display", lambda *_, **__: time.sleep(0.2))
    painter = Painter()

    def on(device):
        draw = painter(device)

        def interrupted(picture):
            if len(painter.drawn) == 2:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(0.5)
            return draw(picture)

        return interrupted

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            image_folders.make(PICTURES, tmp_path, on, record, ["one"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(list(tmp_path.rglob("*.png"))) == 3
    again = threading.Thread(target=make, args=(painter, tmp_path), daemon=True)
    again.start()
    again.join(timeout=60)
    assert not again.is_alive()
    assert len(painter.drawn) == 10


def test_a_picture_that_appears_meanwhile_is_not_made(tmp_path):
    painter = Painter()

    def overtaken(device):
        make(painter, tmp_path, PICTURES[:8])  # another machine, between planning and drawing
        return painter(device)

    assert image_folders.make(PICTURES, tmp_path, overtaken, record, ["one"]) == 2
    assert len(painter.drawn) == 10


def test_a_picture_that_appears_while_it_is_drawn_is_the_other_machines(tmp_path):
    painter = Painter()

    def overtaken(device):
        draw = painter(device)

        def slowly(picture):
            if picture == PICTURES[1]:
                make(Painter(), tmp_path, [picture])
            return draw(picture)

        return slowly

    assert image_folders.make(PICTURES, tmp_path, overtaken, record, ["one"]) == 9
    assert len(files(tmp_path)) == 15


def test_a_name_that_no_file_can_have_is_told_before_anything_is_drawn(tmp_path):
    painter, picture = Painter(), benchmarks.Picture("a prompt", 42, Path("ä" * 200 + "_000000.png"))
    with pytest.raises(UserError, match="411 bytes"):
        make(painter, tmp_path, [PICTURES[0], picture])
    assert not painter.drawn and not painter.devices


def test_other_settings_never_mix(tmp_path, snapshot_message):
    settings = {"model": {"sha256": "a"}, "sampling": {"steps": 4}, "seed": 42}
    image_folders.stamp(tmp_path / "out", settings)
    image_folders.stamp(tmp_path / "out", settings)
    with snapshot_message.raises(UserError, tmp_path / "out", "model and seed"):
        image_folders.stamp(tmp_path / "out", settings | {"model": {"sha256": "b"}, "seed": 1})
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "00000").mkdir()
    with snapshot_message.raises(UserError, tmp_path / "theirs"):
        image_folders.stamp(tmp_path / "theirs", settings)
    (tmp_path / "out" / image_folders.RUN).write_text("{")
    with snapshot_message.raises(UserError, image_folders.RUN):
        image_folders.stamp(tmp_path / "out", settings)
