"""Files and folders appear whole or not at all: killed at every step, two at once, through links, on odd paths."""

import errno
import os
import threading
from pathlib import Path

import crash_windows
import pytest

from flux_jax.errors import UserError
from flux_jax.io import atomic, places


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def fill(folder: Path, text: str, **how) -> None:
    with atomic.WholeFolder(folder, **how) as whole:
        (whole.working / "inner").mkdir()
        for name in ("a", "inner/b"):
            (whole.working / name).write_text(text)
        whole.publish()


class NewFolder:
    """A folder where there was none."""

    @staticmethod
    def work(folder: Path) -> None:
        if NewFolder.whole(folder) == "new":
            with pytest.raises(UserError, match="exists already"):
                fill(folder / "out", "new")
        else:
            fill(folder / "out", "new")

    @staticmethod
    def whole(folder: Path) -> str:
        if not (folder / "out").exists():
            return "nothing"
        (found,) = {(folder / "out" / name).read_text() for name in ("a", "inner/b")}
        return found


class ReplacedFolder(NewFolder):
    """A folder in place of an old one: there is always one of the two under the name, reached through a link."""

    @staticmethod
    def before(folder: Path) -> None:
        (folder / "out").symlink_to("real", target_is_directory=True)
        fill(folder / "real", "old")

    @staticmethod
    def work(folder: Path) -> None:
        fill(folder / "out", "new", overwrite=True)

    @staticmethod
    def whole(folder: Path) -> str:
        assert (folder / "out").is_symlink()
        found = NewFolder.whole(folder)
        assert found in ("old", "new")
        return found


class MovedFolder(ReplacedFolder):
    """The same where the file system cannot exchange two names: for a moment neither has it, and none is lost."""

    @staticmethod
    def work(folder: Path) -> None:
        atomic._rename = lambda *_: False
        ReplacedFolder.work(folder)

    @staticmethod
    def whole(folder: Path) -> str:
        found = NewFolder.whole(folder)
        if found == "nothing":
            assert (folder / ".real.flux-old" / "inner" / "b").read_text() == "old"
            return "old"
        return found


class NewFile:
    """A file where there was none."""

    @staticmethod
    def work(folder: Path) -> None:
        if NewFile.whole(folder) == "nothing":
            atomic.write_whole(folder / "deep" / "out", b"new" * 9, overwrite=False)
        else:
            atomic.write_whole(folder / "deep" / "out", b"new" * 9, overwrite=True)

    @staticmethod
    def whole(folder: Path) -> str:
        path = folder / "deep" / "out"
        if not path.exists():
            return "nothing"
        data = path.read_bytes()
        assert data in (b"new" * 9, b"old" * 9)
        return data[:3].decode()


class LinkedFile(NewFile):
    """The same where the file system knows no rename that refuses: a hard link is the other way."""

    @staticmethod
    def work(folder: Path) -> None:
        atomic._rename = lambda *_: False
        NewFile.work(folder)


class ReplacedFile(NewFile):
    """A file in place of an old one."""

    @staticmethod
    def before(folder: Path) -> None:
        atomic.write_whole(folder / "deep" / "out", b"old" * 9, overwrite=False)


CASES = {"NewFolder": 8, "ReplacedFolder": 8, "MovedFolder": 10, "NewFile": 3, "LinkedFile": 4, "ReplacedFile": 2}


@pytest.mark.parametrize("name", CASES)
def test_killed_between_any_two_steps(name, tmp_path):
    assert crash_windows.survive(__file__, name, tmp_path) >= CASES[name]


def test_what_a_kill_left_goes_when_the_name_is_found_taken(tmp_path):
    fill(tmp_path / "out", "new")
    (tmp_path / ".out.flux-lock").touch()
    (tmp_path / ".out.flux-partial").mkdir()
    (tmp_path / ".out.flux-old").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        atomic.WholeFolder(tmp_path / "out").check()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a", "inner"]


