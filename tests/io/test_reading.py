"""The door for files from outside: whatever lies behind a name, it is what was asked for, or one sentence."""

import codecs
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flux_jax.errors import LONGEST, UserError
from flux_jax.io import reading


def missing(path: Path) -> None:
    pass


def dangling(path: Path) -> None:
    path.symlink_to("gone")


def looped(path: Path) -> None:
    path.symlink_to(path.name)


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)  # nobody writes: whoever opens it waits


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**40)


def text(data: bytes):
    return lambda path: path.write_bytes(data)


READERS = (reading.read_bytes, reading.read_text, reading.read_json, reading.read_object, reading.check_regular)
NO_FILES = (missing, dangling, looped, folder, pipe, device)


@pytest.mark.parametrize("make", [*NO_FILES, large], ids=lambda make: make.__name__)
def test_what_is_no_file_or_too_large(tmp_path, make, snapshot_message):
    path = tmp_path / "config.json"
    make(path)
    for read in READERS if make in NO_FILES else READERS[:-1]:
        with pytest.raises(UserError) as refused:
            read(path, remedy="copy it again")
    snapshot_message(str(refused.value), path)


def test_a_name_that_no_system_takes(tmp_path):
    for name in ("a\0b", "a" * 5000, "\ud800"):
        with pytest.raises(UserError) as refused:
            reading.read_bytes(tmp_path / name)
        assert len(str(refused.value)) <= LONGEST


def test_a_file_without_permission(tmp_path):
    path = tmp_path / "a"
    path.touch(0o000)
    if os.access(path, os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(UserError, match="Permission denied"):
        reading.read_bytes(path)


@pytest.mark.parametrize(
    "data",
    [
        "é猫".encode(),
        codecs.BOM_UTF8 + "é猫".encode(),
        "é猫".encode("utf-16"),
        codecs.BOM_UTF16_BE + "é猫".encode("utf-16-be"),
        "é猫".encode("utf-32"),
        codecs.BOM_UTF32_BE + "é猫".encode("utf-32-be"),
    ],
    ids=["plain", "utf-8 mark", "utf-16", "utf-16 big", "utf-32", "utf-32 big"],
)
def test_encodings(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    assert reading.read_text(tmp_path / "a") == "é猫"


@pytest.mark.parametrize(
    "data", [b"a\nb\xff", "a\nb".encode("utf-16-le"), codecs.BOM_UTF16_LE + b"a", b"a\nb\0"], ids=str
)
def test_what_is_no_text(tmp_path, data, snapshot_message):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(UserError) as refused:
        reading.read_text(tmp_path / "a")
    snapshot_message(str(refused.value), tmp_path / "a")


def test_values_are_those_of_json(tmp_path):
    value = {"a": [1, 2.5, None, True, "é\u2028", {"b": []}], "": "\U0001f642"}
    for ascii_only in (True, False):
        (tmp_path / "a").write_text(json.dumps(value, ensure_ascii=ascii_only), "utf-8")
        assert reading.read_object(tmp_path / "a") == value


DEEP = {"lists": "[" * 100_000 + "]" * 100_000, "objects": '{"a":' * 100_000 + "1" + "}" * 100_000}
BAD = {
    **DEEP,
    "deeper than allowed": "[" * 66 + "]" * 66,
    "NaN": '{"a": NaN}',
    "infinity": '{"a": -Infinity}',
    "a key twice": '{"a": 1, "a": 2}',
    "half a character": r'{"a": "\ud800"}',
    "a key of half a character": r'{"\udfff": 1}',
    "digits": '{"a": ' + "9" * 10_000 + "}",
    "empty": "",
    "half": '{"a": [1, 2',
    "a long key twice": json.dumps({"k" * 10_000: 1, "K" * 10_000: 2}).replace("K", "k"),
    "a list": "[1]",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_json_object(tmp_path, name, snapshot_message):
    path = tmp_path / "a.json"
    path.write_text(BAD[name])
    with pytest.raises(UserError) as refused:
        reading.read_object(path, remedy="copy it again")
    assert len(str(refused.value)) <= LONGEST and "\n" not in str(refused.value)
    if name not in DEEP:
        snapshot_message(str(refused.value), path)


def test_the_depth_that_is_allowed():
    assert reading.parse_json("[" * 64 + "]" * 64, "x") is not None


def test_a_pipe_of_the_shell_is_read_where_it_may_be():
    read = "import sys; from pathlib import Path; from flux_jax.io.reading import read_text as r; "
    read += "[print(r(Path(p), pipes=bool(sys.argv[1]))) for p in sys.argv[2:]]"
    shell = 'echo hi | "$0" -c "$1" "$2" /dev/stdin <(sleep 0.2; echo hello)'
    words = ["bash", "-c", shell, sys.executable, read]
    done = subprocess.run([*words, "yes"], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["hi", "hello"], done.stderr
    done = subprocess.run([*words, ""], capture_output=True, text=True, timeout=60)
    assert done.stdout == "" and "it is a pipe, not a file" in done.stderr
