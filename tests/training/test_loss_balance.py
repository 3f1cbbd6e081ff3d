"""The laws of balance: what a calibrated weight equalises, what a learned one settles at, and when a weight matters at all."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libra_ray.config import override
from libra_ray.model.libra import GROUND_TRUTH
from libra_ray.training.fit import Trainer
from libra_ray.training.loss_balance import (
    EqualGradients,
    GradientMeter,
    LossGradients,
    Uncertainty,
    make_balance,
)
from tests.model.builders import make_batch, tiny_config, tiny_model
from tests.training.builders import training_data

CPU = torch.device("cpu")
SHARED = {"refiner.vision": "shared"}
norms = st.floats(1e-4, 1e4)


def settings(**changes):
    return override(tiny_config(), {f"train.{name}": value for name, value in changes.items()}).train


def rows_of(changes, steps, batch_of=lambda model, step: make_batch(model, 8)):
    """Metrics of every step of a tiny run."""
    trainer = Trainer(tiny_model({"train.steps": steps, "train.curriculum": "teacher", **changes}), device=CPU)
    return [p.metrics for p in trainer.run([batch_of(trainer.model, step) for step in range(steps)])]


def ratios(rows):
    return [row["grad_norm_planner"] / row["grad_norm_refiner"] for row in rows]


@pytest.mark.parametrize("lambdas", [(1.0, 1.0), (3.0, 1.0)], ids=["equal", "three_to_one"])
def test_calibration_gives_the_gradients_the_ratio_of_the_lambdas(lambdas):
    """A toy problem that stands still: from the second step on the norms are as wanted, within a tenth."""
    wanted = {"train.lambda_plan": lambdas[0], "train.lambda_diff": lambdas[1], "train.lr": 1e-12}
    free = ratios(rows_of({**wanted, "train.balance": "fixed"}, 4))
    found = ratios(rows_of({**wanted, "train.balance": "gradient", "train.balance_every": 1}, 12))
    assert abs(math.log(free[0] / (lambdas[0] / lambdas[1]))) > 0.2, "the problem must be out of balance to begin with"
    # The noise levels are drawn anew at every step, so one step's own ratio scatters.
    late = math.exp(sum(map(math.log, found[4:])) / len(found[4:]))
    assert late == pytest.approx(lambdas[0] / lambdas[1], rel=0.1)


def test_calibration_keeps_up_with_a_problem_that_moves():
    changes = {"train.balance": "gradient", "train.balance_every": 1, "train.balance_memory": 0.7, "train.lr": 1e-3}
    found = ratios(rows_of(changes, 80, lambda model, step: make_batch(model, 8, seed=step)))
    late = math.exp(sum(map(math.log, found[40:])) / 40)
    assert late == pytest.approx(1, rel=0.1)


@given(plan=norms, diff=norms, lambda_plan=st.floats(0.1, 10), lambda_diff=st.floats(0.1, 10))
def test_calibrated_weights_keep_their_sum_and_equalise_what_was_measured(plan, diff, lambda_plan, lambda_diff):
    lambdas = {"plan": lambda_plan, "diff": lambda_diff}
    balance = EqualGradients(lambdas, memory=0.9)
    assert balance.weights == lambdas
    for _ in range(3):
        balance.measure(LossGradients(norms={"plan": plan, "diff": diff}))
    weights = balance.weights
    assert sum(weights.values()) == pytest.approx(lambda_plan + lambda_diff)
    assert weights["plan"] * plan / lambda_plan == pytest.approx(weights["diff"] * diff / lambda_diff)


@pytest.mark.parametrize("gone", [0.0, math.nan])
def test_a_vanished_gradient_says_nothing_about_a_weight(gone):
    balance = EqualGradients({"plan": 1.0, "diff": 1.0}, memory=0.9)
    balance.measure(LossGradients(norms={"plan": 4.0, "diff": 1.0}))
    before = balance.weights
    balance.measure(LossGradients(norms={"plan": gone, "diff": 1.0}))
    assert balance.weights == before


@given(plan=st.floats(0.02, 5), diff=st.floats(0.02, 5), lambda_plan=st.floats(0.5, 2))
def test_learned_weights_settle_where_both_weighted_losses_are_one(plan, diff, lambda_plan):
    balance = Uncertainty({"plan": lambda_plan, "diff": 1.0})
    for _ in range(1500):
        balance.learn({"plan": plan, "diff": diff})
    assert balance.weights["plan"] * plan == pytest.approx(1, abs=0.01)
    assert balance.weights["diff"] * diff == pytest.approx(1, abs=0.01)


def test_the_learned_step_descends_the_published_objective():
    """lambda exp(-s) L + s, differentiated by torch instead of by hand."""
    balance = Uncertainty({"plan": 2.0, "diff": 1.0})
    s = torch.zeros(2, requires_grad=True)
    (torch.tensor([2.0, 1.0]) * (-s).exp() * torch.tensor([0.7, 3.0]) + s).sum().backward()
    balance.learn({"plan": 0.7, "diff": 3.0})
    moved = [balance.log_variances[name] for name in ("plan", "diff")]
    torch.testing.assert_close(torch.tensor(moved), -0.01 * s.grad)


@pytest.mark.parametrize("changes", [{}, SHARED], ids=["apart", "shared"])
def test_gradients_are_taken_apart_rightly(changes):
    """One backward pass of the weighted sum gives what a pass of each loss alone would."""
    model, weights = tiny_model(changes), {"plan": 0.3, "diff": 1.7}
    batch, meter = make_batch(model), GradientMeter(model.reached())

    def losses():
        return model(batch, GROUND_TRUTH, torch.Generator().manual_seed(0)).terms

    alone = {}
    for name in weights:
        model.zero_grad()
        losses()[name].backward()
        alone[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = losses()
    meter.before(found)
    sum(weights[name] * term for name, term in found.items()).backward()
    measured = meter.after(weights)
    for name in weights:
        expected = torch.cat([g.flatten() for g in alone[name].values()]).norm()
        assert measured.norms[name] == pytest.approx(float(expected), rel=1e-3)
    both = {id(p) for p in model.reached()["plan"]} & {id(p) for p in model.reached()["diff"]}
    shared = [name for name, p in model.named_parameters() if id(p) in both]
    assert bool(shared) is bool(changes)
    if not shared:
        assert not measured.cosines
        return
    none = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    plan, diff = (torch.cat([(none | grads)[name].flatten() for name in shared]) for grads in alone.values())
    expected = float(torch.nn.functional.cosine_similarity(plan, diff, dim=0))
    assert measured.cosines == {("plan", "diff"): pytest.approx(expected, abs=1e-3)}


def test_three_losses_are_taken_apart_where_they_meet():
    """Two share one weight, all three another, and each has one of its own."""
    dice = torch.Generator().manual_seed(0)
    own, pair, everyone = ([torch.nn.Parameter(torch.randn(4, generator=dice)) for _ in range(3)] for _ in range(3))
    reached = {"a": [own[0], pair[0], everyone[0]], "b": [own[1], pair[0], everyone[0]], "c": [own[2], everyone[0]]}
    terms = {name: sum((i + 1) * (p**2).sum() for i, p in enumerate(found)) for name, found in reached.items()}
    weights, meter = {"a": 0.5, "b": 2.0, "c": 3.0}, GradientMeter(reached)
    meter.before(terms)
    sum(weights[name] * term for name, term in terms.items()).backward()
    measured = meter.after(weights)
    for name, found in reached.items():
        expected = torch.cat([2 * (i + 1) * p.detach() for i, p in enumerate(found)]).norm()
        assert measured.norms[name] == pytest.approx(float(expected), rel=1e-5)
    assert set(measured.cosines) == {("a", "b"), ("a", "c"), ("b", "c")}


def moved(changes):
    trainer = Trainer(tiny_model({"train.curriculum": "teacher", "train.precision": "fp32", **changes}), device=CPU)
    list(trainer.run([make_batch(trainer.model, 4, seed=step) for step in range(3)]))
    return trainer.weights()


def apart(one, other):
    """Mean difference of two sets of weights (a few whose gradient is mere rounding may differ much)."""
    return float(torch.cat([(one[name] - other[name]).abs().flatten() for name in one]).mean())


def test_a_weight_matters_through_clipping_and_through_what_is_shared_alone():
    """AdamW divides by the gradient's size: without either, a tenfold weight changes nothing."""
    heavy, free = {"train.lambda_plan": 10.0}, {"train.grad_clip": 1e9}
    nothing = apart(moved(free), moved(heavy | free))
    assert apart(moved({}), moved(heavy)) > 10 * nothing
    assert apart(moved(SHARED | free), moved(SHARED | heavy | free)) > 10 * nothing


