"""The fleet's board: one small actor that adds up the gateways' snapshots, and the live page that shows it."""

import asyncio
import base64
import hashlib
import time
from collections import deque
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import ray
from ray.exceptions import RayError

from libra_ray.on_ray.serving.fleet_snapshot import FleetSnapshot
from libra_ray.types import Json

BOARD_NAME = "libra_ray_fleet_board"
SILENT_S = 5.0
"""A gateway that says nothing for so long is gone."""
HISTORY_S = 180
PATIENCE_S = 2.0
"""A board that does not answer for so long, because it still starts or its node is lost, is done without for now."""


class FleetBoard:
    """The latest snapshot of every gateway replica, and the curves of the last minutes. An actor's class, plain Python.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._latest: dict[str, tuple[float, FleetSnapshot]] = {}
        self._history: deque[tuple[float, Json]] = deque(maxlen=HISTORY_S)
        self._next_point = clock()

    def report(self, gateway: str, snapshot: FleetSnapshot) -> None:
        """A gateway's snapshot replaces its last one; about one call a second and gateway."""
        now = self._clock()
        self._latest[gateway] = (now, snapshot)
        if now >= self._next_point:
            self._next_point = now + 0.9
            self._history.append((now, self._merged().point()))

    def fleet(self) -> Json:
        """The content of `fleet.json`: `FleetSnapshot.to_json` of the whole fleet, and `history`, a point per second."""
        now = self._clock()
        history = [{"seconds_ago": round(now - at, 2), **point} for at, point in self._history]
        return {**self._merged().to_json(), "history": history}

    def _merged(self) -> FleetSnapshot:
        now = self._clock()
        self._latest = {name: known for name, known in self._latest.items() if now - known[0] < SILENT_S}
        return FleetSnapshot.merged((snapshot for _, snapshot in self._latest.values()), time=time.time())


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


@cache
def fleet_page() -> str:
    """The live page: one self-contained HTML text that asks its own server for `fleet.json` every second and nothing else.

    Its Content-Security-Policy lets only its own script and style run, by their hashes.
    """
    folder = files("libra_ray.on_ray.serving")
    page, style, script = (folder.joinpath(f"fleet.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return page.replace("%POLICY%", policy).replace("%STYLE%", style).replace("%SCRIPT%", script)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
