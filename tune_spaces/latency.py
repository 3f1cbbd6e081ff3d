"""What makes a policy good under a given latency: plans of which length, chunks of which length, and what is shown in training.

What is sought is success with the lateness that the command line gives (`--delay.intent_steps 10`, `--delay.trace FILE`, …).
Every chunk length allows every number of executed and of committed steps.
"""

from ray import tune

from libra_ray.config import Config, DelayConfig

SPACE = {
    "action.chunks": tune.choice([4, 2, 3, 6, 8]),
    "action.horizon": tune.choice([5, 8, 10]),
    "control.rule": tune.choice(["overlap", "event", "fifo"]),
    "control.execute_steps": tune.choice([0, 3, 5]),
    "control.committed_steps": tune.choice([0, 1, 2]),
    "refiner.max_committed_steps": tune.choice([0, 2]),
    "refiner.max_staleness": tune.choice([-1, 0, 5]),
    "refiner.condition_dropout": tune.choice([0.1, 0.0, 0.2, 0.3]),
}
SEARCH = "optuna"


def check(config: Config) -> None:
    """Refuse a sweep for success under a latency where there is none.

    Raises:
        ValueError: nothing is late.
    """
    if config.delay == DelayConfig(seed=config.delay.seed):
        raise ValueError(
            "the space latency seeks success under a given latency, but no answer is late; give --delay.intent_steps 10 "
            "(control steps), or --delay.trace with what jobs/drive.py --out wrote"
        )
