"""Stub policies of two levels, as Libra has them."""

import numpy as np

from libra_ray.types import Intent, Level


def dual_levels(plan_steps, horizon):
    """A planner's and a refiner's level."""
    return Level(name="planner", covers=plan_steps), Level(name="refiner", covers=horizon, reads="planner")


def plan_of(tokens, first_step):
    """The planner's intent of the given tokens `(L, D)`."""
    tokens = np.asarray(tokens)
    return Intent(level="planner", values={"tokens": tokens}, first_step=first_step, covers=len(tokens))


class DualStub:
    """Maps `infer` to `plan(observations)` and `refine(observations, plans)` of a subclass, which also sets `levels`."""

    def infer(self, level, observations, above):
        return self.plan(observations) if level == "planner" else self.refine(observations, above)


def plan(policy, seen):
    """The planner's intents."""
    return policy.infer("planner", seen, [None] * len(seen))


def refine(policy, seen, plans):
    """The refiner's chunks."""
    return policy.infer("refiner", seen, plans)
