"""Search spaces: what is shipped is valid everywhere, what is not is refused at the border by name."""

import itertools
from dataclasses import fields

import pytest
from arguments import Arguments

from libra_ray.config import PRESETS, Config, override, preset
from libra_ray.model.registry import SYSTEMS
from libra_ray.on_ray.sweep import runner
from tests.spaces import SHIPPED, load_space

FILE = "from ray import tune\nSPACE = {{{space}}}\n{more}"


@pytest.fixture
def file(tmp_path):
    def write(space, more=""):
        path = tmp_path / "mine.py"
        path.write_text(FILE.format(space=space, more=more))
        return str(path)

    return write


LATE = {"delay.intent_steps": 10}


@pytest.mark.parametrize(("name", "start"), itertools.product(SHIPPED, PRESETS))
def test_every_point_of_a_shipped_space_is_a_configuration(name, start):
    config = override(preset(start), LATE)
    space = load_space(name, config)
    found = [override(config, point) for point in space.draws(50, seed=1)]
    assert all(a != b for a, b in itertools.pairwise(found))
    assert space.draws(5, seed=3) == space.draws(5, seed=3)


@pytest.mark.parametrize("system", [name for name in SYSTEMS if any(of.name == name for of in fields(Config))])
def test_every_system_with_dials_of_its_own_has_a_space_of_them(system):
    space = load_space(system, preset("debug"))
    assert {point["model.system"] for point in space.draws(5, seed=0)} == {system}
    assert any(name.startswith(f"{system}.") for name in space.domains)


def test_the_grid_is_whole_and_varies_the_first_name_fastest():
    grid = load_space("granularity", preset("debug")).grid()
    assert len(grid) == len({tuple(point.values()) for point in grid}) == 8 * 3 * 3
    assert {point["action.bins"] for point in grid[:8]} == {2, 4, 6, 10, 16, 32, 64, 100}
    assert {(point["action.horizon"], point["action.chunks"]) for point in grid[:8]} == {(5, 2)}, "the published ones first"


def test_joint_is_both_and_seeks_both():
    config = preset("debug")
    joint, parts = load_space("joint", config), [load_space(name, config) for name in ("granularity", "balance")]
    assert set(joint.domains) == {name for part in parts for name in part.domains}
    assert joint.objectives == ("success", "latency_ms")


def test_latency_is_sought_under_the_latency_that_is_given(tmp_path):
    """Every point that there is can be run, each under that latency; without one there is nothing to seek."""
    config = override(preset("debug"), LATE)
    space = load_space("latency", config)
    assert space.objectives == ("success",)
    assert all(override(config, point).delay.intent_steps == 10 for point in space.grid())
    load_space("latency", override(preset("debug"), {"delay.trace": str(tmp_path / "drive.json")}))
    for nothing in ({}, {"delay.seed": 3}):
        with pytest.raises(ValueError, match=r"no answer is late; give --delay\.intent_steps"):
            load_space("latency", override(preset("debug"), nothing))


def test_a_space_of_ones_own(file):
    space = load_space(
        file('"train.lr": tune.loguniform(1e-4, 1e-2), "refiner.depth": tune.grid_search([1, 2])'), preset("debug")
    )
    assert (space.name, space.search, space.objectives) == ("mine", "random", ("success",))
    assert {point["refiner.depth"] for point in space.draws(20, seed=0)} == {1, 2}
    assert len(space.draws(20, seed=0)) == 20


