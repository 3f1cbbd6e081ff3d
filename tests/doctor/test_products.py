"""What a job is given is opened as the job would open it; what is broken in it is said."""

import pytest

from libra_ray.config import Config, override, preset
from libra_ray.doctor import aside, products
from tests.model import families
from tests.model.builders import save_checkpoint, tiny_model
from tests.model.hugging_face import write_siglip


def asked(**settings):
    return override(preset("debug"), {name.replace("__", "."): str(value) for name, value in settings.items()})


def tried(function, *arguments):
    """The check, without the process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aside, "call", _here)
        found = function(*arguments)
    return found if isinstance(found, list) else [found]


def _here(function, *arguments, limit_s):
    assert limit_s > 0
    try:
        return function(*arguments)
    except (ValueError, RuntimeError) as error:
        raise aside.AsideError(str(error)) from error


def test_what_is_looked_at_is_what_is_configured_or_there(tmp_path):
    (tmp_path / "dataset").mkdir()
    given = (tmp_path / "dataset", tmp_path / "checkpoint", "")
    assert list(products.checks_of(Config(), *given)) == ["data set"]
    settings = asked(data__root="a", evaluate__checkpoint="b", planner__backbone="c", refiner__encoder="d")
    everything = products.checks_of(settings, tmp_path / "a", tmp_path / "b", "e")
    assert list(everything) == ["data set", "checkpoint", "start from", "backbone", "encoder"]
    shared = override(settings, {"refiner.vision": "shared"})
    assert "encoder" not in products.checks_of(shared, tmp_path / "a", tmp_path / "b", "")


def test_a_data_set_that_is_none(tmp_path):
    for folder, found in ((tmp_path / "none", "does not exist"), (tmp_path, "it has no meta/info.json")):
        [finding] = tried(products.dataset, Config(), folder)
        assert finding.level == "blocker"
        assert found in finding.found


def test_every_remark_on_a_data_set_is_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(aside, "call", lambda *_, **__: ["3 episodes", "the camera top is left out", "state[2] is constant"])
    levels = [finding.level for finding in products.dataset(Config(), tmp_path)]
    assert levels == ["ok", "warning", "warning"]


def test_checkpoints(tmp_path):
    [finding] = tried(products.checkpoint, tmp_path, "start from")
    assert (finding.name, finding.level) == ("start from", "blocker")
    assert "weights.safetensors" in finding.found
    assert finding.fix == "give the folder that training wrote"
    save_checkpoint(tmp_path / "whole", tiny_model(), step=3)
    [finding] = tried(products.checkpoint, tmp_path / "whole")
    assert finding.level == "ok"
    assert "step 3 of" in finding.found
    with (tmp_path / "whole" / "config.json").open("a") as file:
        file.write(" ")
    [finding] = tried(products.checkpoint, tmp_path / "whole")
    assert finding.level == "blocker"
    assert "was changed after it was written" in finding.found
    assert finding.fix.startswith("restore its files")


@pytest.mark.parametrize(
    ("name", "check", "setting", "write"),
    [
        (
            "backbone",
            products.backbone,
            "planner__backbone",
            lambda folder: families.write(folder, families.FAMILIES["llava"]()),
        ),
        ("encoder", products.encoder, "refiner__encoder", write_siglip),
    ],
)
def test_models(tmp_path, name, check, setting, write):
    (tmp_path / "good").mkdir()
    write(tmp_path / "good")
    [finding] = tried(check, asked(**{setting: tmp_path / "good", "planner__max_text_tokens": 16}))
    assert (finding.name, finding.level) == (name, "ok"), finding
    assert "tokens of width" in finding.found
    for file in (tmp_path / "good").glob("*config.json"):
        file.unlink()
    [finding] = tried(check, asked(**{setting: tmp_path / "good"}))
    assert finding.level == "blocker"
    assert setting.replace("__", ".") in finding.found
    assert finding.fix


def test_a_model_that_takes_no_picture(monkeypatch):
    def call(*_, **__):
        raise aside.AsideError("TypeError: forward() got an unexpected argument")

    monkeypatch.setattr(aside, "call", call)
    finding = products.backbone(Config())
    assert (finding.level, finding.fix) == ("blocker", "give another model, or the built-in one")
