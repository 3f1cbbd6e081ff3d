"""LeRobot's own `PolicyServer` with this policy in the place of `_predict_action_chunk`, started as its `serve` does.

It is made for one robot: one queue of one observation for all who connect. Its clients are what its `RobotClient` sends. A plan
is kept per robot, whose name travels inside the observation; more than LeRobot itself would keep.

Run: `python -m benchmarks.peers.lerobot_server CHECKPOINT PORT THREADS`
"""

import asyncio
import logging
import pickle
import sys
import time
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import torch
from lerobot.async_inference.configs import PolicyServerConfig
from lerobot.async_inference.helpers import TimedAction, TimedObservation
from lerobot.async_inference.policy_server import PolicyServer
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import grpc_channel_options, send_bytes_in_chunks

from benchmarks.peers.work import TIMEOUT_S, Work
from libra_ray.client.protocol import Reply, request
from libra_ray.types import Observation

WORKERS = 4
"""Threads, as in LeRobot's `serve`."""


class LibraPolicyServer(PolicyServer):
    """LeRobot's server around the policy."""

    def __init__(self, work: Work, port: int) -> None:
        # No sleep before an answer: it would only look slower.
        super().__init__(PolicyServerConfig(host="127.0.0.1", port=port, inference_latency=0.0))
        self._work = work

    def _predict_action_chunk(self, observation_t: TimedObservation) -> list[TimedAction]:
        message = observation_t.get_observation()
        chunk = self._work.answer({message["robot"]: self._work.observed(message)})[message["robot"]]
        self.last_processed_obs = observation_t
        actions = list(torch.from_numpy(chunk.actions))
        return self._time_action_chunk(observation_t.get_timestamp(), actions, observation_t.get_timestep())


class LerobotClient:
    """One robot: sends its observation, then asks for actions, as LeRobot's `RobotClient` does."""

    def __init__(self, port: int, robot: str) -> None:
        self.robot, self.reconnects = robot, 0
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", grpc_channel_options())
        self._stub = services_pb2_grpc.AsyncInferenceStub(self._channel)

    async def connect(self) -> Any:
        """Say that this robot is ready; the server forgets what it had queued."""
        async with asyncio.timeout(TIMEOUT_S):
            await self._stub.Ready(services_pb2.Empty())

    async def act(self, observation: Observation, **extra: Any) -> Reply:
        """One request.

        Raises:
            TimeoutError: the server had no observation left to answer.
        """
        seen = request(observation, robot=self.robot, **extra)
        timed = TimedObservation(timestamp=time.time(), timestep=observation.step, observation=seen, must_go=True)
        parts = send_bytes_in_chunks(pickle.dumps(timed), services_pb2.Observation)
        async with asyncio.timeout(TIMEOUT_S):
            await self._stub.SendObservations(parts)
            answer = await self._stub.GetActions(services_pb2.Empty())
        if not answer.data:
            raise TimeoutError("the server had no observation to answer: another robot's request took this one's place")
        actions = np.stack([timed.get_action().numpy() for timed in pickle.loads(answer.data)])  # noqa: S301  (its protocol)
        return Reply(actions=actions, first_step=observation.step, robot=self.robot)

    async def close(self) -> None:
        """Disconnect."""
        await self._channel.close()


def main(checkpoint: str, port: int, threads: int) -> None:
    """Serve until killed."""
    logging.disable(logging.INFO)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=WORKERS))
    policy_server = LibraPolicyServer(Work.open(checkpoint, threads), port)
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(policy_server, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
