"""Join levels that were trained one by one (--train.levels) into one checkpoint, and register it."""

from pathlib import Path

from arguments import parse

from libra_ray.config.paths import place

MORE = {"--levels": {"nargs": "+", "metavar": "LEVEL=CHECKPOINT", "default": [], "help": "the checkpoint of every level"}}


def folders(given: list[str]) -> dict[str, Path]:
    """The levels' checkpoints by their names.

    Raises:
        ValueError: none, one that is not LEVEL=CHECKPOINT, or a level twice.
    """
    found: dict[str, Path] = {}
    for each in given or [""]:
        level, _, folder = each.partition("=")
        if not (level and folder) or level in found:
            raise ValueError(f"--levels takes LEVEL=CHECKPOINT once for every level of the policy, not {each!r}")
        found[level] = place(folder).resolve()
    return found


def main() -> None:
    """Join, register, and say where it is; of the settings those of `tracking` count."""
    arguments = parse(None, __doc__, stage="join", more=MORE, default_name=lambda *_: "joined")
    try:
        levels = folders(arguments.more["levels"])
    except ValueError as mistake:
        arguments.refuse(mistake)
    with arguments.refusing():
        from dataclasses import replace

        from libra_ray.report.publish import check_store, publish_joined, tracked
        from libra_ray.runs.folder import RunFolder, locked
        from libra_ray.training.joining import is_joined, join, joinable

        found, target = joinable(levels), arguments.run_dir.resolve() / "checkpoint"
        config = replace(found.config, tracking=arguments.config.tracking)
        run = RunFolder(target.parent, config)
        if run.begun("train"):
            arguments.refuse(f"{run.root} is the run of a training; give another --name")
        joined = not arguments.fresh and is_joined(target, found)
        if target.exists() and not (joined or arguments.fresh):
            arguments.refuse(f"{run.root} has another checkpoint already; give another --name, or --fresh to join again")
        check_store(run)
        with locked(arguments.run_dir):
            if not joined:
                arguments.prepare("checkpoint", read=levels)
                join(levels, target)
            folder = RunFolder.open(target.parent, config)
            with tracked(folder) as tracker:
                publish_joined(folder, tracker)
            print(f"checkpoint: {target}")


if __name__ == "__main__":
    main()
