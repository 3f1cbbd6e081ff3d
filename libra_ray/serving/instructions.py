"""Which instructions the policy takes: each new one is asked about by itself, before it shares a batch with others."""

import asyncio
from collections.abc import Awaitable, Callable

from libra_ray.serving.requests import BadRequestError

KNOWN = 1024
"""Instructions remembered: beyond, those asked about first are forgotten."""


class Instructions:
    """What a fleet may be asked for. Robots with the same words share one question, and its answer.

    Args:
        ask: of weights and an instruction, why it is refused by them; empty where it is taken.
    """

    def __init__(self, ask: Callable[[str, str], Awaitable[str]]) -> None:
        self._ask = ask
        self._known: dict[tuple[str, str], asyncio.Task[str]] = {}

    async def check(self, weights: str, instruction: str) -> None:
        """Return where the policy of these weights takes the instruction.

        Raises:
            BadRequestError: it does not; the text says why.
            NoAnswerError: nobody could say.
        """
        key = (weights, instruction)
        if key not in self._known:
            if len(self._known) >= KNOWN:
                del self._known[next(iter(self._known))]
            self._known[key] = asyncio.ensure_future(self._ask(weights, instruction))
        asked = self._known[key]
        try:
            # A robot that leaves meanwhile does not take the question with it.
            refusal = await asyncio.shield(asked) if not asked.done() else asked.result()
        except Exception:
            if self._known.get(key) is asked:
                del self._known[key]
            raise
        if refusal:
            raise BadRequestError("prompt", refusal)
