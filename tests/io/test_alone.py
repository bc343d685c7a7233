"""A folder that a run works in: one process's alone, swept, gone where it stays empty; and room on the disk."""

import shutil
from types import SimpleNamespace

import pytest

from flux_jax.errors import UserError
from flux_jax.io import atomic, locks, places


def test_a_second_one_is_refused_and_the_folder_goes_where_nothing_was_written(tmp_path):
    folder = tmp_path / "deep" / "run"
    with locks.alone(folder):
        with pytest.raises(UserError, match=f"{folder} is being written by another process"), locks.alone(folder):
            pass
        assert folder.is_dir()
        atomic.write_whole(folder / "a", b"a", overwrite=False)  # files in it have locks of their own
    assert [path.name for path in folder.iterdir()] == ["a"]
    with pytest.raises(ZeroDivisionError), locks.alone(empty := tmp_path / "empty"):
        1 / 0  # noqa: B018
    assert not empty.exists()


def test_what_a_killed_one_left_goes_and_nothing_else(tmp_path):
    ours = [".a.flux-partial", ".a.flux-lock", "inner/.b.flux-lock", ".folder.flux-partial/.c.flux-partial/x"]
    others = [".a.flux", "a.flux-partial", ".flux-lock", "inner/.hidden", "b"]
    for name in (*ours, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with locks.alone(tmp_path):
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        assert left == {*others, ".all.flux-lock"}


def test_a_link_is_followed_and_what_is_no_folder_is_a_sentence(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "run")
    with locks.alone(tmp_path / "link"):
        assert (tmp_path / "deep" / "run").is_dir()
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="Cannot write"), locks.alone(path):
            pass


def test_room_is_told_in_numbers_that_tell_something(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=41_000))
    path = tmp_path / "not" / "yet" / "there"
    places.check_space(path, 41_000)
    for needed, says in {
        42_300: "42.3 kB, 1.3 kB more",
        7_000_000: "7.0 MB, 7.0 MB",
        10**12: "1000.0 GB, 1000.0 GB",
    }.items():
        with pytest.raises(UserError, match=f"{path} needs about {says}.* than its disk has free: free some space"):
            places.check_space(path, needed)
    assert not (tmp_path / "not").exists()
