"""Is there an inverted U of success over N, where, and why? The granularity, swept with and without an own encoder.

N in {2, 4, 6, 10, 16, 32, 64, 100} x {own encoder, shared features} x seeds, on tasks at the table where only the words tell
what to do and where precision matters. Every cell is a trial of the sweep engine: trained on one shared recording, evaluated in
closed loop on unseen seeds, with and without its refiner. All begin with one backbone, trained on the same demonstrations in a
planner of the finest N. Seed by seed, N interleaved: a part of the study is a whole one with
fewer seeds. Run again, the same command continues: here with what lies in `runs/`, elsewhere with the cells of the JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.files import RESULTS, ROOT, RUNS, command_line, write_result
from benchmarks.granularity_pages import Side, curve_table, difficulty_table, reading
from benchmarks.pretraining import PLACE, PRETRAINING, WORDED_TASKS, checkpoint_of, pretrain
from benchmarks.results_table import write_between
from libra_ray.common.files import write_text
from libra_ray.common.json_text import plain, read
from libra_ray.common.provenance import Hardware, describe_hardware, git_revision, public_config
from libra_ray.config import Config, override, preset
from libra_ray.config.presets import AS_PUBLISHED
from libra_ray.on_ray.session import connected
from libra_ray.on_ray.sweep import publish, runner
from libra_ray.on_ray.sweep.space import Space, load_space
from libra_ray.on_ray.sweep.sweep_folder import MAY_CHANGE, Identity, SweepFolder, TrialFolder, TrialSpec, differences
from libra_ray.report.publish import tracked
from libra_ray.report.sweep.plots import BINS, Curve, granularity_plot, standalone
from libra_ray.report.sweep.report import configuration_row, curve_row, curves
from libra_ray.runs.folder import locked
from libra_ray.runs.trials import Settings, TrialResult, configurations
from libra_ray.stats.granularity_peak import Estimate, Outcomes, paired_difference

STUDY_NAME = "granularity"
SPACE = "encoder"
PRETRAINED = "pretrained"
STUDY: Mapping[str, Any] = {
    **WORDED_TASKS,
    # As published, where the preset is made for late planners.
    **AS_PUBLISHED,
    "train.curriculum": "threshold",
    "train.checkpoint_every": 300,
    "train.validate_every": 300,
    "train.log_every": 40,
    "evaluate.robots": 32,
}
"""Changes of the preset `tabletop`."""
QUICK: Mapping[str, Any] = {
    "data.image_size": 32,
    "sim.max_steps": 40,
    "record.episodes_per_task": 10,
    "train.steps": 40,
    "train.log_every": 10,
    "train.batch_size": 16,
    "train.warmup_steps": 5,
    "evaluate.episodes_per_task": 4,
}
ENCODERS = {"own": "own encoder", "shared": "shared features"}


CONTROLLERS = ("policy", "coarse_only")
DRAWN = (
    ("policy", "own", "own encoder"),
    ("policy", "shared", "shared features"),
    ("coarse_only", "own", "planner alone (own encoder's)"),
)
"""Controller, encoder and name of every curve."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The study's JSON.

    Attributes:
        cells: how many finished and failed; `cell_s`: the mean seconds of one.
        sides: `<encoder>/<controller>` -> the curve over N with its peak, and every configuration's measures;
            `<encoder>/gain` -> what `gains` says.
        space: what the cells' values are drawn from, in words.
        trials: the cells that finished.
    """

    git_revision: str | None
    hardware: Hardware
    config: Mapping[str, Any]
    pretraining: Mapping[str, Any]
    settings: Settings
    cells: Mapping[str, int]
    cell_s: Mapping[str, float | None]
    sides: Mapping[str, Side | Mapping[int, Estimate]]
    space: Mapping[str, str]
    trials: Sequence[TrialResult]


def study(space: Space, *, quick: bool, seeds: int, hours: float, concurrent: int) -> Settings:
    """The whole grid, or with `quick` its first three N."""
    return Settings(
        search="grid",
        scheduler="fifo",
        trials=3 if quick else len(space.grid()),
        seeds=seeds,
        hours=hours,
        concurrent=concurrent,
        controllers=CONTROLLERS,
    )


def result(config: Config, settings: Settings, space: Space, trials: Sequence[TrialResult]) -> Study:
    """What the trials come to."""
    sides: dict[str, Side | Mapping[int, Estimate]] = {}
    for encoder in ENCODERS:
        mine = _with(encoder, trials)
        sides[f"{encoder}/gain"] = gains(mine)
        for controller in CONTROLLERS:
            found = configurations(mine, controller)
            lines = curves(found)
            sides[f"{encoder}/{controller}"] = Side(
                configurations=[configuration_row(c) for c in found], curve=curve_row(lines[0]) if lines else None
            )
    return Study(
        git_revision=git_revision(),
        hardware=describe_hardware(),
        config={name: value for name, value in public_config(config).items() if name != PLACE},
        pretraining=PRETRAINING,
        settings=settings,
        cells={word: sum(t.status == word for t in trials) for word in ("finished", "failed")},
        cell_s={"mean": float(np.mean([t.wall_s for t in trials])) if trials else None},
        sides=sides,
        space=space.text,
        trials=[t for t in trials if t.status == "finished"],
    )


def gains(trials: Sequence[TrialResult]) -> dict[int, Estimate]:
    """N -> what the refiner adds to its planner's success, episode by episode."""
    pairs: dict[int, list[tuple[Outcomes, Outcomes]]] = {}
    for trial in trials:
        if trial.status == "finished":
            refined, alone = (trial.outcomes(controller) for controller in CONTROLLERS)
            pairs.setdefault(int(trial.values[BINS]), []).append((refined, alone))
    return {n: paired_difference(found) for n, found in sorted(pairs.items())}


