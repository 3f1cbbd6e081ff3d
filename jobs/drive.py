"""Drive a fleet of simulated or stub robots against a served policy in real time, and measure what they meet."""

import asyncio
import os

from arguments import JobParser, speak_utf8

from libra_ray.config.paths import place, place_or_name

TOKEN = "LIBRA_TOKEN"  # noqa: S105  (the variable's name)


def parser() -> JobParser:
    """The command line."""
    p = JobParser(prog="drive.py", description=__doc__, allow_abbrev=False)
    p.add_argument("endpoint", metavar="ENDPOINT", help="the server, e.g. ws://127.0.0.1:8765")
    p.add_argument("--robots", type=int, default=16, help="robots (default: %(default)s)")
    p.add_argument(
        "--hz", type=float, default=10, help="simulated: control rate, a chunk is asked for every execute_steps of the server; "
        "--stub: rate of chunk requests per robot, 0 asks again as soon as it is answered (default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--seconds", type=float, default=60, help="measured time (default: %(default)s)")
    p.add_argument("--warmup", type=float, default=0, help="seconds driven before, not counted (default: %(default)s)")
    p.add_argument("--family", choices=("metaworld", "tabletop"), default="metaworld", help="simulator")
    p.add_argument("--tasks", default="", help="task names with commas between (default: those of the family's preset)")
    p.add_argument("--max-steps", type=int, default=500, help="control steps of the longest episode (default: %(default)s)")
    p.add_argument("--seed", type=int, default=100_000, help="seed of the first episodes (default: %(default)s)")
    p.add_argument("--processes", type=int, default=0, help="simulator processes (default: by robots and cores)")
    p.add_argument(
        "--stub", type=place_or_name, default="", help="load without physics: `synthetic`, or the folder of a run or a data "
        "set, to replay",
    )  # fmt: skip
    p.add_argument("--echo", action="store_true", help="with --stub synthetic: the server sends each robot's identity back")
    p.add_argument("--jpeg", type=int, metavar="QUALITY", help="send pictures as JPEG, 1 to 95 (default: raw)")
    p.add_argument(
        "--patience", type=float, default=10, help="seconds without a server before giving up (default: %(default)s)"
    )
    p.add_argument("--out", type=place, help="JSON to write, with the time line second by second")
    p.epilog = f"A server's token is read from the environment variable {TOKEN}."
    return p


def main() -> None:
    """Drive, print the table, write the JSON."""
    speak_utf8()
    arguments = parser()
    given = vars(arguments.parse_args())
    out, tasks = given.pop("out"), given.pop("tasks")
    renamed = {"warmup_s": given.pop("warmup"), "patience_s": given.pop("patience"), "jpeg_quality": given.pop("jpeg")}
    try:
        from libra_ray.client.client import RefusedError
        from libra_ray.common.files import write_text
        from libra_ray.common.json_text import dump
        from libra_ray.common.progress import ProgressBar
        from libra_ray.fleet.run import LoadSpec, run, table

        load = LoadSpec(**given, **renamed, tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()))
        if out is not None and (out.is_dir() or not out.resolve().parent.is_dir()):
            raise ValueError(f"--out {out} is a folder itself, or its folder does not exist; give a file to write")
        with ProgressBar("drive", round(load.warmup_s + load.seconds), "s") as bar:
            result = asyncio.run(run(load, os.environ.get(TOKEN), lambda seconds: bar.to(round(seconds))))
            bar.to(bar.total)
    except KeyboardInterrupt:
        arguments.exit(130, "drive.py: interrupted\n")
    except (ValueError, ConnectionError, RefusedError) as mistake:
        arguments.error(str(mistake))
    print(table(result), end="")
    if out is not None:
        write_text(out, dump(result))
        print(f"written: {out}")


if __name__ == "__main__":
    main()
