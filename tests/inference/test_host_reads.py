"""No level looks at its tensors' values while it computes: a GPU need not be waited for, and its work can be recorded."""

import pytest
import torch

from libra_ray.inference.tensors import LevelInput, mapped
from libra_ray.model.registry import SYSTEMS, make_system
from libra_ray.model.system import SystemInput
from tests.host_reads import HostReadError, there, without_host_reads
from tests.model.builders import SHAPE, make_batch, tiny_config
from tests.model.test_systems import FORMS, TOY

LEVELS = {
    **{
        name: FORMS[name]
        for name in (*SYSTEMS, TOY, "anchor_libra_two_levels", "anchor_own_context", "experts_soft", "hierarchy_two_levels")
    },
    "published": {"refiner.objective": "ddpm", "refiner.predicts": "target", "refiner.max_committed_steps": 2},
    "reads_words": {"refiner.vision": "shared", "refiner.see_language": True},
}
RANDOM = {
    "train.augment_pixels": 2,
    "train.augment_state": 0.1,
    "refiner.condition_dropout": 0.5,
    "refiner.max_committed_steps": 2,
}


def question(model, robots=2):
    """What every level is asked, by its name."""
    config, size = model.config, model.config.data.image_size
    asked = {}
    for level in model.levels:
        spec = {} if level.reads is None else model.intents[level.reads]
        covers = {name: level.covers if value.per_step else None for name, value in spec.items()}
        above = {
            name: torch.zeros(robots, *(value.shape if covers[name] is None else (covers[name], *value.shape[1:]))).to(
                getattr(torch, value.dtype)
            )
            for name, value in spec.items()
        }
        noise = model.noise_shape(level.name)
        seen = SystemInput(
            images=torch.zeros(robots, SHAPE.cameras * config.data.history, 3, size, size, dtype=torch.uint8),
            state=torch.zeros(robots, SHAPE.state_dim),
            text=model.tokenise(["open"] * robots),
            committed=torch.full((robots, level.covers, SHAPE.action_dim), torch.nan),
        )
        asked[level.name] = LevelInput(seen=seen, above=above, noise=None if noise is None else torch.zeros(robots, *noise))
    return asked


@pytest.mark.parametrize("changes", LEVELS.values(), ids=LEVELS)
def test_no_level_of_any_system_looks_at_values(changes):
    config = tiny_config(changes)
    asked = question(make_system(config, SHAPE))

    def make():
        return make_system(config, SHAPE).eval(), {name: mapped(of, there) for name, of in asked.items()}

    def run(made):
        model, given = made
        for variant in ("", *model.variants_of(config)):
            for name, of in given.items():
                with torch.no_grad():
                    answers = model.infer(name, of.seen, of.above, of.noise, variant)
                assert {value.device.type for value in answers.values()} == {"cuda"}

    without_host_reads(make, run)


@pytest.mark.parametrize("changes", LEVELS.values(), ids=LEVELS)
def test_no_loss_looks_at_values(changes):
    """And what is drawn is drawn there."""
    config = tiny_config({**changes, **RANDOM})
    batch = make_batch(make_system(config, SHAPE), 4)

    def run(made):
        model, windows = made
        for phase in model.schedule().phases:
            losses = model.losses(windows, phase)
            assert {term.device.type for term in (*losses.terms.values(), *losses.metrics.values())} == {"cuda"}

    without_host_reads(lambda: (make_system(config, SHAPE), mapped(batch, there)), run)


@pytest.mark.parametrize("place", ["libra_ray.model.parts.backbone", "libra_ray.model.experts"])
def test_a_level_that_looks_at_values_is_noticed(place, monkeypatch):
    """What a CPU may do to save work, as if it were one."""
    monkeypatch.setattr(f"{place}.reads_are_free", lambda value: True)
    with pytest.raises(HostReadError):
        test_no_level_of_any_system_looks_at_values({"model.system": "experts"})


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: torch.unique(x, dim=0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x + torch.arange(3).to(x),
        lambda x: x * torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: x[:, [0, 1]],
    ],
    ids=["float", "bool", "mask", "nonzero", "unique", "list", "fetched", "handed", "constants", "indices"],
)
def test_what_looks_at_values_is_noticed(reads):
    with pytest.raises(HostReadError):
        without_host_reads(lambda: torch.zeros(2, 3), reads)


def test_what_training_hands_to_the_device_may_be_let_through():
    without_host_reads(lambda: torch.zeros(2, 3), lambda x: x + torch.rand(2, 3).to(x), uploads=True)
    with pytest.raises(HostReadError):
        without_host_reads(lambda: torch.zeros(2, 3), lambda x: x.cpu(), uploads=True)
