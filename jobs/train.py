"""Train planner and refiner on the run's data set (or on --data.root) with Ray Train. Run again, it continues."""

from arguments import parse


def main() -> None:
    """Run the training stage of one run."""
    arguments = parse(None, __doc__, stage="train")
    with arguments.refusing():
        from libra_ray.on_ray import stages
        from libra_ray.on_ray.session import connected
        from libra_ray.report.publish import tracked
        from libra_ray.runs.folder import RunFolder, locked, products

        stages.check(RunFolder(arguments.run_dir.resolve(), arguments.config), "train", fresh=arguments.fresh)
        with locked(arguments.run_dir):
            folder = RunFolder.open(
                arguments.prepare(*products("train", "evaluate")),
                arguments.config,
                forget=("train", "evaluate") if arguments.fresh else (),
            )
            with tracked(folder) as tracker, connected():
                stages.train(folder, tracker)
                print(f"checkpoint: {folder.path('checkpoint')}")


if __name__ == "__main__":
    main()
