"""What every simulator checks of the values it is given."""

import numpy as np
from numpy.typing import NDArray


def checked_seed(seed: int) -> int:
    """The seed of an episode.

    Raises:
        ValueError: it is negative or no integer.
    """
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed {seed!r} is not an integer of at least 0")
    return int(seed)


def checked_action(action: NDArray[np.float32], dims: int) -> NDArray[np.float32]:
    """The action `(dims,)`, float32, clipped to [-1, 1].

    Raises:
        ValueError: it is not `(dims,)` finite numbers.
    """
    array = np.asarray(action)
    if array.shape != (dims,) or not np.issubdtype(array.dtype, np.number):
        raise ValueError(f"an action is an array of {dims} numbers, shape ({dims},); got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"an action's numbers must be finite; got {array.tolist()}")
    return np.clip(array, -1, 1).astype(np.float32)
