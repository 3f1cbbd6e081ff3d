"""What the benchmark of the starting noise changes of a policy."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.noise import with_noise
from libra_ray import policy as policies
from libra_ray.policy import SystemPolicy, act
from libra_ray.types import Observation
from tests.model.builders import save_checkpoint, tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("noise") / "checkpoint"
    save_checkpoint(folder, tiny_model())
    return folder


def answers(policy: SystemPolicy, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Chunks of one observation under different draws of the starting noise."""
    manifest, size = policy.source.manifest, policy.source.config.data.image_size
    images = {key: np.full((size, size, 3), 90, np.uint8) for key in manifest.image_keys}
    state = np.zeros(manifest.shape.state_dim, np.float32)
    seen = Observation(images=images, state=state, instruction=manifest.instructions[0])
    drawn, found = policies.starting_noise, []
    for sign in (1, -1):
        with monkeypatch.context() as patch:
            patch.setattr(policies, "starting_noise", lambda *of, s=sign: None if (n := drawn(*of)) is None else s * n)
            found.append(act(policy, [seen])[0].actions)
    return found


@pytest.mark.parametrize(("scale", "same"), [(1.0, False), (0.0, True)])
def test_without_its_scale_the_noise_is_nothing(checkpoint, monkeypatch, scale, same):
    one, other = answers(with_noise(checkpoint, scale), monkeypatch)
    assert np.array_equal(one, other) == same
