"""The named presets, as changes to the defaults. Standard library only."""

from typing import Any

MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)
QUICKSTART_TASKS = ("button-press-topdown-v3", "drawer-open-v3", "window-open-v3", "door-open-v3", "plate-slide-v3")
TABLETOP_TASKS = ("touch", "push", "bin", "place-5mm")
"""From one scene three, up to twelve, six and six instructions are possible: only the words say which is meant."""

LATE_IS_NORMAL = {
    "action.chunks": 4,
    "refiner.max_staleness": -1,
    "refiner.condition_dropout": 0.1,
    "control.rule": "overlap",
}
"""Plans twice as long as published, and a refiner that was shown them at every age: a late planner costs next to nothing."""

PUBLISHED = {
    "model.system": "libra",
    "action.bins": 10,
    "action.horizon": 5,
    "action.chunks": 2,
    "refiner.vision": "own",
    "refiner.see_language": False,
    "refiner.objective": "ddpm",
    "refiner.predicts": "target",
    "refiner.noise_draws": 1,
    "refiner.sample_noise": 1.0,
    "refiner.condition_dropout": 0.0,
    "refiner.max_staleness": 0,
    "refiner.max_committed_steps": 0,
    "train.curriculum": "threshold",
    "train.tau": 0.6,
    "train.balance": "gradient",
    "control.rule": "fifo",
    "control.execute_steps": 0,
    "control.committed_steps": 0,
}
"""Libra-VLA's recipe to the letter (docs/method.md): named in full, lest a default that is changed changes it."""

AS_PUBLISHED = {name: PUBLISHED[name] for name in LATE_IS_NORMAL}
"""The same settings in Libra-VLA's recipe."""

QUICK_TASKS = {"sim.max_steps": 250, "train.steps": 1500, "train.batch_size": 128}
"""Whoever has not succeeded after 250 steps (the experts need 120) never does; only the floor would go on to 500."""

FINE_TUNED = {
    **LATE_IS_NORMAL,
    "sim.tasks": MT10,
    "data.image_size": 224,
    "record.episodes_per_task": 60,
    "record.episodes_of": ("reach-v3=800", "push-v3=800", "pick-place-v3=800", "peg-insert-side-v3=200"),
    "planner.depth": 12,
    # The language model reads all of them, padding too.
    "planner.max_text_tokens": 32,
    "refiner.depth": 12,
    "refiner.vision_tokens": "patches",
    "train.lr": 1e-4,
    "train.augment_pixels": 8,
    "train.augment_state": 0.05,
    "train.checkpoint_every": 5000,
    "train.validate_every": 5000,
    "ray.use_gpu": True,
}
"""Pretrained models, fine-tuned on a GPU."""

PRESETS: dict[str, dict[str, Any]] = {
    "quickstart": {**QUICK_TASKS, **LATE_IS_NORMAL},
    "published": {**QUICK_TASKS, "sim.tasks": QUICKSTART_TASKS, **PUBLISHED},
    "mt10": {
        **LATE_IS_NORMAL,
        "sim.tasks": MT10,
        "sim.supersample": 2,
        # Where the goal is a small dot anywhere, more places teach to find a new one better (benchmarks/places.py); where it is
        # a part of the furniture, 60 are enough.
        "record.episodes_per_task": 60,
        "record.episodes_of": ("reach-v3=800", "push-v3=800", "pick-place-v3=800", "peg-insert-side-v3=200"),
        "planner.width": 128,
        "refiner.width": 128,
        # The experts do one thing: where the refiner's noise begins is only jitter (benchmarks/noise.py).
        "refiner.sample_noise": 0.0,
        # Twice the windows cost half as much again (benchmarks/train_speed.py).
        "train.batch_size": 128,
        "train.steps": 12000,
        "train.augment_pixels": 2,
        "train.augment_state": 0.05,
        "train.checkpoint_every": 1000,
        "train.validate_every": 1000,
    },
    "debug": {
        "sim.tasks": ("reach-v3",),
        "data.image_size": 32,
        "sim.max_steps": 100,
        "record.episodes_per_task": 4,
        "planner.width": 32,
        "planner.depth": 1,
        "refiner.width": 32,
        "refiner.depth": 1,
        "train.steps": 20,
        "train.batch_size": 16,
        "train.warmup_steps": 2,
        "train.log_every": 2,
        "train.checkpoint_every": 10,
        "train.validate_every": 10,
        "evaluate.episodes_per_task": 2,
        "evaluate.robots": 2,
        "evaluate.videos_per_task": 1,
    },
    "tabletop": {
        **LATE_IS_NORMAL,
        "sim.family": "tabletop",
        "sim.tasks": TABLETOP_TASKS,
        "sim.supersample": 2,
        "sim.max_steps": 200,
        "record.episodes_per_task": 250,
        "record.noise_std": 0.25,
        "planner.max_text_tokens": 128,
        "train.lr": 0.002,
        # Of sampled tokens the refiner learns to disregard them: a block within 1 mm in 8 % against 34 % (docs/components.md).
        "train.curriculum": "teacher",
        "train.steps": 4000,
        "train.augment_pixels": 1,
        "train.checkpoint_every": 1000,
        "train.validate_every": 1000,
    },
    # Half a billion weights: one GPU of 24 GB.
    "small": {
        **FINE_TUNED,
        "planner.backbone": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        "planner.width": 512,
        "planner.heads": 8,
        "refiner.encoder": "google/siglip-base-patch16-224",
        "refiner.width": 512,
        "refiner.heads": 8,
        "train.steps": 20000,
        "train.batch_size": 32,
        "train.warmup_steps": 500,
    },
    # The sizes of the paper, its plans of two chunks too; where it is silent, those of its closest public relatives.
    "paper": {
        **FINE_TUNED,
        "action.bins": 10,
        "action.horizon": 5,
        "action.chunks": 2,
        "planner.backbone": "OpenGVLab/InternVL3-2B-hf",
        "planner.width": 1024,
        "planner.heads": 16,
        "refiner.encoder": "google/siglip-so400m-patch14-224",
        "refiner.width": 1024,
        "refiner.heads": 16,
        "train.steps": 30000,
        "train.batch_size": 32,
        # Eight windows at a time take 67 GiB of a GPU (docs/gpu.md).
        "train.accumulate": 4,
        "train.warmup_steps": 1000,
    },
}
