"""The settings of training, and of what it runs on. Standard library only."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Joint training of both systems."""

    start_from: str = ""
    """A checkpoint folder to fine-tune: its weights are taken where name and shape agree; empty means random ones."""
    start_parts: tuple[str, ...] = ()
    """Which of its weights are taken, by the beginnings of their names, e.g. `planner.backbone`, or, where it has another name
    for them, by `OURS=THEIRS`, e.g. `strategic.backbone=planner.backbone`; empty means all."""
    levels: tuple[str, ...] = ()
    """The levels to train, each given what those above it should have said (ground truth); the others stay as they begin, until
    `jobs/join.py` puts them together. Empty means all."""
    stats_from: str = ""
    """A run's or checkpoint's folder whose normalisation statistics are used: levels that are joined need the same. Empty means
    those of the data set."""
    steps: int = 1500
    """Optimiser steps."""
    batch_size: int = 64
    """Windows per optimiser step, over all workers."""
    accumulate: int = 1
    """Pieces that a worker cuts its windows of a step into: one after the other they need the memory of one."""
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
    compile: Literal["auto", "none", "layers"] = "auto"
    """`layers`: repeated layers are compiled; `auto`: on a GPU those of systems with pretrained networks."""
    graph: Literal["auto", "none", "step"] = "auto"
    """`step`: the whole step is one CUDA graph, and nobody waits for its thousands of kernels to be launched; `auto`: where one
    worker has a GPU."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """What the layers of pretrained networks compute again in the backward pass, to save memory: nothing; all but matrix
    products and attention; or everything."""
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
    """Simulator processes; 0 means one per CPU of the cluster that no policy replica has."""
    train_workers: int = 1
    """Training workers (data parallel)."""
    train_cpus_per_worker: float = 0.0
    """CPUs reserved per training worker; 0 shares all of the cluster's among them."""
    use_gpu: bool = False
    """One GPU per training worker; the policy is evaluated on GPUs of the cluster's machines (`evaluate.gpus_per_replica`)."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several training workers share: `ddp`, each has the whole model; `fsdp`, each has a shard of its weights, averages
    and optimiser (FSDP2)."""
    max_failures: int = 3
    """Times a training run is restarted from its last checkpoint after a worker died."""
