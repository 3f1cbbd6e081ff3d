"""The main job, measured from outside: wall time and peak memory of everything it starts.

`uv run -m benchmarks.main_job quickstart [options of jobs/pipeline.py]` runs the pipeline, samples the proportional memory
(PSS: pages that several processes share count once) of its whole process tree, and takes the report into `benchmarks/results/`.
"""

import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

from benchmarks.files import ROOT, RUNS, command_line
from benchmarks.results_table import take, write_pages
from libra_ray.report.records import Measured

SECONDS_BETWEEN_SAMPLES = 2.0


def memory_gb(process: psutil.Process) -> float:
    """Memory of a process and all its descendants, in GiB."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**30


def measured(job: Sequence[str]) -> Measured:
    """Run a job with its options to its end.

    Raises:
        SystemExit: it failed, with its status.
    """
    began, peak = time.monotonic(), 0.0
    process = subprocess.Popen([sys.executable, *job], cwd=ROOT)
    while process.poll() is None:
        try:
            peak = max(peak, memory_gb(psutil.Process(process.pid)))
        except psutil.NoSuchProcess:
            break
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    wall_s = time.monotonic() - began
    if process.wait():
        raise SystemExit(process.returncode)
    return Measured(wall_s=round(wall_s, 1), peak_memory_gb=round(peak, 2))


def main() -> None:
    """Run, measure, keep."""
    parser = command_line("main_job", __doc__)
    parser.add_argument("preset", nargs="?", default="quickstart", help="(default: %(default)s)")
    parser.add_argument("--name", help="of the run (default: the preset)")
    given, options = parser.parse_known_args()
    name = given.name or given.preset
    took = measured(["jobs/pipeline.py", given.preset, "--name", name, *options])
    take(RUNS / name, took)
    write_pages()
    print(f"{given.preset}: {took.wall_s:.0f} s, {took.peak_memory_gb:.1f} GiB at most")


if __name__ == "__main__":
    main()
