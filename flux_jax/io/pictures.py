"""Finished pictures read back, to be judged and shown.

In: a PNG file that this project drew, and that somebody may have damaged or replaced since. Out: the picture, decoded
whole; or UserError, one sentence that says which file to delete.
"""

from pathlib import Path

from PIL import Image

from flux_jax.io import png, reading

AGAIN = "delete it, and the same command makes it again"


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """The picture in RGB. size: (width, height) that it must have."""
    with png.opened(path, AGAIN) as file:
        picture = file.convert("RGB")
    if size is not None and picture.size != size:
        had, wanted = ("x".join(map(str, each)) for each in (picture.size, size))
        raise reading.unreadable(path, f"it has {had} pixels, and those beside it have {wanted}", AGAIN)
    return picture
