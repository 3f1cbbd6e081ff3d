"""Both objectives against answers known in closed form: for Gaussian data the best predictor is linear."""

import math

import pytest
import torch

from libra_ray.model.parts.diffusion import DDPM, FlowMatching, make_objective

MEAN, STD = 0.4, 0.3
UNCLIPPED = DDPM(levels=100, clip=math.inf)


def best_velocity(x, t):
    """E[data - noise | x_t] for data ~ N(MEAN, STD^2) on the straight path."""
    t = t.view(-1, 1)
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def best_epsilon(ddpm):
    """E[noise | x_t] for data ~ N(MEAN, STD^2) under the schedule of `ddpm`."""

    def predict(x, t):
        a = ddpm.alpha_bar(t).view(-1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)

    return predict


def standard_noise(rows=20000):
    return torch.randn(rows, 1, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("objective", "predict"), [(FlowMatching(), best_velocity), (UNCLIPPED, best_epsilon(UNCLIPPED))], ids=["flow", "ddpm"]
)
def test_the_best_predictor_samples_the_data(objective, predict):
    samples = objective.sample(predict, standard_noise(), 100)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("objective", [FlowMatching(), UNCLIPPED], ids=["flow", "ddpm"])
def test_every_path_ends_where_the_known_equation_leads_it(objective):
    """For Gaussian data both samplers follow an ODE with a known solution: standard scores are kept from noise to data."""
    start = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1)
    if isinstance(objective, FlowMatching):
        predict, scores = best_velocity, start
    else:
        a = objective.alpha_bar(torch.zeros(1, dtype=torch.float64))
        predict, scores = best_epsilon(objective), (start - a.sqrt() * MEAN) / (a * STD**2 + 1 - a).sqrt()
    errors = [(objective.sample(predict, start, n) - MEAN - STD * scores).abs().max().item() for n in (25, 50, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("steps", [1, 2, 6, 7, 60])
@pytest.mark.parametrize("levels", [7, 100])
def test_every_number_of_ddim_steps_keeps_the_mean(steps, levels):
    """A DDIM step maps the noise of one level to that of the next; levels that did not meet would move the mean."""
    ddpm = DDPM(levels=levels, clip=math.inf)
    start = torch.full((1, 1), math.sqrt(ddpm.alpha_bar(torch.zeros(1)).item()) * MEAN)
    assert ddpm.sample(best_epsilon(ddpm), start, steps).item() == pytest.approx(MEAN, abs=1e-4)


@pytest.mark.parametrize("objective", [FlowMatching(), UNCLIPPED], ids=["flow", "ddpm"])
def test_the_target_is_what_the_best_predictor_says_on_average(objective):
    """Regression of `target` on `x` has the analytic predictor's slope, at every level."""
    noise, generator = standard_noise(), torch.Generator().manual_seed(1)
    data = MEAN + STD * torch.randn(noise.shape, generator=generator)
    predict = best_velocity if isinstance(objective, FlowMatching) else best_epsilon(objective)
    for level in (0.1, 0.5, 0.9):
        made = objective.corrupt(data, noise, torch.full((len(data),), level))
        expected = predict(made.x, made.t)
        assert (made.target - expected).mean().abs() < 0.02
        assert ((made.target - expected) * (made.x - made.x.mean())).mean().abs() < 0.02


@pytest.mark.parametrize("objective", [FlowMatching(), UNCLIPPED], ids=["flow", "ddpm"])
@pytest.mark.parametrize("level", [0.0, 0.3, 0.77])
def test_the_data_says_the_target(objective, level):
    """Whoever knows the data knows the target; an error of the data is one of the target, by its weight, or weighs 1."""
    generator = torch.Generator().manual_seed(2)
    data, noise, error = torch.randn(3, 50, 4, generator=generator, dtype=torch.float64)
    made = objective.corrupt(data, noise, torch.full((50,), level, dtype=torch.float64))
    torch.testing.assert_close(objective.target_of(data, made.x, made.t), made.target)
    mistake = objective.target_of(data + error, made.x, made.t) - made.target
    worth = (mistake.square() / error.square()).clamp(min=1)
    torch.testing.assert_close(worth, objective.data_weight(made.t)[:, None].expand_as(worth))


@pytest.mark.parametrize("objective", [FlowMatching(), UNCLIPPED], ids=["flow", "ddpm"])
def test_the_weight_grows_with_the_signal_and_is_bounded(objective):
    weights = objective.data_weight(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert (weights.diff() >= 0).all()
    assert weights[0] == 1
    assert weights[-1] == pytest.approx(25, rel=1e-3)


def test_euler_converges_with_order_one():
    """x' = x, x(0) = 1 has the solution e at 1; half the step, half the error."""
    one = torch.ones(1, 1, dtype=torch.float64)
    errors = [abs(FlowMatching().sample(lambda x, t: x, one, n).item() - math.e) for n in (64, 128, 256)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.03)


@pytest.mark.parametrize("objective", [FlowMatching(), UNCLIPPED], ids=["flow", "ddpm"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_times_are_those_at_which_the_solver_asks(objective, steps):
    seen = []
    objective.sample(lambda x, t: seen.append(t) or torch.zeros_like(x), torch.zeros(2, 1), steps)
    torch.testing.assert_close(torch.stack(seen), objective.times(steps)[:, None].expand(-1, 2))


def test_the_solver_hands_over_the_time_of_each_step():
    seen = []
    FlowMatching().sample(lambda x, t: seen.append(t.tolist()) or torch.zeros_like(x), torch.zeros(2, 1), 4)
    assert seen == [[0.0, 0.0], [0.25, 0.25], [0.5, 0.5], [0.75, 0.75]]


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_the_ends_are_noise_and_data(name):
    data, noise = torch.full((2, 3, 4), 0.5), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    objective = make_objective(name, 100_000)
    start = objective.corrupt(data, noise, torch.zeros(2))
    torch.testing.assert_close(start.x, noise, atol=0.02, rtol=0)
    assert start.t.tolist() == [0, 0]
    end = objective.corrupt(data, noise, torch.full((2,), 1 - 1e-5))
    torch.testing.assert_close(end.x, data, atol=0.02, rtol=0)


def test_the_schedule_falls_from_signal_to_noise():
    levels = UNCLIPPED.alpha_bar(torch.linspace(0, 1, 101))
    assert (levels.diff() >= 0).all()
    assert 0 < levels[0] < 1e-3
    assert 1 - 1e-3 < levels[-1] < 1


def test_training_sees_only_the_discrete_levels():
    made = DDPM(levels=10).corrupt(torch.zeros(200, 1), torch.zeros(200, 1), torch.rand(200))
    assert set((made.t * 10).round().int().tolist()) <= set(range(10))
    torch.testing.assert_close(made.t * 10, (made.t * 10).round())


def test_clipping_bounds_the_samples():
    wild = DDPM(levels=100, clip=1.0).sample(lambda x, t: -10 * torch.ones_like(x), standard_noise(50), 10)
    assert wild.abs().max() <= 1


def test_unknown_objectives_are_refused():
    with pytest.raises(ValueError, match="valid: ddpm, flow"):
        make_objective("diffusion", 100)
