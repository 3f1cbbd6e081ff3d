"""Join levels that were trained one by one (--train.levels) into one checkpoint, and register it."""

from pathlib import Path

from arguments import parse

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
        found[level] = Path(folder).expanduser().resolve()
    return found


def main() -> None:
    """Join, register, and say where it is; of the settings those of `tracking` count."""
    arguments = parse(None, __doc__, stage="join", more=MORE, default_name=lambda *_: "joined")
    try:
        levels = folders(arguments.more["levels"])
    except ValueError as mistake:
        arguments.refuse(mistake)
    if (arguments.run_dir / "checkpoint").exists() and not arguments.fresh:
        arguments.refuse(f"{arguments.run_dir} has a checkpoint already; give another --name, or --fresh to join again")
    with arguments.refusing():
        from dataclasses import replace

        from libra_ray.report.publish import check_store, publish_joined, tracked
        from libra_ray.runs.folder import RunFolder, locked
        from libra_ray.training.joining import join, joinable

        config = replace(joinable(levels).config, tracking=arguments.config.tracking)
        check_store(RunFolder(arguments.run_dir.resolve(), config))
        with locked(arguments.run_dir):
            target = arguments.prepare("checkpoint").resolve() / "checkpoint"
            join(levels, target)
            folder = RunFolder.open(target.parent, config)
            with tracked(folder) as tracker:
                publish_joined(folder, tracker)
            print(f"checkpoint: {target}")


if __name__ == "__main__":
    main()
