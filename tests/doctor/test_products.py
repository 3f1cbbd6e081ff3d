"""What a job is given is opened as the job would open it; what is broken in it is said."""

import pytest

from libra_ray.config import override, preset
from libra_ray.data.dataset import open_dataset, write_dataset
from libra_ray.doctor import aside, products
from libra_ray.doctor.finding import outcome
from tests.data.builders import make_episode, rename_features
from tests.model import families
from tests.model.builders import save_checkpoint, tiny_model
from tests.model.hugging_face import write_siglip


def asked(**settings):
    return override(preset("debug"), {name.replace("__", "."): str(value) for name, value in settings.items()})


def looked(config, name, data, policy):
    """What the check finds, without the process of its own."""

    def here(function, *arguments, limit_s):
        assert limit_s > 0
        try:
            return function(*arguments)
        except (ValueError, RuntimeError) as error:
            raise aside.AsideError(str(error)) from error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aside, "call", here)
        return outcome(products.checks_of(config, data, policy)[name])


def test_what_is_looked_at_is_what_is_configured_or_there(tmp_path):
    (tmp_path / "dataset").mkdir()
    given = (tmp_path / "dataset", tmp_path / "checkpoint")
    assert list(products.checks_of(asked(), *given)) == ["data set"]
    everything = asked(data__root="a", evaluate__checkpoint="b", planner__backbone="c")
    assert list(products.checks_of(everything, *given)) == ["data set", "checkpoint", "model"]
    for setting in ("planner__backbone", "refiner__encoder", "train__start_from"):
        assert "model" in products.checks_of(asked(**{setting: "c"}), *given)
    assert "model" not in products.checks_of(asked(refiner__encoder="c", refiner__vision="shared"), *given)


@pytest.fixture
def demos(tmp_path):
    episodes = [make_episode(seed=seed, cameras=("observation.image", "observation.images.top")) for seed in range(2)]
    return write_dataset(episodes, tmp_path / "demos", fps=10)


def test_a_data_set_as_the_settings_read_it_and_every_remark_on_it(demos, tmp_path):
    rename_features(demos, action="actions")
    settings = asked(data__root=demos, data__keys="action=actions", data__cameras="observation.images.top")
    good, *remarks = looked(settings, "data set", demos, tmp_path / "none")
    assert good.level == "ok"
    assert f"{demos}: 2 episodes, 24 frames at 10 Hz, observation.images.top, state " in good.found
    assert {finding.level for finding in remarks} == {"warning"}
    said = " ".join(finding.found for finding in remarks)
    assert "observation.image" in said, "a camera is left out"
    assert "action[3]=0.5" in said, "a dimension is constant"
    [finding] = looked(asked(data__root=demos), "data set", demos, tmp_path / "none")
    assert (finding.level, "data.keys" in finding.found + finding.fix) == ("blocker", True)


def test_a_data_set_that_is_none(demos, tmp_path):
    next(demos.rglob("*.mp4")).write_bytes(b"no video")
    for folder, found in ((tmp_path / "none", "does not exist"), (tmp_path, "no meta/info.json"), (demos, "read as a video")):
        [finding] = looked(asked(data__root=folder), "data set", folder, tmp_path / "none")
        assert finding.level == "blocker"
        assert found in finding.found
        assert finding.fix


def test_a_video_that_is_whole_outside_and_broken_inside(demos, tmp_path):
    """Only who decodes a picture can notice."""
    path = next(demos.rglob("*.mp4"))
    content = bytearray(path.read_bytes())
    begin, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[begin:end] = bytes(end - begin)
    path.write_bytes(content)
    open_dataset(demos)
    [finding] = looked(asked(data__root=demos), "data set", demos, tmp_path / "none")
    assert (finding.level, str(path) in finding.found) == ("blocker", True), finding
    assert finding.fix


def test_checkpoints(tmp_path):
    def checked(folder):
        return looked(asked(evaluate__checkpoint=folder), "checkpoint", tmp_path / "none", folder)[0]

    assert "weights.safetensors" in checked(tmp_path).found
    assert checked(tmp_path).fix == "give the folder that training wrote"
    save_checkpoint(tmp_path / "whole", tiny_model(), step=3)
    assert checked(tmp_path / "whole").level == "ok"
    assert "step 3 of" in checked(tmp_path / "whole").found
    _, *levels = looked(asked(control__rule="overlap"), "checkpoint", tmp_path / "none", tmp_path / "whole")
    assert [finding.found.split(":")[0] for finding in levels] == ["planner", "refiner"]
    assert all("ms (one robot)" in finding.found for finding in levels)
    [planner, _] = looked(asked(control__rule="fifo"), "checkpoint", tmp_path / "none", tmp_path / "whole")[1:]
    assert (planner.level, planner.fix.startswith("control.rule=overlap")) == ("warning", True)
    with (tmp_path / "whole" / "config.json").open("a") as file:
        file.write(" ")
    finding = checked(tmp_path / "whole")
    assert (finding.level, "was changed after it was written" in finding.found) == ("blocker", True)
    assert finding.fix.startswith("restore its files")


def write_llava(folder):
    families.write(folder, families.FAMILIES["llava"]())


@pytest.mark.parametrize(("setting", "write"), [("planner__backbone", write_llava), ("refiner__encoder", write_siglip)])
def test_models_as_training_makes_them(tmp_path, setting, write):
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder)
    settings = asked(**{setting: folder, "planner__max_text_tokens": 48})
    [finding] = looked(settings, "model", tmp_path / "none", tmp_path / "none")
    assert (finding.level, str(folder) in finding.found) == ("ok", True), finding
    for file in folder.glob("*config.json"):
        file.unlink()
    [finding] = looked(settings, "model", tmp_path / "none", tmp_path / "none")
    assert finding.level == "blocker"
    assert f"{setting.replace('__', '.')}='{folder}' cannot be loaded" in finding.found
    assert finding.fix.startswith("give `")


def test_a_start_that_does_not_fit_the_data(demos, tmp_path):
    save_checkpoint(tmp_path / "other", tiny_model(), step=3)
    settings = asked(data__root=demos, train__start_from=tmp_path / "other")
    [finding] = looked(settings, "model", demos, tmp_path / "none")
    assert (finding.level, "is a checkpoint of another robot" in finding.found) == ("blocker", True)
    assert finding.fix.startswith("give --train.start_parts")
