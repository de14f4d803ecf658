"""Tables as text: columns as wide as their widest cell, numbers to the right."""

import pytest

from megatron_ettin.text_table import text_facts, text_table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("nano", "12", "yes"), ("1b", "1,031", "")]
    assert list(text_table(("model", "size", "fits"), rows, numbers=["size"])) == [
        "model   size  fits",
        "-----  -----  ----",
        "nano      12  yes",
        "1b     1,031",
    ]


def test_a_table_without_rows_has_its_names() -> None:
    assert list(text_table(("a", "long"), [])) == ["a  long", "-  ----"]


def test_a_row_has_a_cell_for_each_name() -> None:
    with pytest.raises(ValueError, match="zip"):
        list(text_table(("a", "b"), [("1",)]))


def test_values_of_facts_begin_in_one_column() -> None:
    facts = [("hours", "561.6"), ("parameters", "16,913,600"), ("note", "")]
    assert list(text_facts(facts)) == ["hours       561.6", "parameters  16,913,600", "note"]
    assert list(text_facts([])) == []
