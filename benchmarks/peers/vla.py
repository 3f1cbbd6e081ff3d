"""`vla-eval`'s own server (PyPI), which batches across robots, with this policy behind its `predict_batch`.

Run: `python -m benchmarks.peers.vla CHECKPOINT PORT THREADS`
"""

import sys
from typing import Any

from vla_eval.connection import Connection
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import serve
from vla_eval.protocol.numpy_codec import set_image_format
from vla_eval.specs import DimSpec

from benchmarks.peers.work import TIMEOUT_S, Work
from libra_ray.client.protocol import Reply, request
from libra_ray.types import Observation

MAX_BATCH, MAX_WAIT_S = 64, 0.01
"""As many robots as the benchmark has, and the server's own default."""


class LibraModelServer(PredictModelServer):
    """The policy behind vla-eval's interface; whole chunks are answered."""

    def __init__(self, work: Work, max_batch_size: int = MAX_BATCH, max_wait_time: float = MAX_WAIT_S) -> None:
        super().__init__(max_batch_size=max_batch_size, max_wait_time=max_wait_time)
        self._work = work

    def predict_batch(self, obs_batch: list[dict[str, Any]], ctx_batch: list[SessionContext]) -> list[dict[str, Any]]:
        """One chunk per session."""
        sessions = [ctx.session_id for ctx in ctx_batch]
        seen = {session: self._work.observed(obs) for session, obs in zip(sessions, obs_batch, strict=True)}
        chunks = self._work.answer(seen)
        return [{"actions": chunks[session].actions} for session in sessions]

    def get_action_spec(self) -> dict[str, DimSpec]:
        """None is declared."""
        return {}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """None is declared."""
        return {}


class VlaClient:
    """vla-eval's own connection, one per robot; pictures travel raw, as everybody's here (its default is PNG)."""

    def __init__(self, port: int, robot: str) -> None:
        set_image_format("raw")
        self.robot, self.reconnects = robot, 0
        self._connection = Connection(f"ws://127.0.0.1:{port}", timeout=TIMEOUT_S)

    async def connect(self) -> Any:
        """Connect, greet and begin an episode."""
        await self._connection.connect()
        await self._connection.start_episode({})

    async def act(self, observation: Observation, **extra: Any) -> Reply:
        """One request."""
        answer = await self._connection.act(request(observation, **extra))
        return Reply(actions=answer["actions"], first_step=observation.step, robot=self.robot)

    async def close(self) -> None:
        """Disconnect."""
        await self._connection.close()


if __name__ == "__main__":
    serve(LibraModelServer(Work.open(sys.argv[1], int(sys.argv[3]))), "127.0.0.1", int(sys.argv[2]))
