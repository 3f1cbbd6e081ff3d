"""Measure every component of a checkpoint on this machine, and propose the settings that fit a budget per control decision."""

from functools import partial

from arguments import Arguments, JobParser, set_aside, speak_utf8

from libra_ray.config.paths import place


def parser() -> JobParser:
    """The command line."""
    p = JobParser(prog="budget.py", description=__doc__, allow_abbrev=False)
    p.add_argument("checkpoint", metavar="CHECKPOINT", type=place, help="its folder, e.g. runs/quickstart/checkpoint")
    p.add_argument("--ms", type=float, help="milliseconds from picture to actions (default: one control step)")
    p.add_argument("--hz", type=float, help="control steps per second (default: those of the demonstrations)")
    p.add_argument("--robots", type=int, default=1, help="served by one replica a level and one gateway (default: %(default)s)")
    p.add_argument("--rule", choices=("fifo", "overlap", "event"), default="", help="of control (default: the checkpoint's)")
    p.add_argument("--committed", type=int, metavar="STEPS", help="control.committed_steps (default: the checkpoint's)")
    p.add_argument("--episodes", type=int, help="of each task: measure success too, simulated with the delays (default: none)")
    p.add_argument(
        "--device", choices=("cpu", "cuda"), default="", help="where it computes (default: on a GPU if there is one)"
    )
    p.add_argument("--threads", type=int, default=1, help="of one call on a CPU, as a replica's (default: %(default)s)")
    p.add_argument("--jpeg", type=int, default=90, metavar="QUALITY", help="of pictures sent; 0 is raw (default: %(default)s)")
    p.add_argument("--out", type=place, help="folder of the results (default: `budget` beside the checkpoint)")
    p.add_argument("--fresh", action="store_true", help="measure again; earlier results are kept as FOLDER.old-1")
    p.epilog = "Run again, the same command uses what was measured, and goes on with the episodes."
    return p


def main() -> None:
    """Measure, answer, print the tables, write JSON and plot."""
    speak_utf8()
    given = parser().parse_args()
    out = given.out or given.checkpoint.resolve().parent / "budget"
    with Arguments(run_dir=out, fresh=given.fresh, stage="budget").refusing():
        from libra_ray.budget.answer import answered_budget, check_place, kept_profile, measurable, question_of, write_budget
        from libra_ray.budget.table import budget_table
        from libra_ray.common.progress import print_status
        from libra_ray.runs.folder import locked

        numbers = {"budget_ms": given.ms, "control_hz": given.hz, "robots": given.robots, "committed": given.committed}
        question = question_of(given.checkpoint, rule=given.rule, **numbers)
        check_place(out)
        device = measurable(given.device, given.threads, given.jpeg)
        if given.episodes is not None:
            from libra_ray.on_ray.budget import check_success, measured_success

            check_success(given.checkpoint, question, given.episodes)
        with locked(out):
            if given.fresh and (kept := set_aside(out)):
                print_status(f"budget: kept the earlier {out} as {kept}")
            out.mkdir(parents=True, exist_ok=True)
            told = lambda what: print_status(f"budget: {what}")  # noqa: E731
            profile = kept_profile(out, given.checkpoint, device, given.threads, given.jpeg, told)
            success = None
            if given.episodes is not None:
                success = partial(measured_success, out, given.checkpoint, question, profile, episodes=given.episodes)
            report = answered_budget(given.checkpoint, question, profile, success)
            write_budget(out, report)
    print(budget_table(report), end="")
    print(f"written: {out / 'budget.json'}, {out / 'budget.svg'}")


if __name__ == "__main__":
    main()
