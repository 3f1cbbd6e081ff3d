"""The study of recovery demonstrations: two recordings that differ in nothing else, and what is made of its cells."""

from argparse import Namespace

import pytest

from benchmarks import recovery
from benchmarks.files import write_result
from libra_ray.common.json_text import plain
from libra_ray.config.overrides import flatten


def cell(share: float, seed: int, outcomes: str) -> recovery.Cell:
    return recovery.Cell(
        share=share, seed=seed, cpu="this", outcomes=dict.fromkeys(recovery.TASKS, outcomes),
        errors_mm={task: [1.0, 2.0, None, 90.0] for task in recovery.TASKS}, frames=100, train_s=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, recovery.QUICK])
def test_the_recordings_differ_in_recovery_alone(changes):
    without, with_ = (flatten(recovery.config_of(share, 1, changes)) for share in recovery.SHARES)
    assert {name for name in without if without[name] != with_[name]} == {"record.recovery_share"}
    assert without["record.recovery_share"] == 0
    assert with_["sim.tasks"] == recovery.TASKS
    assert with_["train.seed"] == 1


def test_differences_are_by_pairs_of_the_same_seed():
    cells = [cell(0.0, 0, "0001"), cell(0.5, 0, "0111"), cell(0.0, 1, "1111")]
    assert recovery.gain(cells, "place-1mm").value == 0.5
    assert recovery.gain(cells[:1], "place-1mm") is None
    assert recovery.success(cells[:1], "place-5mm").value == 0.25
    shown = recovery.markdown(cells)
    assert shown.count("| place-") == 4
    assert "+0.50" in shown
    assert recovery.markdown([]).count("\n") == 1


def test_a_stopped_study_keeps_its_cells_and_refuses_others(tmp_path):
    settings, cells = {"train.steps": 5}, [cell(0.0, 0, "01")]
    assert recovery.kept(tmp_path / "none.json", settings) == []
    write_result(tmp_path / "found.json", {"settings": settings, "cells": cells})
    assert plain(recovery.kept(tmp_path / "found.json", settings)) == plain(cells)
    with pytest.raises(ValueError, match="give the same, or another --out"):
        recovery.kept(tmp_path / "found.json", {"train.steps": 6})


@pytest.mark.parametrize("given", ["record.recovery_share=1", "train.seed=2", "sim.tasks=stack", "train.steps"])
def test_what_the_study_varies_itself_is_refused(given):
    assert recovery.settings_given(Namespace(quick=False, set=["train.lr=0.1"])) == {"train.lr": "0.1"}
    with pytest.raises(ValueError, match=r"NAME=VALUE of a setting other than record\.recovery_share"):
        recovery.settings_given(Namespace(quick=False, set=[given]))