def _with(encoder: str, trials: Sequence[TrialResult]) -> list[TrialResult]:
    return [trial for trial in trials if trial.values.get("refiner.vision") == encoder]


def plot(trials: Sequence[TrialResult]) -> str:
    """Both encoders and the planner alone in one plot; the difficulty is that of the own encoder."""
    lines: list[Curve] = []
    for controller, encoder, label in DRAWN:
        found = curves(configurations(_with(encoder, trials), controller))
        lines += [Curve(label=label, points=line.points, peak=line.peak) for line in found[:1]]
    return granularity_plot(lines)


def markdown(found: Study) -> str:
    """The tables and sentences for docs/granularity.md."""
    parts = []
    for encoder, label in ENCODERS.items():
        policy, coarse, gain = (found.sides[f"{encoder}/{name}"] for name in (*CONTROLLERS, "gain"))
        assert isinstance(policy, Side)
        assert isinstance(coarse, Side)
        assert not isinstance(gain, Side)
        parts += [f"### {label.capitalize()}", curve_table(policy, coarse, gain), difficulty_table(policy), *reading(policy)]
    return "\n\n".join(parts) + "\n"


def restore(path: Path, sweep: SweepFolder) -> None:
    """Take the cells of a result into the sweep's folder, so that another machine goes on where one stopped.

    Raises:
        ValueError: they were measured under other settings.
    """
    if not path.exists():
        return
    found = read(Study, path)
    mine = _comparable(sweep.identity())
    known = _comparable({**found.config, **found.settings.identity, "space": found.space})
    if changed := differences(known, mine):
        raise ValueError(
            f"{path} holds cells of a study with another {', '.join(changed)}; give the same settings, or another --results"
        )
    for ended in found.trials:
        trial = sweep.write(TrialSpec(number=ended.number, seed=ended.seed, values=dict(ended.values)))
        if trial.result() is None:
            trial.end(ended)


def _comparable(identity: Identity) -> Identity:
    """What cells of one study agree on, wherever they were run."""
    return {name: value for name, value in plain(identity).items() if name != PLACE and not name.startswith(MAY_CHANGE)}


def write_results(sweep: SweepFolder, results: Path, pages: Path, name: str) -> None:
    """Write JSON, plot and fragments of what is finished."""
    trials = sweep.results()
    found = result(sweep.run.config, sweep.settings, sweep.space, trials)
    write_result(results / f"{name}.json", found)
    write_text(results / f"{name}.md", markdown(found))
    if svg := plot(trials):
        write_text(pages / "images" / f"{name}.svg", standalone(svg))
    page = pages / "granularity.md"
    if name == STUDY_NAME and page.exists():
        write_between(page, Path(__file__).name, markdown(found))
    print(markdown(found))


def main() -> None:
    """Run the study, or the rest of it, and write what it found."""
    parser = command_line("granularity", __doc__)
    parser.add_argument("--quick", action="store_true", help="three N, a minute of work: does everything run?")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of every cell (default: %(default)s)")
    parser.add_argument("--hours", type=float, default=0.0, help="begin no cell after this time (default: no limit)")
    parser.add_argument("--concurrent", type=int, default=0, help="cells at a time (default: one per CPU, or per GPU)")
    parser.add_argument("--gpu", action="store_true", help="train and evaluate on GPUs")
    parser.add_argument("--steps", type=int, help=f"optimiser steps of every cell (default: {STUDY['train.steps']})")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder that holds the runs (default: runs)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="for the JSON and the tables")
    parser.add_argument("--pages", type=Path, default=ROOT / "docs", help="for the page and its plot")
    parser.add_argument("--only-publish", action="store_true", help="write what is finished, run nothing")
    given = parser.parse_args()
    name = f"{STUDY_NAME}-quick" if given.quick else STUDY_NAME
    root = (given.runs / f"study-{name}").resolve()
    changes = {**STUDY, **(QUICK if given.quick else {}), "ray.use_gpu": given.gpu}
    changes[PLACE] = str(checkpoint_of(root / PRETRAINED))
    config = override(preset("tabletop"), changes | ({"train.steps": given.steps} if given.steps else {}))
    space = load_space(SPACE, config, ROOT / "tune_spaces")
    settings = study(space, quick=given.quick, seeds=given.seeds, hours=given.hours, concurrent=given.concurrent)
    with locked(root):
        resume = (root / "plan.json").exists()
        sweep = SweepFolder.open(root, config, space, settings, resume=resume)
        restore(given.results / f"{name}.json", sweep)
        if not given.only_publish:
            with tracked(sweep.run) as tracker, connected():

                def ended(trial: TrialFolder, result: TrialResult) -> None:
                    publish.publish_trial(sweep, tracker, trial, result)

                pretrain(root / PRETRAINED, sweep.data(config), {}, quick=given.quick)
                runner.run(sweep, ended)
        (given.pages / "images").mkdir(parents=True, exist_ok=True)
        write_results(sweep, given.results, given.pages, name)


if __name__ == "__main__":
    main()
