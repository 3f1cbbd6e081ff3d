"""The laws of the action experts: what the router learns, whose answer is executed, and what each expert is alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from libra_ray.config.systems import EXPERTS
from libra_ray.model.dry_run import dry_run
from libra_ray.model.experts import Experts
from libra_ray.model.parts.action_experts import choice_loss, errors_of, load_loss, shares_of
from libra_ray.model.parts.chunks import Chunk, chunk_of
from libra_ray.model.parts.diffusion import DDPM, FlowMatching
from libra_ray.model.system import seen_now
from libra_ray.policy import act, check_variant, load_policy
from libra_ray.training.fit import Trainer
from tests.model.builders import SHAPE, make_batch, make_observation, save_checkpoint, tiny_config, tiny_model

ROUTING = pytest.mark.parametrize("routing", ["hard", "soft"])


def model_of(**changes):
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return tiny_model({"model.system": "experts"} | given)


def losses(model, batch):
    return model(batch, "", torch.Generator().manual_seed(7))


def noise_for(batch):
    return torch.randn(len(batch), 5, SHAPE.action_dim, generator=torch.Generator().manual_seed(3))


def answer(model, batch, variant="", **seen):
    return model.infer("policy", replace(seen_now(batch), **seen), {}, noise_for(batch), variant)


class ByState(nn.Module):
    """A router that goes by proprioception alone, so that robots of one batch differ."""

    def forward(self, features, state):
        return 3 * state[:, : len(EXPERTS)]


def routed_by_state(**changes):
    model = model_of(**changes)
    model.router = ByState()
    return model


def route(model, answers, steps=60, seeds=range(4)):
    """Let the router learn alone from what experts answer to a batch; returns its last metrics."""
    optimiser = torch.optim.Adam(model.router.parameters(), lr=0.01)
    asked = []
    for seed in seeds:
        batch = make_batch(model, 8, seed=seed)
        with torch.no_grad():
            features = model.shared.encode(batch.images, seen_now(batch).text)
        asked.append((features, batch.state, answers(batch), chunk_of(batch, 5)))
    for step in range(steps):
        features, state, said, chunk = asked[step % len(asked)]
        found = model.router_loss(model.router(features, state), said, chunk)
        optimiser.zero_grad()
        found.terms["router"].backward()
        optimiser.step()
    return {name: float(value) for name, value in found.metrics.items()}


def one_task_each(batch):
    """Two experts, each of which knows all actions of one instruction, and the very contrary of the other's."""
    sign = torch.where(batch.text[:, 0] == batch.text[0, 0], 1.0, -1.0)[:, None, None]
    actions = chunk_of(batch, 5).actions
    return torch.stack([sign * actions, -sign * actions])


def one_is_better(batch):
    """Three experts of which the first has half the error everywhere."""
    actions = chunk_of(batch, 5).actions
    return torch.stack([actions + 0.1, actions + 0.2**0.5 / 10**0.5, actions - 0.2**0.5 / 10**0.5])


@ROUTING
def test_the_router_sends_each_window_to_the_expert_that_is_better_for_it(routing):
    """Two tasks, of which each is known to one expert alone; then pictures that it has not seen."""
    model = model_of(experts__names="token,flow", experts__routing=routing)
    before = route(model, one_task_each, steps=1)["routed_error"]
    assert route(model, one_task_each)["routed_error"] < 0.1 * before
    fresh = make_batch(model, 8, seed=9)
    shares = answer(model, fresh)
    assert (shares["share_token"][::2] > 0.9).all(), "the task that the token expert knows"
    assert (shares["share_flow"][1::2] > 0.9).all(), "the task that the flow expert knows"


@ROUTING
def test_a_router_that_is_sure_too_early_can_be_taught_otherwise(routing):
    """What it learned by while the experts were no good yet is taken back."""
    model = model_of(experts__names="token,flow", experts__routing=routing, experts__balance=0.0)
    model.router.to_logits[-1].bias.data = torch.tensor([60.0, 0.0])
    route(model, one_task_each, steps=400)
    assert (answer(model, make_batch(model, 8, seed=9))["share_flow"][1::2] > 0.9).all()


@ROUTING
def test_load_balancing_pushes_against_collapse(routing):
    """One expert is better everywhere: it has all, unless it is paid to use the others too."""
    weights, metrics = {}, {}
    for balance in (0.0, 3.0):
        model = model_of(experts__routing=routing, experts__balance=balance)
        metrics[balance] = route(model, one_is_better, steps=120)
        batch = make_batch(model, 32, seed=9)
        weights[balance] = (
            model.router(model.shared.encode(batch.images, seen_now(batch).text), batch.state).softmax(-1).mean(0)
        )
    assert weights[0.0][0] > 0.85
    assert metrics[0.0]["load"] > 2.2
    assert weights[3.0][0] < 0.7
    assert weights[3.0][1:].min() > 2 * weights[0.0][1:].max()