@pytest.mark.parametrize(
    ("space", "more", "said"),
    [
        ('"action.bin": tune.choice([2, 4])', "", "action.bins"),
        ('"action.bins": tune.choice([2, 1])', "", "at least 2"),
        ('"train.balance": tune.choice(["fixed", "equal"])', "", "gradient"),
        ('"train.tau": tune.uniform(0.5, 3.0)', "", r"\[0, 1\]"),
        ('"planner.heads": tune.choice([4, 5])', "", "not a multiple"),
        ('"action.bins": [2, 4]', "", "tune.choice"),
        ('"train.seed": tune.choice([1, 2])', "", "decides"),
        ("", "", "must define SPACE"),
        ('"action.bins": tune.choice([2, 4])', 'OBJECTIVES = ("speed",)', "begin with success"),
        ('"action.bins": tune.choice([2, 4])', 'SEARCH = "gird"', "grid, random, optuna"),
        ('"action.bins": tune.choise([2, 4])', "", "choise"),
        ('"action.bins": tune.choice([2, 4])', "def check(_): raise ValueError('not for this')", "not for this"),
    ],
)
def test_what_does_not_exist_is_refused(space, more, said, file):
    with pytest.raises(ValueError, match=said):
        load_space(file(space, more), preset("debug"))


@pytest.mark.parametrize("error", ["ValueError('not for this')", "KeyError('not for this')"])
def test_what_a_space_refuses_or_breaks_at_ends_a_job_in_one_line(error, file, tmp_path, capsys):
    mine = file('"action.bins": tune.choice([2, 4])', f"def check(_): raise {error}")
    with pytest.raises(SystemExit) as ended, Arguments(run_dir=tmp_path, fresh=False, stage="sweep").refusing():
        load_space(mine, preset("debug"))
    assert (ended.value.code, capsys.readouterr().err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("granularty", "anchor_refine, balance, coarse_to_fine, encoder, experts, granularity, hierarchy, joint"),
        ("nowhere/mine.py", "no such file"),
    ],
)
def test_a_space_that_is_not_there(name, said):
    with pytest.raises(ValueError, match=said):
        load_space(name, preset("debug"))


def test_a_grid_of_what_is_continuous_is_refused():
    with pytest.raises(ValueError, match="lambda_plan"):
        load_space("balance", preset("debug")).grid()


def test_recordings_are_shared_unless_the_space_changes_them(file):
    config = preset("debug")
    assert load_space("joint", config).recordings(config) == [config]
    wrist = load_space(file('"data.image_size": tune.choice([32, 48]), "action.bins": tune.choice([2, 4])'), config)
    assert [c.data.image_size for c in wrist.recordings(config)] == [32, 48]
    with pytest.raises(ValueError, match="noise_std"):
        load_space(file('"record.noise_std": tune.uniform(0.0, 1.0)'), config).recordings(config)


class TestASpaceAndASystem:
    """What a space decides, and what of it means nothing to the system, is not passed over in silence."""

    @staticmethod
    def check(name, monkeypatch, tmp_path, **given):
        monkeypatch.setattr("libra_ray.on_ray.stages.check", lambda *_: None)
        config = override(preset("debug"), {key.replace("__", "."): value for key, value in given.items()})
        runner.check(tmp_path, config, "fifo", load_space(name, config))

    def test_of_another_system_is_refused(self, monkeypatch, tmp_path, capsys):
        with pytest.raises(ValueError, match=r"^space experts is for model.system=experts, not for hierarchy; leave"):
            self.check("experts", monkeypatch, tmp_path, model__system="hierarchy")
        self.check("experts", monkeypatch, tmp_path)
        self.check("granularity", monkeypatch, tmp_path)
        assert capsys.readouterr().err == ""

    def test_what_has_no_effect_is_said(self, monkeypatch, tmp_path, capsys, file):
        self.check("granularity", monkeypatch, tmp_path, model__system="regression", action__horizon=4)
        said = capsys.readouterr().err.splitlines()
        assert said == [
            "sweep: no effect beside space granularity, which decides on them: action.horizon=4",
            "sweep: no effect with model.system=regression: action.bins, which space granularity varies",
        ]
        only = file("'action.bins': tune.choice([2, 4])")
        with pytest.raises(ValueError, match=r"space mine varies nothing else than what has no effect .*action.bins; give"):
            self.check(only, monkeypatch, tmp_path, model__system="regression")
        self.check(only, monkeypatch, tmp_path)

    def test_every_shipped_one_is_named_by_the_job(self):
        from sweep import OPTIONS

        assert all(f"{name}, " in OPTIONS["space"]["help"] for name in SHIPPED)
