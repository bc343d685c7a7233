"""The summary of a visit: what matters most comes first, and all of it fits into what a machine gives back."""

from bench import summary

GOOD = {
    "step": "kernels",
    "time": 1.0,
    "m": 4608,
    "implementation": "A8 kernel",
    "seconds": 0.00031234,
    "correct": True,
}
END = {"step": "kernels", "time": 2.0, "exit": 0, "seconds": 98.7}


def test_words_stand_alone_and_numbers_behind_their_names():
    assert summary.line({**GOOD, "samples_us": [1.0], "none": None}) == "kernels: m 4608, A8 kernel, seconds 0.0003123"


def test_what_is_a_problem():
    assert not any(map(summary.is_problem, [GOOD, END, {"skipped": "3 s left"}, {"wrong": None}]))
    bad = [{"correct": False}, {"wrong": "error 2"}, {"failure": "no tile"}, {"exit": 1}, {"exit": None}]
    assert all(map(summary.is_problem, bad))
    assert list(map(summary.is_wrong, bad)) == [True, True, False, False, False]


def test_right_cases_are_counted_and_the_rest_is_a_line_each():
    case = {"step": "correct", "case": "gelu edge", "error": 0.1}
    rows = [case, {**case, "wrong": "error 0.1"}, case, GOOD, END, {"step": "tune", "skipped": "3 s left"}]
    assert summary.whole(rows).splitlines() == [
        "== WRONG (1)",
        "correct: gelu edge, error 0.1, wrong error 0.1",
        "== not done (1)",
        "tune: skipped 3 s left",
        "== kernels (2)",
        "m 4608, A8 kernel, seconds 0.0003123",
        "exit 0, seconds 98.7",
        "== correct (1)",
        "2 cases are right",
    ]


def test_long_parts_give_way_to_short_ones_and_lose_their_middle():
    rows = [{"step": "kernels", "m": i, "note": "x" * 40} for i in range(1000)]
    rows += [{"step": "tune", "m": i, "note": "y" * 40} for i in range(1000)]
    rows += [{"step": "A8", "ms_a_step": 93.21}, {"step": "correct", "wrong": "error 1"}]
    text = summary.brief(rows)
    assert summary.LIMIT - 300 < len(text) <= summary.LIMIT
    lines = text.splitlines()
    assert lines[:2] == ["== WRONG (1)", "correct: wrong error 1"] and lines[-2:] == ["== A8 (1)", "ms_a_step 93.21"]
    assert lines.count(summary.CUT) == 2
    for letter in "xy":
        kept = [line for line in lines if line.endswith(letter * 40)]
        assert kept[0].startswith("m 0,") and kept[-1].startswith("m 999,") and len(kept) > 60
    assert set(map(len, (line for line in lines if line[-1] == "x"))) <= {45, 46, 47}  # whole lines


def test_many_problems_leave_room_for_figures():
    rows = [{"step": "correct", "failure": "z" * 300} for _ in range(100)] + [GOOD]
    text = summary.brief(rows)
    assert len(text) <= summary.LIMIT // 2 + 100 and text.endswith(
        "== kernels (1)\nm 4608, A8 kernel, seconds 0.0003123"
    )


def test_rows_that_found_no_room_are_read_from_stderr():
    row = 'not written to /out/a{b}.jsonl (No space left on device): {"step": "a", "value": {"b": "(c): {"}}'
    said = ["noise {", row, row[:-9], "not written to {"]  # one of them is cut off
    assert summary.unwritten(said) == [{"step": "a", "value": {"b": "(c): {"}}]
