"""A data set made ready: odd ones train, and what a reader would not expect of them is said; what cannot be told is refused."""

import re

import numpy as np
import pytest
import torch

from libra_ray.config import Config, override, preset
from libra_ray.data.dataset import write_dataset
from libra_ray.data.fingerprint import Fingerprint
from libra_ray.model.parts.backbone import Text
from libra_ray.training.data import TrainingData, distinct_tokens
from libra_ray.training.fit import Trainer
from tests.data.builders import make_episode
from tests.training.builders import training_data


def config(**changes: object) -> Config:
    few = {"train.steps": 3, "train.batch_size": 4, "train.log_every": 1}
    return override(preset("debug"), few | {name.replace("__", "."): value for name, value in changes.items()})


@pytest.mark.parametrize("normalisation", ["min_max", "quantile"])
def test_an_episode_of_one_frame_and_constant_dimensions_train(tmp_path, normalisation):
    """The windows of one frame are padded and masked; a dimension without a range divides nothing."""
    root = write_dataset([make_episode(length=1, seed=n, instruction=f"task {n}") for n in range(2)], tmp_path / "d", fps=10)
    data = TrainingData.open(config(data__normalisation=normalisation), root, tmp_path / "frames")
    assert data.remarks() == [
        "constant in all training episodes, and so it comes out of the policy as it is: action[3]=0.5",
        "constant in all training episodes, and so it says nothing to the policy: observation.state[1]=0",
        "nothing is held out, for no instruction has an episode to spare: there will be no offline measures",
    ]
    assert data.validator(torch.device("cpu")) is None
    model = data.make_model()
    windows = data.windows(model, data.split.train)
    batch = windows.batch(np.array([0, 1, 0, 1]), np.random.default_rng(0))
    assert batch.action_mask.sum(dim=1).tolist() == [1] * 4
    assert all(torch.isfinite(part).all() for part in (batch.actions, batch.state, batch.plan_state))
    rows = [progress.metrics for progress in Trainer(model, device=torch.device("cpu")).run([batch] * 3)]
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_nothing_is_said_of_ordinary_data(tmp_path):
    root = write_dataset([make_episode(seed=n, state_dim=2, action_dim=4) for n in range(3)], tmp_path / "d", fps=10)
    remarks = TrainingData.open(config(), root, None).remarks()
    assert [remark for remark in remarks if "action[3]" not in remark] == []
    assert not list(tmp_path.rglob("*.npy")), "who only looks decodes nothing"


def test_other_data_than_at_the_beginning_are_refused_before_they_are_decoded(tmp_path):
    root = write_dataset([make_episode()], tmp_path / "d", fps=10)
    before = TrainingData.open(config(), root, tmp_path / "frames").fingerprint
    TrainingData.open(config(), root, tmp_path / "frames", before)
    other = Fingerprint(episodes=2, frames=before.frames, content=before.content)
    with pytest.raises(ValueError, match=r"it has 1 episodes \(then 2\)"):
        TrainingData.open(config(), root, tmp_path / "unused", other)
    assert not (tmp_path / "unused").exists()


def test_two_instructions_must_not_be_the_same_to_the_policy():
    """As of words that a vocabulary does not hold; capitals and spaces at the ends are no other task."""

    def latin_only(texts: list[str]) -> Text:
        ids = torch.tensor([[ord(c) if ord(c) < 128 else 1 for c in text.strip().lower().ljust(8)] for text in texts])
        return Text(ids=ids, mask=ids > 0)

    ids, mask = distinct_tokens(latin_only, ["open", "Open ", "close", ""])
    assert (ids.shape, mask.all()) == ((4, 8), True)
    with pytest.raises(ValueError, match=r"makes the same tokens of '打开' and '关上'"):
        distinct_tokens(latin_only, ["open", "打开", "关上"])


@pytest.mark.parametrize(("pretrained", "count"), [([], 9), ([torch.nn.Identity()], 4)])
def test_pretrained_networks_are_measured_on_fewer_windows_and_always_on_the_same(monkeypatch, pretrained, count):
    """Beside their optimiser a GPU has no room for more; statistics are of all windows all the same."""
    for name, value in (("VALIDATION_WINDOWS", 9), ("FEW_WINDOWS", 4), ("pretrained_layers", lambda _: pretrained)):
        monkeypatch.setattr(f"libra_ray.training.data.{name}", value)
    data = training_data(config())
    model, seen = data.make_model().eval(), []
    monkeypatch.setattr(model, "measure", lambda batch, everything: seen.append((batch.images, len(everything))) or {})
    validate = data.validator(torch.device("cpu"))
    assert validate(model) == validate(model) == {}
    (first, all_of_them), (second, _) = seen
    assert len(first) == count < all_of_them
    assert torch.equal(first, second)


def test_single_values_far_outside_all_others_are_said(tmp_path):
    episodes = [make_episode(length=60, seed=n) for n in range(3)]
    root = write_dataset(episodes, tmp_path / "sound", fps=10)
    assert "far outside" not in str(TrainingData.open(config(data__holdout_share=0), root, None).remarks())
    episodes[1].steps[7].action.label[0] = 1e6
    root = write_dataset(episodes, tmp_path / "wild", fps=10)
    said = r"far outside all others.*: action\[0\] from -\d\S* to 1e\+06; .*data\.normalisation quantile"
    assert re.search(said, str(TrainingData.open(config(data__holdout_share=0), root, None).remarks()))
    quantile = config(data__holdout_share=0, data__normalisation="quantile")
    assert "far outside" not in str(TrainingData.open(quantile, root, None).remarks())
