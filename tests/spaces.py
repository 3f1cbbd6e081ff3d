"""The shipped search spaces, as `jobs/sweep.py` finds them."""

from functools import partial
from pathlib import Path

from libra_ray.on_ray.sweep import space

FOLDER = Path(__file__).parents[1] / "tune_spaces"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.py"))
load_space = partial(space.load_space, shipped=FOLDER)
