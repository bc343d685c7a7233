"""Sheets: every picture where it belongs, pixel by pixel; captions and labels beside it."""

import numpy as np
import pytest
from PIL import Image

from flux_jax.io.contact_sheet import RIGHT, WRONG, Judged, judged_sheet, sheet, stacked


def picture(value: int, width: int = 20, height: int = 10) -> Image.Image:
    return Image.new("RGB", (width, height), (value, value, value))


def test_pictures_stand_in_rows(tmp_path):
    page = np.asarray(sheet([picture(i) for i in range(5)], [""] * 5, columns=2))
    assert page.shape == (3 * (10 + 36 + 6) + 6, 2 * (20 + 6) + 6, 3)
    expected = np.full_like(page, 255)
    for i in range(5):
        top, left = 6 + i // 2 * 52, 6 + i % 2 * 26
        expected[top : top + 10, left : left + 20] = i
    np.testing.assert_array_equal(page, expected)


def test_captions_stand_below_and_labels_at_the_left():
    pairs = [stacked([picture(9), picture(8)]) for _ in range(3)]
    plain = np.asarray(sheet(pairs, [""] * 3, columns=2))
    assert (plain[6:16, 6:26] == 9).all() and (plain[16:22, 6:26] == 255).all() and (plain[22:32, 6:26] == 8).all()
    captioned = np.asarray(sheet(pairs, ["a red circle, and more words than there is room for", "", "one"], columns=2))
    rows, columns = np.nonzero((captioned != plain).any(-1))
    assert rows.min() > 31 and columns.max() < 6 + 20 + 6
    assert ((rows > 6 + 26) & (rows < 6 + 26 + 36)).any() and (rows > 6 + 68 + 26).any()
    assert not ((rows >= 6 + 26 + 36) & (rows < 6 + 68 + 26)).any()  # three lines, and nothing over the next row
    labelled = np.asarray(sheet(pairs, [""] * 3, 2, ["first", "second\nof two"]))
    assert labelled.shape == (plain.shape[0], plain.shape[1] + 6 + 7 * len("second"), 3)
    np.testing.assert_array_equal(labelled[:, -plain.shape[1] :], plain)
    rows, _ = np.nonzero((labelled[:, : -plain.shape[1]] != 255).any(-1))
    assert {row // 68 for row in rows.tolist()} == {0, 1}  # beside every row


def test_a_frame_tells_the_verdict(tmp_path):
    """A sheet as those that came with FLUX-nano: frames of 3 pixels, 6 between pictures, 36 for a caption."""
    for i in range(3):
        picture(i, 30, 40).save(tmp_path / f"{i}.png")
    page = np.asarray(judged_sheet([Judged(tmp_path / f"{i}.png", "", i != 1) for i in range(3)], 2))
    assert page.shape == (2 * (46 + 36 + 6) + 6, 2 * (36 + 6) + 6, 3)
    for i, color in enumerate((RIGHT, WRONG, RIGHT)):
        top, left = 6 + i // 2 * 88, 6 + i % 2 * 42
        framed = page[top : top + 46, left : left + 36]
        assert (framed[3:-3, 3:-3] == i).all()
        inside = np.zeros(framed.shape[:2], bool)
        inside[3:-3, 3:-3] = True
        assert (framed[~inside] == color).all()


@pytest.mark.parametrize("model", ["nano-bf16", "nano-1.58bit"])
def test_shipped_sheets_have_this_layout(model):
    from flux_jax.checkpoints.checkpoint import resolve

    with Image.open(resolve(model) / "sheet.png") as file:
        page = np.asarray(file.convert("RGB"))
    tiles = [page[6 + 176 * row :, 6 + 140 * column :][:134, :134] for row in range(6) for column in range(8)]
    assert page.shape == (6 * 176 + 6, 8 * 140 + 6, 3)
    assert {tuple(tile[0, 0].tolist()) for tile in tiles} == {RIGHT, WRONG}
    assert all((tile[:3] == tile[0, 0]).all() and (tile[:, -3:] == tile[0, 0]).all() for tile in tiles)
