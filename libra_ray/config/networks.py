"""The settings of actions, systems, their networks, and how these are run. Standard library only."""

from dataclasses import dataclass
from typing import Literal

Training = Literal["full", "frozen", "lora"]
"""How a part trains: all of its weights, none, or adapters beside its linear layers."""


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
    `experts`: token, diffusion and flow experts over one backbone, and a learned router; `hierarchy`: three levels, from
    sub-goals to waypoints to actions; or the address of a class of your own (docs/systems.md)."""
    lora_rank: int = 16
    """Rank of the adapters of parts that train by `lora` (`planner.train_*`, `refiner.train_*`)."""
    lora_alpha: float = 32.0
    """What adapters add is multiplied by `lora_alpha / lora_rank`."""


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """The Semantic Planner: a vision-language backbone with a bidirectional head of learned queries."""

    backbone: str = "tiny"
    """`tiny` (random weights, byte tokeniser, no download), or name or folder of a Hugging Face image-text-to-text model."""
    train_vision: Training = "full"
    """How the backbone's vision tower trains: `full`; `frozen`, as loaded; or `lora`, by adapters beside its linear layers."""
    train_language: Training = "full"
    """How the rest of the backbone trains: its language model, and what joins both."""
    train_head: Training = "full"
    """How the head trains; `frozen` and `lora` are for one that `train.start_from` has taught."""
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
    train_encoder: Training = "full"
    """How its own encoder trains: `full`, `frozen` or `lora`, as the planner's parts."""
    train_transformer: Training = "full"
    """How the rest of the refiner trains; `frozen` and `lora` are for one that `train.start_from` has taught."""
    vision: Literal["own", "shared"] = "own"
    """`own`: its own encoder, as published; `shared`: the planner's picture features (ablation)."""
    vision_tokens: Literal["pooled", "patches"] = "pooled"
    """What its own encoder makes of a picture. `pooled`: four tokens, which modulate the layers; `patches`: the encoder's map
    besides, to whose places every layer attends. The planner's features are pooled."""
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


PolicyPrecision = Literal["auto", "fp32", "bf16"]
PolicyCompile = Literal["auto", "none", "graphs", "layers", "inductor"]
"""What `PolicyConfig` may say, and a server's arguments likewise."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How a trained policy is run: no part of what was trained, so that a checkpoint may be loaded with other values."""

    precision: PolicyPrecision = "auto"
    """What a policy's networks compute in. `auto`: bf16 on a GPU that can, fp32 elsewhere; actions are fp32 always."""
    compile: PolicyCompile = "auto"
    """How a policy's networks are run. `none`: as written; `graphs`: as CUDA graphs, one for each level and size of batch;
    `layers`: the same of compiled layers; `inductor`: all by torch.compile, on a GPU within such graphs; `auto`: `graphs` on a
    GPU, `none` elsewhere."""
