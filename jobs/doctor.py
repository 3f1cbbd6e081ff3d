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

    from libra_ray.doctor.finding import chosen, examined, page, summary

    arguments = parse(None, __doc__, stage="doctor", more=OPTIONS)
    # A folder's name may hold what the terminal cannot show.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    colour, width = sys.stdout.isatty(), shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    findings = []
    with arguments.refusing():
        for finding in examined(chosen(checks_of(arguments), arguments.more["only"])):
            findings.append(finding)
            print(page(finding, colour=colour, width=width), flush=True)
    print(summary(findings, colour=colour))
    sys.exit(any(finding.level == "blocker" for finding in findings))


def checks_of(arguments: "Arguments") -> "dict[str, Check]":
    """The checks that apply to what a job is given, in the order in which they are shown."""
    from libra_ray.doctor import hardware, machine, products, stores
    from libra_ray.on_ray import doctor as ray
    from libra_ray.run_folder import RunFolder

    config, runs = arguments.config, arguments.run_dir.parent
    folder = RunFolder(arguments.run_dir.resolve(), config)
    checks: dict[str, Check] = {
        "python": machine.python,
        "libraries": machine.libraries,
        "runs folder": partial(machine.runs_folder, runs),
        "shared memory": machine.shared_memory,
        "home": machine.home,
        "user": machine.user,
        "encoding": machine.encoding,
        "proxies": partial(machine.proxies, config.tracking.uri),
        "ports": machine.ports,
        "ray address": ray.address,
        "ray token": ray.token,
        "ray leftover": ray.leftover,
        "ray sockets": ray.sockets,
        "gpu": partial(hardware.gpu, config.ray.use_gpu),
        "rendering": hardware.rendering,
        "simulator": partial(hardware.simulator, config),
        "video": partial(hardware.video, config.record.video_codec),
        "mlflow": partial(stores.store, config.tracking, runs),
    }
    given = products.checks_of(config, folder.dataset, folder.checkpoint, config.train.start_from)
    return checks | given


if __name__ == "__main__":
    main()
