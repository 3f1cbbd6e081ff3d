"""The settings of single systems: dials that no other one has (docs/systems.md). Standard library only."""

from dataclasses import dataclass
from typing import Literal

EXPERTS = ("token", "diffusion", "flow")
"""The action experts that there are."""


@dataclass(frozen=True, kw_only=True)
class CoarseToFineConfig:
    """`model.system=coarse_to_fine`; its classes are `action.bins`."""

    steps: int = 5
    """Steps of the flow from the coarse action to the fine one, in place of `refiner.denoising_steps`."""
    noise: float = 0.1
    """Standard deviation of the noise around the coarse action where the flow begins, in normalised units (range [-1, 1]); at
    inference times `refiner.sample_noise`."""


@dataclass(frozen=True, kw_only=True)
class AnchorRefineConfig:
    """`model.system=anchor_refine`."""

    backbone: Literal["regression", "diffusion", "libra"] = "regression"
    """The policy whose chunk is the anchor: `regression`, by the actions' mean; `diffusion`, as the monolithic baseline
    denoises one (`refiner.objective`: flow or ddpm); `libra`, planner and refiner."""
    levels: Literal["one", "two"] = "one"
    """`one`: anchor and residual of the same picture, H steps, as published; `two`: a slow anchor of M * H steps, and
    residuals of H steps from a fresh picture."""
    anchor_share: float = 0.7
    """Share of `train.steps` that the anchor learns for, then frozen (paper: 200k of 280k steps). 0: a whole anchor is taken
    from `train.start_from`."""
    context: Literal["shared", "own"] = "shared"
    """What the residual reads: `shared`, the backbone's features of the present picture and the words, as published; `own`, a
    vision encoder of its own (`refiner.encoder`), without words, so that a fast second level needs no backbone."""
    gripper: str = "declared"
    """Which action dimension opens and closes the gripper: the one that the data set declares (`data.gripper`), or the last
    one where it declares none; `last`, its number from 0, or `none`. It is executed as one of both ends of its range, the
    anchor's too."""
    gripper_refinement: Literal["decision", "naive", "none"] = "decision"
    """`decision`: just across the threshold where the anchor decides wrongly, nothing elsewhere, as published; ablations:
    `naive`, all of the probability's error; `none`, the anchor's decision."""
    gripper_margin: float = 0.1
    """How far across the threshold of 0.5, in probability, a wrong decision is carried. Open in the paper."""
    lambda_residual: float = 1.0
    """Weight of the residual's squared error."""
    lambda_gripper: float = 0.01
    """Weight of the gripper's squared error."""
    stop_gradient: bool = True
    """Ablation `false`: the residual's loss goes on to train the anchor (`regression` only)."""
    predicts: Literal["residual", "action"] = "residual"
    """What the second phase predicts; `action` is the ablation."""
    see_anchor: bool = False
    """Ablation: the anchor joins the residual's tokens."""


@dataclass(frozen=True, kw_only=True)
class HierarchyConfig:
    """`model.system=hierarchy`; its tactical level covers M * H steps, its motor level H."""

    levels: Literal["three", "two"] = "three"
    """`three`: strategic, tactical, motor. `two`: the same networks, but the tactical level reads the instruction itself, by
    what would be the strategic level's, and nothing says sub-goals."""
    plans: int = 2
    """Answers of the tactical level that one of the strategic level covers: it lasts so many times M * H steps."""
    subgoals: int = 4
    """K, sub-goals that the strategic level says, the present one first; of a shorter rest the end too."""
    waypoint_steps: int = 5
    """Control steps from one waypoint to the next; the last one lies at the end of the M * H steps. Open in the source."""


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """`model.system=experts`; its token expert's classes are `action.bins`, the denoisers are of the size of `refiner`."""

    names: tuple[str, ...] = EXPERTS
    """The experts that take part: `token`, `diffusion` (DDPM), `flow`; one alone has no router, for comparison."""
    routing: Literal["hard", "soft"] = "hard"
    """`hard`: each chunk is that of one expert, and no other one is computed; `soft`: the mean of all experts' chunks by the
    router's weights."""
    temperature: float = 0.2
    """How sharply the router is taught by errors: one expert's being lower by so much, as a share of the experts' mean squared
    error, makes it e times as right for a window. No source."""
    balance: float = 0.01
    """Weight of the load-balancing term beside the cross-entropy of the router's choice (0.01 in Switch Transformers)."""
