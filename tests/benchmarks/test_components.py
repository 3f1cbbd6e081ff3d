"""The study of components: what is compared, and how it is shown."""

import json

import pytest

from benchmarks.component_tables import BENCHES, QUICK, TABLES, config_of
from benchmarks.components import PAGE, README, Cell, Study, for_readme, kept_cells, publish, settings_of, table
from benchmarks.results_table import RESULTS, read_between
from libra_ray.common.json_text import plain, read
from libra_ray.config.overrides import flatten
from libra_ray.runs.results import EpisodeResult

PAPER = {
    "monolithic diffusion": ("monolithic", "shared"),
    "+ own encoder (no tokens)": ("monolithic", "own"),
    "+ refinement (tokens, shared features)": ("libra", "shared"),
    "full": ("libra", "own"),
}


def config(row, seed=0):
    return config_of(BENCHES[row.bench], row.variant, seed, QUICK)


def test_the_component_table_is_the_papers():
    found = {row.label: config(row) for row in TABLES["components"]}
    assert {label: (cell.model.system, cell.refiner.vision) for label, cell in found.items()} == PAPER


@pytest.mark.parametrize("name", TABLES)
def test_the_lines_of_a_table_differ_in_what_they_are_named_after_alone(name):
    flat = [flatten(config(row)) for row in TABLES[name]]
    changed = {key for key in flat[0] if len({str(settings[key]) for settings in flat}) > 1}
    named = {
        # What a refiner without tokens is told of the curriculum means nothing.
        "precision": {"action.bins", "model.system", "evaluate.controllers", "train.curriculum"},
        "precision with the grasp": {"model.system", "evaluate.controllers", "train.curriculum"},
        "components": {"model.system", "refiner.vision"},
        "curriculum": {"train.curriculum"},
        "information": {"action.bins", "refiner.see_language"},
    }
    assert changed == named[name]


def cell(variant="full", seed=0, success=True, error_mm=0.5) -> Cell:
    def episodes(controller, good):
        common = {"task": "place-1mm", "instruction": "place", "controller": controller, "success": good, "steps": 9}
        return [EpisodeResult(**common, seed=s, position_error_mm=mm) for s, mm in enumerate((error_mm, 2 * error_mm))]

    both = {"policy": episodes("policy", success)}
    settings = settings_of(config_of(BENCHES["place"], variant, seed, QUICK))
    both |= {"coarse_only": episodes("coarse_only", False)} if variant == "full" else {}
    return Cell(
        bench="place", variant=variant, seed=seed, cpu="this", settings=settings, parameters=2_000_000, train_s=1.0,
        evaluate_s=1.0, steps=3, difficulty={"val_explained_truth": 0.25}, episodes=both,
    )  # fmt: skip


def test_a_table_shows_what_was_measured_so_far(tmp_path):
    cells = [cell(seed=0), cell(seed=1)]
    assert [line.sample.label for line in table("precision", cells)] == ["coarse + refine, N = 10", "coarse only, N = 10"]
    cells.append(cell("monolithic", success=False, error_mm=30.0))
    lines = table("precision", cells)
    assert [line.success.value for line in lines] == [1, 0, 0]
    assert [line.error_mm.value for line in lines] == [0.75, 0.75, 45.0]
    assert table("curriculum", cells) == []
    assert publish(tmp_path / "none.json", []) == "no cell is measured yet"
    text = publish(tmp_path / "found.json", cells)
    assert (tmp_path / "found.md").read_text() == f"{text}\n"
    assert "monolithic, equal budget" in text
    assert (tmp_path / "found.svg").read_text().startswith("<?xml")
    again = read(Study, tmp_path / "found.json").cells
    assert publish(tmp_path / "again.json", again) == text


def test_the_page_shows_what_was_measured(tmp_path):
    cells = read(Study, RESULTS / "components.json").cells
    text = publish(tmp_path / "again.json", cells)
    assert read_between(PAGE, "components.py") == text
    assert (RESULTS / "components.md").read_text() == f"{text}\n"
    assert read_between(README, "components.py") == for_readme(table("precision", cells))


def test_another_machine_keeps_the_cells_of_the_same_settings(tmp_path):
    cells = [cell(seed=0), cell("monolithic", seed=1)]
    publish(tmp_path / "found.json", cells)
    kept = kept_cells(tmp_path / "found.json", QUICK)
    assert [plain(cell) for cell in kept] == [plain(cell) for cell in cells]
    assert kept_cells(tmp_path / "found.json", {**QUICK, "train.lr": 0.5}) == []
    assert kept_cells(tmp_path / "none.json", QUICK) == []


def test_the_committed_cells_still_count():
    """They were measured when the system and the delay of intents were set under other names."""
    cells = read(Study, RESULTS / "components.json").cells
    assert all({"refiner.condition", "control.planner_delay_steps"} <= cell.settings.keys() for cell in cells)
    kept = kept_cells(RESULTS / "components.json", {})
    assert [(cell.bench, cell.variant, cell.seed) for cell in kept] == [(cell.bench, cell.variant, cell.seed) for cell in cells]


def test_a_cell_from_before_a_setting_existed_had_its_default(tmp_path):
    publish(tmp_path / "found.json", [cell()])
    tree = json.loads((tmp_path / "found.json").read_text())
    del tree["cells"][0]["settings"]["record.episodes_of"]
    (tmp_path / "found.json").write_text(json.dumps(tree))
    assert len(kept_cells(tmp_path / "found.json", QUICK)) == 1
    assert kept_cells(tmp_path / "found.json", {**QUICK, "record.episodes_of": "putdown-1mm=5"}) == []
