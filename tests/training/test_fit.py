"""The laws of training: it can be interrupted anywhere, and each system's measures are its own."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from libra_ray import checkpoint
from libra_ray.config import override
from libra_ray.model.libra import GROUND_TRUTH, SAMPLED, Curriculum
from libra_ray.model.precision import uses_bf16
from libra_ray.training.fit import Trainer, learning_rate
from libra_ray.training.loss_balance import RawGradients
from tests.model.builders import make_batch, save_checkpoint, tiny_config, tiny_model

CPU = torch.device("cpu")
EVERYTHING_RANDOM = {
    "train.augment_pixels": 2,
    "train.augment_state": 0.1,
    "refiner.condition_dropout": 0.5,
    "train.curriculum": "planner",
}


def batches(model, steps):
    return [make_batch(model, 4, seed=step, masked=2) for step in range(steps)]


def trained(trainer, steps) -> list[dict[str, float]]:
    """Metrics of every step up to `steps`."""
    return [progress.metrics for progress in trainer.run(batches(trainer.model, steps)[trainer.step :])]


def resumed_in_memory(trainer, _):
    return Trainer(tiny_model(EVERYTHING_RANDOM), device=CPU, state=copy.deepcopy(trainer.state()))


def resumed_from_disk(trainer, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", trainer.model, trainer.step, trainer.state())
    return Trainer(tiny_model(EVERYTHING_RANDOM), device=CPU, state=checkpoint.load_trainer_state(tmp_path / "checkpoint"))


def resumed_from_what_earlier_versions_wrote(trainer, tmp_path):
    """Whole weights to run with, and beside them one file with torch's own state of the optimiser, by number."""
    save_checkpoint(tmp_path / "checkpoint", trainer.model, trainer.step)
    state = {name: value for name, value in trainer.state().items() if name != "frozen"}
    former = state | {"optimiser": trainer.optimiser.state_dict(), **state["schedule"]}
    del former["schedule"]
    (tmp_path / "checkpoint" / "trainer").mkdir()
    torch.save(former, tmp_path / "checkpoint" / "trainer" / "state.pt")
    return Trainer(tiny_model(EVERYTHING_RANDOM), device=CPU, state=checkpoint.load_trainer_state(tmp_path / "checkpoint"))


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("resume", [resumed_in_memory, resumed_from_disk, resumed_from_what_earlier_versions_wrote])
def test_two_and_two_resumed_steps_are_four(resume, tmp_path):
    whole = Trainer(tiny_model(EVERYTHING_RANDOM), device=CPU)
    rows = trained(whole, 4)
    first = Trainer(tiny_model(EVERYTHING_RANDOM), device=CPU)
    early = trained(first, 2)
    torch.manual_seed(12345)
    second = resume(first, tmp_path)
    assert second.step == 2
    late = trained(second, 4)
    assert second.step == whole.step == 4
    assert same(second.model.state_dict(), whole.model.state_dict())
    assert same(second.weights(), whole.weights())
    assert second.schedule.state() == whole.schedule.state()
    losses = [[row[name] for row in found] for found in (rows, early + late) for name in ("loss_plan", "loss_diff", "lr")]
    assert losses[:3] == losses[3:]


def test_a_step_not_resumed_rightly_would_be_seen():
    """The same two steps without optimiser state, or at other step numbers, end elsewhere."""
    whole, first = (Trainer(tiny_model(EVERYTHING_RANDOM), device=CPU) for _ in range(2))
    trained(whole, 4)
    trained(first, 2)
    for forgotten in ("optimiser", "step"):
        state = copy.deepcopy(first.state()) | {
            forgotten: Trainer(tiny_model(EVERYTHING_RANDOM), device=CPU).state()[forgotten]
        }
        other = Trainer(tiny_model(EVERYTHING_RANDOM), device=CPU, state=state)
        list(other.run(batches(other.model, 4)[2:]))
        assert not same(other.model.state_dict(), whole.model.state_dict())


def test_training_stops_at_its_last_step_and_saves_there():
    trainer = Trainer(tiny_model({"train.steps": 3, "train.checkpoint_every": 2, "train.log_every": 100}), device=CPU)
    found = list(trainer.run(batches(trainer.model, 10)))
    assert [(progress.step, progress.checkpoint_due) for progress in found] == [(2, True), (3, True)]
    assert list(trainer.run(batches(trainer.model, 10))) == []


