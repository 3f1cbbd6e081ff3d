"""What a run evaluates: one policy, under one trace of latencies, the same ones at every start."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from libra_ray.manifest import read_manifest
from libra_ray.runs.folder import RunFolder

FACT = "evaluate.subject"
"""What a run keeps, beside the stages, of what its evaluation began with."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSubject:
    """What an evaluation's episodes depend on and no setting tells: the contents behind the paths.

    Attributes:
        policy: digest of the checkpoint.
        trace: sha256 of the file `delay.trace`; empty where there is none.
    """

    policy: str
    trace: str = ""

    @classmethod
    def of(cls, folder: RunFolder) -> "EvaluationSubject":
        """What lies there now.

        Raises:
            ValueError: there is no checkpoint.
        """
        trace = Path(folder.config.delay.trace)
        found = hashlib.sha256(trace.read_bytes()).hexdigest() if folder.config.delay.trace and trace.is_file() else ""
        return cls(policy=read_manifest(folder.checkpoint).digest, trace=found)


def check_same_subject(folder: RunFolder) -> None:
    """Refuse to go on with an evaluation, or to show it again, where something else lies in its place by now.

    Raises:
        ValueError: says what has changed and what to do.
    """
    before = folder.fact(FACT, EvaluationSubject)
    if before is None or not folder.checkpoint.is_dir():
        return
    now = EvaluationSubject.of(folder)
    if before.policy != now.policy:
        what = f"checkpoint {folder.checkpoint}"
    elif now.trace not in ("", before.trace):
        what = f"delay.trace={folder.config.delay.trace}"
    else:
        return
    raise ValueError(
        f"{what} is another one than the evaluation of {folder.root.name} began with; restore it, or give --fresh to evaluate "
        "anew (earlier results are kept aside), or another --name"
    )


def keep_subject(folder: RunFolder) -> None:
    """Bind the run to what it evaluates, from now on.

    Raises:
        ValueError: see `check_same_subject`.
    """
    check_same_subject(folder)
    if folder.fact(FACT, EvaluationSubject) is None:
        folder.note(FACT, EvaluationSubject.of(folder))
