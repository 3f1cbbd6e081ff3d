"""The laws of a study's table: figures that are known, intervals that shrink, differences that know their sign."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from libra_ray.report.comparison import Sample, markdown, summarise
from libra_ray.report.interval_plot import Mark, Panel, interval_plot


def sample(label, rates, episodes=100, errors_mm=(), tasks=1):
    """Per seed one success rate, exactly reached."""
    outcomes = [[np.arange(episodes) < round(rate * episodes)] * tasks for rate in rates]
    return Sample(label=label, outcomes=outcomes, errors_mm=errors_mm, facts=(f"fact of {label}",))


def test_values_are_means_and_intervals_hold_them():
    lines = summarise([sample("a", [0.8, 0.9, 1.0], tasks=2), sample("b", [0.2, 0.3, 0.1])])
    assert [line.success.value for line in lines] == pytest.approx([0.9, 0.2])
    assert lines[0].success.seeds == pytest.approx([0.8, 0.9, 1.0])
    for line in lines:
        assert line.success.low <= line.success.value <= line.success.high
    assert lines[0].difference is None
    assert lines[1].difference.value == pytest.approx(-0.7)
    assert lines[1].difference.high < -0.4, "far apart, beyond doubt"


def test_every_line_is_compared_with_the_first():
    lines = summarise([sample("a", [0.5]), sample("b", [0.6]), sample("c", [0.9])])
    assert [line.difference.value for line in lines[1:]] == pytest.approx([0.1, 0.4])


def test_equal_policies_are_not_told_apart():
    again = summarise([sample("a", [0.5, 0.6, 0.4]), sample("b", [0.5, 0.6, 0.4])])[1].difference
    assert again.low < 0 < again.high


def test_more_episodes_and_agreeing_seeds_are_surer():
    def width(rates, episodes):
        mark = summarise([sample("a", rates, episodes)])[0].success
        return mark.high - mark.low

    assert width([0.5] * 3, 400) < 0.6 * width([0.5] * 3, 100)
    assert width([0.5] * 3, 100) < 0.7 * width([0.1, 0.5, 0.9], 100)


def test_errors_are_medians_over_all_episodes():
    errors = [np.full(50, 1.0), np.full(50, 1.0), np.array([1.0] * 20 + [90.0] * 30)]
    line = summarise([sample("a", [0.5] * 3, errors_mm=errors)], draws=400)[0]
    assert line.error_mm.value == 1.0
    assert line.error_mm.seeds == [1.0, 1.0, 90.0]
    assert line.error_mm.low == 1.0 < line.error_mm.high


def test_the_table_has_a_cell_for_every_column():
    plain = markdown(summarise([sample("a", [0.5, 0.5]), sample("b", [1.0])]), ["fact"])
    assert "| a | 0.50 (" in plain
    assert "| 2 × 100 | fact of a |" in plain
    assert "mm" not in plain
    precise = markdown(summarise([sample("a", [0.5], errors_mm=[np.ones(9)]), sample("b", [1.0])], draws=50), ["fact"])
    assert "1.0 (1.0 to 1.0)" in precise
    for text in (plain, precise):
        assert len({row.count("|") for row in text.splitlines()}) == 1


def test_no_seed_is_refused():
    with pytest.raises(ValueError, match="must be one"):
        summarise([sample("a", [])])


def test_the_plot_names_every_row_and_is_the_same_every_time():
    marks = [Mark(label=name, value=0.5, low=0.4, high=0.7, seeds=[0.4, 0.6]) for name in ("dual & co", "monolithic")]
    panels = [
        Panel(title="success", unit="share", marks=marks),
        Panel(title="error", unit="mm", marks=marks, share=False),
        Panel(title="empty", unit="", marks=[]),
    ]
    text = interval_plot(panels)
    words = {element.text for element in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")}
    assert {"dual & co", "monolithic", "success", "error", "share", "mm"} <= words
    assert "empty" not in words
    assert interval_plot(panels) == text
    with pytest.raises(ValueError, match="measure something"):
        interval_plot(panels[2:])
