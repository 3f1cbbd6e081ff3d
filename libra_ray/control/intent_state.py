"""What one robot knows of one level above the last."""

from dataclasses import dataclass, field

from libra_ray.control.disagreement import Replan, replanned
from libra_ray.types import Intent


@dataclass(frozen=True, kw_only=True)
class Coming:
    """What becomes of a request.

    Attributes:
        step: from which on that is so.
        intent: that has come; None where nobody waits for it any longer.
        ends: whether the request is over with it, so that the level may be asked again.
    """

    step: int
    intent: Intent | None = None
    ends: bool = True


@dataclass
class IntentState:
    """What one robot knows of one level above the last.

    Attributes:
        current: the intent in use, or used up.
        pending: what is to come.
        requested: whether a request is open.
        took_steps: control steps from the picture behind the current intent to its first use; 0 of an episode's first one.
    """

    current: Intent | None = None
    pending: list[Coming] = field(default_factory=list)
    requested: bool = False
    took_steps: int = 0

    replans: list[Replan] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        """Whether the episode has no intent of this level yet, nor one to come."""
        return self.current is None and not any(coming.intent for coming in self.pending)

    def adopt(self, step: int) -> None:
        """Take in what has come by this step; an intent never replaces one of a later observation."""
        if not self.pending:
            return
        arrived = sorted((coming for coming in self.pending if coming.step <= step), key=lambda coming: coming.step)
        if not arrived:
            return
        self.pending = [coming for coming in self.pending if coming.step > step]
        for coming in arrived:
            self.requested = self.requested and not coming.ends
            intent = coming.intent
            if intent is not None and (self.current is None or intent.first_step >= self.current.first_step):
                self.took_steps = 0 if self.current is None else step - intent.first_step

                self.replans += replanned(self.current, intent)
                self.current = intent
