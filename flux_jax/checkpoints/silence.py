"""Orbax's own words kept from the user while it works: what went wrong is raised, and said in one sentence.

When one of its reads or writes fails, Orbax drops the others, and asyncio logs a traceback for each; absl logs what
it tries again.
"""

import contextlib
import gc
import logging
from collections.abc import Iterator


class Mute(logging.Filter):
    """Lets nothing pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        return False


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Loggers say nothing inside; each user has a filter of its own, for threads may overlap."""
    mute, loggers = Mute(), [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(mute)
    try:
        yield
    except BaseException:
        gc.collect()  # now: a task that nobody asked for its error says so when it is collected
        raise
    finally:
        for logger in loggers:
            logger.removeFilter(mute)
