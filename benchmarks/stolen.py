"""What a machine shared with others lost to them meanwhile: figures measured then say more about the neighbours."""

import psutil

MOST_STOLEN = 0.05
"""Share of the CPU time that others may take before a figure is better measured again."""


class StolenCpu:
    """The share of this machine's CPU time that its host gave to others since this was made; 0 where nobody counts it."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times()

    @property
    def share(self) -> float:
        """From 0 to 1."""
        now, before = psutil.cpu_times(), self._before
        spent = sum(now) - sum(before)
        return (getattr(now, "steal", 0.0) - getattr(before, "steal", 0.0)) / spent if spent > 0 else 0.0
