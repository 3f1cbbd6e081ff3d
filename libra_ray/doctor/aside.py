"""A function called in a process of its own: what crashes, hangs or prints there does neither here."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class AsideError(RuntimeError):
    """It raised, crashed, or did not answer in time."""


def call[T](function: Callable[..., T], *arguments: Any, limit_s: float) -> T:
    """What a module's function returns; arguments and answer travel as JSON.

    Args:
        function: defined at the top of its module.
        limit_s: seconds after which it is ended.

    Raises:
        AsideError: one line that says why there is no answer; a `ValueError` or `RuntimeError` speaks for itself.
    """
    command = [sys.executable, "-m", "libra_ray.doctor.aside", function.__module__, function.__qualname__]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(
            command,
            input=json.dumps(arguments).encode(),
            capture_output=True,
            env=os.environ | {"PYTHONPATH": path},
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise AsideError(f"no answer within {limit_s:g} s") from None
    if not done.stdout:
        raise AsideError(_end(done.returncode, done.stderr.decode(errors="replace")))
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise AsideError(answer["error"])
    value: T = answer["value"]
    return value


def _end(status: int, said: str) -> str:
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    how = f"it was ended by {signal.Signals(-status).name}" if status < 0 else f"it ended with status {status}"
    return f"{how}: {last}" if last else how


def _main() -> None:
    # What libraries print goes to standard error: the answer alone goes to standard output.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    module, name = sys.argv[1:]
    try:
        value = getattr(importlib.import_module(module), name)(*json.load(sys.stdin))
        told = {"value": value}
    except (ValueError, RuntimeError) as error:
        told = {"error": str(error)}
    except Exception as error:  # noqa: BLE001  (the border of this process)
        told = {"error": f"{type(error).__name__}: {error}"}
    with answer:
        json.dump(told, answer)


if __name__ == "__main__":
    _main()
