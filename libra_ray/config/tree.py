"""The configuration: one frozen tree, named presets, and `override`, the only way to change a value. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from libra_ray.config.checks import check, counts_of
from libra_ray.config.closed_loop import ControlConfig, DelayConfig, EvaluateConfig
from libra_ray.config.former import refuse_former
from libra_ray.config.overrides import flatten, with_changes
from libra_ray.config.paths import in_full
from libra_ray.config.presets import PRESETS as NAMED
from libra_ray.config.presets import QUICKSTART_TASKS
from libra_ray.config.systems import AnchorRefineConfig, CoarseToFineConfig, ExpertsConfig

PRESETS = NAMED
"""Preset -> its changes of the defaults."""


@dataclass(frozen=True, kw_only=True)
class SimConfig:
    """The simulated robots."""

    family: Literal["metaworld", "tabletop"] = "metaworld"
    """The simulator."""
    tasks: tuple[str, ...] = QUICKSTART_TASKS
    """Task names; one policy learns them all."""
    image_size: int = 64
    """Height and width of the camera picture, in pixels."""
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
    history: int = 1
    """Pictures per camera a system sees: the present one and `history - 1` before it."""
    holdout_share: float = 0.1
    """Share of the episodes of each task kept out of training, for the offline measures."""
    normalisation: Literal["min_max", "quantile"] = "min_max"
    """How actions are mapped to [-1, 1]: by extremes, or by the 1 % and 99 % quantiles."""


@dataclass(frozen=True, kw_only=True)
class ActionConfig:
    """The hybrid action space (method.md, Libra-VLA)."""

    bins: int = 10
    """N, coarse classes per action dimension; the paper's Libra point is 10."""
    horizon: int = 5
    """H, control steps in one refiner chunk."""
    chunks: int = 2
    """M, refiner chunks that one plan covers; a plan has M * H steps."""

    @property
    def plan_steps(self) -> int:
        """L = M * H, control steps in one plan."""
        return self.horizon * self.chunks


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What kind of policy it is."""

    system: str = "libra"
    """`libra`: planner and refiner, as published; `monolithic`: the baseline at equal budget, one level and one loss (with
    `refiner.vision` it spans the paper's component table); `regression`: the actions' mean by one network; `coarse_to_fine`:
    token heads, and a flow that starts from their decoded action; `anchor_refine`: a frozen anchor and its learned residual;
    `experts`: token, diffusion and flow experts over one backbone, and a learned router; or the address of a class of your own
    (docs/systems.md)."""


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """The Semantic Planner: a vision-language backbone with a bidirectional head of learned queries."""

    backbone: str = "tiny"
    """`tiny` (random weights, byte tokeniser, no download), or name or folder of a Hugging Face image-text-to-text model."""
    freeze_backbone: bool = False
    """Keep the backbone's weights as loaded and train the head alone."""
    width: int = 96
    """Width of the head, and of the tiny backbone."""
    depth: int = 2
    """Transformer layers of the head (paper: 12 of width 1024)."""
    heads: int = 4
    """Attention heads; must divide the width."""
    max_text_tokens: int = 64
    """Longest instruction, in the backbone's tokens (for `tiny`: bytes)."""
    see_state: bool = True
    """Whether proprioception joins the head's tokens. The paper is silent."""


@dataclass(frozen=True, kw_only=True)
class RefinerConfig:
    """The Action Refiner: a diffusion transformer with its own encoder and without language."""

    width: int = 96
    """Width of the transformer and of its vision tokens."""
    depth: int = 2
    """Transformer layers."""
    heads: int = 4
    """Attention heads; must divide the width."""
    encoder: str = "conv"
    """Its own encoder: `conv`, or the name or folder of a Hugging Face vision model (paper: SigLIP)."""
    vision: Literal["own", "shared"] = "own"
    """`own`: its own encoder, as published; `shared`: the planner's picture features (ablation)."""
    see_language: bool = False
    """Let the refiner read the instruction (ablation); published: no, the tokens are its only task channel."""
    objective: Literal["ddpm", "flow"] = "flow"
    """`ddpm`: epsilon prediction, as published; `flow`: velocity regression on the straight path."""
    predicts: Literal["target", "action"] = "action"
    """What the network predicts. `target`: the objective's own target, as published. `action`: how far each action lies from
    its coarse token's centre (of the monolithic baseline: from 0), from which the target follows; before any training the
    refiner then answers with the coarse action."""
    train_timesteps: int = 100
    """Noise levels of the DDPM schedule. Open in the paper."""
    denoising_steps: int = 6
    """Denoising steps at inference. Open in the paper."""
    noise_draws: int = 2
    """Noise levels drawn per window and step: the vision features are computed once for all of them. Open in the paper."""
    sample_noise: float = 1.0
    """Scale of the starting noise at inference; 0 starts every chunk from the mean. Open in the paper."""
    condition_dropout: float = 0.0
    """Share of windows whose coarse tokens are hidden in training (RoboDual drops them at random)."""
    max_staleness: int = 0
    """How far the refiner's picture may lag behind the planner's in training: control steps beyond the chunk starts (0: those
    only, as published); -1: anywhere up to the plan's end, so that it knows intents of every age."""
    max_committed_steps: int = 0
    """Real-time chunking, learned: of each chunk in training 0 to so many first steps are given as decided, and only the rest
    is learned, so that a robot can go on while its next chunk is computed (`control.committed_steps`)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Joint training of both systems."""

    start_from: str = ""
    """A checkpoint folder to fine-tune: its weights are taken where name and shape agree; empty means random ones."""
    start_parts: tuple[str, ...] = ()
    """Which of its weights are taken, by the beginnings of their names, e.g. `planner.backbone`; empty means all."""
    steps: int = 1500
    """Optimiser steps."""
    batch_size: int = 64
    """Windows per optimiser step, over all workers."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    lr_final_share: float = 0.05
    """Share of `lr` that the cosine schedule ends at."""
    warmup_steps: int = 100
    """Optimiser steps of linear warm-up before the cosine."""
    weight_decay: float = 0.01
    """AdamW's weight decay of matrices; biases and norms are not decayed."""
    grad_clip: float = 1.0
    """Largest norm of the gradient of both systems together."""
    ema_decay: float = 0.995
    """Decay per step of the moving average of the weights, which is what the policy runs with."""
    lambda_plan: float = 1.0
    """Weight of the planner's cross-entropy (its meaning under another `balance`: see there)."""
    lambda_diff: float = 1.0
    """Weight of the refiner's denoising loss."""
    balance: Literal["fixed", "gradient", "uncertainty"] = "fixed"
    """How the two weights are found. `fixed`: as given. `gradient`: calibrated until the norms of the weighted losses'
    gradients have the ratio of the lambdas. `uncertainty`: learned log-variances, beginning at the lambdas (Kendall et al.)."""
    balance_every: int = 10
    """Optimiser steps between measures of both losses' gradients, for `gradient` and for the log."""
    balance_memory: float = 0.9
    """Decay per measure of the gradient norms that `gradient` goes by; 0 takes the last measure alone."""
    curriculum: Literal["threshold", "teacher", "planner"] = "threshold"
    """What the refiner reads: ground truth until accuracy `tau`, then sampled tokens, as published; ground truth always, by
    which it follows the planner better (docs/components.md); sampled always."""
    tau: float = 0.6
    """Planner accuracy (moving average over steps) that ends teacher forcing. Open in the paper."""
    augment_pixels: int = 0
    """Largest random shift of the pictures in training, in pixels; 0 turns it off."""
    augment_state: float = 0.0
    """Noise on proprioception in training (std; the recorded range is 2 wide), lest it tells which way the expert set out."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 where the hardware computes in it, fp32 elsewhere."""
    log_every: int = 20
    """Optimiser steps between rows of the training log."""
    checkpoint_every: int = 500
    """Optimiser steps between checkpoints to resume from."""
    validate_every: int = 500
    """Optimiser steps between measures on the held-out episodes; 0 turns them off."""
    seed: int = 0
    """Seed of initial weights, data order, noise and split."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Resources. The same configuration runs on a laptop, on an existing cluster and as a submitted job."""

    simulator_actors: int = 0
    """Simulator processes; 0 means one per available CPU."""
    train_workers: int = 1
    """Training workers (data parallel)."""
    train_cpus_per_worker: float = 0.0
    """CPUs reserved per training worker; 0 shares all of the cluster's among them."""
    use_gpu: bool = False
    """One GPU per training worker; the policy is evaluated on a GPU where the driver has one."""
    max_failures: int = 3
    """Times a training run is restarted from its last checkpoint after a worker died."""


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
