"""The configuration: one frozen tree, named presets, and `override`, the only way to change a value. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from libra_ray.config.checks import check, counts_of
from libra_ray.config.closed_loop import ControlConfig, DelayConfig, EvaluateConfig
from libra_ray.config.former import refuse_former
from libra_ray.config.networks import ActionConfig, ModelConfig, PlannerConfig, PolicyConfig, RefinerConfig
from libra_ray.config.overrides import flatten, with_changes
from libra_ray.config.paths import in_full
from libra_ray.config.presets import PRESETS as NAMED
from libra_ray.config.presets import QUICKSTART_TASKS
from libra_ray.config.systems import AnchorRefineConfig, CoarseToFineConfig, ExpertsConfig, HierarchyConfig
from libra_ray.config.training import RayConfig, TrainConfig

PRESETS = NAMED
"""Preset -> its changes of the defaults."""


@dataclass(frozen=True, kw_only=True)
class SimConfig:
    """The simulated robots."""

    family: Literal["metaworld", "tabletop"] = "metaworld"
    """The simulator."""
    tasks: tuple[str, ...] = QUICKSTART_TASKS
    """Task names; one policy learns them all."""
    supersample: int = 1
    """Pixels drawn per pixel and axis, averaged; 2 shows goals of a pixel or two steadily and costs about 1 ms a picture."""
    wrist_camera: bool = False
    """A second picture, from the hand (tabletop only)."""
    goal_moves_at: int = 0
    """The control step at which what the task is about is put elsewhere, drawn from the episode's seed (tabletop only: touch,
    push, place, putdown, stack, insert); 0: never."""
    max_steps: int = 500
    """Control steps after which an episode is truncated (Meta-World's own limit is 500)."""


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Demonstrations by the scripted experts."""

    episodes_per_task: int = 50
    """Successful demonstrations recorded of each task."""
    episodes_of: tuple[str, ...] = ()
    """Tasks with another number of demonstrations, as TASK=COUNT, e.g. `reach-v3=800`; tasks not recorded may be named."""
    noise_std: float = 0.5
    """Standard deviation of the seeded action noise (action units, range [-1, 1]); labels stay clean."""
    noise_share: float = 0.5
    """Share of the episodes that are recorded with noise."""
    recovery_share: float = 0.0
    """Share of the episodes in which the expert makes one mistake and recovers (tabletop only): it closes on nothing or askew,
    lets go beside the goal, or the hand is shoved; drawn from the episode's seed, whatever the noise; labels stay clean."""
    settle_steps: int = 0
    """Control steps recorded after the first success."""
    max_attempts: int = 3
    """Attempts per wanted episode before recording gives up on a task; only successes are kept."""
    seed: int = 0
    """Seed of the first episode; evaluation seeds start far away (`evaluate.seed`)."""
    video_codec: str = "h264"
    """LeRobot's name of the encoder, e.g. h264 or libsvtav1."""

    def episodes(self, task: str) -> int:
        """Demonstrations wanted of a task."""
        return counts_of(self.episodes_of).get(task, self.episodes_per_task)

    @property
    def counted_tasks(self) -> tuple[str, ...]:
        """The tasks with a number of their own."""
        return tuple(counts_of(self.episodes_of))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Windows over the recorded episodes."""

    root: str = ""
    """An existing LeRobotDataset v3 folder to train on; empty means the run's own recording."""
    cameras: tuple[str, ...] = ()
    """The cameras to use, by feature name, in the order the model reads them; empty means all colour cameras."""
    keys: tuple[str, ...] = ()
    """Other names for the data set's features, as NEW=OLD, e.g. `action=actions,observation.state=state` (docs/data.md)."""
    image_size: int = 64
    """Height and width of the pictures as models read them, in pixels: a data set's are resized, simulators draw them so."""
    gripper: str = ""
    """Which action dimension opens and closes the gripper: its name, its number from 0, `last` or `none`; empty means as the
    data set declares it (docs/data.md)."""
    action_is: Literal["declared", "delta", "absolute"] = "declared"
    """Whether the other dimensions of an action are changes or values, where the data set does not say or is wrong."""
    rotation: Literal["declared", "none", "euler", "axis_angle", "quaternion", "rot6d"] = "declared"
    """How the rotation in an action is written, likewise."""
    action_names: tuple[str, ...] = ()
    """The names of an action's dimensions, in the data set's order; empty means those in its `info.json`."""
    state_names: tuple[str, ...] = ()
    """Of a state's, likewise."""
    history: int = 1
    """Pictures per camera a system sees: the present one and `history - 1` before it."""
    holdout_share: float = 0.1
    """Share of the episodes of each task kept out of training, for the offline measures."""
    normalisation: Literal["min_max", "quantile"] = "min_max"
    """How actions are mapped to [-1, 1]: by extremes, or by the 1 % and 99 % quantiles."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow."""

    uri: str = ""
    """Tracking store; empty means `sqlite:///<runs>/mlflow.db`."""
    experiment: str = "libra_ray"
    """Name of the MLflow experiment."""
    registered_model: str = "libra"
    """Name in the model registry."""
    required: bool = True
    """Refuse to begin where the store cannot be used; `false` goes on, and the same command publishes later."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything one run is determined by."""

    preset: str = "quickstart"
    sim: SimConfig = field(default_factory=SimConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    data: DataConfig = field(default_factory=DataConfig)
    action: ActionConfig = field(default_factory=ActionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    refiner: RefinerConfig = field(default_factory=RefinerConfig)
    coarse_to_fine: CoarseToFineConfig = field(default_factory=CoarseToFineConfig)
    anchor_refine: AnchorRefineConfig = field(default_factory=AnchorRefineConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    hierarchy: HierarchyConfig = field(default_factory=HierarchyConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    delay: DelayConfig = field(default_factory=DelayConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def preset(name: str) -> Config:
    """The named preset's configuration.

    Raises:
        ValueError: the name is unknown; the message lists the presets.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; valid presets: {', '.join(sorted(PRESETS))}")
    return override(Config(preset=name), PRESETS[name])


def inference_settings(config: Config) -> dict[str, Any]:
    """How a configuration has policies run: for `load_policy`, where that of a run counts and not that of its checkpoint."""
    return {name: value for name, value in flatten(config).items() if name.startswith("policy.")}


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of `config` with dotted names replaced, e.g. `{"refiner.depth": 6}`.

    Values may be of the field's type or text (from a command line or YAML), which is converted; folders become absolute.

    Raises:
        ValueError: a name that does not exist (the message names its nearest neighbours), a value of the wrong type or choice,
            or one outside its range.
    """
    refuse_former(changes)
    changed = with_changes(config, in_full(changes))
    check(flatten(changed))
    return changed
