"""Evaluate the run's checkpoint (or --evaluate.checkpoint) in closed loop by simulated robots. Run again, it continues."""

from arguments import parse


def main() -> None:
    """Run the evaluation stage of one run and print its table."""
    arguments = parse(None, __doc__, stage="evaluate")
    with arguments.refusing():
        from libra_ray.on_ray import stages
        from libra_ray.on_ray.session import connected
        from libra_ray.report.publish import tracked
        from libra_ray.report.table import summary_table
        from libra_ray.runs.folder import RunFolder, locked, products

        stages.check(RunFolder(arguments.run_dir.resolve(), arguments.config), "evaluate", fresh=arguments.fresh)
        with locked(arguments.run_dir):
            folder = RunFolder.open(
                arguments.prepare(*products("evaluate")), arguments.config, forget=("evaluate",) if arguments.fresh else ()
            )
            with tracked(folder) as tracker, connected():
                stages.evaluate(folder)
                report = stages.report(folder, tracker)
                print(summary_table(report))
                print(f"report: {folder.path('report.html')}")


if __name__ == "__main__":
    main()
