"""The gripper as a decision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libra_ray.model.parts.gripper import decided, decision_target, gripper_dim, probability
from libra_ray.spec import NO_GRIPPER


@given(q=st.floats(0, 1, width=32), wanted=st.sampled_from([-1.0, 1.0]), margin=st.floats(0.01, 0.4))
def test_the_target_crosses_the_threshold_exactly_where_the_decision_is_wrong(q, wanted, margin):
    said, right = torch.tensor(q), torch.tensor(wanted)
    target = decision_target(said, right, margin)
    assert decided(said + target) == right
    if decided(said) == right and q != 0.5:
        assert target == 0
    else:
        assert abs(float(said + target) - 0.5) == pytest.approx(margin, abs=1e-5), "and no further than the margin"
        assert target.sign() == right


@pytest.mark.parametrize("wanted", [-1.0, 1.0])
def test_where_there_is_no_anchor_both_decisions_are_equally_sure(wanted):
    """An error of less than the margin turns neither."""
    nothing, right = torch.tensor(0.5), torch.tensor(wanted)
    for error in (-0.09, 0.09):
        assert decided(nothing + decision_target(nothing, right, 0.1) + error) == right


def test_a_mean_of_both_ends_is_a_probability():
    torch.testing.assert_close(probability(torch.tensor([-1.0, -0.5, 0.0, 1.0, 1.5])), torch.tensor([0.0, 0.25, 0.5, 1.0, 1.0]))
    assert decided(torch.tensor([0.0, 0.5, 0.51])).tolist() == [-1, -1, 1]


def test_which_dimension_it_is():
    assert [gripper_dim(setting, 4) for setting in ("last", "none", "0", "3")] == [3, None, 0, 3]
    assert gripper_dim("none", 1) is None


def test_it_is_the_declared_one_where_nobody_says_otherwise():
    assert [gripper_dim("declared", 4, declared) for declared in (None, 0, 2, NO_GRIPPER)] == [3, 0, 2, None]
    assert [gripper_dim(setting, 4, 1) for setting in ("last", "none", "0")] == [3, None, 0]


@pytest.mark.parametrize(("setting", "dims"), [("4", 4), ("last", 1), ("0", 1)])
def test_a_dimension_that_is_not_there_or_the_only_one_is_refused(setting, dims):
    with pytest.raises(
        ValueError, match=rf"anchor_refine.gripper={setting}: the data's actions have {dims} dim.*give last, none"
    ):
        gripper_dim(setting, dims)
