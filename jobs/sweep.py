"""Find the Libra point: train and evaluate many configurations of a search space with Ray Tune, by closed-loop success."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arguments import Arguments, Options, parse

from libra_ray.config import Config
from libra_ray.config.paths import place_or_name

SPACES = Path(__file__).parents[1] / "tune_spaces"
SHIPPED = ", ".join(sorted(path.stem for path in SPACES.glob("[!_]*.py")))
DEBUG_SIZE, SIZE = (4, 1), (24, 3)
"""Configurations, and seeds of each, where the command line does not say."""

OPTIONS: Options = {
    "space": {"metavar": "SPACE", "type": place_or_name, "nargs": "?", "help": f"{SHIPPED}, or the path of a file with SPACE"},
    "--trials": {"type": int, "metavar": "K", "help": "configurations to try (default: 24; debug: 4; of a grid: the first K)"},
    "--seeds": {"type": int, "metavar": "S", "help": "seeds of each configuration, trials of their own (default: 3; debug: 1)"},
    "--hours": {"type": float, "default": 0.0, "help": "start no trial after this time; running ones come to their end"},
    "--search": {"choices": ["grid", "random", "optuna"], "help": "how points are chosen (default: as the space says)"},
    "--scheduler": {
        "default": "fifo",
        "metavar": "{fifo,asha}",
        "help": "fifo runs every trial to its end; asha stops the weak ones at rungs of closed-loop success",
    },
    "--rung_episodes": {"type": int, "default": 10, "metavar": "E", "help": "episodes per task at asha's rungs (default: 10)"},
    "--concurrent": {"type": int, "default": 0, "metavar": "C", "help": "trials at a time (default: all that fit)"},
    "--resume": {"action": "store_true", "help": "continue an interrupted sweep; trials that have ended are not run again"},
}


def main() -> None:
    """Run one sweep, or the rest of it, and print its table."""
    arguments = parse(None, __doc__, stage="sweep", more=OPTIONS, default_name=default_name)
    if arguments.more["space"] is None:
        arguments.refuse(f"which SPACE? after the preset give {SHIPPED}, or the path of a file")
    with arguments.refusing():
        _sweep(arguments)


def default_name(config: Config, more: Mapping[str, Any]) -> str:
    """The run's name where none is given: preset and space."""
    return f"{config.preset}-{Path(more['space'] or 'sweep').stem}"


def _sweep(arguments: Arguments) -> None:
    from libra_ray.on_ray.session import connected
    from libra_ray.on_ray.sweep import publish, runner
    from libra_ray.on_ray.sweep.space import load_space
    from libra_ray.on_ray.sweep.sweep_folder import SweepFolder, settings_of
    from libra_ray.report.publish import tracked
    from libra_ray.report.sweep.report import sweep_table
    from libra_ray.runs.folder import locked

    given, config = arguments.more, arguments.config
    space = load_space(given["space"], config, SPACES)
    runner.check(arguments.run_dir, config, given["scheduler"], space)
    size = DEBUG_SIZE if config.preset == "debug" else SIZE
    settings = settings_of(space, config, {**given, "trials": given["trials"] or size[0], "seeds": given["seeds"] or size[1]})
    if not arguments.fresh:
        SweepFolder.check(arguments.run_dir, config, space, settings, resume=given["resume"])
    with locked(arguments.run_dir):
        sweep = SweepFolder.open(arguments.prepare(), config, space, settings, resume=given["resume"])
        with tracked(sweep.run) as tracker:
            with connected():
                runner.run(sweep, lambda trial, result: publish.publish_trial(sweep, tracker, trial, result))
            report = publish.publish_sweep(sweep, tracker)
            print(sweep_table(report))
            print(f"report: {sweep.run.path('report.html')}")
            print(f"best: {arguments.run_dir / 'best.yaml'}, for --config of any job")


if __name__ == "__main__":
    main()
