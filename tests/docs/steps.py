"""What a reader types, in this order, and how the outcome is seen."""
# ruff: noqa: E501  (a printed line stays one)

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Step:
    """A printed line and how its outcome is seen.

    Attributes:
        line: as printed.
        leaves: files below the clone that must be there afterwards; `~` is the reader's home.
        says: a pattern that standard output must match.
        serves: address that must answer while the line runs.
        smaller: what is typed in place of parts of the line, because it would take hours.
        forgets: folders below the clone to remove first: a line of another page had the same run name.
        closes: afterwards, end what earlier lines have left running.
        waits: it works as soon as what an earlier line began is ready; until then it is typed again.
    """

    line: str
    leaves: tuple[str, ...] = ()
    says: str = ""
    serves: str = ""
    smaller: Mapping[str, str] = field(default_factory=dict)
    forgets: tuple[str, ...] = ()
    closes: bool = False
    waits: bool = False


JOB, SUBMIT = "uv run jobs/", "uv run ray job submit --working-dir . -- python jobs/"
STEPS = [
    Step(
        line="make quickstart", leaves=("runs/quickstart/report.html", "runs/quickstart/checkpoint/manifest.json"), says="mean"
    ),
    Step(line="make doctor", says="0 blockers"),
    Step(
        line=JOB + "budget.py runs/quickstart/checkpoint --ms 50",
        leaves=("runs/quickstart/budget/budget.json", "runs/quickstart/budget/budget.svg"),
        says="settings for 50 ms a decision",
    ),
    Step(
        line=JOB + "budget.py runs/quickstart/checkpoint --ms 50 --episodes 25",
        leaves=("runs/quickstart/budget/evaluated",),
        says="front: over latency and success|nothing fits",
        smaller={"--ms 50 --episodes 25": "--ms 500 --episodes 1"},
    ),
    Step(line=JOB + "pipeline.py quickstart --name n32 --action.bins 32", leaves=("runs/n32/report.html",), says="report:"),
    Step(
        line=JOB + "evaluate.py quickstart --name late --evaluate.checkpoint runs/quickstart/checkpoint --delay.intent_steps 3",
        leaves=("runs/late/report.json",),
    ),
    Step(
        line=JOB
        + "evaluate.py quickstart --name late --evaluate.checkpoint runs/quickstart/checkpoint --delay.intent_steps 10",
        leaves=("runs/late/report.json",),
        forgets=("runs/late",),
    ),
    Step(
        line=JOB + "sweep.py debug granularity",
        leaves=("runs/debug-granularity/best.yaml", "runs/debug-granularity/report.html"),
    ),
    Step(line="uv run mlflow ui --backend-store-uri sqlite:///runs/mlflow.db", serves="http://127.0.0.1:5000"),
    Step(
        line=JOB + 'doctor.py --only "data set,mlflow" --data.root /data/mine --tracking.uri http://127.0.0.1:5000', says="2 ok"
    ),
    Step(line=JOB + "doctor.py quickstart --data.root /data/mine --planner.backbone /models/mine", says="0 blockers"),
    Step(line=JOB + "train.py quickstart --name mine --data.root /data/mine", leaves=("runs/mine/checkpoint/manifest.json",)),
    Step(
        line=JOB + "train.py --name mine --data.root /data/mine",
        leaves=("runs/mine/checkpoint/manifest.json",),
        says="^$",
    ),
    Step(
        line=JOB
        + "train.py --name mine --data.root /data/mine --data.cameras observation.images.front,observation.images.wrist",
        leaves=("runs/mine/checkpoint/manifest.json",),
        forgets=("runs/mine",),
        smaller={"/data/mine": "../two_cameras"},
    ),
    Step(
        line=JOB
        + "train.py --name mine --data.root /data/mine --data.keys action=actions,observation.state=state,observation.images.front=image",
        leaves=("runs/mine/checkpoint/manifest.json",),
        forgets=("runs/mine",),
        smaller={"/data/mine": "../renamed"},
    ),
    Step(line=JOB + "pipeline.py debug", leaves=("runs/debug/report.html",), says="report:"),
    Step(
        line=JOB + "train.py --name tuned --data.root /data/mine --train.start_from runs/quickstart/checkpoint",
        leaves=("runs/tuned/checkpoint/manifest.json",),
    ),
    Step(
        line=JOB + "train.py --name planner --data.root /data/large --train.levels planner",
        leaves=("runs/planner/checkpoint/manifest.json",),
        smaller={"/data/large": "../data"},
    ),
    Step(
        line=JOB + "train.py --name refiner --data.root /data/mine --train.levels refiner --train.stats_from runs/planner",
        leaves=("runs/refiner/checkpoint/manifest.json",),
    ),
    Step(
        line=JOB + "join.py --levels planner=runs/planner/checkpoint refiner=runs/refiner/checkpoint",
        leaves=("runs/joined/checkpoint/manifest.json",),
        says="checkpoint:",
    ),
    Step(
        line=JOB
        + "pipeline.py --name coarser --action.bins 6 --train.start_from runs/quickstart/checkpoint --train.start_parts planner.backbone",
        leaves=("runs/coarser/report.html",),
    ),
    Step(
        line=JOB + "train.py PRESET --planner.backbone NAME_OR_FOLDER",
        leaves=("runs/m1/checkpoint/processor",),
        smaller={"PRESET": "debug --name m1 --data.root ../data", "NAME_OR_FOLDER": "../model"},
    ),
    Step(
        line=JOB + "train.py PRESET --refiner.encoder NAME_OR_FOLDER",
        leaves=("runs/m2/checkpoint/encoder",),
        smaller={"PRESET": "debug --name m2 --data.root ../data", "NAME_OR_FOLDER": "../encoder"},
    ),
    Step(
        line=JOB + "sweep.py PRESET encoder --hours 8",
        leaves=("runs/debug-encoder/best.yaml",),
        smaller={"PRESET": "debug"},
    ),
    Step(line=JOB + "sweep.py tabletop granularity --hours 8", leaves=("runs/tabletop-granularity/best.yaml",)),
    Step(
        line=JOB + "sweep.py quickstart joint --search optuna --trials 40 --seeds 2",
        leaves=("runs/quickstart-joint/best.yaml",),
        smaller={"--trials 40 --seeds 2": "--trials 2 --seeds 1"},
    ),
    Step(
        line=JOB + "sweep.py quickstart latency --delay.intent_steps 10",
        leaves=("runs/quickstart-latency/best.yaml",),
        smaller={"--delay": "--trials 2 --seeds 1 --delay"},
    ),
    Step(line=JOB + "sweep.py tabletop balance --scheduler asha", leaves=("runs/tabletop-balance/best.yaml",)),
    Step(
        line=JOB + "pipeline.py --config runs/tabletop-granularity/best.yaml",
        leaves=("runs/tabletop/report.html",),
    ),
    Step(
        line=JOB
        + "evaluate.py tabletop --name moved --sim.tasks touch,push,place-5mm --sim.goal_moves_at 5 --evaluate.checkpoint runs/tabletop/checkpoint",
        leaves=("runs/moved/report.json",),
    ),
    Step(
        line=JOB
        + "pipeline.py --sim.family tabletop --sim.tasks place-1mm,stack,chain2 --sim.max_steps 200 --planner.max_text_tokens 256",
        leaves=("runs/quickstart/report.html",),
        smaller={"--sim.family": "--name blocks --sim.family"},
    ),
    Step(line=JOB + "pipeline.py published", leaves=("runs/published/report.html",), says="report:"),
    Step(
        line=JOB + "pipeline.py quickstart --name one --model.system monolithic",
        leaves=("runs/one/report.html",),
        says="report:",
    ),
    Step(
        line=JOB
        + "pipeline.py tabletop --name levels --model.system hierarchy --sim.tasks chain1,chain2,chain3 --planner.max_text_tokens 256",
        leaves=("runs/levels/report.html",),
        says="report:",
        smaller={"tabletop": "debug --sim.family tabletop --sim.max_steps 300"},
    ),
    Step(
        line=JOB + "pipeline.py quickstart --name mine --model.system my_systems:Mine",
        leaves=("runs/mine/report.html",),
        forgets=("runs/mine",),
        says="report:",
    ),
    Step(line="uv run -m benchmarks.results_table", says="quickstart"),
    Step(
        line="uv run serve run serve_apps.libra:app checkpoint=runs/quickstart/checkpoint",
        serves="http://127.0.0.1:8765/readyz",
    ),
    Step(
        line=(
            "curl -s localhost:8765/act -H 'Content-Type: application/json' "
            '-d \'{"robot": "a", "observation.image": "\'$(base64 -w0 picture.png)\'", '
            '"observation.state": [0, 0.6, 0.2, 1], "prompt": "open the drawer"}\''
        ),
        says='"actions"',
        closes=True,
    ),
    Step(line="export RAY_AUTH_MODE=token"),
    Step(line="uv run ray get-auth-token --generate", leaves=("~/.ray/auth_token",)),
    Step(line="uv run ray start --head", says="Ray runtime started"),
    Step(line="export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265"),
    Step(line=SUBMIT + "pipeline.py quickstart --runs ~/runs", leaves=("~/runs/quickstart/report.html",), says="succeeded"),
    Step(line=SUBMIT + "record.py quickstart --runs ~/runs", leaves=("~/runs/quickstart/dataset",), says="succeeded"),
    Step(line=SUBMIT + "train.py quickstart --runs ~/runs", says="succeeded"),
    Step(line=SUBMIT + "evaluate.py quickstart --runs ~/runs", says="succeeded"),
    Step(
        line=SUBMIT + "sweep.py debug granularity --runs ~/runs",
        leaves=("~/runs/debug-granularity/best.yaml",),
        says="succeeded",
    ),
    Step(
        line="RAY_ADDRESS=auto uv run jobs/pipeline.py quickstart --runs /shared/runs",
        leaves=("~/shared/quickstart/report.html",),
    ),
    Step(line="uv run serve deploy serve_apps/libra.yaml", says="successful"),
    Step(line="uv run serve status", says="RUNNING|DEPLOYING"),
    Step(
        line="RAY_ADDRESS=auto uv run python -c 'from libra_ray.on_ray.serving.app import update_weights; update_weights(\"runs/better/checkpoint\")'",
        smaller={"runs/better": "runs/n32"},
        waits=True,
    ),
]
ELSEWHERE = {
    "make test": "it is what runs the other tests",
    "uv run --with boto3 ray up cluster.yaml": "needs an AWS account; tests/test_cluster.py holds it against Ray's schema",
    "uv run -m benchmarks.components": "hours; tests/benchmarks/test_components.py",
    "uv run -m benchmarks.granularity": "hours; tests/benchmarks/test_granularity.py",
    "uv run -m benchmarks.systems metaworld": "hours; tests/benchmarks/test_systems.py",
    "uv run -m benchmarks.systems tabletop": "hours; tests/benchmarks/test_systems.py",
    "uv run -m benchmarks.systems contact": "an hour; tests/benchmarks/test_systems.py",
    "uv run -m benchmarks.systems chains": "hours; tests/benchmarks/test_systems.py",
    "uv run -m benchmarks.recovery": "hours; tests/benchmarks/test_recovery.py",
    "uv run -m benchmarks.scaling quickstart --cpus 2 16": "needs 16 cores; tests/benchmarks/test_scaling.py",
    "uv run -m benchmarks.main_job quickstart": "it is `make quickstart`, timed, on a machine of its own",
    "uv run python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=local/demos --root='/data/my demos' --push-to-hub=false": (
        "tests/data/test_converter.py"
    ),
}
"""Lines that are not run here, with the reason."""
