"""Which checkpoint is meant is decided once, where its address was typed: replicas look at other times, in other folders."""

from pathlib import Path

import pytest
import ray

from libra_ray.config import TrackingConfig
from libra_ray.on_ray.serving.app import update_weights
from libra_ray.serving.settings import ServingSettings
from libra_ray.serving.weights import folder_of, pinned
from libra_ray.tracking import Registered, Tracker, TrackingError
from tests.model.builders import save_checkpoint, tiny_model
from tests.tracking.conftest import SCHEMA


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder whose `runs` hold one checkpoint, registered twice: `champion` is the second version, `first` the other."""
    home = tmp_path_factory.mktemp("home")
    save_checkpoint(home / "runs" / "one" / "checkpoint", tiny_model())
    with Tracker.start(TrackingConfig(), home / "runs", "one") as tracker:
        for digest, alias in (("1", "first"), ("2", "champion")):
            tracker.register_model(home / "runs" / "one" / "checkpoint", SCHEMA, digest=digest, alias=alias)
    return home


@pytest.fixture(autouse=True)
def here(home, monkeypatch) -> None:
    monkeypatch.chdir(home)


def test_an_alias_is_looked_up_once(home, tmp_path, monkeypatch):
    """What it points at when the next replica starts is no matter, nor where that runs."""
    found = {name: pinned(ServingSettings(checkpoint=f"models:/libra@{name}")) for name in ("first", "champion")}
    assert pinned(ServingSettings(checkpoint="models:/libra/latest")) == found["champion"] != found["first"]
    monkeypatch.chdir(tmp_path)
    for settings in found.values():
        folder = folder_of(settings.checkpoint, settings.tracking_uri)
        assert home / "runs" / "mlartifacts" in folder.parents
        assert (folder / "manifest.json").is_file()


def test_a_store_whose_files_lie_elsewhere_is_asked_for_one_version(home, tmp_path, monkeypatch):
    def registered(address, tracking, runs):
        return Registered(address="models:/libra/2", folder=Path("runs/one/checkpoint").resolve(), in_place=False)

    monkeypatch.setattr("libra_ray.tracking.registered", registered)
    settings = pinned(ServingSettings(checkpoint="models:/libra@champion"))
    monkeypatch.chdir(tmp_path)
    assert settings.checkpoint == "models:/libra/2"
    assert (folder_of(settings.checkpoint, settings.tracking_uri) / "manifest.json").is_file()


@pytest.mark.parametrize("address", ["models:/libra@champion", "models:/libra/latest", "models:/libra/Production"])
def test_a_replica_takes_no_address_that_may_mean_another_checkpoint_tomorrow(address):
    with pytest.raises(ValueError, match=r"give one version, as models:/libra/3"):
        folder_of(address, "")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("runs/nowhere", "there are runs/one/checkpoint"),
        ("models:/libra@nobody", "registered there: .*models:/libra@champion"),
        ("models:/other/1", "registered there: .*models:/libra@champion"),
        ("models:/", "Not a proper models:/ URI"),
        ("models:/a/b/c", "Not a proper models:/ URI"),
    ],
)
def test_what_is_not_there_is_refused_where_it_is_typed(address, says):
    with pytest.raises((ValueError, TrackingError), match=says) as refused:
        pinned(ServingSettings(checkpoint=address))
    assert "\n" not in str(refused.value)


def test_the_home_folder_is_meant(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    assert pinned(ServingSettings(checkpoint="~/runs/one/checkpoint")).checkpoint == str(home / "runs" / "one" / "checkpoint")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        pinned(ServingSettings(checkpoint=str(tmp_path)))


def test_a_registry_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrackingError, match="there is no MLflow store"):
        pinned(ServingSettings(checkpoint="models:/libra@champion"))


def test_new_weights_need_a_cluster_to_be_named(monkeypatch):
    """A cluster of the program's own would hold no application."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"RAY_ADDRESS is unset.*give auto"):
        update_weights("runs/one/checkpoint")
