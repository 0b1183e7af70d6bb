"""Tables and marks in a terminal."""

import io
import sys

from jaxvqa.cli.output import box_text, error_text, mark, shortened, table


def test_columns_are_aligned_and_cells_may_have_several_lines():
    assert table(("a", "long header"), [("first\ncell", 1), ("", "x\ny")]).splitlines() == [
        "a      long header",
        "-----  -----------",
        "first  1",
        "cell",
        "       x",
        "       y",
    ]


def test_table_without_rows_is_its_header():
    assert table(("a", "b"), []) == "a  b\n-  -"


def test_marks_fall_back_where_the_terminal_has_no_unicode(monkeypatch):
    for encoding, marks in (("utf-8", ["✓", "✗", ""]), ("ascii", ["+", "-", ""])):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        assert [mark(right) for right in (True, False, None)] == marks


def test_box_is_whole_pixels():
    assert box_text((0.4, 1.6, 2.0, 3.0)) == "(0, 2, 2, 3)"


def test_path_error_names_the_path_and_the_reason(tmp_path):
    try:
        (tmp_path / "nowhere").read_text()
    except FileNotFoundError as error:
        assert error_text(error) == f"{tmp_path / 'nowhere'}: No such file or directory"


def test_long_answer_is_cut_to_one_line():
    assert shortened("a\nb  c") == "a b c"
    assert shortened("x" * 32) == "x" * 32 and shortened("x" * 33) == "x" * 29 + "..."
