"""The study of systems: every policy can be made, the smallest study runs and goes on, and its tables say what was measured."""

import re
import sys
from itertools import product

import numpy as np
import pytest

from benchmarks import systems, systems_pace, systems_page
from benchmarks.pretraining import BACKBONES, PART
from benchmarks.systems_pace import ROUNDS, least_in_turn
from benchmarks.systems_page import NOTHING, against_best, publish
from benchmarks.systems_tables import (
    ABLATIONS,
    ALONE,
    DOMAINS,
    LATENCY,
    MONOLITHIC,
    POLICY,
    REGRESSION,
    TABLES,
    TIMED,
    VARIANTS,
    config_of,
    evaluated_config,
    variants_of,
)
from benchmarks.systems_times import LevelTime, SystemTime
from benchmarks.systems_training import Cell, Course, Played, paces_of
from libra_ray.budget import stopwatch
from libra_ray.budget.records import Candidate
from libra_ray.common.json_text import read
from libra_ray.config.overrides import flatten
from libra_ray.model.registry import SYSTEMS, make_system, system_class
from libra_ray.types import RobotShape

SHAPE = RobotShape(action_dim=4, state_dim=4, cameras=2, subgoals=tuple(f"touch block {i}" for i in range(30)))

SHORT = {"tabletop": 30, "contact": 45}
"""Control steps in which an expert is done, so that who never is does not go on for long."""


def played(seed, share, tasks, **more):
    draws = np.random.default_rng(seed).random((len(tasks), 40))
    outcomes = {task: "".join("1" if draw < share else "0" for draw in row) for task, row in zip(tasks, draws, strict=True)}
    return Played(**{"outcomes": outcomes, "errors_mm": {}, "parts_done": {}, "measures": {}} | more)


def cell(variant, seed, shares, tasks, **more):
    """A policy that succeeds in so many of its episodes, as each of its controllers."""
    found = {name: played(seed, shares.get(name, 0.5), tasks, **more) for name in VARIANTS[variant].controllers}
    return Cell(
        variant=variant, seed=seed, machine="a CPU", parameters=1_500_000, steps=1000 + seed, step_s=0.1, spent_s=100.0,
        held_out={"val_gripper_error": 0.01, "val_gripper_error_anchor": 0.04} if "anchor" in variant else {}, played=found,
    )  # fmt: skip


def ordered(*words):
    """What such a command line asks for."""
    return systems.ordered(systems.parser().parse_args(words))


@pytest.mark.parametrize("name", DOMAINS)
def test_every_policy_is_a_configuration_that_can_be_made(name):
    domain = DOMAINS[name]
    assert {row.variant for table in domain.tables if table != LATENCY for row in TABLES[table]} <= set(VARIANTS)
    for table, seed in product(domain.tables, (0, 2)):
        for variant in variants_of(table, domain):
            config = config_of(domain, variant, seed, {})
            assert evaluated_config(config, domain, 7).sim.tasks == domain.tasks
            assert config.train.seed == seed
            there = {POLICY, *system_class(config.model.system).variants_of(config)}
            assert set(config.evaluate.controllers) <= there


@pytest.mark.parametrize("table", TABLES)
def test_the_rows_of_a_table_are_apart_and_what_they_are_compared_with_is_there(table):
    rows = {row.label: row for row in TABLES[table]}
    assert len(rows) == len(TABLES[table]) == len({(row.variant, row.controller) for row in rows.values()})
    for row in rows.values():
        assert row.controller in VARIANTS[row.variant].controllers
        assert set(row.against) <= set(rows) - {row.label}
    assert any(row.against for row in rows.values())


def test_all_systems_are_ranked_against_the_three_plain_networks():
    asked = {row.variant: row for row in TABLES["ranking"]}
    names = {config_of(DOMAINS["metaworld"], variant, 0, {}).model.system for variant in asked}
    assert {"libra", "coarse_to_fine", "anchor_refine", "experts", "hierarchy"} <= names
    plain = {row.label for row in asked.values() if not row.against}
    assert all(set(row.against) == plain for row in asked.values() if row.against)
    assert len(plain) == 3


def test_an_ablation_differs_from_the_full_recipe_in_one_setting():
    full = flatten(config_of(DOMAINS["tabletop"], "anchor_regression", 0, {}))
    for variant in ABLATIONS.values():
        own = flatten(config_of(DOMAINS["tabletop"], variant, 0, {}))
        changed = {name for name in full if own[name] != full[name]} - {"evaluate.controllers"}
        assert len(changed) == 1
        assert changed.pop().startswith("anchor_refine.")
    assert len({str(VARIANTS[variant].changes) for variant in ABLATIONS.values()}) == 5


def test_every_system_can_begin_with_the_backbone(tmp_path):
    assert set(BACKBONES) == set(SYSTEMS)
    config = {"planner.width": 32, "refiner.width": 32}
    given = make_system(config_of(DOMAINS["tabletop"], "libra", 0, config), SHAPE)
    wanted = {name.removeprefix(PART) for name in given.state_dict() if name.startswith(PART)}
    for variant in dict.fromkeys(row.variant for table in TABLES.values() for row in table):
        model = make_system(own := config_of(DOMAINS["tabletop"], variant, 0, config), SHAPE)
        ours = BACKBONES[own.model.system].partition("=")[0]
        assert {name.removeprefix(ours) for name in model.state_dict() if name.startswith(ours)} == wanted


