"""Progress of long work: a bar on a terminal, plain lines now and then elsewhere."""

import sys
import time
from typing import Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10


def print_status(text: str) -> None:
    """A plain line for whoever watches."""
    print(text, file=sys.stderr, flush=True)


class ProgressBar:
    """A counter towards `total` with a few values beside it."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.count, self._line_at = 0, 0.0
        self.bar = tqdm(total=total, desc=label, unit=unit, dynamic_ncols=True) if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        """Start."""
        return self

    def __exit__(self, *_: object) -> None:
        """Show the last state."""
        if self.bar is not None:
            self.bar.close()
        else:
            self._line({})

    def to(self, count: int, **values: float) -> None:
        """Set the counter, and the values shown beside it."""
        self.count = count
        if self.bar is not None:
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()}, refresh=False)
            self.bar.n = count
            self.bar.refresh()
        elif time.monotonic() - self._line_at >= SECONDS_BETWEEN_LINES:
            self._line(values)

    def say(self, text: str) -> None:
        """A plain line, above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print_status(text)

    def _line(self, values: dict[str, float]) -> None:
        self._line_at = time.monotonic()
        words = "".join(f"  {k} {v:.3g}" for k, v in values.items())
        print_status(f"{self.label}: {self.count}/{self.total} {self.unit}{words}")
