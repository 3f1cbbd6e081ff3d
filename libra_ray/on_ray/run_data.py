"""The data set of a run: the same one at every start, and what it is when it is not there yet."""

from libra_ray.checkpoint import STATS_NAME
from libra_ray.common.files import write_text
from libra_ray.common.progress import print_status
from libra_ray.data.checks import DatasetError
from libra_ray.data.dataset import Demonstrations, open_dataset
from libra_ray.data.fingerprint import Fingerprint
from libra_ray.data.transforms import NormStats
from libra_ray.runs.folder import RunFolder
from libra_ray.spec import RobotSpec, differences
from libra_ray.training.data import TrainingData

FACT, STATS_FACT = "train.data", "train.stats"
"""What a run keeps, beside the stages, of the data set and the normalisation statistics that its training began with."""
ROBOT = "train.robot"
"""What that data set said of its robot."""


def began_with(folder: RunFolder) -> Fingerprint | None:
    """The data set that the run's training began with; None where it has not begun, or under a version that did not say."""
    return folder.fact(FACT, Fingerprint)


def open_unchanged(folder: RunFolder) -> Demonstrations:
    """The numbers of the run's data set.

    Raises:
        ValueError: there is none, it cannot be trained on, or it is another one than the run's training began with.
    """
    recorded, before = open_dataset(folder.dataset, folder.config.data), began_with(folder)
    if before is not None:
        before.check_unchanged(Fingerprint.of(recorded), folder.dataset)
    _check_same_robot(folder, recorded.robot)
    return recorded


def open_to_train(folder: RunFolder) -> TrainingData:
    """The run's data set, checked and decoded, its remarks told; from now on the run goes on with this one alone.

    Raises:
        ValueError: as `open_unchanged`.
    """
    data = TrainingData.open(folder.config, folder.dataset, folder.path("frames"), before=began_with(folder))
    _check_same_robot(folder, data.demonstrations.robot)
    for remark in data.remarks():
        print_status(f"data set: {remark}")
    keep(folder, data.fingerprint)
    if folder.fact(ROBOT, RobotSpec) is None:
        folder.note(ROBOT, data.demonstrations.robot)
    _keep_stats(folder, data.stats)
    return data


def _check_same_robot(folder: RunFolder, now: RobotSpec) -> None:
    """Refuse to go on where the numbers no longer mean what they meant when training began.

    Raises:
        DatasetError: says what differs.
    """
    before = folder.fact(ROBOT, RobotSpec)
    if before is None or not (found := differences(now, before, undeclared=True)):
        return
    raise DatasetError(
        f"the data set {folder.dataset} says otherwise what its numbers mean than when this run's training began: "
        f"{'; '.join(f'{name} {said} (then {then})' for name, (said, then) in found.items())}; restore its meta/info.json, or "
        "give --fresh to start over (earlier results are kept aside), or another --name"
    )


def _keep_stats(folder: RunFolder, stats: NormStats) -> None:
    """Leave the statistics where runs of other levels find them (`train.stats_from`) from the first step on.

    Raises:
        ValueError: the run began with others.
    """
    before = folder.fact(STATS_FACT, str)
    if folder.config.train.stats_from and before not in (None, stats.digest()):
        raise ValueError(
            f"the run {folder.root.name} began with other normalisation statistics than train.stats_from gives now; restore "
            "what it points to, or give --fresh"
        )
    folder.note(STATS_FACT, stats.digest())
    write_text(folder.path(STATS_NAME), stats.to_json())


def keep(folder: RunFolder, data: Fingerprint) -> None:
    """Bind the run to a data set, unless it is bound already."""
    if began_with(folder) is None:
        folder.note(FACT, data)
