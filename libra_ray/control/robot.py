"""The asynchronous controller: when to ask which level, which intent is current, its age, what to do when late.

`RobotControl` is one robot's bookkeeping: pure, without a clock of its own and without a policy. `libra_ray.control.lockstep`
runs it in simulated time, the serving gateway in real time.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from libra_ray.config import ControlConfig
from libra_ray.control.disagreement import Replan
from libra_ray.control.intent_state import Coming, IntentState
from libra_ray.control.surprise import SurpriseDetector
from libra_ray.spec import NO_GRIPPER, UNDECLARED, VectorSpec
from libra_ray.types import Action, ActionChunk, Intent, Level, Observation

OLDEST = 3
"""By default the last level acts under an intent that is at most so many times as old as what it covers."""


@dataclass
class RobotControl:
    """One robot's current intents and chunk, in absolute control steps.

    All levels are asked where the last one is, every `execute_steps`: a served robot shows itself no oftener.

    Rules (`ControlConfig.rule`), for every level above the last:
        fifo: as published. A new intent is asked for when the old one does not cover what is executed next; the last level
            takes H steps per chunk, each with a fresh picture.
        overlap: the level runs freely. A new intent is asked for whenever the level below is asked and none is under way, and
            replaces the rest of the old one at the right step as soon as it arrives.
        event: like overlap, but only where the intent will be used up before the chunk ends from which on the next one could
            be in use, by the time that the last one took; or where what is seen is a surprise
            (`libra_ray.control.surprise`): the world has drifted from what the intent assumed.
    Whatever the rule, another instruction outdates all intents, as a surprise does by `event`: each level is asked anew, after
    the one that it reads. Until they come the robot goes on under those that it has.
    Answers come when whoever drives the robot says; only the first ones of an episode are waited for. Until a chunk is there
    the robot goes on with the one that it has, which is why the next one is asked for `committed_steps` before that ends.
    Past an intent's end the last level goes on by what it sees, with nothing known of the intent, until that is older than
    `max_intent_age_steps`. Only then the last action is held, marked and counted.

    Args:
        levels: of the policy, slow to fast.
        action: what its actions mean, as far as that is declared.

    Attributes:
        chunk: what it executes, or would if it were asked now.
        episode: the seed of its episode, where it has one.
    """

    control: ControlConfig
    levels: tuple[Level, ...]
    chunk: ActionChunk | None = None
    episode: int = 0
    action: VectorSpec = UNDECLARED
    _states: dict[str, IntentState] = field(default_factory=dict)
    _detector: SurpriseDetector = field(default_factory=SurpriseDetector, compare=False)
    _outdated_by: int | None = None
    _instruction: str | None = None
    _observed_step: int | None = None
    _last: Action | None = None
    _coming_chunk: tuple[int, ActionChunk] | None = None

    def __post_init__(self) -> None:
        """Nothing is known of any level."""
        self._level = {level.name: level for level in self.levels}
        self._states = {level.name: IntentState() for level in self.levels[:-1]}
        self._reader = {level.reads: level.name for level in reversed(self.levels) if level.reads is not None}

    def reset(self, episode: int = 0) -> None:
        """A new episode: nothing known, nothing under way."""
        self.episode, self._coming_chunk = episode, None
        self._states = {name: IntentState() for name in self._states}
        self.chunk, self._last, self._observed_step = None, None, None
        self._outdated_by, self._instruction = None, None
        self._detector.reset()

    @property
    def acting(self) -> Level:
        """The last level."""
        return self.levels[-1]

    @property
    def execute_steps(self) -> int:
        """Control steps from one request for a chunk to the next."""
        return chunk_period(self.control.execute_steps, self.control.committed_steps, self.acting.covers)

    def observe(self, observation: Observation) -> None:
        """Take in the observation of the present step: whether intents are outdated by it."""
        outdated = self._instruction not in (None, observation.instruction)
        self._instruction = observation.instruction
        if self.control.rule == "event":
            outdated |= self._detector.surprised(observation, self._executed(observation.step))
            self._observed_step = observation.step
        if outdated:
            self._outdated_by = observation.step

    def wants(self, level: str, step: int) -> bool:
        """Whether a level should be asked with this step's observation: never before it has an intent to read."""
        asked = self._level[level]
        if asked.reads is not None and self.read_by(level, step) is None:
            return False
        return self._wants_chunk(step) if asked is self.acting else self._wants_intent(asked, step)

    def read_by(self, level: str, step: int) -> Intent | None:
        """The intent that a level reads at this step; None where it reads none or there is none that it may act under.

        Levels above the last read what covers the step; the last one also an intent that is used up, until it is too old.
        """
        reads = self._level[level].reads
        if reads is None:
            return None
        if level != self.acting.name:
            return self.intent_at(reads, step)
        intent = self.current(reads, step)
        oldest = self.control.max_intent_age_steps or OLDEST * self._level[reads].covers
        return intent if intent is not None and 0 <= step - intent.first_step <= oldest else None

    def intent_at(self, level: str, step: int) -> Intent | None:
        """The intent of a level that covers this step; None where there is none, or it is used up."""
        intent = self.current(level, step)
        return intent if intent is not None and intent.first_step <= step < intent.end_step else None

    def covered(self, level: str, step: int) -> bool:
        """Whether a level's intent covers all that is done from this step on until the level below is asked again."""
        intent = self.intent_at(level, step)
        span = self.execute_steps if level == self.acting.reads else 1
        return intent is not None and step + span <= intent.end_step

    def current(self, level: str, step: int) -> Intent | None:
        """The newest intent of a level that has arrived by this step, used up or not."""
        state = self._states[level]
        state.adopt(step)
        return state.current

    def mark_requested(self, level: str) -> None:
        """A request to the level is in flight; `wants` is False until it is answered or fails."""
        self._states[level].requested = True

    def is_requested(self, level: str) -> bool:
        """Whether a request to the level is in flight."""
        return self._states[level].requested

    def mark_failed(self, level: str) -> None:
        """The request failed; the level may be asked again."""
        self._states[level].requested = False

    def accept_intent(self, intent: Intent, usable_from: int | None, given_up_at: int | None = None) -> None:
        """A level's answer, to be used from the absolute step `usable_from` on; an episode's first one at once.

        Args:
            usable_from: None where it never comes.
            given_up_at: from which step on the level may be asked again although there is no answer; None waits for it.
        """
        state = self._states[intent.level]
        if state.is_first:
            state.pending.append(Coming(step=intent.first_step, intent=intent))
            return
        if given_up_at is not None:
            state.pending.append(Coming(step=given_up_at))
        if usable_from is not None:
            state.pending.append(Coming(step=usable_from, intent=intent, ends=given_up_at is None))

    def accept_chunk(self, chunk: ActionChunk, usable_from: int = 0) -> None:
        """The last level's answer, to be used from the absolute step `usable_from` on; an episode's first one at once."""
        if self.chunk is None or usable_from <= chunk.first_step:
            self.chunk, self._coming_chunk = chunk, None
        else:
            self._coming_chunk = usable_from, chunk

    def committed(self, step: int) -> NDArray[np.float32] | None:
        """What the robot does from this step on while its next chunk is computed `(C, D)`; None where it waits for that."""
        chunk, steps = self.chunk, self.control.committed_steps
        if not steps or chunk is None or step < chunk.first_step:
            return None
        rest = chunk.actions[step - chunk.first_step :][:steps]
        return rest if len(rest) else None

    def next_action(self, step: int) -> Action:
        """The action of this step, or the last one again, marked as held.

        Raises:
            ValueError: nothing was ever answered in this episode, so that there is nothing to hold.
        """
        self._adopt_chunk(step)
        chunk = self.chunk
        # What goes beyond is for the time in which the next one is computed.
        lasts = self.execute_steps if self._coming_chunk is None else self.acting.covers
        if chunk is not None and 0 <= step - chunk.first_step < min(lasts, len(chunk.actions)):
            value = chunk.actions[step - chunk.first_step]
            age, begins, of = step - chunk.intent_first_step, chunk.first_step, chunk.measures
            self._last = Action(value=value, label=value, intent_age_steps=age, chunk_first_step=begins, measures=of)
            return self._last
        if self._last is None:
            raise ValueError(f"step {step} has no action and none to hold: the first answer of an episode must be waited for")
        value = self._safe(self._last.value)
        return Action(value=value, label=value, intent_age_steps=self.intent_age(step), held=True)

    def intent_age(self, step: int) -> int | None:
        """Control steps since the observation behind the intent that the last level reads; None where there is none."""
        reads = self.acting.reads
        intent = None if reads is None else self.current(reads, step)
        return None if intent is None else step - intent.first_step

    def take_replans(self) -> list[Replan]:
        """How far intents differed from those that they replaced since this was last asked, or since the episode began."""
        taken: list[Replan] = []
        for state in self._states.values():
            taken, state.replans = taken + state.replans, []
        return taken

    def held_actions(self, step: int) -> NDArray[np.float32] | None:
        """Safe actions `(H, D)` for a robot that executes whole chunks; None where nothing was executed yet.

        They follow from the last action before `step` that was executed of the chunk in use.
        """
        chunk = self.chunk
        if chunk is None:
            return None
        last = chunk.actions[min(max(step - chunk.first_step, 1), self.execute_steps) - 1]
        return np.tile(self._safe(last), (self.acting.covers, 1))

    def steps_until_wanted(self, step: int) -> int:
        """Control steps that can be executed before a picture is needed again, at least 1."""
        if self._coming_chunk is not None:
            usable, chunk = self._coming_chunk
            return max(1, usable - step, chunk.first_step + self.execute_steps - step)
        if not self._wants_chunk(step):
            assert self.chunk is not None
            return self.chunk.first_step + self.execute_steps - step
        # It holds, for want of an intent: until one comes.
        for state in self._states.values():
            state.adopt(step)
        coming = [coming.step - step for state in self._states.values() for coming in state.pending]
        return min(coming, default=1)

    def _wants_intent(self, level: Level, step: int) -> bool:
        intent = self.intent_at(level.name, step)
        if self._states[level.name].requested:
            return False
        if self._is_outdated(level.name) and not (level.reads and self._is_outdated(level.reads)):
            return True
        if intent is None or self.control.rule == "fifo":
            return not self.covered(level.name, step)
        comes_in = max(self.execute_steps, self._states[level.name].took_steps)
        ends_soon = intent.end_step < step + self.execute_steps + comes_in + self.control.committed_steps
        return self.wants(self._reader[level.name], step) and (self.control.rule == "overlap" or ends_soon)

    def _is_outdated(self, level: str) -> bool:
        """Whether its intent was made before the last surprise, or for other words."""
        intent = self._states[level].current
        return intent is not None and self._outdated_by is not None and intent.first_step < self._outdated_by

    def _wants_chunk(self, step: int) -> bool:
        """Where it is time for the next one."""
        self._adopt_chunk(step)
        if self._coming_chunk is not None:
            return False
        return self.chunk is None or step >= self.chunk.first_step + self.execute_steps

    def _adopt_chunk(self, step: int) -> None:
        if self._coming_chunk is not None and self._coming_chunk[0] <= step:
            self.chunk, self._coming_chunk = self._coming_chunk[1], None

    def _safe(self, last: NDArray[np.float32]) -> NDArray[np.float32]:
        hold, gripper = self.control.hold, self.action.gripper
        if hold == "repeat" or (hold == "declared" and self.action.delta is False):
            return last
        still = np.zeros_like(last)
        if gripper != NO_GRIPPER:
            kept = -1 if gripper is None else gripper
            still[kept] = last[kept]
        return still

    def _executed(self, step: int) -> NDArray[np.float32] | None:
        """Sum `(D,)` of the actions from the last observation to this step; None where the chunk in use does not tell."""
        chunk, since = self.chunk, self._observed_step
        if chunk is None or since is None or not chunk.first_step <= since < step <= chunk.first_step + len(chunk.actions):
            return None
        total: NDArray[np.float32] = chunk.actions[since - chunk.first_step : step - chunk.first_step].sum(axis=0)
        return total


def chunk_period(execute_steps: int, committed_steps: int, covers: int) -> int:
    """Control steps from one request for a chunk to the next: what is executed of each, so that enough is left to go on with.

    Args:
        execute_steps: as configured; 0 means all.
        committed_steps: that the robot goes on while the next chunk is computed.
        covers: H, control steps of a chunk.
    """
    return max(1, min(execute_steps or covers, covers - committed_steps))
