"""The gateways' way to the fleet's board, which is one small actor."""

import asyncio
import time
from typing import Any

import ray
from ray.exceptions import RayError

from libra_ray.serving.board import FleetBoard
from libra_ray.serving.fleet_snapshot import FleetSnapshot
from libra_ray.types import Json

BOARD_NAME = "libra_ray_fleet_board"
PATIENCE_S = 2.0
"""A board that does not answer for so long, because it still starts or its node is lost, is done without for now."""


class BoardClient:
    """A gateway's way to the board that all gateways share. A board that died is begun anew; no gateway depends on it.

    Args:
        gateway: this replica's own name.
    """

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway
        self._latest = FleetSnapshot(time=time.time(), gateways=0)
        self._board: Any = None

    async def report(self, snapshot: FleetSnapshot) -> None:
        """Send this gateway's snapshot; to be called once a second."""
        self._latest = snapshot
        await self._ask("report", self._gateway, snapshot)

    async def fleet(self) -> Json:
        """The content of `fleet.json`; without a board, of this gateway alone and without curves."""
        fleet = await self._ask("fleet")
        return fleet if fleet is not None else {**self._latest.to_json(), "history": []}

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            if self._board is None:
                # It costs no CPU, dies with the gateway that started it, and is then started by another.
                options = {"name": BOARD_NAME, "get_if_exists": True, "num_cpus": 0}
                self._board = ray.remote(FleetBoard).options(**options).remote()
            return await asyncio.wait_for(getattr(self._board, method).remote(*arguments), PATIENCE_S)
        except TimeoutError:
            # The handle stays: with its starter's last handle the actor would end.
            return None
        except (RayError, ValueError):
            self._board = None
            return None