def test_the_load_is_1_of_experts_that_are_used_alike_and_K_of_one_that_has_all():
    chunk = Chunk(actions=torch.zeros(6, 5, 4), mask=torch.ones(6, 5, dtype=torch.bool))
    even, one = torch.zeros(6, 3), torch.tensor([[1e3, 0.0, 0.0]]).expand(6, 3)
    assert load_loss(even, torch.eye(3).repeat(2, 1), chunk) == pytest.approx(1)
    assert load_loss(one, shares_of(one, "hard"), chunk) == pytest.approx(3)
    assert load_loss(even, shares_of(even, "soft"), chunk) == pytest.approx(1)


def test_errors_are_relative_and_their_softmax_is_what_the_router_is_taught():
    chunk = Chunk(actions=torch.zeros(2, 5, 4), mask=torch.ones(2, 5, dtype=torch.bool))
    answers = torch.stack([torch.full((2, 5, 4), 0.2), torch.full((2, 5, 4), -0.4)])
    errors = errors_of(answers, chunk)
    torch.testing.assert_close(errors, torch.tensor([[0.04, 0.16]] * 2))
    right = torch.tensor([[0.04, 0.16]] * 2).div(-0.1 * 0.2).softmax(-1)
    logits = torch.tensor([[0.3, -0.2], [1.0, 2.0]])
    expected = -(right * logits.softmax(-1).log()).sum(-1).mean()
    torch.testing.assert_close(choice_loss(logits, errors, chunk, 0.2), expected)
    torch.testing.assert_close(choice_loss(logits, 1e-4 * errors, chunk, 0.2), expected)


@ROUTING
def test_the_routers_loss_is_its_choice_and_the_weighted_load(routing):
    model = model_of(experts__routing=routing, experts__balance=0.25)
    batch = make_batch(model)
    logits = torch.tensor([[0.3, -0.2, 0.1]]).repeat(6, 1)
    chunk, answers = chunk_of(batch, 5), torch.randn(3, 6, 5, 4)
    found = model.router_loss(logits, answers, chunk)
    choice = choice_loss(logits, errors_of(answers, chunk), chunk, 0.2)
    torch.testing.assert_close(found.terms["router"], choice + 0.25 * found.metrics["load"])
    executed = answers[0] if routing == "hard" else torch.einsum("k,kbhd->bhd", logits[0].softmax(-1), answers)
    error = (executed - chunk.actions).square().mean() / (answers - chunk.actions).square().mean()
    torch.testing.assert_close(found.metrics["routed_error"], error)


def test_by_hard_routing_each_robot_gets_its_experts_answer_and_no_other_is_computed(monkeypatch):
    model = routed_by_state()
    batch, rows = make_batch(model, 12), {name: [] for name in EXPERTS}
    for name, expert in model.experts.items():
        read = expert.read
        monkeypatch.setattr(expert, "read", lambda f, s, name=name, read=read: rows[name].append(len(s)) or read(f, s))
    found = answer(model, batch)
    chosen = torch.stack([found[f"share_{name}"] for name in EXPERTS], dim=-1)
    torch.testing.assert_close(chosen.argmax(-1), batch.state[:, :3].argmax(-1))
    assert chosen.unique().tolist() == [0, 1]
    assert {name: sum(of) for name, of in rows.items()} == dict(zip(EXPERTS, chosen.sum(0).int().tolist(), strict=True))
    assert min(map(sum, rows.values())) > 0
    for name in EXPERTS:
        mine = found[f"share_{name}"] == 1
        alone = answer(model, batch, f"expert_{name}")["actions"]
        torch.testing.assert_close(found["actions"][mine], alone[mine])
        assert not torch.isclose(found["actions"][~mine], alone[~mine]).all(-1).all(-1).any()


def test_soft_routing_is_the_mean_by_the_weights():
    model = routed_by_state(experts__routing="soft")
    batch = make_batch(model, 12)
    found = answer(model, batch)
    mean = sum(found[f"share_{name}"][:, None, None] * answer(model, batch, f"expert_{name}")["actions"] for name in EXPERTS)
    torch.testing.assert_close(found["actions"], mean)
    torch.testing.assert_close(found["share_flow"], (3 * batch.state[:, :3]).softmax(-1)[:, 2])


@ROUTING
def test_an_answer_does_not_depend_on_who_else_is_in_the_batch(routing):
    model = routed_by_state(experts__routing=routing)
    batch = make_batch(model, 12)
    together, noise = answer(model, batch), noise_for(batch)
    for row in range(12):
        alone = model.infer("policy", seen_now(batch.index(torch.tensor([row]))), {}, noise[row : row + 1])
        for name, value in alone.items():
            torch.testing.assert_close(value[0], together[name][row], atol=1e-4, rtol=1e-4)


