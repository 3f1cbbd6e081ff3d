"""How far answers in bf16 may be from those in fp32 (docs/serving.md says so)."""

import numpy as np

EQUAL_SHARE = 0.95
"""Of whole numbers that intents hold, as classes: near a tie the other one may win."""
MEAN_DIFFERENCE = 0.02
"""Of the range of what is a real number, where the same intents are read, on average over a batch."""


def differences(policy, other, seen):
    """Per level: the share of equal whole numbers, and the mean difference of real ones as a share of 2, the actions' range.

    Both read the intents of `policy`.
    """
    intents, found = {None: [None] * len(seen)}, {}
    span = policy.pipeline.outputs_action(np.ones((1, policy.model.shape.action_dim), np.float32))
    span = span - policy.pipeline.outputs_action(-np.ones((1, policy.model.shape.action_dim), np.float32))
    for level in policy.levels:
        mine, theirs = (of.infer(level.name, seen, intents[level.reads]) for of in (policy, other))
        intents[level.name] = mine
        if level is policy.levels[-1]:
            apart = [np.abs(a.actions - b.actions) / span for a, b in zip(mine, theirs, strict=True)]
            found[level.name] = {"actions": float(np.mean(apart))}
            continue
        found[level.name] = {}
        for name in mine[0].values:
            one, two = (np.stack([i.values[name] for i in of]) for of in (mine, theirs))
            real = np.issubdtype(one.dtype, np.floating)
            found[level.name][name] = float(np.abs(one - two).mean() / 2) if real else float((one == two).mean())
            found[level.name][f"{name} are real"] = float(real)
    return found


def within_tolerance(found):
    """Whether all of it is."""
    return all(
        (value >= EQUAL_SHARE if of.get(f"{name} are real") == 0 else value <= MEAN_DIFFERENCE)
        for of in found.values()
        for name, value in of.items()
        if not name.endswith(" are real")
    )
