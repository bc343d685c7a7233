"""Folders of pictures for the official evaluators: made by any number of devices and machines, in any number of runs.

In: `Picture`s and a way to load a pipeline. Out: PNG files that hold their own record, sidecars, and `run.json`, which
says what all of them were made with; another run may only add to the same. A picture appears whole or not at all, and
one that is there is not made again. What killed runs leave unfinished, `flux_jax.io.locks.sweep` removes: evaluators
would stumble over it.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flux_jax.errors import UserError
from flux_jax.evaluate.benchmarks import Picture
from flux_jax.io import atomic, places, png, reading

RUN = "run.json"


def stamp(out: Path, settings: dict[str, Any]) -> None:
    """Writes `out`/run.json, or makes sure that what is there was made with the same settings: UserError if not, or if
    there are other files and no run.json."""
    places.check_writable(path := out / RUN)
    if not path.exists():
        if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise UserError(
                f"{out} holds files but no {RUN}: it is not of this program's making; choose another folder."
            )
        try:
            atomic.write_whole(path, (json.dumps(settings, indent=2) + "\n").encode(), overwrite=False)
            return
        except UserError:  # another shard may have been quicker: what it wrote is compared below
            if not path.exists():
                raise
    there = read_run(out)
    differing = [key for key in {**there, **settings} if there.get(key) != settings.get(key)]
    if differing:
        raise UserError(f"{out} holds pictures made with another {' and '.join(differing)}; choose another folder.")


def read_run(out: Path) -> dict[str, Any]:
    """The settings in `out`/run.json; UserError where it cannot be read."""
    return reading.read_object(out / RUN, remedy="choose another folder")


def missing(pictures: Iterable[Picture], out: Path) -> list[Picture]:
    """Those that are not there. UserError where one could not be written, before anything is drawn."""
    wanted = [picture for picture in pictures if not os.path.exists(out / picture.path)]
    for picture in wanted:
        places.check_writable(out / picture.path)
    return wanted


def make(
    pictures: Sequence[Picture],
    out: Path,
    draw: Callable[[Any], Callable[[Picture], Any]],
    record: Callable[[Picture, Any], dict[str, Any]],
    devices: Sequence[Any],
) -> int:
    """Makes what is missing of `pictures` under `out` and returns how many were made.

    draw(device) is called once on each device, in a thread of its own, and returns what draws a picture there (PIL);
    record(picture, image) is what the file says of itself. The first failure stops all devices and is raised; finished
    pictures stay.
    """
    wanted, free = missing(pictures, out), list(devices)
    here, stopped = threading.local(), threading.Event()  # here.draw: what draws on this thread's device

    def one(picture: Picture) -> bool:
        if stopped.is_set():
            return False
        try:
            if not hasattr(here, "draw"):
                here.draw = draw(free.pop(0))
            if (out / picture.path).exists():  # another machine may have made it meanwhile
                return False
            image = here.draw(picture)
            return write(picture, image, out, record(picture, image))
        except BaseException:
            stopped.set()
            raise
        finally:
            bar.update()

    if not wanted:
        return 0
    # This thread only waits: tqdm keeps its lock for ever where Ctrl-C arrives in the middle of a bar.
    with tqdm(total=len(wanted), unit="picture", mininterval=2) as bar:
        with ThreadPoolExecutor(min(len(devices), len(wanted))) as pool:
            try:
                return sum(pool.map(one, wanted))
            finally:  # Ctrl-C arrives here: the threads finish their picture
                stopped.set()


def write(picture: Picture, image: Any, out: Path, record: dict[str, Any]) -> bool:
    """The sidecar first, then the picture: where a picture is, its metadata are. Whether it was not there already:
    another machine may have been quicker."""
    if picture.sidecar_path and not (out / picture.sidecar_path).exists():
        atomic.write_whole(out / picture.sidecar_path, json.dumps(picture.sidecar).encode(), overwrite=True)
    try:
        png.write_png(out / picture.path, image, record)
    except UserError:
        if not (out / picture.path).exists():
            raise
        return False
    return True
