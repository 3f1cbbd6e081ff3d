"""Every system can be profiled, its stages are those of its calls, and what is changed at load is what runs."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from libra_ray.budget import stopwatch
from libra_ray.budget.profile import measured_profile, setting_of, still_holds
from libra_ray.budget.records import GATEWAY, REST, ROBOT, TRANSPORT, WHOLE
from libra_ray.budget.stopwatch import timings, watched
from libra_ray.budget.wire import noisy
from libra_ray.common.json_text import dump, parse
from libra_ray.inference import engine as engines
from libra_ray.inference.recording import CallAgain
from libra_ray.model.registry import SYSTEMS
from libra_ray.policy import act, load_policy
from tests.model.builders import save_checkpoint, tiny_model
from tests.model.test_systems import FORMS, TOY

DENOISING = ("libra", "monolithic", "coarse_to_fine", "hierarchy", "anchor_libra_two_levels")
PROFILED = (*SYSTEMS, TOY, "anchor_libra_two_levels", "anchor_own_context")
NAMED = {
    "planner": {"preprocessing", "vision-language encoder", "planner head"},
    "refiner": {"preprocessing", "refiner context", "noise levels", "denoising step"},
}
"""The stages of Libra's levels."""


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    monkeypatch.setattr(stopwatch, "CALLS", 3)


@pytest.fixture
def folder(request, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model(FORMS[request.param]))
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("folder", PROFILED, indirect=True)
def test_every_system_is_profiled_by_its_levels_and_stages(folder, request):
    profile = measured_profile(folder, "cpu", threads=1, jpeg=80, batches=(1, 2))
    policy = load_policy(folder)
    levels, (setting, steps) = [level.name for level in policy.levels], setting_of(policy.model)
    assert list(profile.calls) == levels
    for name, calls in profile.calls.items():
        denoises = name == profile.denoising_level
        assert {c.steps for c in calls} == ({1, steps, 2 * steps} if denoises else {0})
        assert {c.batch for c in calls} == {1, 2}
    assert bool(setting) == any(f"[{name}]" in request.node.name for name in DENOISING)
    assert (profile.denoising_setting, profile.denoising_steps) == (setting, steps)
    by_place = {}
    for row in profile.components:
        by_place.setdefault(row.where, {}).setdefault(row.batch, {})[row.name] = row
        assert 0 <= row.p50_ms <= row.p95_ms
    assert set(by_place) == {ROBOT, GATEWAY, TRANSPORT, *levels}
    for name in levels:
        for rows in by_place[name].values():
            assert {WHOLE, REST, "preprocessing"} < rows.keys()
            assert rows.keys() >= NAMED.get(name, set())
            assert len(rows) >= 4 or name in ("goal", "path", "motor")
    if profile.denoising_level:
        assert by_place[profile.denoising_level][1]["denoising step"].calls == steps
    assert parse(type(profile), dump(profile), "profile.json") == profile


@pytest.mark.parametrize("folder", DENOISING, indirect=True)
def test_what_is_changed_at_load_is_what_runs(folder):
    """The same weights with other denoising steps, which each are one call of the network."""
    trained = load_policy(folder)
    setting, steps = setting_of(trained.model)
    seen = [noisy(trained.blank())]
    chunks = {}
    for count in (1, steps, 2 * steps):
        policy = load_policy(folder, changes={setting: count})
        assert setting_of(policy.model) == (setting, count)
        assert all(torch.equal(v, policy.model.state_dict()[k]) for k, v in trained.model.state_dict().items())
        with watched(policy.stages(), lambda: None) as found:
            chunks[count] = act(policy, seen)[0].actions
        assert len(found["denoising step"]) == count
    np.testing.assert_array_equal(chunks[steps], act(trained, seen)[0].actions)
    assert not np.array_equal(chunks[1], chunks[steps])


def test_a_change_that_the_weights_do_not_fit_is_refused(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model())
    with pytest.raises(ValueError, match="weights do not fit its configuration"):
        load_policy(tmp_path / "checkpoint", changes={"action.horizon": 7})


def test_a_profile_holds_for_the_same_question_to_the_same_machine(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model({"model.system": "regression"}))
    profile = measured_profile(tmp_path / "checkpoint", "cpu", threads=1, jpeg=0, batches=(1,))
    asked = {"digest": profile.digest, "device": "cpu", "threads": 1, "jpeg": 0}
    assert still_holds(profile, **asked)
    for other in ({"digest": "0" * 64}, {"device": "cuda"}, {"threads": 2}, {"jpeg": 90}):
        assert not still_holds(profile, **asked | other)


def test_a_watched_method_is_timed_wherever_it_is_called_and_left_as_it_was():
    class Owner:
        def double(self, x):
            return 2 * x

        def half(self, x):
            return x / 2

        def twice(self, x):
            return self.double(self.double(x))

    owner = Owner()
    with watched({"doubling": owner.double, "never": owner.half}, lambda: None) as found:
        assert owner.twice(1) == 4
    with pytest.raises(TypeError), watched({"doubling": owner.double}, lambda: None):
        owner.twice(None)
    assert {name: len(ms) for name, ms in found.items()} == {"doubling": 2, "never": 0}
    assert vars(owner) == {}, "nothing is left behind"


def test_the_first_call_is_not_counted(monkeypatch):
    monkeypatch.setattr(stopwatch, "CALLS", 5)
    calls = []
    assert len(timings(lambda: calls.append(1))) == len(calls) - 1 == 5


def test_the_other_process_ends_with_its_input():
    command = [sys.executable, "-m", "libra_ray.budget.echo", "10"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip().isdigit()
        process.stdin.close()
        assert process.wait(60) == 0


def test_what_is_recorded_for_a_gpu_has_stages_all_the_same(tmp_path, monkeypatch):
    """They are those of the networks as written: a recording is one piece. Whole levels are timed as they will run."""
    monkeypatch.setattr(engines, "_recorder", lambda device, how: None if how == "none" else CallAgain(device))
    save_checkpoint(tmp_path / "checkpoint", tiny_model())
    profile = measured_profile(tmp_path / "checkpoint", "cpu", threads=1, jpeg=80, batches=(1,))
    for level in load_policy(tmp_path / "checkpoint").levels:
        assert len([row for row in profile.components if row.where == level.name]) >= 4
        assert profile.calls[level.name]
