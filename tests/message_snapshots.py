"""The wording of messages, once: tests/snapshots/messages.txt, compared by the fixture `snapshot_message`.

A test asserts what a message must name (a file, a value, a flag), and by the snapshot that its words are the known
ones. `pytest --update-snapshots` writes the words of the tests that it runs: whoever changes a message sees in the diff
of one file what users will read.
"""

import contextlib
import difflib
import os
import re
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILE = TESTS / "snapshots" / "messages.txt"
HEADER = """\
# What users are told, as the tests see it. `pytest --update-snapshots` writes this file.
# A name is that of a test, #2 is its second message. <folder> is the test's own, <folders> all tests', <clone> this.
"""
# What differs from one Python, one machine or one run to the next, and what only the tests' type checker says.
VOLATILE = [
    (re.compile(r"(?<=\(choose from )[^)\n]*(?=\))"), lambda found: found[0].replace("'", "")),  # quoted until 3.12
    (re.compile(r"(<folders>/\D*?)\d+(?=/|\b)"), lambda found: found[1]),  # pytest counts the folders of one name
    (re.compile(r"Type-check error[\s\S]*"), lambda found: "..."),
]


def read(file: Path = FILE) -> dict[str, str]:
    """Name -> words."""
    found, name = {}, ""
    for line in file.read_text("utf-8").splitlines() if file.exists() else []:
        if line.startswith("    "):
            found[name] = f"{found[name]}\n{line[4:]}" if name in found else line[4:]
        elif line and not line.startswith("#"):
            name = line
    return found


def write(words: dict[str, str], file: Path = FILE) -> None:
    """In the order of the names, so that a change of one is a change of one place."""
    blocks = ["\n".join([name, *(f"    {line}" for line in text.split("\n"))]) for name, text in sorted(words.items())]
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n\n".join([HEADER.rstrip("\n"), *blocks]) + "\n", encoding="utf-8")


def test_of(name: str) -> str:
    return name.rpartition(" #")[0] or name


class Messages:
    """Of one test: `messages(text, *names)` compares one; `with messages.raises(Error, *names):` one that is raised."""

    def __init__(self, plugin: "Plugin", test: str, folders: dict[str, str]):
        self.plugin, self.test, self.count = plugin, test, 0
        self.folders = sorted(folders.items(), key=lambda pair: -len(pair[0]))  # the inner ones first

    def __call__(self, text: str, *names: object, volatile: str | None = None) -> None:
        """Each of `names` stands in the text, and the text reads as in the snapshot, where "..." stands for what the
        regular expression `volatile` finds: words of other people's libraries."""
        for name in names:
            assert str(name) in text, f"{str(name)!r} is not named: {text!r}"
        text = self.normalised(text, volatile)
        self.count += 1
        name = f"{self.test} #{self.count}" if self.count > 1 else self.test
        if self.plugin.update:
            self.plugin.new[name] = text
            return
        known = self.plugin.words.get(name)
        if known != text:
            why = "is not in" if known is None else "reads otherwise than in"
            told = f"a message {why} tests/snapshots/messages.txt; if it should, --update-snapshots. {name}:"
            pytest.fail("\n".join([told, *difflib.ndiff((known or "").splitlines(), text.splitlines())]))

    @contextlib.contextmanager
    def raises(self, kind: type[Exception], *names: object, volatile: str | None = None):
        """Yields pytest's ExceptionInfo."""
        with pytest.raises(kind) as caught:
            yield caught
        self(str(caught.value), *names, volatile=volatile)

    def normalised(self, text: str, volatile: str | None) -> str:
        for folder, word in self.folders:
            text = text.replace(folder, word)
        for pattern, word in VOLATILE:
            text = pattern.sub(word, text)
        if volatile:
            text = re.sub(volatile, "...", text)
        return "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))


class Plugin:
    """Reads the file once; writes it when asked to, from all of xdist's processes."""

    def __init__(self, config: pytest.Config):
        self.config, self.update = config, config.getoption("update_snapshots")
        self.words, self.new, self.collected = read(), {}, set()

    @pytest.fixture
    def snapshot_message(
        self, request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Messages:
        """The words of a message against tests/snapshots/messages.txt, see tests/message_snapshots.py."""
        folders = {str(tmp_path): "<folder>", str(tmp_path_factory.getbasetemp()): "<folders>"}
        folders |= {os.environ["XDG_CACHE_HOME"]: "<cache>", str(TESTS.parent): "<clone>", sys.executable: "python"}
        return Messages(self, request.node.nodeid.removeprefix("tests/"), folders)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """All that there are, before some are deselected."""
        self.collected = {item.nodeid.removeprefix("tests/") for item in items}

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["messages"] = self.new
            self.config.workeroutput["collected"] = sorted(self.collected) if self.update else []
        elif self.update:
            write({name: text for name, text in self.words.items() if not self.gone(name)} | self.new)

    def gone(self, name: str) -> bool:
        """It is of a test that ran and says less, or of one whose function has no such case any more."""
        ran, functions = {test_of(new) for new in self.new}, {test.partition("[")[0] for test in self.collected}
        test = test_of(name)
        alone = any("[" in word for word in self.config.args)  # one case of a function says nothing of the others
        return test in ran or (not alone and test.partition("[")[0] in functions and test not in self.collected)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        told = getattr(node, "workeroutput", {})
        self.new |= told.get("messages", {})
        self.collected |= set(told.get("collected", ()))
