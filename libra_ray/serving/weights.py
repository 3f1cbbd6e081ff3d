"""Which weights are meant, and what a replica says that cannot use them; free of torch, which no gateway should wait for."""

import re
from collections.abc import Mapping
from pathlib import Path

from libra_ray.config import TrackingConfig
from libra_ray.config.paths import place
from libra_ray.serving.settings import ServingSettings

REGISTRY = "models:/"
_ONE_VERSION = re.compile(rf"{REGISTRY}([^/]+/[0-9]+|m-[0-9a-f]+)")
RUNS = Path("runs")
"""In it lies the store that is meant where `tracking_uri` is empty."""


class UnknownWeightsError(RuntimeError):
    """A replica does not hold the checkpoint that it is asked of; another one may, or will soon."""


def weights_key(user_config: Mapping[str, str]) -> str:
    """One name for the weights that a `user_config` asks for, the same in all deployments."""
    return f"{user_config['checkpoint']}#{user_config.get('revision', '')}"


def pinned(settings: ServingSettings) -> ServingSettings:
    """The settings with the one checkpoint that is meant now, in full, and all of its levels, where the address was typed.

    Replicas are started in other folders and at other times: a relative folder, or an alias that has moved on, would be
    another checkpoint there, and two levels could hold two. So they are told a folder, or one version.

    Raises:
        ValueError: there is no such checkpoint, or it has no such level or variant.
        TrackingError: the registry's store cannot be used.
    """
    address, store = located(settings.checkpoint), settings.tracking_uri
    folder = Path(address)
    if address.startswith(REGISTRY):
        from libra_ray.tracking import registered, tracking_uri

        tracking = TrackingConfig(uri=store)
        found = registered(address, tracking, RUNS)
        folder = found.folder
        if found.in_place:
            # Found without MLflow, whose import takes seconds.
            address = str(folder)
        else:
            address, store = found.address, tracking_uri(tracking, RUNS)
    from libra_ray.manifest import read_levels

    if settings.variant:
        # What variants there are, only the system's class knows, which needs torch.
        from libra_ray.policy import check_variant

        check_variant(folder, settings.variant)
    levels = read_levels(folder)
    horizon, executed, committed = levels[-1].covers, settings.execute_steps, settings.committed_steps
    at_a_time = f"the {horizon} steps that checkpoint {folder} answers at a time"
    if executed > horizon:
        raise ValueError(f"execute_steps={executed} is more than {at_a_time}; give at most {horizon}")
    if 2 * committed > horizon:
        raise ValueError(f"committed_steps={committed} is more than half of {at_a_time}; give at most {horizon // 2}")
    return settings.with_levels([level.name for level in levels]).model_copy(
        update={"checkpoint": address, "tracking_uri": store}
    )


def folder_of(address: str, tracking_uri: str) -> Path:
    """The folder behind an address that `pinned` gave.

    Raises:
        ValueError: there is no such checkpoint, or the address may mean another one tomorrow.
    """
    if not address.startswith(REGISTRY):
        return Path(address)
    if not _ONE_VERSION.fullmatch(address):
        raise ValueError(
            f"{address!r} may point elsewhere by the time that the next replica looks; give one version, as models:/libra/3"
        )
    from libra_ray.tracking import checkpoint_from_registry

    return checkpoint_from_registry(address, TrackingConfig(uri=tracking_uri), RUNS)


def located(address: str) -> str:
    """The address in full: replicas may run in another folder.

    Raises:
        ValueError: there is no checkpoint; names those below `runs`.
    """
    if address.startswith(REGISTRY):
        return address
    folder = place(address).resolve()
    if not (folder / "manifest.json").is_file():
        found = sorted(str(path.parent) for path in Path("runs").glob("*/checkpoint/manifest.json"))
        hint = f"there are {', '.join(found)}" if found else "jobs/pipeline.py makes one"
        raise ValueError(f"no checkpoint at {address!r}; {hint}, or give models:/name@alias of the registry")
    return str(folder)
