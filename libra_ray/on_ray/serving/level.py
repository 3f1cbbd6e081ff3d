"""A level's replica as Serve starts it: it answers by Serve's ways, and the gateways of its machine directly too."""

from collections.abc import Mapping
from typing import Any

from ray import serve

from libra_ray.on_ray import ray_private
from libra_ray.serving.local_calls import LocalCallServer, socket_name
from libra_ray.serving.replica import LevelReplica

LEAVE_S = 3.0


class AnsweringLocally:
    """Mixed into a level's class, before it: opens its socket as soon as it holds its first weights."""

    _local: LocalCallServer | None = None

    async def reconfigure(self, user_config: Mapping[str, str]) -> None:
        """As the level does."""
        level: Any = super()
        await level.reconfigure(user_config)
        if self._local is None:
            self._local, own = LocalCallServer(level.infer), serve.get_replica_context()
            name = socket_name(own.app_name, own.deployment, own.replica_tag)
            await self._local.open(ray_private.sockets_folder() / name)

    async def __del__(self) -> None:
        """Drain."""
        if self._local is not None:
            await self._local.close(LEAVE_S)


class ServedLevel(AnsweringLocally, LevelReplica):
    """What serves a level."""
