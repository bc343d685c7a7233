"""tests/snapshots/messages.txt holds the words of tests that there are, and changes only when it is told to."""

import re
from pathlib import Path

import message_snapshots
import pytest

TESTS = Path(__file__).parent


def test_every_message_is_of_a_test_that_there_is():
    names = {message_snapshots.test_of(name).partition("[")[0] for name in message_snapshots.read()}
    assert names
    for name in sorted(names):
        file, _, function = name.partition("::")
        assert re.search(rf"^def {function}\(", (TESTS / file).read_text(encoding="utf-8"), re.M), name


def test_what_is_written_is_read(tmp_path):
    words = {"b.py::test_b[x #2] #2": "One line.\n  - and\n\nanother", "a.py::test_a[]": ""}
    message_snapshots.write(words, tmp_path / "messages.txt")
    assert message_snapshots.read(tmp_path / "messages.txt") == words


def test_other_words_fail_and_say_how_to_accept_them(snapshot_message, tmp_path):
    if snapshot_message.plugin.update:
        pytest.skip("they are accepted")
    snapshot_message.plugin.words[snapshot_message.test] = "Cannot read <folder>/a: it is gone."
    snapshot_message(f"Cannot read {tmp_path / 'a'}: it is gone.", tmp_path / "a")
    with pytest.raises(pytest.fail.Exception, match="--update-snapshots"):
        snapshot_message("Something else.")
    with pytest.raises(AssertionError, match="is not named"):
        snapshot_message("Something else.", "b.png")