@pytest.mark.parametrize(("balance", "reads"), [("fixed", 2), ("gradient", 10)])
def test_gradients_are_read_where_a_step_is_logged_or_the_next_ones_weights_depend_on_them(balance, reads, monkeypatch):
    """Nowhere else: a GPU would be waited for."""
    often = {"train.balance": balance, "train.balance_every": 1, "train.log_every": 4, "train.steps": 8}
    found, read = [], RawGradients.read
    monkeypatch.setattr(RawGradients, "read", lambda gradients: found.append(read(gradients)) or found[-1])
    rows = trained(Trainer(tiny_model(often), device=CPU), 8)
    assert len(found) == reads
    assert rows[-1]["grad_norm_loss_plan"] == found[-1].norms["plan"]


def test_every_row_speaks_of_both_systems():
    rows = trained(Trainer(tiny_model(), device=CPU), 4)
    names = {"loss", "lr", "phase_ground_truth", "phase_sampled", "plan_accuracy", "samples_per_s", "data_wait_share"}
    names |= {f"{measure}_{part}" for measure, part in (("loss", "plan"), ("loss", "diff"))}
    names |= {f"grad_norm_{part}" for part in ("planner", "refiner")}
    for row in rows:
        assert names <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
        assert row["grad_norm_planner"] > 0
        assert row["grad_norm_refiner"] > 0
        assert 0 <= row["data_wait_share"] <= 1


@pytest.mark.parametrize(("zero", "still", "moving"), [("plan", "planner", "refiner"), ("diff", "refiner", "planner")])
def test_the_weights_of_the_losses_scale_the_gradients_of_their_systems(zero, still, moving):
    row = trained(Trainer(tiny_model({f"train.lambda_{zero}": 0.0}), device=CPU), 1)[0]
    assert row[f"grad_norm_{still}"] == 0
    assert row[f"grad_norm_{moving}"] > 0
    assert row["loss"] == pytest.approx(row["loss_diff"] if zero == "plan" else row["loss_plan"])
    double = trained(Trainer(tiny_model({f"train.lambda_{zero}": 2.0}), device=CPU), 1)[0]
    single = trained(Trainer(tiny_model(), device=CPU), 1)[0]
    assert double[f"grad_norm_{still}"] == pytest.approx(2 * single[f"grad_norm_{still}"], rel=1e-4)


@pytest.mark.parametrize("bound", [1e-3, 1e3])
def test_gradients_are_clipped_to_the_bound_and_reported_unclipped(bound):
    trainer = Trainer(tiny_model({"train.grad_clip": bound}), device=CPU)
    row = trained(trainer, 1)[0]
    reported = math.hypot(row["grad_norm_planner"], row["grad_norm_refiner"])
    used = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).norm().item()
    assert reported > 1e-2
    assert used == pytest.approx(min(bound, reported), rel=1e-3)


def test_the_average_lags_behind_the_weights():
    trainer = Trainer(tiny_model({"train.ema_decay": 1.0, "train.lr": 1e-2}), device=CPU)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trained(trainer, 1)
    # A young average forgets its random start fast: its first decay is 1 / 10 whatever ema_decay says.
    for name, now in trainer.model.named_parameters():
        torch.testing.assert_close(trainer.weights()[name], torch.lerp(start[name], now.detach(), 0.9))


def test_the_average_forgets_the_random_start_of_what_learns_later():
    changes = {"model.system": "anchor_refine", "anchor_refine.anchor_share": 0.5, "train.steps": 12, "train.ema_decay": 1.0}
    trainer = Trainer(tiny_model(changes), device=CPU)
    name = "residual.head.to_residual.weight"
    start = trainer.model.state_dict()[name].clone()
    trained(trainer, 6)
    torch.testing.assert_close(trainer.weights()[name], start, msg="it has not learned yet")
    trained(trainer, 7)
    now = trainer.model.state_dict()[name]
    assert not now.equal(start)
    torch.testing.assert_close(trainer.weights()[name], torch.lerp(start, now, 0.9))


def test_without_memory_the_average_is_the_weights():
    trainer = Trainer(tiny_model({"train.ema_decay": 0.0}), device=CPU)
    trained(trainer, 2)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(trainer.weights()[name], value)


