"""The table of tools/compare_layouts.py: a line for each layout, differences from the first."""

from megatron_ettin.evaluation.layouts import Curve, Distance, distance_table


def test_each_layout_has_a_line() -> None:
    curves = {"tp1": Curve([2.0, 1.5], "a", [1.0]), "dp2": Curve([2.0, 1.6], "b", [1.0])}
    distances = {"tp1": Distance(0.0, 0.0, True), "dp2": Distance(1e-6, 0.25, False)}
    names, _, *lines = distance_table(curves, distances)
    assert names.split("  ")[0] == "layout"
    assert [line.split() for line in lines] == [
        ["tp1", "1", "2", "1.500000", "0.0e+00", "0.0e+00", "same"],
        ["dp2", "2", "2", "1.600000", "1.0e-06", "2.5e-01", "DIFFERENT"],
    ]
