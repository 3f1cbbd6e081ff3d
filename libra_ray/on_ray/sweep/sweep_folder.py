"""A sweep on disk: its specification, and a folder per trial, from which it continues after any end.

```
runs/<name>/
  plan.json            the configuration, the space, how it is searched: a sweep is never continued under another one
  data/<digest>/       one recording for all trials whose recording settings agree
  trials/<n>-seed<s>/  a run folder each: configuration n with train.seed s
    trial.json         its specification: values, resolved configuration, rungs
    rungs.jsonl        closed-loop success on the way
    result.json        written last: such a trial is not run again
  sweep.json, best.yaml, report.html
```
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from libra_ray.common.files import read_jsonl, write_text
from libra_ray.common.json_text import dump, plain, read
from libra_ray.config import Config, from_tree, override
from libra_ray.config.former import upgraded
from libra_ray.config.overrides import flatten
from libra_ray.data.fingerprint import Fingerprint
from libra_ray.on_ray.run_data import began_with, open_unchanged
from libra_ray.on_ray.sweep.space import Space, Values
from libra_ray.runs.folder import STAGE_KEYS, RunFolder
from libra_ray.runs.trials import Rung, Scheduler, Settings, TrialResult

REDUCTION = 3
BUDGETS: dict[Scheduler, tuple[int, ...]] = {"asha": (1, REDUCTION, REDUCTION**2), "fifo": (REDUCTION**2,)}
"""Rungs, in ninths of the training steps: at each one closed-loop success is measured and reported."""
FULL = REDUCTION**2
RUNGS_NAME = "rungs.jsonl"
MAY_CHANGE = ("ray.", "tracking.", "evaluate.robots", "evaluate.policy_replicas", "evaluate.gpus_per_replica")
"""Settings that may be others when a sweep is continued: they change no result."""


Identity = Mapping[str, Any]
"""What a continued study must agree on: dotted names of settings, and what else there is, to values as JSON has them."""


def differences(before: Identity, now: Identity) -> dict[str, Any]:
    """What of `before` is another now: name -> as it was.

    Settings of earlier versions count by what they meant; one unknown to whoever wrote `before` had its default.
    """
    known: Identity = plain(upgraded(before))
    was = {**plain(flatten(Config())), **known}
    names = sorted(name for name in {*known, *now} if not name.startswith(MAY_CHANGE))
    return {name: was.get(name) for name in names if was.get(name) != now.get(name)}


def settings_of(space: Space, config: Config, given: Mapping[str, Any]) -> Settings:
    """The settings that a command line asks for.

    Args:
        given: `Settings`' fields by name; a `search` of None means the space's own.

    Raises:
        ValueError: a number that makes no sweep, or a search that the space does not allow.
    """
    least = {"trials": 1, "seeds": 1, "hours": 0, "concurrent": 0, "rung_episodes": 1}
    for name, value in least.items():
        if given[name] < value:
            raise ValueError(f"--{name} {given[name]} is too small; it must be at least {value}")
    search, trials = given["search"] or space.search, given["trials"]
    if search == "grid":
        trials = min(trials, len(space.grid()))
    elif search == "random":
        trials = len(space.draws(trials, config.train.seed))
    return Settings(
        **{f.name: given[f.name] for f in fields(Settings) if f.name in given} | {"search": search, "trials": trials}
    )


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial to run: a configuration with one seed."""

    number: int
    seed: int
    values: Values

    @property
    def name(self) -> str:
        """The name of the trial's folder; sorts by number."""
        return f"{self.number:04d}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class WrittenOrder(TrialSpec):
    """An order with all that its trial has to know.

    Attributes:
        config: the resolved configuration as a tree; see `config_with`.
        frames: the folder of the sweep's decoded pictures.
        data: the data set to train on, as it was when the sweep began; None where the version that wrote it did not say.
        budgets: the rungs.
        rung_episodes: episodes per task at every rung before the last.
    """

    config: Mapping[str, Any]
    frames: str
    data: Fingerprint | None = None
    budgets: Sequence[int]
    rung_episodes: int

    def config_with(self, **changes: object) -> Config:
        """The trial's configuration, with `ray` settings as the machine has them."""
        return override(from_tree(self.config), {f"ray.{name}": value for name, value in changes.items()})


@dataclass(frozen=True, kw_only=True)
class TrialProcess:
    """What Ray Tune hands to the process of a trial: its folder, and what of the machine it has."""

    trial: str
    threads: int
    simulator_actors: int


