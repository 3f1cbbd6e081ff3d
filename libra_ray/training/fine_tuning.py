"""Training that begins with the weights of another checkpoint."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from libra_ray.checkpoint import read_config, read_manifest
from libra_ray.common.progress import print_status
from libra_ray.model.parts.adapters import is_adapter, merged, plain
from libra_ray.model.system import System
from libra_ray.spec import differences
from libra_ray.types import RobotShape


def start_from(model: System, folder: Path, parts: Sequence[str]) -> list[str]:
    """Give a model the weights of a checkpoint, which may be one of another granularity or of other parts.

    What does not fit stays random, and is named in one line on standard error.

    Of another robot's checkpoint only parts that fit as a whole are taken: half a policy would seem to be one.

    Args:
        model: whose weights of the same name and shape are replaced.
        folder: the checkpoint.
        parts: beginnings of the names to take, e.g. `planner.backbone`; where the checkpoint has another name for it, both,
            e.g. `strategic.backbone=planner.backbone`. Of several that fit the longest holds.

    Returns:
        The names of the weights that were taken.

    Raises:
        ValueError: the folder is no checkpoint or a damaged one, one of `parts` has no weight that fits, the checkpoint is
            another robot's and one of `parts` has a weight that does not, or it means something else by the same numbers and
            `parts` are all there are.
    """
    theirs, called = read_manifest(folder).shape, _pairs(parts)
    names = {plain(name): name for name in model.state_dict() if not is_adapter(name)}
    own = {name: model.state_dict()[real] for name, real in names.items()}
    try:
        weights = merged(load_file(folder / "weights.safetensors"), read_config(folder).model)
        known = {name: weights[source] for name, source in _sources(own, called) if source in weights}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"train.start_from={folder}: its weights cannot be read ({error}); give another, or restore it"
        ) from error
    fitting = {n: value for n, value in known.items() if value.shape == own[n].shape}
    for part in parts:
        if not any(name.startswith(part.partition("=")[0]) for name in fitting):
            raise ValueError(
                f"train.start_parts={part}: checkpoint {folder} has no weights of this name and shape; this model's parts are "
                f"{', '.join([*model.parts(), *_heads(own)])}; the checkpoint's are {', '.join(_heads(weights))}, and one of "
                "another name is given as OURS=THEIRS"
            )
    wanted = [name for name in own if name.startswith(tuple(called))]
    if _dims(theirs) != _dims(model.shape):
        _refuse_half_a_policy(folder, model.shape, theirs, {name: name in fitting for name in wanted}, called)
    _check_meaning(folder, model, theirs, list(called))
    model.load_state_dict({names[n]: value for n, value in fitting.items()}, strict=False)
    if random := [name for name in wanted if name not in fitting]:
        count = f"{len(fitting)} of {len(fitting) + len(random)}"
        print_status(
            f"train.start_from={folder}: {count} weights of {', '.join(parts)} are taken; "
            f"the others do not fit and stay random, in {', '.join(_heads(random))}"
        )
    return sorted(fitting)


def _pairs(parts: Sequence[str]) -> dict[str, str]:
    """The beginnings of names here -> in the checkpoint."""
    split = [part.partition("=") for part in parts]
    return {ours: theirs if equals else ours for ours, equals, theirs in split}


def _sources(own: Iterable[str], called: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The names of weights that are to be taken, each with its name in the checkpoint."""
    for name in own:
        if found := [begins for begins in called if name.startswith(begins)]:
            ours = max(found, key=len)
            yield name, called[ours] + name.removeprefix(ours)


def _heads(names: Iterable[str]) -> list[str]:
    """The parts that weights belong to, e.g. `planner.backbone`."""
    return sorted({".".join(name.split(".")[:2]) for name in names})


def _dims(shape: RobotShape) -> dict[str, Any]:
    """Of the robot; neither what its numbers mean, nor what its demonstrations were told to do."""
    return {name: value for name, value in vars(shape).items() if name not in ("action", "state", "subgoals")}


def _check_meaning(folder: Path, model: System, theirs: RobotShape, parts: Sequence[str]) -> None:
    """Refuse a whole policy that means something else by the same numbers; of single parts, which may know none, say so.

    Raises:
        ValueError: names what differs.
    """
    if not (found := differences(theirs, model.shape)):
        return
    words = "; ".join(f"{name} {said} (here {ours})" for name, (said, ours) in found.items())
    line = f"train.start_from={folder} is a checkpoint of a robot whose numbers mean something else: {words}"
    if set(parts) >= set(model.parts()):
        raise ValueError(
            f"{line}; give a checkpoint of this robot, say with data.action_is, data.gripper and the like what the data set "
            "means, or name in train.start_parts the parts that know of no action, e.g. planner.backbone"
        )
    print_status(f"{line}; only {', '.join(parts)} of it is taken")


def _refuse_half_a_policy(
    folder: Path, ours: RobotShape, theirs: RobotShape, wanted: Mapping[str, bool], called: Mapping[str, str]
) -> None:
    """Refuse parts of which some weights have the shape of another robot.

    Args:
        folder: the checkpoint.
        ours, theirs: robots.
        wanted: the weights that are to be taken, and whether each fits.
        called: see `_pairs`.

    Raises:
        ValueError: names the dimensions of both, and the parts that fit.
    """
    if not (missing := [name for name, fits in wanted.items() if not fits]):
        return
    heads: dict[str, bool] = {}
    for name, fits in wanted.items():
        head = _offered(name, called)
        heads[head] = heads.get(head, True) and fits
    whole = [head for head, fits in heads.items() if fits]
    advice = f"give --train.start_parts {','.join(whole)}, or fewer, to take what fits as a whole" if whole else "no part fits"
    here = _dims(ours)
    differing = "; ".join(f"{n} {was} (here {here[n]})" for n, was in _dims(theirs).items() if was != here[n])
    raise ValueError(
        f"train.start_from={folder} is a checkpoint of another robot: {differing}; {len(missing)} of {len(wanted)} weights do "
        f"not fit, e.g. {missing[0]}; {advice}"
    )


def _offered(name: str, called: Mapping[str, str]) -> str:
    """The part that a weight belongs to, as `train.start_parts` takes it: no larger than the part that was asked for."""
    asked = max((begins for begins in called if name.startswith(begins)), key=len)
    head = max(".".join(name.split(".")[:2]), asked, key=len)
    theirs = called[asked] + head.removeprefix(asked)
    return head if theirs == head else f"{head}={theirs}"
