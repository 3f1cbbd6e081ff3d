"""The main job: record demonstrations, train planner and refiner, evaluate in closed loop, report. Run again, it continues."""

import time

from arguments import parse


def main() -> None:
    """Run all stages of one run and print its table."""
    began = time.monotonic()
    arguments = parse(None, __doc__, stage="pipeline")
    with arguments.refusing():
        from libra_ray.on_ray import stages
        from libra_ray.on_ray.session import connected
        from libra_ray.report.publish import tracked
        from libra_ray.report.table import summary_table
        from libra_ray.runs.folder import RunFolder, locked

        stages.check(
            RunFolder(arguments.run_dir.resolve(), arguments.config), "record", "train", "evaluate", fresh=arguments.fresh
        )
        with locked(arguments.run_dir):
            folder = RunFolder.open(arguments.prepare(), arguments.config)
            with tracked(folder) as tracker, connected():
                report = stages.pipeline(folder, tracker, began)
                print(summary_table(report))
                print(f"report: {folder.path('report.html')}")


if __name__ == "__main__":
    main()
