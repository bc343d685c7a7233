"""Orbax's own words kept from the user: what went wrong is raised, and said in one sentence.

When one of its reads or writes fails, Orbax leaves the others behind: asyncio logs a traceback for each whose error
nobody asked for, when it is collected, and Python prints one for each that ends after its event loop was closed. absl
logs what is tried again.
"""

import contextlib
import functools
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

LEFT_BEHIND = re.compile(r"tensorstore|zarr|OCDBT")  # in what such an error says


class Mute(logging.Filter):
    """Lets nothing pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        return False


class MuteLeftBehind(logging.Filter):
    """Lets pass what asyncio says of others' tasks."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return "never retrieved" not in record.getMessage() or not LEFT_BEHIND.search(str(error))


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """absl says nothing inside; each user has a filter of its own, for threads may overlap."""
    _mute_left_behind()
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning, "orbax")
    mute, logger = Mute(), logging.getLogger("absl")
    logger.addFilter(mute)
    try:
        yield
    finally:
        logger.removeFilter(mute)


@functools.cache
def _mute_left_behind() -> None:
    """For good: nobody knows when what was left behind ends, on a thread of TensorStore's, or is collected."""
    logging.getLogger("asyncio").addFilter(MuteLeftBehind())
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
