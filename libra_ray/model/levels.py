"""Some levels of a system taught without the others, and which weights are whose."""

from collections.abc import Iterable, Mapping, Sequence

from libra_ray.model.system import System


def teach_only(system: System, levels: Sequence[str]) -> None:
    """Let some levels learn, each given what the levels above it should have said, and leave the weights of the others.

    Raises:
        ValueError: there is no such level, it cannot learn without another, or it shares weights with one.
    """
    taught = system.taught_by()
    if {system.level(name).name for name in levels} == {level.name for level in system.levels}:
        return
    for name in levels:
        if name not in taught:
            raise ValueError(
                f"train.levels: {name} cannot be trained alone, for it learns from what another level really answers; "
                f"of this policy {', '.join(taught) or 'no level'} can"
            )
        if system.level(name).reads is not None and _reads_answers(system):
            raise ValueError(
                f"train.levels: {name} cannot be trained alone with train.curriculum=planner, by which it learns from what "
                "another level really answers; give teacher, or train all together"
            )
    learned = frozenset(term for name in levels for term in taught[name])
    own, others = (_reached(system, terms) for terms in (learned, system.loss_weights().keys() - learned))
    if shared := own.keys() & others.keys():
        parts = sorted({".".join(own[weight].split(".")[:2]) for weight in shared})
        raise ValueError(
            f"train.levels: {', '.join(levels)} cannot be trained alone, for other levels learn with the same weights "
            f"({', '.join(parts)}); choose settings by which levels share nothing, or train all together"
        )
    for weight in system.parameters():
        if id(weight) not in own:
            weight.requires_grad = False
    system.learned = learned


def check_teaching(system: System) -> None:
    """Refuse a training by which nothing, or nothing of what is configured, would be learned.

    Raises:
        ValueError: every loss that is learned has no weight or reaches no weights, or there is nothing to balance.
    """
    train, weights = system.config.train, {n: w for n, w in system.loss_weights().items() if system.teaches(n)}
    whose = (
        f"train.levels={','.join(train.levels)}" if system.learned is not None else f"model.system={system.config.model.system}"
    )
    if not any(weights.values()):
        raise ValueError(
            f"{whose} would learn nothing: the weight of {', '.join(weights)} is 0; give train.lambda_plan or "
            "train.lambda_diff above 0"
        )
    if not _reached(system, weights):
        raise ValueError(
            f"{whose} would learn nothing: every weight that its losses reach is frozen; give full or lora to a part"
        )
    if train.balance != "fixed" and len(weights) < 2:
        raise ValueError(f"train.balance={train.balance} has nothing to balance: {whose} has one loss; give fixed")


def _reads_answers(system: System) -> bool:
    """Whether levels learn from what those above them say, from the first step on."""
    return system.config.train.curriculum == "planner" and "train.curriculum" in (system.follows(system.config) or ())


def owners(system: System) -> dict[str, str | None]:
    """The level that each part, weight and buffer belongs to, by its name; None of one that no level has for itself.

    Of a level are the weights that its losses alone reach, and what never learns in a part that is otherwise its own.

    Raises:
        ValueError: a level cannot learn without another.
    """
    taught = system.taught_by()
    for level in system.levels:
        if level.name not in taught:
            raise ValueError(f"level {level.name} cannot learn without another, and so cannot be joined to one")
    levels_of: dict[str, set[str]] = {}
    for learner, terms in taught.items():
        for name in _reached(system, terms).values():
            levels_of.setdefault(name, set()).add(learner)
    of_part: dict[str, set[str]] = {}
    for name, found in levels_of.items():
        of_part.setdefault(_part(system, name), set()).update(found)
    found_of = {name: levels_of.get(name) or of_part.get(_part(system, name), set()) for name in system.state_dict()}
    every = {part: of_part.get(part, set()) for part in system.parts()} | found_of
    return {name: next(iter(found)) if len(found) == 1 else None for name, found in every.items()}


def owner_of(name: str, whose: Mapping[str, str | None]) -> str | None:
    """The level of a weight by `owners`; of one that the system has no more, as an adapter's, that of what it is part of."""
    while name and name not in whose:
        name = name.rpartition(".")[0]
    return whose.get(name)


def _reached(system: System, terms: Iterable[str]) -> dict[int, str]:
    """The names of all weights that some loss terms reach, by their identities."""
    names = {id(weight): name for name, weight in system.named_parameters()}
    reached = system.reached()
    return {id(weight): names[id(weight)] for term in terms for weight in reached[term]}


def _part(system: System, name: str) -> str:
    return next((part for part in system.parts() if name.startswith(f"{part}.")), "")
