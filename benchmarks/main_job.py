"""The main job, measured from outside: wall time and peak memory of everything it starts.

`uv run benchmarks/main_job.py quickstart [options of jobs/pipeline.py]` runs the pipeline, samples the proportional memory
(PSS: pages that several processes share count once) of its whole process tree, and takes the report into `benchmarks/results/`.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import psutil
from results_table import ROOT, take, write_pages

from libra_ray.common.files import write_text
from libra_ray.common.json_text import dump, read
from libra_ray.report.records import Measured, Report

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


def main(preset: str, options: list[str]) -> None:
    """Run, measure, keep."""
    took = measured(["jobs/pipeline.py", preset, *options])
    name = options[options.index("--name") + 1] if "--name" in options else preset
    path = take(ROOT / "runs" / name)
    write_text(path, dump(replace(read(Report, path), measured=took)))
    write_pages()
    print(f"{preset}: {took.wall_s:.0f} s, {took.peak_memory_gb:.1f} GiB at most")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "quickstart", sys.argv[2:])
