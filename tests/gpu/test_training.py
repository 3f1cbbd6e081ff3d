"""On a GPU: a captured step learns what an eager one learns, bf16 nearly what fp32 learns, and shards what replicas learn."""

import copy
import socket

import jaxtyping
import pytest
import torch
from torch import distributed

from libra_ray import checkpoint
from libra_ray.training.fit import Trainer
from libra_ray.training.graph import GraphedStep
from libra_ray.training.saving import BackgroundSaver
from tests.model import families
from tests.model.builders import make_batch, tiny_model
from tests.training.builders import training_data

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
DEVICE, STEPS = torch.device("cuda"), 14
FULL = {"train.precision": "fp32", "train.steps": STEPS}
RANDOM = {"train.augment_pixels": 2, "refiner.condition_dropout": 0.3, "train.balance_every": 4, "train.curriculum": "planner"}
FORMS = {
    "libra": RANDOM,
    "shared": {**RANDOM, "refiner.vision": "shared", "refiner.max_staleness": 0},
    "gradient": {**RANDOM, "train.balance": "gradient"},
    "uncertainty": {**RANDOM, "train.balance": "uncertainty"},
    "threshold": {**RANDOM, "train.curriculum": "threshold", "train.tau": 0.0, "train.warmup_steps": 6},
    "phases": {"model.system": "anchor_refine", "anchor_refine.anchor_share": 0.5},
    "experts": {"model.system": "experts"},
    "pieces": {**RANDOM, "train.accumulate": 2},
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return str(families.write(tmp_path_factory.mktemp("hub") / "llava", families.FAMILIES["llava"]()))


@pytest.fixture
def traceable(monkeypatch):
    """Without checks of shapes, which no compiler can follow."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def train(changes, *, state=None, until=STEPS):
    """The trainer after step `until`, and its rows."""
    trainer = Trainer(tiny_model({**FULL, **changes}), device=DEVICE, state=state)
    return trainer, rest(trainer, until)


def rest(trainer, until=STEPS):
    """The rows of the steps up to `until`."""
    batches = [make_batch(trainer.model, 4, seed=step).pinned() for step in range(trainer.step, until)]
    return [progress.metrics for progress in trainer.run(batches, until=until)]


def saved(trainer, folder):
    """The trainer's state from disk, written while it trains on."""
    with BackgroundSaver(trainer, training_data(trainer.model.config)) as saver:
        saver.begin(folder)
        rest(trainer)
    return checkpoint.load_trainer_state(folder)


def losses(rows):
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("form", FORMS)
def test_captured_steps_learn_what_eager_ones_learn(form):
    eager, rows = train({**FORMS[form], "train.graph": "none"})
    captured, same = train({**FORMS[form], "train.graph": "step"})
    assert isinstance(captured._take, GraphedStep)
    assert captured._take._captured
    assert losses(same) == pytest.approx(losses(rows), rel=2e-2)
    assert same[-1]["lr"] == pytest.approx(rows[-1]["lr"])
    for name, value in captured.weights().items():
        torch.testing.assert_close(value, eager.weights()[name], rtol=0, atol=5e-3)


def test_a_captured_run_resumes(tmp_path):
    _, rows = train(RANDOM)
    first, early = train(RANDOM, until=8)
    kept = copy.deepcopy(first.state())
    for state in (kept, saved(first, tmp_path / "saved")):
        _, late = train(RANDOM, state=state)
        assert losses(early + late) == pytest.approx(losses(rows), rel=2e-2)


def test_every_captured_step_draws_anew():
    """The same batch again and again: only what is drawn differs."""
    model = tiny_model({**FULL, **RANDOM, "train.lr": 1e-12})
    trainer, batch = Trainer(model, device=DEVICE), make_batch(model, 4).pinned()
    rows = [progress.metrics for progress in trainer.run([batch] * STEPS)]
    assert len({round(row["loss_diff"], 9) for row in rows}) == STEPS


@pytest.mark.parametrize("changes", [{}, {"train.checkpointing": "selective"}, {"train.checkpointing": "full"}])
def test_pretrained_networks_compiled_and_captured_learn_what_they_learn_as_written(traceable, backbone, changes):
    base = {**RANDOM, "planner.backbone": backbone, "train.steps": 8}
    _, rows = train({**base, "train.compile": "none", "train.graph": "none"}, until=8)
    _, same = train({**base, "train.compile": "layers", **changes}, until=8)
    assert losses(same) == pytest.approx(losses(rows), rel=3e-2)


def test_bf16_learns_nearly_what_fp32_learns(backbone, monkeypatch):
    monkeypatch.setattr("libra_ray.training.weights.LARGE", 1)
    base = {"planner.backbone": backbone, "train.compile": "none"}
    _, rows = train(base)
    narrow, same = train({**base, "train.precision": "bf16"})
    assert torch.bfloat16 in {value.dtype for value in narrow.model.state_dict().values()}
    assert losses(same) == pytest.approx(losses(rows), rel=0.15)
    assert {"tflops", "mfu", "memory_gib"} <= same[-1].keys()


def test_a_shard_of_one_learns_what_a_whole_learns(traceable, backbone, tmp_path):
    """By itself uncaptured, and saved over CPUs beside the exchanges of the GPUs."""
    base = {"planner.backbone": backbone, "train.compile": "none"}
    _, rows = train(base)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    distributed.init_process_group("nccl", init_method=address, rank=0, world_size=1)
    try:
        shards = {**base, "ray.parallel": "fsdp"}
        trainer, same = train(shards)
        assert not isinstance(trainer._take, GraphedStep)
        first, early = train(shards, until=8)
        _, late = train(shards, state=saved(first, tmp_path / "saved"))
        _, narrow = train({**base, "ray.parallel": "fsdp", "train.precision": "bf16", "train.compile": "layers"})
    finally:
        distributed.destroy_process_group()
    assert losses(same) == pytest.approx(losses(rows), rel=1e-2)
    assert losses(early + late) == pytest.approx(losses(same), rel=1e-2)
    assert losses(narrow) == pytest.approx(losses(rows), rel=0.15)