def test_validation_measures_the_average_and_joins_the_row():
    trainer = Trainer(tiny_model({"train.validate_every": 2, "train.steps": 3}), device=CPU)
    seen = []

    def validate(model):
        assert model is trainer.model
        assert not model.training
        assert same(model.state_dict(), trainer.weights())
        seen.append(trainer.step)
        return {"val_measure": 7.0}

    rows = [progress.metrics for progress in trainer.run(batches(trainer.model, 3), validate)]
    assert seen == [2, 3]
    assert trainer.model.training
    assert not same(trainer.model.state_dict(), trainer.weights())
    assert [row.get("val_measure") for row in rows] == [None, 7.0, 7.0]


def test_a_loss_that_is_no_number_ends_training_with_advice():
    trainer = Trainer(tiny_model(), device=CPU)
    batch = make_batch(trainer.model, 4)
    spoilt = replace(batch, state=torch.full_like(batch.state, torch.nan))
    run = trainer.run([batch, spoilt, batch, batch])
    assert next(run).step == 1
    with pytest.raises(FloatingPointError, match=r"loss became nan at step 2; lower train\.lr or look at the data"):
        next(run)


def config(**changes):
    settings = {"steps": 100, "warmup_steps": 10, "lr": 0.5, "lr_final_share": 0.1} | changes
    return override(tiny_config(), {f"train.{name}": value for name, value in settings.items()}).train


