"""Which parameters an objective depends on: Optuna's fANOVA over the finished configurations, however they were searched."""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial
from ray.tune.search.optuna import OptunaSearch

from libra_ray.on_ray.sweep.space import Space
from libra_ray.runs.trials import Configuration, Objective

FEWEST = 8
"""Configurations below which a forest has nothing to say."""


def parameter_importance(space: Space, found: Sequence[Configuration]) -> dict[str, dict[str, float]]:
    """Objective -> parameter -> share of the objective's variation, largest first.

    Empty for fewer than `FEWEST` finished configurations or a single parameter; an objective that never varied is left out.
    """
    distributions = OptunaSearch.convert_search_space(dict(space.domains))
    if len(distributions) < 2:
        return {}
    shares = {objective: _importance(distributions, found, objective) for objective in space.objectives}
    return {objective: by_name for objective, by_name in shares.items() if by_name}


def _importance(distributions: Mapping[str, Any], found: Sequence[Configuration], objective: Objective) -> dict[str, float]:
    known = [(c.values, value) for c in found if (value := getattr(c, objective)) is not None]
    if len(known) < FEWEST or len({value for _, value in known}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    study.add_trials([create_trial(params=dict(v), distributions=dict(distributions), value=value) for v, value in known])
    return dict(get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)))
