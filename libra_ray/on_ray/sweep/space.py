"""Search spaces: dotted configuration names to `ray.tune` distributions, checked through `override` before anything starts."""

import importlib.util
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
from ray.tune.search.sample import Categorical, Domain

from libra_ray.config import Config, override
from libra_ray.runs.folder import STAGE_KEYS
from libra_ray.runs.trials import Objective, Search

MODES: dict[Objective, str] = {"success": "max", "latency_ms": "min"}

CHECKED_DRAWS = 200
LARGEST_GRID = 100_000
OWN_NAMES = ("train.seed", "data.root", "evaluate.checkpoint", "evaluate.controllers", "tracking.", "ray.")
"""What the sweep itself decides."""
OUTSIDE = ("model.system", "planner.backbone", "refiner.encoder", "refiner.vision", "delay.trace")
"""What a trial loads from outside: its system, pretrained models, measured latencies."""

Values = dict[str, Any]
"""One point of a space: dotted name -> value."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """A checked space.

    Attributes:
        domains: dotted name -> distribution.
        objectives: what is sought; the first is success.
        search: how, unless the user says otherwise.
    """

    name: str
    domains: Mapping[str, Domain]
    objectives: tuple[Objective, ...]
    search: Search

    @property
    def text(self) -> dict[str, str]:
        """The distributions in words, by which two spaces are told apart."""
        return {n: f"{type(d).__name__} {type(d.get_sampler()).__name__} {d.domain_str}" for n, d in self.domains.items()}

    def grid(self) -> list[Values]:
        """Every combination; the first name varies fastest.

        Raises:
            ValueError: a distribution that is not a choice, or more combinations than anybody can try.
        """
        loose = [name for name, domain in self.domains.items() if not isinstance(domain, Categorical)]
        if loose:
            raise ValueError(f"a grid needs choices, but {', '.join(loose)} is no choice; give --search random or optuna")
        sides = [domain.categories for domain in self.domains.values() if isinstance(domain, Categorical)]
        if (size := int(np.prod([len(side) for side in sides]))) > LARGEST_GRID:
            raise ValueError(f"the grid has {size} points, more than {LARGEST_GRID}; give --search random or optuna")
        points = itertools.product(*reversed(sides))
        return [dict(zip(self.domains, reversed(point), strict=True)) for point in points]

    def draws(self, count: int, seed: int) -> list[Values]:
        """At most `count` different random points, the same for the same seed."""
        rng = np.random.default_rng(seed)
        found: list[Values] = []
        for _ in range(20 * count):
            point = {name: plain_value(domain.sample(random_state=rng)) for name, domain in self.domains.items()}
            if point not in found:
                found.append(point)
            if len(found) == count:
                break
        return found

    def recordings(self, config: Config) -> list[Config]:
        """The configurations whose demonstrations the trials need: one, unless the space changes how they are recorded.

        Raises:
            ValueError: it does so by a distribution that is not a choice.
        """
        return self._variants(config, STAGE_KEYS["record"])

    def loads(self, config: Config) -> list[Config]:
        """The configurations that differ in what the trials load from outside.

        Raises:
            ValueError: the space changes them by a distribution that is not a choice.
        """
        return self._variants(config, OUTSIDE)

    def _variants(self, config: Config, names: tuple[str, ...]) -> list[Config]:
        """The configuration under every combination of the settings whose names begin so."""
        kept = {name: domain for name, domain in self.domains.items() if name.startswith(names)}
        part = Space(name=self.name, domains=kept, objectives=self.objectives, search=self.search)
        return [override(config, point) for point in part.grid()] if kept else [config]


def plain_value(value: Any) -> Any:
    """A sampled value without numpy, as JSON and YAML write it."""
    return value.item() if isinstance(value, np.generic) else value


def load_space(name: str, config: Config, shipped: Path) -> Space:
    """A shipped space by its name, or one of the user's by the path of a Python file with `SPACE`.

    Args:
        name: a file of `shipped` without its ending, or a path ending in `.py`. It may also say `OBJECTIVES` and `SEARCH`, and
            have a function `check` that refuses, by a ValueError, a configuration that the space makes no sense for.
        config: what the trials start from; every value is tried on it.
        shipped: the folder of the shipped spaces.

    Raises:
        ValueError: there is no such space, or it names a setting or value that does not exist.
    """
    path = _file(name, shipped)
    module = _module(path)
    given = getattr(module, "SPACE", None)
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{name} must define SPACE, a dictionary of dotted names to ray.tune distributions")
    space = Space(
        name=Path(name).stem,
        domains={key: _domain(key, value) for key, value in given.items()},
        objectives=_objectives(name, getattr(module, "OBJECTIVES", ("success",))),
        search=getattr(module, "SEARCH", "random"),
    )
    if space.search not in get_args(Search):
        raise ValueError(f"{name}: SEARCH={space.search!r} is not one of {', '.join(get_args(Search))}")
    if refuses := getattr(module, "check", None):
        with _read(path):
            refuses(config)
    _check(space, config)
    return space


def _file(name: str, shipped: Path) -> Path:
    path = Path(name) if name.endswith(".py") else shipped / f"{name}.py"
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in shipped.glob("*.py")))
        raise ValueError(f"no space {name}: there is no such file; there are {there}, or give the path of a file ending in .py")
    return path


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"space_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _read(path):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _read(path: Path) -> Iterator[None]:
    """Tell what a space's own code raises as the user's mistake that it is; what it refuses on purpose in its own words."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        raise ValueError(f"the space in {path} cannot be read: {type(error).__name__}: {error}") from error


def _domain(name: str, value: Any) -> Domain:
    if isinstance(value, dict) and list(value) == ["grid_search"]:
        value = Categorical(value["grid_search"])
    if not isinstance(value, Domain):
        raise ValueError(f"{name}: {value!r} is not a ray.tune distribution, such as tune.choice([1, 2]) or tune.uniform(0, 1)")
    if name.startswith(OWN_NAMES):
        raise ValueError(f"a space cannot change {name}: the sweep decides on {', '.join(OWN_NAMES)} itself")
    return value


def _objectives(name: str, given: Any) -> tuple[Objective, ...]:
    objectives = tuple(given)
    if not objectives or objectives[0] != "success" or not set(objectives) <= set(MODES):
        raise ValueError(f"{name}: OBJECTIVES={objectives} must begin with success and may add latency_ms")
    return objectives


def _check(space: Space, config: Config) -> None:
    """Every choice on its own, beside what the space leaves no choice of, then many points as wholes."""
    categories = {name: list(domain.categories) for name, domain in space.domains.items() if isinstance(domain, Categorical)}
    fixed = {name: values[0] for name, values in categories.items() if len(values) == 1}
    for name, domain in space.domains.items():
        for value in domain.categories if isinstance(domain, Categorical) else [plain_value(domain.sample())]:
            try:
                override(config, {**fixed, name: value})
            except ValueError as error:
                raise ValueError(f"space {space.name}: {error}") from None
    for point in space.draws(CHECKED_DRAWS, seed=0):
        try:
            override(config, point)
        except ValueError as error:
            words = ", ".join(f"{name}={value}" for name, value in point.items())
            raise ValueError(f"space {space.name}: {words} is not a valid configuration: {error}") from None
