"""Tables for the screen."""

import io

from rich.console import Console

from dpo.report.tables import columns, on_screen, seeds_in_words


def shown(table, width=40):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_a_cell_may_have_lines_and_has_no_control_sequences():
    text = shown(on_screen("title", [["settings", "n"], ["a=1\nb=2\x1b[2J", "3"]], note="[note]"))
    lines = [line.split() for line in text.splitlines()]
    assert ["a=1", "3"] in lines
    assert ["b=2\\x1b[2J"] in lines
    assert "[note]" in text


def test_names_stand_on_the_left_and_numbers_on_the_right():
    table = on_screen("title", [["a", "b", "c"], ["x", "y", "1"]], num_names=2)
    assert [column.justify for column in table.columns] == ["left", "left", "right"]


def test_columns_are_taken_by_name():
    assert columns([["a", "b", "c"], ["1", "2", "3"]], ("c", "a")) == [["c", "a"], ["3", "1"]]


def test_seeds_are_counted_in_words():
    assert (seeds_in_words([7]), seeds_in_words([1, 2])) == ("one seed", "2 seeds")
