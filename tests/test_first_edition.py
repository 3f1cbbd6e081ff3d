"""What the first edition of this code left behind still works: a checkpoint and a model of the MLflow registry."""

from pathlib import Path

import mlflow.pyfunc
import numpy as np

from libra_ray.policy import act, load_policy
from libra_ray.types import ACTION_KEY, IMAGE_KEY, STATE_KEY, Observation

MODEL = Path(__file__).parent / "fixtures" / "first_edition" / "registered_model"
CHECKPOINT = MODEL / "data" / "checkpoint"
ANSWER = Path(__file__).parent / "fixtures" / "first_edition" / "answer.npy"
"""What that edition answered, `(B, H, D)`."""
TOLERANCE = 1e-3
"""Other processors and thread counts add in another order."""


def _inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        IMAGE_KEY: rng.integers(0, 255, (3, 32, 32, 3)).astype(np.uint8),
        STATE_KEY: rng.random((3, 4), np.float32) * 0.2,
        "instruction": np.array(["Reach the goal", "reach", ""]),
    }


def test_a_checkpoint_answers_as_it_did():
    given, policy = _inputs(), load_policy(CHECKPOINT)
    observations = [
        Observation(images={IMAGE_KEY: image}, state=state, instruction=str(words))
        for image, state, words in zip(*given.values(), strict=True)
    ]
    chunks = act(policy, observations)
    np.testing.assert_allclose([chunk.actions for chunk in chunks], np.load(ANSWER), atol=TOLERANCE)


def test_a_registered_model_answers_as_it_did():
    found = mlflow.pyfunc.load_model(str(MODEL)).predict(_inputs())
    np.testing.assert_allclose(found[ACTION_KEY], np.load(ANSWER), atol=TOLERANCE)