@pytest.mark.parametrize("balance", ["gradient", "uncertainty"])
def test_two_and_two_resumed_steps_are_four_under_every_balance(balance):
    changes = SHARED | {"train.balance": balance, "train.balance_every": 1, "train.augment_pixels": 1}

    def run(trainer, until):
        return [
            p.metrics["weight_plan"]
            for p in trainer.run([make_batch(trainer.model, 4, seed=s) for s in range(until)][trainer.step :])
        ]

    whole, first = (Trainer(tiny_model(changes), device=CPU) for _ in range(2))
    weights, early = run(whole, 4), run(first, 2)
    second = Trainer(tiny_model(changes), device=CPU, state=copy.deepcopy(first.state()))
    assert early + run(second, 4) == weights
    assert len(set(weights)) > 2, "the weights must move, or nothing was tested"
    assert second.balance.state() == whole.balance.state()
    assert all(torch.equal(second.weights()[name], value) for name, value in whole.weights().items())


@pytest.mark.parametrize("balance", ["fixed", "gradient", "uncertainty"])
def test_every_row_has_weights_and_gradients_of_both_losses(balance):
    rows = rows_of(SHARED | {"train.balance": balance, "train.balance_every": 2}, 3)
    for row in rows:
        assert row["loss"] == pytest.approx(
            row["weight_plan"] * row["loss_plan"] + row["weight_diff"] * row["loss_diff"], rel=1e-5
        )
        assert row["grad_norm_loss_plan"] > 0
        assert row["grad_norm_loss_diff"] > 0
        assert -1 <= row["grad_cosine_plan_diff"] <= 1
    assert rows[0]["grad_norm_loss_plan"] == rows[1]["grad_norm_loss_plan"] != rows[2]["grad_norm_loss_plan"]
    lambdas = {"plan": 1.0, "diff": 2.0}
    assert make_balance(settings(balance=balance), lambdas).weights == lambdas


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.balance": "gradient", "train.lambda_plan": 0.0}, r"train\.lambda_plan=0\.0.*above 0"),
        ({"train.balance": "uncertainty", "train.lambda_diff": 0.0}, r"train\.lambda_diff=0\.0.*above 0"),
        ({"train.balance_memory": 1.0}, "below 1"),
        ({"train.balance_every": 0}, "at least 1"),
    ],
)
def test_a_balance_of_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(changes)


@pytest.mark.parametrize("balance", ["gradient", "uncertainty"])
def test_one_loss_cannot_be_balanced(balance):
    with pytest.raises(ValueError, match=r"nothing to balance: model\.system=monolithic has one loss"):
        training_data(tiny_config({"train.balance": balance, "model.system": "monolithic"})).make_model()
    with pytest.raises(ValueError, match=r"nothing to balance: train\.levels=planner has one loss"):
        training_data(tiny_config({"train.balance": balance, "train.levels": "planner"})).make_model()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"train.lambda_plan": 0, "train.lambda_diff": 0},
            r"model\.system=libra would learn nothing: the weight of plan, diff is 0",
        ),
        (
            {"train.lambda_plan": 0, "train.levels": "planner"},
            r"train\.levels=planner would learn nothing: the weight of plan is 0",
        ),
        (
            {"refiner.train_encoder": "frozen", "refiner.train_transformer": "frozen", "train.levels": "refiner"},
            r"train\.levels=refiner would learn nothing: every weight that its losses reach is frozen",
        ),
    ],
)
def test_a_training_that_would_teach_nothing_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        training_data(tiny_config(changes)).make_model()
    training_data(tiny_config({"train.lambda_plan": 0})).make_model()
