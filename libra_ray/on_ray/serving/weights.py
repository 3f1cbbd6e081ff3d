"""Which weights are meant; free of torch, so that a gateway starts in no time."""

from collections.abc import Mapping
from pathlib import Path

REGISTRY = "models:/"


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
