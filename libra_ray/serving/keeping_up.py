"""Whether the levels of a served policy answer in time, by what the gateway measures; said in the log, once per level."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from libra_ray.config import ControlConfig
from libra_ray.control.margin import Latency, Margin, margins
from libra_ray.serving.weight_switch import WeightSwitch


@dataclass
class KeepingUp:
    """The levels' margins, as they are at present.

    Args:
        control: when levels are asked.
        switch: knows the policy's levels, and how long each took for one robot before there were any.
        log: where a level that is too late is said.

    Attributes:
        margins: by level, as `look` last found them.
    """

    control: ControlConfig
    switch: WeightSwitch
    log: logging.Logger
    margins: dict[str, Margin] = field(default_factory=dict)
    _told: set[tuple[str, str]] = field(default_factory=set)

    def look(self, served: Mapping[str, Latency]) -> dict[str, Margin]:
        """The margins by what was served of late; levels that served too little go by their latency with one robot.

        A level that is too late is said in the log, once for its weights.
        """
        shake = self.switch.handshake
        if shake is None:
            return {}
        latencies = {**self.switch.latencies, **served}
        found = margins(shake.levels, latencies, shake.control_hz, self.control, self.switch.lengthened_by, section="")
        self.margins = {margin.level: margin for margin in found}
        for margin in found:
            of = (margin.level, self.switch.weights)
            if margin.margin_steps < 0 and of not in self._told:
                self._told.add(of)
                self.log.warning("%s", margin.text)
        return self.margins
