"""AnchorRefine: how long the anchor learns before it is frozen, and what the residual's and the gripper's errors weigh."""

from ray import tune

SPACE = {
    "model.system": tune.choice(["anchor_refine"]),
    "anchor_refine.anchor_share": tune.uniform(0.3, 0.9),
    "anchor_refine.lambda_residual": tune.loguniform(0.1, 10.0),
    "anchor_refine.lambda_gripper": tune.loguniform(0.001, 1.0),
    "anchor_refine.gripper_margin": tune.uniform(0.02, 0.3),
}
SEARCH = "optuna"