def test_the_learning_rate_rises_then_falls():
    rates = [learning_rate(config(), step) for step in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[10] == pytest.approx(0.5)
    assert rates[55] == pytest.approx(0.5 * 0.55)
    assert rates[100] == pytest.approx(0.05)
    assert all(rate > 0 for rate in rates)


def test_the_learning_rate_needs_no_warm_up_and_keeps_its_end():
    assert learning_rate(config(warmup_steps=0), 0) == pytest.approx(0.5)
    assert learning_rate(config(), 500) == pytest.approx(0.05)
    assert learning_rate(config(lr_final_share=1.0), 73) == pytest.approx(0.5)
    assert math.isfinite(learning_rate(config(steps=5, warmup_steps=10), 5))


def test_the_rows_learning_rate_is_the_optimisers():
    trainer = Trainer(tiny_model({"train.warmup_steps": 3}), device=CPU)
    for step, progress in enumerate(trainer.run(batches(trainer.model, 4))):
        assert progress.metrics["lr"] == learning_rate(trainer.config, step)
        assert {group["lr"] for group in trainer.optimiser.param_groups} == {progress.metrics["lr"]}


def phases(accuracies, **changes):
    """The phase of every step of a curriculum whose planner's accuracy follows a script."""
    curriculum, found = Curriculum(config(steps=len(accuracies), **changes)), []
    for step, accuracy in enumerate(accuracies):
        found.append(curriculum.phase)
        curriculum.advance(step + 1, {"plan_accuracy": accuracy})
    return found


def test_the_curriculum_switches_once_and_stays():
    """Good after step 10, hopeless again from step 20 on: the ground truth does not come back."""
    found = phases([0.0] * 10 + [1.0] * 10 + [0.0] * 40, curriculum="threshold", tau=0.3, warmup_steps=0)
    switch = found.index(SAMPLED)
    assert 10 < switch <= 20
    assert found == [GROUND_TRUTH] * switch + [SAMPLED] * (60 - switch)


def test_the_curriculum_waits_for_the_warm_up_and_for_the_accuracy():
    assert phases([1.0] * 20, tau=0.5, warmup_steps=10).index(SAMPLED) == 10
    assert set(phases([0.49] * 50, tau=0.5, warmup_steps=0)) == {GROUND_TRUTH}
    assert phases([0.51] * 50, tau=0.5, warmup_steps=0).index(SAMPLED) == 1


@pytest.mark.parametrize(("curriculum", "phase"), [("teacher", GROUND_TRUTH), ("planner", SAMPLED)])
def test_the_other_curricula_never_switch(curriculum, phase):
    assert set(phases([0.0] * 5 + [1.0] * 15, curriculum=curriculum, tau=0.1, warmup_steps=0)) == {phase}


def test_a_resumed_run_does_not_go_back_to_the_truth():
    changes = {"train.curriculum": "threshold", "train.tau": 0.0}
    trainer = Trainer(tiny_model(changes), device=CPU)
    rows = trained(trainer, 2)
    assert [(row["phase_ground_truth"], row["phase_sampled"]) for row in rows] == [(1, 0), (0, 1)]
    again = Trainer(tiny_model(changes), device=CPU, state=trainer.state())
    assert again.schedule.phase == SAMPLED
    assert again.schedule.state() == trainer.schedule.state()
    assert again.schedule.state()["switched_at"] == 1


def test_precision_is_as_asked_for():
    assert uses_bf16("bf16", CPU)
    assert not uses_bf16("fp32", CPU)
    assert isinstance(uses_bf16("auto", CPU), bool)


def test_both_systems_train_in_bf16_with_weights_in_full_precision():
    trainer = Trainer(tiny_model({"train.precision": "bf16"}), device=CPU)
    rows = trained(trainer, 2)
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert {value.dtype for value in trainer.weights().values()} == {torch.float32}


def test_a_checkpoint_is_saved_before_anything_is_measured():
    """So a validation that fails takes no step with it."""
    trainer = Trainer(tiny_model({"train.validate_every": 2, "train.checkpoint_every": 2}), device=CPU)
    saved = []

    def validate(model):
        raise ValueError("held-out episodes are gone")

    run = trainer.run(batches(trainer.model, 4), validate, lambda row: saved.append((trainer.step, row["loss"])))
    assert next(run).step == 1
    assert saved == []
    with pytest.raises(ValueError, match="are gone"):
        next(run)
    assert saved == [(2, trainer.row["loss"])]


def test_training_until_a_step_saves_there():
    trainer = Trainer(tiny_model({"train.steps": 9, "train.log_every": 2}), device=CPU)
    saved = []
    found = list(trainer.run(batches(trainer.model, 9), save=lambda _: saved.append(trainer.step), until=3))
    assert [(progress.step, progress.checkpoint_due) for progress in found] == [(2, False), (3, True)]
    assert saved == [3]


FROZEN = {**EVERYTHING_RANDOM, "planner.train_vision": "frozen", "planner.train_language": "frozen", "train.lr": 1e-2}


def test_frozen_weights_are_held_once_and_stay(tmp_path):
    """In the policy's weights, not in the trainer's state, and never in the average's own memory."""
    trainer = Trainer(tiny_model(FROZEN), device=CPU)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trained(trainer, 2)
    backbone = {name for name in start if name.startswith("planner.backbone.")}
    assert backbone
    assert {name for name, value in trainer.weights().items() if torch.equal(value, start[name])} >= backbone
    assert trainer.weights().keys() == start.keys()
    for part in ("model", "average"):
        assert not backbone & trainer.state()[part].keys()
    for name in backbone:
        assert trainer.weights()[name].data_ptr() == trainer.model.state_dict()[name].data_ptr()


def test_a_run_with_frozen_weights_resumes_exactly_whatever_its_model_began_with(tmp_path):
    """The source of a backbone may have changed, or its weights may have come from `train.start_from`."""
    whole, first = (Trainer(tiny_model(FROZEN), device=CPU) for _ in range(2))
    trained(whole, 4)
    trained(first, 2)
    save_checkpoint(tmp_path / "saved", first.model, first.step, first.state())
    other = tiny_model(FROZEN)
    for weight in other.parameters():
        weight.data.add_(1)
    second = Trainer(other, device=CPU, state=checkpoint.load_trainer_state(tmp_path / "saved"))
    trained(second, 4)
    assert same(second.model.state_dict(), whole.model.state_dict())
    assert same(second.weights(), whole.weights())


def test_a_frozen_part_does_not_drop_out_while_the_rest_trains():
    model = tiny_model(FROZEN)
    model.planner.backbone.extra = nn.Dropout(0.5)
    trainer = Trainer(model, device=CPU)
    trained(trainer, 1)
    assert model.training
    assert model.planner.blocks.training
    assert not any(module.training for module in model.planner.backbone.modules())


def test_the_averages_statistics_are_those_of_the_model():
    """Batch normalisation's are no weights: averaging passes them over."""
    model = tiny_model()
    model.refiner.extra = nn.BatchNorm1d(2)
    trainer = Trainer(model, device=CPU)
    model.refiner.extra.running_mean += 3
    trained(trainer, 1)
    assert trainer.weights()["refiner.extra.running_mean"].tolist() == [3, 3]


def test_a_state_with_frozen_weights_in_it_is_read_too():
    """Earlier checkpoints have them."""
    trainer = Trainer(tiny_model(FROZEN), device=CPU)
    trained(trainer, 2)
    earlier = trainer.state() | {"model": trainer.model.state_dict(), "average": trainer.weights()}
    earlier.pop("row")
    again = Trainer(tiny_model(FROZEN), device=CPU, state=earlier)
    assert same(again.weights(), trainer.weights())
