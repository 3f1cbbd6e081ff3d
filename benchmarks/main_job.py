"""The main job, measured from outside: wall time and peak memory of everything it starts.

`uv run benchmarks/main_job.py quickstart [options of jobs/pipeline.py]` runs the pipeline, samples the proportional memory
(PSS: pages that several processes share count once) of its whole process tree, and takes the report into `benchmarks/results/`.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
from results_table import ROOT, take, write_readme

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


def main(preset: str, options: list[str]) -> None:
    """Run, measure, keep."""
    began = time.monotonic()
    job = subprocess.Popen([sys.executable, "jobs/pipeline.py", preset, *options], cwd=ROOT)
    peak = 0.0
    while job.poll() is None:
        try:
            peak = max(peak, memory_gb(psutil.Process(job.pid)))
        except psutil.NoSuchProcess:
            break
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    wall_s = time.monotonic() - began
    if job.wait():
        raise SystemExit(job.returncode)
    name = options[options.index("--name") + 1] if "--name" in options else preset
    path = take(ROOT / "runs" / name)
    report = json.loads(path.read_text())
    report["measured"] = {"wall_s": round(wall_s, 1), "peak_memory_gb": round(peak, 2)}
    Path(path).write_text(json.dumps(report, indent=2))
    write_readme()
    print(f"{preset}: {wall_s:.0f} s, {peak:.1f} GiB at most")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "quickstart", sys.argv[2:])
