"""The limit: the same work in one process without any server, all robots in one batch, again and again.

Run: `python -m benchmarks.peers.bare CHECKPOINT ROBOTS THREADS SECONDS`; prints one line of JSON.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.peers.work import Work
from libra_ray.stats.intervals import percentiles
from libra_ray.types import Json, Observation


def measure(work: Work, shown: Sequence[Observation], seconds: float) -> Json:
    """Requests/s, latency and CPU seconds per request of batches of all robots."""
    horizon, step, times = work.horizon, 0, []
    # Twice through the longest intent: everything that is computed now and then is warm.
    for _ in range(2 * (work.policy.levels[0].covers // horizon)):
        work.answer({str(i): replace(o, step=step) for i, o in enumerate(shown)})
        step += horizon
    cpu_s, end = time.process_time(), time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        work.answer({str(i): replace(o, step=step) for i, o in enumerate(shown)})
        step += horizon
        times.append(time.perf_counter() - began)
    requests = len(times) * len(shown)
    return {
        "seconds": sum(times),
        "chunk_requests_per_s": requests / sum(times),
        "latency_ms": vars(percentiles([1e3 * t for t in times])),
        "cpu_s_per_request": (time.process_time() - cpu_s) / requests,
        "wrong_robot": 0,
        "errors": {},
    }


if __name__ == "__main__":
    opened = Work.open(sys.argv[1], int(sys.argv[3]))
    blank = opened.blank()
    print(json.dumps(measure(opened, [blank] * int(sys.argv[2]), float(sys.argv[4]))))
