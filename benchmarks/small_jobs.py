"""The jobs that people try first, measured from outside: the main job at its smallest, and a small sweep.

`uv run -m benchmarks.small_jobs` runs both from nothing, each beside its limit, and counts what is left of them afterwards.
"""

import tempfile
from dataclasses import asdict

import psutil

from benchmarks.files import RESULTS, command_line, origin, write_result
from benchmarks.main_job import measured

JOBS = {
    "jobs/pipeline.py debug": 90.0,
    "jobs/sweep.py debug granularity": 240.0,
}
"""Command -> most seconds it should take on two cores without a GPU."""


def ray_processes() -> set[int]:
    """Processes of any Ray cluster on this machine."""
    found = psutil.process_iter(["pid", "cmdline"])
    return {p.info["pid"] for p in found if any("ray::" in part or "raylet" in part for part in p.info["cmdline"] or ())}


def main() -> None:
    """Run, measure, keep, print."""
    command_line("small_jobs", __doc__).parse_args()
    rows = []
    for job, limit_s in JOBS.items():
        before = ray_processes()
        with tempfile.TemporaryDirectory() as runs:
            took = measured([*job.split(), "--runs", runs])
        left = len(ray_processes() - before)
        rows.append({"job": job, "limit_s": limit_s, **asdict(took), "processes_left": left})
    write_result(RESULTS / "small_jobs.json", {**origin(), "jobs": rows})
    print("| job | s | at most, s | GiB at most | processes left |\n|---|---|---|---|---|")
    for row in rows:
        print("| {job} | {wall_s} | {limit_s:g} | {peak_memory_gb} | {processes_left} |".format(**row))


if __name__ == "__main__":
    main()
