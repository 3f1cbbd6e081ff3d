"""What the presets say: the paper's recipe where they are named after it, elsewhere what measured best."""

import pytest

from benchmarks.components import Study, table
from benchmarks.files import RESULTS, read_result
from libra_ray.common.json_text import read
from libra_ray.config import PRESETS, preset
from libra_ray.config.overrides import flatten
from libra_ray.config.presets import PUBLISHED
from libra_ray.control.margin import cycle_of

LETTER = {
    "action.bins": 10,
    "action.horizon": 5,
    "action.chunks": 2,
    "refiner.vision": "own",
    "refiner.see_language": False,
    "refiner.objective": "ddpm",
    "refiner.predicts": "target",
    "refiner.sample_noise": 1.0,
    "refiner.condition_dropout": 0.0,
    "refiner.max_staleness": 0,
    "refiner.max_committed_steps": 0,
    "train.curriculum": "threshold",
    "train.balance": "gradient",
    "control.rule": "fifo",
}
"""What docs/method.md reports of the paper."""


def test_the_published_recipe_is_the_papers():
    found = flatten(preset("published"))
    assert {name: found[name] for name in LETTER} == LETTER
    assert LETTER.keys() <= PRESETS["published"].keys(), "named, whatever the defaults become"


def test_the_published_recipe_is_run_on_the_quickstarts_tasks():
    """Whatever differs between the two is the recipe's."""
    ours, theirs = flatten(preset("quickstart")), flatten(preset("published"))
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert changed - {"preset"} <= PUBLISHED.keys()
    assert {"action.chunks", "refiner.objective", "control.rule"} <= changed


def test_the_table_trains_on_the_tokens_that_measured_better():
    cells = read(Study, RESULTS / "components.json").cells
    lines = {line.sample.label: line.success for line in table("precision", cells)}
    true, sampled = lines["coarse + refine, N = 10"], lines["coarse + refine, N = 10, trained on sampled tokens"]
    assert true.low > sampled.high
    assert preset("tabletop").train.curriculum == "teacher"


@pytest.mark.parametrize("name", ["mt10"])
def test_the_starting_noise_is_the_one_that_measured_better(name):
    rows = read_result(RESULTS / f"noise_{name}.json")["rows"]
    best = max((row for row in rows if row["task"] == "all"), key=lambda row: row["success"])
    assert preset(name).refiner.sample_noise == best["sample_noise"]


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"debug", "published", "paper"}))
def test_a_plan_that_is_late_by_ten_steps_costs_nothing(name):
    """It still covers what is executed when the next one is in use, and the refiner has been shown what it meets there."""
    config, late = preset(name), 10
    covers = config.action.chunks * config.action.horizon
    cycle = cycle_of(covers, late, config.action.horizon, config.action.horizon, config.control, above_last=True)
    assert cycle.replaced <= covers
    assert config.refiner.max_staleness == -1
    assert config.refiner.condition_dropout > 0
