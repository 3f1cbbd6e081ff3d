"""How many places does it take to learn to find a goal? What `record.episodes_of` of the preset `mt10` rests on.

The first picture of many episodes, and in it the place of the goal: a network with the encoder of our tiny model regresses it
from the pictures of some seeds, and is measured on others. No policy, no control: an upper limit of what demonstrations in so
many places can teach, in two minutes a task.

    uv run -m benchmarks.places
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.files import RESULTS, command_line, origin, write_result
from libra_ray.common.progress import ProgressBar
from libra_ray.config import override, preset
from libra_ray.model.parts.vision import VISION_TOKENS, ConvEncoder
from libra_ray.sim import choose_backend

TASKS = ("reach-v3", "push-v3")
PLACES = (225, 450, 900)
"""Training placements; 225 are what is left for training of 250 demonstrations."""
UNSEEN, UNSEEN_SEED = 300, 100_000
SUCCESS_M = 0.05
"""How near Meta-World's reach and push want the goal."""
WIDTH, STEPS, BATCH, LR = 96, 1500, 64, 2e-3


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """First pictures `(B, 1, 3, size, size)` uint8 and the goals in them `(B, 3)`, in metres."""

    images: Tensor
    goals: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Found:
    """How well unseen goals are found after training on so many places; distances in centimetres."""

    task: str
    places: int
    median_cm: float
    within_5_cm: float
    training_median_cm: float


def scenes(task: str, seeds: Sequence[int]) -> Scenes:
    """The first pictures of these episodes, as `mt10` draws them."""
    choose_backend()
    from libra_ray.sim.metaworld import Metaworld

    config = override(preset("mt10"), {"sim.tasks": task})
    environment = Metaworld(config.sim, task, config.data.image_size)
    images, goals = [], []
    with ProgressBar(task, len(seeds), "scenes") as bar:
        for seed in seeds:
            (picture,) = environment.reset(seed).images.values()
            images.append(picture)
            goals.append(environment._env._target_pos.copy())  # noqa: SLF001  # nobody else is told
            bar.to(bar.count + 1)
    environment.close()
    return Scenes(images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)[:, None], goals=np.stack(goals))


def trained(seen: Scenes, mean: NDArray[np.float64], std: NDArray[np.float64]) -> nn.Module:
    """A network that says where the goal is, standardised."""
    torch.manual_seed(0)
    size = seen.images.shape[-1]
    head = nn.Sequential(
        nn.Flatten(), nn.Linear(VISION_TOKENS * WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, seen.goals.shape[1])
    )
    net = nn.Sequential(ConvEncoder(size, WIDTH), head)
    optimiser = torch.optim.AdamW(net.parameters(), LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, STEPS)
    wanted = torch.from_numpy((seen.goals - mean) / std).float()
    for _ in range(STEPS):
        rows = torch.randint(0, len(wanted), (BATCH,))
        loss = (net(seen.images[rows]) - wanted[rows]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval()


def measure(task: str) -> list[Found]:
    """A task's row for every number of places."""
    known, unseen = scenes(task, range(max(PLACES))), scenes(task, range(UNSEEN_SEED, UNSEEN_SEED + UNSEEN))
    mean, std = known.goals.mean(0), known.goals.std(0) + 1e-6

    def errors_m(net: nn.Module, of: Scenes) -> NDArray[np.float64]:
        with torch.no_grad():
            said = net(of.images).double().numpy() * std + mean
        return np.linalg.norm(said - of.goals, axis=1)

    rows = []
    for places in PLACES:
        seen = Scenes(images=known.images[:places], goals=known.goals[:places])
        net = trained(seen, mean, std)
        off = errors_m(net, unseen)
        rows.append(
            Found(
                task=task,
                places=places,
                median_cm=round(100 * float(np.median(off)), 2),
                within_5_cm=round(float((off < SUCCESS_M).mean()), 3),
                training_median_cm=round(100 * float(np.median(errors_m(net, seen))), 2),
            )
        )
    return rows


def main() -> None:
    """Measure, keep, print."""
    parser = command_line("places", __doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="Meta-World tasks with a goal (default: %(default)s)")
    rows = [row for task in parser.parse_args().tasks for row in measure(task)]
    write_result(RESULTS / "places.json", {**origin(), "unseen": UNSEEN, "rows": rows})
    print("| task | places | median error, cm | within 5 cm | on its training places, cm |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.task} | {row.places} | {row.median_cm} | {row.within_5_cm} | {row.training_median_cm} |")


if __name__ == "__main__":
    main()
