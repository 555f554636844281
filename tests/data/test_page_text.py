"""Text on a page: as it is, but for what acts."""

import pytest

from dpo.data.files import page_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>&amp;</b>", "<b>&amp;</b>"),
        ("a\nb\tc", "a\nb\tc"),
        ("a\r\nb\rc", "a\nb\\rc"),
        ("\x1b[31m\x00\x9b", "\\x1b[31m\\x00\\x9b"),
        ("\u202eabc\u202c\u2066x\u2069", "\\u202eabc\\u202c\\u2066x\\u2069"),
        ("a\u2028b\u2029c", "a\\u2028b\\u2029c"),
        ("\ud800", "\\ud800"),
        ("שלום مرحبا می\u200cخواهم 👩‍👧", "שלום مرحبا می\u200cخواهم 👩‍👧"),
    ],
    ids=[
        *("markup", "space", "line ends", "controls", "reordering", "separators"),
        *("a lone surrogate", "languages"),
    ],
)
def test_text_is_shown_as_it_is_but_for_what_acts(text, shown):
    assert page_text(text) == shown
