"""The study of late networks: every cell can be run, and its page says what was measured."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from benchmarks import asynchrony_page, systems_page
from benchmarks.asynchrony import begun, cell_config, config_of, kept, settings_of
from benchmarks.asynchrony_page import (
    CURVES,
    DELAYS,
    DOMAINS,
    PANELS,
    SPLIT,
    VARIANTS,
    Cell,
    by_place,
    differences,
    plot,
    publish,
)
from benchmarks.files import write_result
from benchmarks.results_table import BEGIN
from libra_ray.common.json_text import plain


def cell(curve, delay, seed, share, episodes=20):
    """A policy that succeeds in so many of its episodes."""
    draws = np.random.default_rng(seed).random((2, episodes))
    outcomes = {f"task {i}": "".join("1" if draw < share else "0" for draw in row) for i, row in enumerate(draws)}
    return Cell(
        panel=curve.panel, label=curve.label, delay_steps=delay, seed=seed, cpu="a CPU", outcomes=outcomes, held_share=0.0,
        intent_age_p50=3.0, train_s=1.0,
    )  # fmt: skip


def measured(falls):
    """Two seeds of every curve; `falls` gives a curve's success by its delay."""
    return [cell(c, d, seed, falls(c, d)) for c, d, seed in product(CURVES, DELAYS, range(2))]


@pytest.mark.parametrize("name", DOMAINS)
def test_every_cell_is_a_configuration_that_can_be_run(name):
    for curve, delay in product(CURVES, DELAYS):
        config = cell_config(config_of(DOMAINS[name], curve.variant, 1, {}), curve, delay, 20)
        late = config.delay.chunk_steps if curve.whole else config.delay.intent_steps
        assert late == delay
        assert config.train.seed == 1
    assert {curve.variant for curve in CURVES} == set(VARIANTS)


def test_every_study_has_its_place_on_its_page():
    """Looked for only after the first policy was trained."""
    for module, script in ((asynchrony_page, "asynchrony.py"), (systems_page, "systems.py")):
        for name in module.DOMAINS:
            assert BEGIN.format(f"{script} {name}") in module.PAGE.read_text()


def test_systems_of_a_pretrained_domain_begin_with_its_backbone(tmp_path):
    for name, domain in DOMAINS.items():
        for variant in VARIANTS:
            config = config_of(domain, variant, 0, begun(domain, variant, tmp_path, {}))
            assert bool(config.train.start_from) == (name != "metaworld" and variant != "cloning")


def test_no_two_curves_share_a_folder():
    assert len({(curve.variant, curve.slug) for curve in CURVES}) == len(CURVES)


def test_a_policy_that_is_met_in_time_is_the_same_whatever_would_be_late():
    """With no delay, a curve differs from its twin by the rule alone."""
    for curve in CURVES:
        if curve.whole:
            config = cell_config(config_of(DOMAINS["metaworld"], curve.variant, 0, {}), curve, 0, 1)
            assert (config.delay.chunk_steps, config.control.committed_steps) == (0, 0)


def test_the_page_shows_every_curve_and_what_is_lost(tmp_path):
    cells = measured(lambda curve, delay: 0.9 if curve.label == "dual, overlap" else 0.9 - 0.04 * delay)
    text = publish(tmp_path / "study.json", "metaworld", cells, page=False)
    for panel in PANELS:
        assert panel in text
    for curve in CURVES:
        assert f"| {curve.label} | 2 |" in text
    found = differences(by_place(cells))
    own = next(line for line in found.splitlines() if line.startswith("| dual, overlap, against itself in time"))
    assert own.count("+0.00 (+0.00–+0.00)") == len(DELAYS)
    apart = next(line for line in found.splitlines() if line.startswith("| dual, overlap minus monolithic |"))
    assert "+0.00" in apart.split("|")[2]
    assert float(apart.split("|")[-2].split()[0]) > 0.5
    assert (tmp_path / "study.svg").read_text().count("<svg") == 1


def test_what_is_not_measured_yet_is_a_dash(tmp_path):
    first = [cell(CURVES[0], 0, 0, 1.0)]
    text = publish(tmp_path / "study.json", "metaworld", first, page=False)
    assert "| – |" in text
    assert [panel for panel in PANELS if f"**{panel}**" in text] == [SPLIT], "beside the reference there is nothing yet"
    assert "control steps late" in plot(by_place(first), "metaworld")
    assert publish(tmp_path / "study.json", "metaworld", [], page=False) == "no cell is measured yet"


def test_a_study_whose_tasks_or_data_are_others_now_is_another_one(tmp_path):
    out, domain = tmp_path / "study.json", DOMAINS["tabletop"]
    write_result(out, {"settings": settings_of(domain, 20, {}), "cells": []})
    assert kept(out, settings_of(domain, 20, {})) == []
    fewer = replace(domain, changes={**domain.changes, "record.episodes_per_task": 250})
    with pytest.raises(ValueError, match="was measured with"):
        kept(out, settings_of(fewer, 20, {}))


def test_a_study_goes_on_only_under_the_same_settings(tmp_path):
    out, settings = tmp_path / "study.json", {"episodes": 20}
    cells = [cell(CURVES[0], 0, 0, 1.0)]
    write_result(out, {"settings": settings, "cells": [plain(each) for each in cells]})
    assert kept(out, settings) == cells
    with pytest.raises(ValueError, match="give the same, or another --out"):
        kept(out, {"episodes": 5})
    assert kept(tmp_path / "none.json", settings) == []


def test_the_first_panel_has_the_three_kinds_of_policy():
    """What the split is for cannot be seen without those that have none."""
    shown = {curve.variant for curve in CURVES if curve.panel == SPLIT}
    assert {"late", "monolithic", "cloning"} <= shown


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
def test_a_cell_has_a_hundred_episodes(domain):
    assert domain.episodes * len(config_of(domain, "late", 0, {}).sim.tasks) >= 100
