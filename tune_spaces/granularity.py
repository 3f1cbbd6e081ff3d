"""The decomposition: N bins, H control steps in a chunk, M chunks in a plan (method.md, section 1).

The first values are the published ones, and N varies fastest: a sweep that is cut short still has a curve over N.
"""

from ray import tune

SPACE = {
    "action.bins": tune.choice([10, 2, 100, 4, 32, 6, 16, 64]),
    "action.horizon": tune.choice([5, 3, 8]),
    "action.chunks": tune.choice([2, 1, 4]),
}
SEARCH = "grid"