@ROUTING
def test_shares_sum_to_one_in_the_chunks_and_in_the_log(routing, tmp_path):
    model = model_of(experts__routing=routing)
    logged = losses(model, make_batch(model)).metrics
    assert sum(float(logged[f"share_{name}"]) for name in EXPERTS) == pytest.approx(1)
    save_checkpoint(tmp_path / "checkpoint", model)
    for chunk in act(load_policy(tmp_path / "checkpoint"), [make_observation(robot) for robot in range(3)]):
        assert list(chunk.measures) == [f"share_{name}" for name in EXPERTS]
        assert sum(chunk.measures.values()) == pytest.approx(1)
        assert routing == "soft" or max(chunk.measures.values()) == 1


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_alone_is_a_policy_of_its_own(name, tmp_path):
    """Whatever the router says, and the same as the policy whose router sends all robots there."""
    model = model_of()
    model.router.to_logits[-1].bias.data[EXPERTS.index(name)] = 1e3
    save_checkpoint(tmp_path / "checkpoint", model)
    seen = [make_observation(robot) for robot in range(3)]
    policy, alone = (load_policy(tmp_path / "checkpoint", variant=v) for v in ("", f"expert_{name}"))
    for one, other in zip(act(policy, seen), act(alone, seen), strict=True):
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-5)
        assert (one.measures[f"share_{name}"], dict(other.measures)) == (1, {})


def test_experts_that_do_not_take_part_are_no_variants(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", model_of(experts__names="token,flow"))
    check_variant(tmp_path / "checkpoint", "expert_flow")
    with pytest.raises(ValueError, match="has no variant 'expert_diffusion'; it has expert_token, expert_flow"):
        check_variant(tmp_path / "checkpoint", "expert_diffusion")


@pytest.mark.parametrize("name", EXPERTS)
def test_one_expert_alone_has_no_router_and_answers_all(tmp_path, name):
    model = model_of(experts__names=name)
    assert not any("router" in of for of, _ in model.named_parameters())
    terms = losses(model, make_batch(model)).terms
    assert set(terms) == set(model.loss_weights()) == set(model.reached()) == {name}
    save_checkpoint(tmp_path / "checkpoint", model)
    seen = [make_observation(robot) for robot in range(2)]
    policy, alone = (load_policy(tmp_path / "checkpoint", variant=v) for v in ("", f"expert_{name}"))
    for one, other in zip(act(policy, seen), act(alone, seen), strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        assert one.measures[f"share_{name}"] == 1


def test_each_expert_learns_by_its_own_loss_with_its_own_objective():
    model = model_of()
    assert isinstance(model.experts["diffusion"].refiner.objective, DDPM)
    assert isinstance(model.experts["flow"].refiner.objective, FlowMatching)
    terms = losses(model, make_batch(model)).terms
    for term, loss in terms.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        taught = {name for name, part in model.parts().items() if any(p.grad is not None for p in part.parameters())}
        assert taught == ({"router"} if term == "router" else {"shared", f"experts.{term}"})


@ROUTING
def test_steps_past_the_end_never_influence_a_loss(routing):
    model = model_of(experts__routing=routing)
    batch = make_batch(model, masked=8)
    assert not chunk_of(batch, 5).mask.all()
    other = replace(batch, actions=torch.where(batch.action_mask[..., None], batch.actions, -0.9 * torch.ones(())))
    assert losses(model, batch).terms == losses(model, other).terms
    assert losses(model, batch).terms["router"] != losses(model, replace(batch, actions=-batch.actions)).terms["router"]


def test_what_is_committed_is_gone_on_from_by_experts_that_denoise():
    model = routed_by_state(refiner__max_committed_steps=2)
    batch = make_batch(model, 12)
    committed = torch.full((12, 2, SHAPE.action_dim), 0.3)
    committed[6:] = torch.nan
    found, free = answer(model, batch, committed=committed), answer(model, batch)
    denoised = free["share_token"] == 0
    goes_on = denoised & (torch.arange(12) < 6)
    assert goes_on.any()
    torch.testing.assert_close(found["actions"][goes_on, :2], committed[goes_on])
    torch.testing.assert_close(found["actions"][~goes_on], free["actions"][~goes_on])


def test_every_expert_learns_whether_it_is_chosen_or_not():
    model = model_of(train__steps=15, train__log_every=15, train__lr=5e-3, train__warmup_steps=2, action__bins=3)
    model.router.to_logits[-1].bias.data[1] = 1e3
    batch = make_batch(model, 4)
    before = losses(model, batch)
    assert before.metrics["share_diffusion"] == 1
    for _ in Trainer(model, device=torch.device("cpu")).run([batch] * 15):
        after = losses(model.eval(), batch)
    for name in EXPERTS:
        assert after.terms[name] < 0.9 * before.terms[name].detach(), name


def test_its_measures_are_numbers_that_the_border_lets_pass():
    assert dry_run(model_of).config.model.system == "experts"


@pytest.mark.parametrize("names", ["token,token", "token,flows", ""])
def test_experts_that_are_none_are_refused(names):
    with pytest.raises(ValueError, match=rf"experts\.names={names} must name at least one of token, diffusion, flow"):
        tiny_config({"model.system": "experts", "experts.names": names})


def test_a_negative_balance_is_refused():
    with pytest.raises(ValueError, match=r"experts\.balance=-1\.0 is too small"):
        tiny_config({"experts.balance": -1.0})


def test_its_variants_are_named_for_whoever_has_no_checkpoint():
    assert Experts.variants == ("expert_token", "expert_diffusion", "expert_flow")
