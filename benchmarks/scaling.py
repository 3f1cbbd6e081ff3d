"""Do recording and evaluation use the cores? Both with 1, 2, ... N CPUs given to Ray, each in a process of its own.

uv run -m benchmarks.scaling quickstart --cpus 2 16 --episodes 25

A number of CPUs is a number of cores: the processes are kept on so many. The policy has random weights, which are as fast as
any, unless a checkpoint is given. Seconds are those of the stages as the jobs have them, the start of their processes included;
that of Ray and of the libraries is not. Whoever wants them steadier gives more episodes.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.files import RESULTS, ROOT, command_line, origin, write_result
from libra_ray.types import Json

if TYPE_CHECKING:
    from libra_ray.runs.folder import RunFolder

STAGES: tuple[Literal["record", "evaluate"], ...] = ("record", "evaluate")


def measure(given: Namespace, work: Path) -> Json:
    """Both stages in this process, on its first `given.one` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.one])

    from libra_ray.config import override, preset
    from libra_ray.evaluation.log import read_evaluation
    from libra_ray.on_ray import evaluate as evaluation
    from libra_ray.on_ray import record as recording
    from libra_ray.on_ray.session import end, start_local
    from libra_ray.runs.folder import RunFolder

    episodes = {"record.episodes_per_task": given.episodes, "evaluate.episodes_per_task": given.episodes}
    resources = {"evaluate.policy_replicas": given.replicas, "ray.use_gpu": given.gpu}
    folder = RunFolder.open(work / str(given.one), override(preset(given.preset), {**episodes, **resources}))
    start_local(num_cpus=given.one, num_gpus=int(given.gpu), include_dashboard=False, log_to_driver=False)
    with folder.stage("record") as clock:
        recording.record(folder, clock)
    checkpoint = given.checkpoint or untrained(folder, work / "checkpoint")
    folder = RunFolder.open(folder.root, override(folder.config, {"evaluate.checkpoint": str(checkpoint)}))
    with folder.stage("evaluate") as clock:
        evaluation.evaluate(folder, clock)
    end()
    info = json.loads((folder.dataset / "meta" / "info.json").read_text(encoding="utf-8"))
    results = read_evaluation(folder).results
    steps = {"record": info["total_frames"], "evaluate": sum(result.steps for result in results)}
    wall_s = {stage: folder.wall_s(stage) for stage in STAGES}
    return {
        "cpus": given.one,
        "errors": sum(result.error is not None for result in results),
        "steps": steps,
        "wall_s": wall_s,
        "steps_per_s": {stage: round(steps[stage] / wall_s[stage], 1) for stage in STAGES},
    }


def untrained(folder: "RunFolder", root: Path) -> Path:
    """A checkpoint of the run's model before its first step; made once."""
    import torch

    from libra_ray import checkpoint
    from libra_ray.training.data import TrainingData

    if not root.exists():
        torch.manual_seed(0)
        data = TrainingData.open(folder.config, folder.dataset, folder.path("frames"))
        model = data.make_model()
        checkpoint.save(root, model, model.state_dict(), data.stats, data.spec, step=0)
    return root


def parser() -> ArgumentParser:
    """The command line; `--one` and `--work` are this script's own, for the processes that it starts."""
    parser = command_line("scaling", __doc__)
    parser.add_argument("preset", nargs="?", default="quickstart", help="(default: %(default)s)")
    parser.add_argument("--cpus", type=int, nargs="+", default=[1, 2], help="CPUs to give to Ray (default: 1 2)")
    parser.add_argument("--episodes", type=int, default=25, help="of each task and controller (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="whose policy is evaluated (default: random weights)")
    parser.add_argument("--replicas", type=int, default=0, help="evaluate.policy_replicas (default: what that finds itself)")
    parser.add_argument("--gpu", action="store_true", help="the policy computes on this machine's GPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json", help="the JSON (default: %(default)s)")
    parser.add_argument("--one", type=int, help="measure with so many here, and print a row")
    parser.add_argument("--work", type=Path, help="where to, with --one")
    return parser


def row_of(given: Namespace, cpus: int, work: Path) -> Json:
    """What a process of its own measures.

    Raises:
        SystemExit: it failed, with its status.
    """
    command = [sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:], "--one", str(cpus), "--work", str(work)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    row: Json = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Measure with each number of CPUs, write the JSON, print the table."""
    layout = parser()
    given = layout.parse_args()
    if given.one:
        print(json.dumps(measure(given, given.work)))
        return
    if not given.cpus or not 1 <= min(given.cpus) <= max(given.cpus) <= len(os.sched_getaffinity(0)):
        layout.error(f"--cpus {given.cpus} must lie between 1 and the {len(os.sched_getaffinity(0))} of this machine")
    with tempfile.TemporaryDirectory() as folder:
        rows = [row_of(given, cpus, Path(folder)) for cpus in given.cpus]
    first = rows[0]["steps_per_s"]
    for row in rows:
        row["ratio"] = {stage: round(row["steps_per_s"][stage] / first[stage], 2) for stage in STAGES}
    asked = {"preset": given.preset, "episodes": given.episodes, "replicas": given.replicas, "gpu": given.gpu}
    write_result(given.out, {**asked, **origin(), "rows": rows})
    print("| CPUs | record, s | steps/s | × | evaluate, s | steps/s | × | errors |\n|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row['wall_s'][s]:.1f} | {row['steps_per_s'][s]:.0f} | {row['ratio'][s]:.2f}" for s in STAGES]
        print(f"| {row['cpus']} | {' | '.join(cells)} | {row['errors']} |")


if __name__ == "__main__":
    main()