def test_two_and_three_levels_have_as_many_weights():
    sizes = []
    for variant in variants_of("hierarchy", DOMAINS["chains"]):
        model = make_system(config_of(DOMAINS["chains"], variant, 0, {"planner.width": 32, "refiner.width": 32}), SHAPE)
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]


def test_a_stopped_study_has_as_many_seeds_of_one_policy_as_of_another():
    order = ordered("metaworld", "--seeds", "2")
    wanted = order.cells(())
    assert [seed for seed, _ in wanted] == sorted(seed for seed, _ in wanted)
    assert len(wanted) == len(set(wanted)) == 2 * len({variant for _, variant in wanted})
    known = [cell(variant, seed, {}, DOMAINS["metaworld"].tasks) for seed, variant in wanted[:5]]
    assert order.cells(known) == wanted[5:]
    assert order.times(()) == [name for name in TIMED if name != "hierarchy_three"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tabletop", "--variants", "libre"], "--variants libre: there are cloning, regression"),
        (["chains", "--tables", "ranking"], "--tables ranking: of chains there are hierarchy, latency"),
        (["chains", "--variants", "cloning"], "--variants cloning: none of them is in hierarchy, latency"),
        (["tabletop", "--set", "train.steps=5"], "--set train.steps: give NAME=VALUE of a setting other than model.system"),
        (["tabletop", "--set", "train.lrr=5"], "train.lrr"),
        (["tabletop", "--seconds", "0"], "--seconds 0 must be above 0"),
        (["tabletop", "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["table"], "invalid choice: 'table'"),
    ],
)
def test_what_there_is_not_is_refused_in_a_line(words, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["systems", *words, "--runs", str(tmp_path), "--out", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit) as ended:
        systems.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_page_shows_every_policy_with_its_pairs(tmp_path):
    domain = DOMAINS["tabletop"]
    errors = {"errors_mm": {task: [1.5] * 39 + [None] for task in domain.tasks}}
    better = {"anchor_regression": {POLICY: 0.9, "anchor_only": 0.6}, "regression": {POLICY: 0.6}}
    wanted = ordered("tabletop", "--seeds", "2").cells(())
    cells = [cell(v, seed, better.get(v, {POLICY: 0.5}), domain.tasks, **errors) for seed, v in wanted]
    text = publish(tmp_path / "found.json", "tabletop", cells, [], page=False)
    for table in ("ranking", "anchor", "experts"):
        for row in TABLES[table]:
            assert f"| {row.label} |" in text
            assert all(f"| {row.label} minus {other} |" in text for other in row.against)
        assert (tmp_path / f"found_{table}.svg").read_text().count("<svg") == 1
    assert "2 × 120 | 1.50 M | 1,000/1,001" in text
    gain = next(line for line in text.splitlines() if line.startswith(f"| AnchorRefine over regression minus {REGRESSION} |"))
    assert gain.split("|")[2].strip().startswith("+0.3")
    same = next(line for line in text.splitlines() if line.startswith(f"| AnchorRefine over diffusion minus {MONOLITHIC} |"))
    assert same.split("|")[2].strip() == "+0.00 (+0.00–+0.00)"
    assert re.search(r"\| AnchorRefine over regression \| 0\.\d\d \(.*\| 1\.5 \(.*\| 100 \| 4\.0 % \| 1\.0 % \|", text)
    assert publish(tmp_path / "none.json", "tabletop", [], [], page=False) == NOTHING


def test_the_router_is_set_beside_the_best_expert_of_each_task():
    domain = DOMAINS["tabletop"]
    one = cell("experts_hard", 0, {}, domain.tasks)
    best = {"token": "110", "diffusion": "000", "flow": "001"}
    digits = {name: dict(zip(domain.tasks, of, strict=True)) for name, of in best.items()}
    played = {POLICY: Played(outcomes=dict.fromkeys(domain.tasks, "11"), errors_mm={}, parts_done={}, measures={})}
    for name, of in digits.items():
        outcomes = {task: 2 * digit for task, digit in of.items()}
        played[ALONE[name]] = Played(outcomes=outcomes, errors_mm={}, parts_done={}, measures={})
    one = Cell(**{field: getattr(one, field) for field in one.__dataclass_fields__} | {"played": played})
    assert against_best([one], domain, domain.tasks).count("+0.00 (+0.00–+0.00)") == 4
    assert against_best([], domain, domain.tasks) == ""


def test_latencies_are_shown_by_level_with_what_is_proposed(tmp_path):
    fits = Candidate(
        denoising_steps=4, execute_steps=5, batch=1, ms=21.5, late_steps={}, margin_steps={}, robots=1, most_robots=4
    )
    levels = [
        LevelTime(level=level, batch=b, p50_ms=b + 0.5, p95_ms=b + 1) for level in ("planner", "refiner") for b in (1, 16)
    ]
    common = {"machine": "a CPU", "setting": "refiner.denoising_steps", "denoising_steps": 6, "rule": "overlap"}
    times = [SystemTime(variant="libra", levels=levels, proposal=fits, least_chunks=2, **common)]
    times += [SystemTime(variant="monolithic", levels=levels[:2], proposal=None, least_chunks=None, **common)]
    text = publish(tmp_path / "found.json", "tabletop", [], times, page=False)
    assert "| libra | planner | 1.5 / 2 | 16.5 / 17 |  |  |" in text
    assert "| libra | refiner | 1.5 / 2 | 16.5 / 17 | refiner.denoising_steps 4, execute 5, M ≥ 2, overlap | 21.5 |" in text
    assert "| monolithic | planner | 1.5 / 2 | 16.5 / 17 | nothing fits | – |" in text
    assert (tmp_path / "found_latency.svg").exists()


def test_paces_are_measured_in_turn_and_a_busy_minute_makes_nobody_slower():
    """The neighbours come for the second round: each policy's own pace stands."""
    asked, busy = [], [1.0, 1.7, 1.2]

    def measure(name, seconds):
        asked.append(name)
        return seconds * busy[(len(asked) - 1) // 2]

    found = least_in_turn({"slow": lambda: measure("slow", 0.2), "fast": lambda: measure("fast", 0.1)})
    assert found == {"slow": 0.2, "fast": 0.1}
    assert asked == ["slow", "fast"] * ROUNDS


def test_seeds_on_another_machine_take_as_many_steps(tmp_path):
    """Who goes on with a result finds no folder of its work there: the steps are those of its cells."""
    known = [cell(variant, 0, {}, ("a",)) for variant in ("libra", "cloning")]
    course = Course(
        root=tmp_path, domain=DOMAINS["metaworld"], data=None, changes={}, episodes=1, seconds=60.0, probed_steps=1,
        paced=paces_of(known),
    )  # fmt: skip
    assert course.config("libra", 3).train.steps == round(60.0 / known[0].step_s)
    assert course.pace("cloning") is None
    (tmp_path / "paces.json").write_text('{"libra": 0.2}')
    assert course.config("libra", 3).train.steps == 300, "a study that began here goes on as it began"


@pytest.fixture
def study(ray_cluster, tmp_path, monkeypatch):
    """The smallest study: what it has measured after such a command line."""
    monkeypatch.setattr(systems_page, "RESAMPLES", 10)
    monkeypatch.setattr(stopwatch, "CALLS", 2)
    monkeypatch.setattr(stopwatch, "FEWEST_CALLS", 1)
    monkeypatch.setattr(systems_pace, "ROUNDS", 1)

    def run(*words):
        short = f"sim.max_steps={SHORT[words[0]]}"
        given = ["systems", *words, "--quick", "--seeds", "1", "--runs", str(tmp_path), "--set", short]
        monkeypatch.setattr(sys, "argv", given)
        systems.main()
        return read(systems.Study, tmp_path / f"systems_{words[0]}_quick.json")

    return run


def test_the_smallest_study_runs_and_goes_on(study, monkeypatch, capsys):
    both = ("tabletop", "--variants", "anchor_regression", "experts_hard", "--tables", "anchor", "experts")
    found = study(*both)
    anchored, mixed = found.cells
    assert set(anchored.played) == {POLICY, "anchor_only"}
    assert set(mixed.played) == {POLICY, *ALONE.values()}
    assert anchored.steps == max(1, round(systems.QUICK_SECONDS / anchored.step_s))
    assert {"val_gripper_error", "val_gripper_error_anchor"} <= set(anchored.held_out)
    for task in DOMAINS["tabletop"].tasks:
        assert len(mixed.played[POLICY].outcomes[task]) == len(mixed.played[POLICY].errors_mm[task]) == 1
        assert sum(mixed.played[POLICY].measures[task].values()) == pytest.approx(1, abs=1e-3)
    assert found.times == []
    found = study("tabletop", "--variants", "anchor_regression", "--tables", "latency")
    assert [time.variant for time in found.times] == ["anchor_regression"]
    assert [row.batch for row in found.times[0].levels] == [1, 16]
    capsys.readouterr()

    done = []
    monkeypatch.setattr(Course, "cell", lambda self, variant, seed, pool: done.append(variant) or anchored)
    monkeypatch.setattr(Course, "times", lambda self, variant: pytest.fail("it is timed already"))
    study(*both)
    study("tabletop", "--variants", "anchor_regression", "--tables", "latency")
    assert done == []
    assert "| share of the actions |" in capsys.readouterr().out
    study("tabletop", "--variants", "libra", "anchor_regression", "--tables", "ranking")
    assert done == ["libra"]


def test_the_smallest_study_of_chains_counts_parts(study):
    (found,) = study("contact", "--variants", "hierarchy_three", "--tables", "hierarchy").cells
    assert set(found.played[POLICY].parts_done) == set(DOMAINS["contact"].tasks)
    assert found.played[POLICY].errors_mm == {}
    assert all(0 <= int(done) <= int(task[-1]) for task, of in found.played[POLICY].parts_done.items() for done in of)