def test_a_twin_is_told_and_touches_nothing(tmp_path, snapshot_message):
    with atomic.WholeFolder(tmp_path / "out") as first:
        (first.working / "a").write_text("mine")
        for twin in (lambda: atomic.WholeFolder(tmp_path / "out").check(), lambda: fill(tmp_path / "out", "other")):
            with pytest.raises(UserError) as refused:
                twin()
            snapshot_message(str(refused.value), tmp_path / "out")
        first.publish()
    assert (tmp_path / "out" / "a").read_text() == "mine" and names(tmp_path) == ["out"]


def test_threads_that_write_one_file_do_it_one_after_the_other(tmp_path):
    datas = [bytes([65 + i]) * 100_000 for i in range(8)]
    threads = [
        threading.Thread(target=atomic.write_whole, args=(tmp_path / "a", data), kwargs={"overwrite": True})
        for data in datas
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() in datas and names(tmp_path) == ["a"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_an_error_leaves_nothing_behind_and_the_old_in_place(tmp_path, stop):
    fill(tmp_path / "out", "old")

    def interrupted() -> None:
        with atomic.WholeFolder(tmp_path / "out", overwrite=True) as whole:
            (whole.working / "a").write_text("half")
            raise stop

    with pytest.raises(stop):
        interrupted()
    assert NewFolder.whole(tmp_path) == "old" and names(tmp_path) == ["out"]


def test_users_own_folders_with_such_names_are_left_alone(tmp_path):
    for name in ("out.old", "out.partial"):
        fill(tmp_path / name, "backup")
    fill(tmp_path / "out", "old")
    fill(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path) == ["out", "out.old", "out.partial"]
    assert (tmp_path / "out.old" / "a").read_text() == "backup"


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    write = (lambda: atomic.write_whole(tmp_path / "a", b"x", overwrite=True)) if where == "file" else None
    with pytest.raises(UserError, match="its disk is full"):
        (write or (lambda: fill(tmp_path / "a", "x")))()
    assert names(tmp_path) == []


def long_name(tmp_path: Path) -> Path:
    return tmp_path / ("猫" * 100)


def loop(tmp_path: Path) -> Path:
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path / "loop" / "a"


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file" / "a"


def below_a_folder_that_is_gone(tmp_path: Path) -> Path:
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    return Path("a")


def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


PLACES = {
    "long name": long_name,
    "long name on the way": lambda tmp_path: long_name(tmp_path) / "a",
    "loop of links": loop,
    "below a file": below_a_file,
    "below the current folder, which is gone": below_a_folder_that_is_gone,
    "pipe": pipe,
    "device": lambda _: Path("/dev/null"),
    "below a device": lambda _: Path("/dev/null/a"),
    "root": lambda _: Path("/"),
    "zero byte": lambda tmp_path: tmp_path / "a\0b",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("folder", [False, True])
def test_odd_places_are_one_sentence_before_any_work(tmp_path, place, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)  # and back
    path = PLACES[place](tmp_path)
    with pytest.raises(UserError, match="^Cannot write ") as refused:
        places.check_writable(path, folder=folder)
    assert len(str(refused.value)) <= 300
    with pytest.raises(UserError):
        fill(path, "x") if folder else atomic.write_whole(path, b"x", overwrite=True)


def test_the_longest_name_that_the_file_system_takes(tmp_path):
    atomic.write_whole(tmp_path / ("a" * 255), b"x", overwrite=False)
    fill(tmp_path / ("b" * 255), "x")
    assert names(tmp_path) == ["a" * 255, "b" * 255]


def test_links_are_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "file").symlink_to("elsewhere/new")
    atomic.write_whole(tmp_path / "file", b"x", overwrite=False)
    assert names(tmp_path / "elsewhere") == ["new"] and (tmp_path / "file").is_symlink()
    with pytest.raises(UserError, match="exists"):
        atomic.write_whole(tmp_path / "file", b"y", overwrite=False)