@dataclass(frozen=True, kw_only=True)
class TrialFolder:
    """The folder of one trial. Its files' errors name the file and the field."""

    root: Path

    def spec(self) -> WrittenOrder:
        """What was ordered."""
        return read(WrittenOrder, self.root / "trial.json")

    def result(self) -> TrialResult | None:
        """How it ended; None for one that has not."""
        path = self.root / "result.json"
        return read(TrialResult, path) if path.exists() else None

    def rungs(self) -> list[Rung]:
        """What it has reported so far."""
        return read_jsonl(self.root / RUNGS_NAME, Rung)

    def end(self, result: TrialResult) -> None:
        """Note how it ended."""
        write_text(self.root / "result.json", dump(result))


@dataclass(frozen=True, kw_only=True)
class SweepFolder:
    """A sweep and its folder."""

    run: RunFolder
    space: Space
    settings: Settings

    @classmethod
    def open(cls, root: Path, config: Config, space: Space, settings: Settings, *, resume: bool) -> Self:
        """Create the folder, or continue in it.

        Raises:
            ValueError: it holds a sweep and `resume` is false, or one of other settings.
        """
        known = cls.check(root, config, space, settings, resume=resume)
        (root / "trials").mkdir(parents=True, exist_ok=True)
        sweep = cls(run=RunFolder.open(root, config), space=space, settings=settings)
        if not known:
            write_text(root / "plan.json", dump(sweep.identity()))
        return sweep

    @classmethod
    def check(cls, root: Path, config: Config, space: Space, settings: Settings, *, resume: bool) -> bool:
        """Whether the folder holds this very sweep.

        Raises:
            ValueError: as `open`; also where `resume` finds nothing to continue, or other data than the trials before had.
        """
        sweep = cls(run=RunFolder(root, config), space=space, settings=settings)
        path = root / "plan.json"
        if not path.exists():
            if resume:
                raise ValueError(f"{root.name} holds no sweep to continue; leave --resume out, or give its --name")
            return False
        if not resume:
            specs = len(list(root.glob("trials/*/trial.json")))
            raise ValueError(
                f"{root.name} holds a sweep with {specs} trials begun; give --resume to continue it, --fresh to start over "
                "(the old folder is kept aside), or another --name"
            )
        now = sweep.identity()
        if changed := differences(read(dict[str, Any], path), now):
            told = ", ".join(f"{name} ({was} -> {now.get(name)})" for name, was in changed.items())
            raise ValueError(f"{root.name} was started with another {told}; give the same, or another --name")
        for recording in map(sweep.data, space.recordings(config)):
            if began_with(recording) is not None:
                open_unchanged(recording)
        return True

    def identity(self) -> Identity:
        """What a continued sweep must agree on, by name."""
        settings = {n: v for n, v in flatten(self.run.config).items() if not n.startswith(MAY_CHANGE)}
        return dict(plain({**settings, "space": self.space.text, **self.settings.identity}))

    def data(self, config: Config) -> RunFolder:
        """Where the demonstrations of a trial lie, shared by all that record the same."""
        kept = {name: value for name, value in flatten(config).items() if name.startswith(STAGE_KEYS["record"])}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
        return RunFolder(self.run.path("data") / digest, config)

    def write(self, spec: TrialSpec) -> TrialFolder:
        """Write a trial's specification, so that it belongs to the sweep whatever happens next."""
        trial = TrialFolder(root=self.run.path("trials") / spec.name)
        if not (trial.root / "trial.json").exists():
            trial.root.mkdir(parents=True, exist_ok=True)
            config = override(self.run.config, {**spec.values, "train.seed": spec.seed})
            data = self.data(config)
            own: Mapping[str, Any] = {
                "data.root": str(data.dataset),
                "evaluate.checkpoint": "",
                "evaluate.controllers": self.settings.controllers,
                "evaluate.videos_per_task": 0,
            }
            written = WrittenOrder(
                **vars(spec),
                config=plain(override(config, own)),
                frames=str(data.path("frames")),
                data=began_with(data),
                budgets=BUDGETS[self.settings.scheduler],
                rung_episodes=min(self.settings.rung_episodes, config.evaluate.episodes_per_task),
            )
            write_text(trial.root / "trial.json", dump(written))
        return trial

    def specs(self) -> list[TrialSpec]:
        """All trials begun so far, by number and seed."""
        specs = [read(TrialSpec, path) for path in self.run.root.glob("trials/*/trial.json")]
        return sorted(specs, key=lambda spec: (spec.number, spec.seed))

    def results(self) -> list[TrialResult]:
        """All trials that have ended, by number and seed."""
        found = [TrialFolder(root=self.run.path("trials") / spec.name).result() for spec in self.specs()]
        return [result for result in found if result is not None]
