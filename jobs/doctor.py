"""Look at everything a job needs on this machine, one line a check with its fix. Give a job's own PRESET and settings."""

import sys
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arguments import Arguments

    from libra_ray.doctor.finding import Check

OPTIONS = {
    "--only": {"metavar": "CHECKS", "default": "", "help": "names of checks with commas between (default: all that apply)"}
}


def main() -> None:
    """Print what is found; status 1 where something would end a job."""
    if sys.version_info < (3, 12):  # noqa: UP036  (the older one reads this far, and no further)
        sys.exit("doctor.py: error: Python 3.12 is needed; start jobs with `uv run`")
    import shutil

    from arguments import parse

    arguments = parse(None, __doc__, stage="doctor", more=OPTIONS)
    colour, width = sys.stdout.isatty(), shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    findings = []
    with arguments.refusing():
        from libra_ray.doctor.finding import chosen, examined, page, summary

        for name, finding in examined(chosen(checks_of(arguments), arguments.more["only"])):
            findings.append(finding)
            print(page(name, finding, colour=colour, width=width), flush=True)
    print(summary(findings, colour=colour))
    sys.exit(any(finding.level == "blocker" for finding in findings))


def checks_of(arguments: "Arguments") -> "dict[str, Check]":
    """The checks that apply to what a job is given, in the order in which they are shown."""
    from libra_ray.config import to_json
    from libra_ray.doctor import hardware, machine, products, stores
    from libra_ray.doctor.aside import call
    from libra_ray.doctor.finding import Check
    from libra_ray.on_ray import doctor as ray
    from libra_ray.runs.folder import RunFolder

    config, runs = arguments.config, arguments.run_dir.parent
    folder = RunFolder(arguments.run_dir.resolve(), config)
    see = partial(call, hardware.try_simulator, to_json(config), limit_s=180)
    film = partial(call, hardware.try_video, config.record.video_codec, limit_s=120)
    checks = {
        "python": Check(look=machine.python),
        "libraries": Check(look=machine.libraries),
        "runs folder": Check(look=partial(machine.runs_folder, runs)),
        "shared memory": Check(look=machine.shared_memory),
        "home": Check(look=machine.home),
        "encoding": Check(look=machine.encoding),
        "proxies": Check(look=machine.proxies),
        "ports": Check(look=machine.ports),
        "ray address": Check(look=ray.address, fix="unset RAY_ADDRESS"),
        "ray token": Check(look=ray.token),
        "ray folder": Check(look=ray.folder, fix="export RAY_TMPDIR=/tmp"),
        "gpu": Check(look=partial(hardware.gpu, config.ray.use_gpu), fix="uv sync --locked --reinstall-package torch"),
        "rendering": Check(look=hardware.rendering),
        "simulator": Check(look=see, fix="uv sync --locked, or give other tasks: --sim.tasks NAMES"),
        "video": Check(look=film, fix="uv sync --locked --reinstall-package av, or --record.video_codec libsvtav1"),
        "mlflow": Check(look=partial(stores.store, config, runs), fix=stores.FIX),
    }
    return checks | products.checks_of(config, folder.dataset, folder.checkpoint)


if __name__ == "__main__":
    main()
