"""The chosen cameras and the names of a user's own data set go all the way: into training, the checkpoint and the policy."""

import numpy as np
import torch

from libra_ray import checkpoint
from libra_ray.config import override, preset
from libra_ray.policy import load_policy
from libra_ray.training.data import TrainingData
from libra_ray.types import ACTION_KEY, Observation
from tests.data.builders import edit_info, make_images, rename_features
from tests.policies import plan

FRONT, SIDE = "observation.images.front", "observation.images.side"


def test_a_policy_knows_the_cameras_by_their_new_names_and_in_the_chosen_order(tmp_path):
    pictures = {key: np.full((16, 16, 3), value, np.uint8) for key, value in (("left", 10), ("observation.images.side", 20))}
    root = make_images(tmp_path / "demos", {**pictures, "observation.images.other": np.zeros((16, 16, 3), np.uint8)})
    rename_features(root, action="actions", left="image")
    edit_info(root, fps=29.97)
    changes = {"data.keys": f"action=actions,{FRONT}=image", "data.cameras": f"{SIDE},{FRONT}"}
    data = TrainingData.open(override(preset("debug"), changes), root, tmp_path / "frames")
    assert data.frames[:, 0, 0, 0, 0].tolist() == [20, 10]
    model = data.make_model()
    checkpoint.save(tmp_path / "checkpoint", model, model.state_dict(), data.stats, data.spec, 1)
    manifest = checkpoint.read_manifest(tmp_path / "checkpoint")
    assert manifest.image_keys == (SIDE, FRONT)
    assert manifest.control_hz == 29.97
    assert data.demonstrations.features.keys() & {ACTION_KEY, "actions", "image"} == {ACTION_KEY}

    size = data.config.data.image_size
    shown = {key: np.full((size, size, 3), 10, np.uint8) for key in (FRONT, SIDE, "observation.images.unknown")}
    policy = load_policy(tmp_path / "checkpoint")
    with torch.inference_mode():
        (intent,) = plan(policy, [Observation(images=shown, state=data.demonstrations.state[0], instruction="wait", step=0)])
    assert intent.values["tokens"].shape == (data.config.action.plan_steps, 4)
