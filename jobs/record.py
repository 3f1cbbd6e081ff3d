"""Record demonstrations by the scripted experts into one LeRobotDataset v3. Run again, it continues."""

from arguments import parse


def main() -> None:
    """Run the recording stage of one run."""
    arguments = parse(None, __doc__, stage="record")
    with arguments.refusing():
        from libra_ray.on_ray import stages
        from libra_ray.on_ray.session import connected
        from libra_ray.runs.folder import RunFolder, locked

        stages.check(RunFolder(arguments.run_dir.resolve(), arguments.config), "record", fresh=arguments.fresh)
        with locked(arguments.run_dir):
            folder = RunFolder.open(arguments.prepare(), arguments.config)
            with connected():
                stages.record(folder)
        print(f"data set: {folder.dataset}")


if __name__ == "__main__":
    main()
