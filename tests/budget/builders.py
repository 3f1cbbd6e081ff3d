"""Profiles that nobody measured, and questions about them."""

from libra_ray.budget.front import Question
from libra_ray.budget.records import BATCHES, GATEWAY, TRANSPORT, LatencyModel, TimedCall
from libra_ray.config import ControlConfig
from tests.policies import dual_levels

MODELS = {
    "planner": LatencyModel(overhead=20.0, per_robot=2.0),
    "refiner": LatencyModel(overhead=3.0, per_robot=0.5, per_step=1.0, per_step_robot=0.1),
    GATEWAY: LatencyModel(overhead=0.2, per_robot=0.1),
    TRANSPORT: LatencyModel(overhead=0.5, per_robot=0.05),
}


def question(control=None, **changes):
    """Of Libra's two levels at 20 Hz; trained with 6 denoising steps, chunks of 5, plans of 2 chunks."""
    asked = {
        "budget_ms": 50.0,
        "control_hz": 20.0,
        "robots": 1,
        "control": ControlConfig(**{"rule": "overlap", **(control or {})}),
        "levels": dual_levels(10, 5),
        "lengthened_by": {"planner": ("action.chunks", 5), "refiner": ("action.horizon", 1)},
        "denoised": "refiner",
        "trained_steps": 6,
        "most_steps": 100,
    }
    return Question(**asked | changes)


def calls(model, steps=(1, 6, 12), noise=lambda: 1.0):
    """What a level of that model would be measured as."""
    return [TimedCall(batch=b, steps=k, p50_ms=model.ms(b, k), p95_ms=model.ms(b, k) * noise()) for k in steps for b in BATCHES]
