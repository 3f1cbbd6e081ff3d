"""Which weights are meant, and what a replica says that cannot use them; free of torch, which no gateway should wait for."""

from collections.abc import Mapping
from pathlib import Path

REGISTRY = "models:/"


class UnknownWeightsError(RuntimeError):
    """A replica does not hold the checkpoint that it is asked of; another one may, or will soon."""


class FailedComputingError(RuntimeError):
    """A replica could not compute a batch. Errors travel to the gateway, which must know their class without torch."""


def weights_key(user_config: Mapping[str, str]) -> str:
    """One name for the weights that a `user_config` asks for, the same in all deployments."""
    return f"{user_config['checkpoint']}#{user_config.get('revision', '')}"


def located(address: str) -> str:
    """The address in full: replicas may run in another folder.

    Raises:
        ValueError: there is no checkpoint; names those below `runs`.
    """
    if address.startswith(REGISTRY):
        return address
    folder = Path(address).resolve()
    if not (folder / "manifest.json").is_file():
        found = sorted(str(path.parent) for path in Path("runs").glob("*/checkpoint/manifest.json"))
        hint = f"there are {', '.join(found)}" if found else "jobs/pipeline.py makes one"
        raise ValueError(f"no checkpoint at {address!r}; {hint}, or give models:/name@alias of the registry")
    return str(folder)
