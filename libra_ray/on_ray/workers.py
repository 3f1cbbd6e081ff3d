"""Training workers: what each of them reserves, and what they could not do."""

from ray.train import ScalingConfig

from libra_ray.config import Config
from libra_ray.on_ray.session import available_cpus, available_gpus, is_private
from libra_ray.training.data import check_shares
from libra_ray.training.graph import check_graph


def scaling(config: Config) -> ScalingConfig:
    """Workers and what each reserves; without a given number, the workers share all CPUs of the cluster.

    Raises:
        ValueError: this machine's own cluster has fewer CPUs or GPUs than that: the workers would never start.
    """
    check_resources(config)
    return ScalingConfig(
        num_workers=config.ray.train_workers, use_gpu=config.ray.use_gpu, resources_per_worker=_of_each_worker(config)
    )


def check_resources(config: Config) -> None:
    """Refuse workers that a cluster of this machine's own would not have the CPUs or GPUs for.

    Raises:
        ValueError: says what there is.
    """
    if is_private():
        workers, each = config.ray.train_workers, _of_each_worker(config)
        _check_enough("CPU", workers * each["CPU"], available_cpus(), "ray.train_workers, ray.train_cpus_per_worker")
        _check_enough("GPU", workers * each.get("GPU", 0), available_gpus(), "ray.train_workers, ray.use_gpu")


def check_workers(config: Config) -> None:
    """Refuse what the workers would refuse once they run, whatever they train.

    Raises:
        ValueError: a setting that so many workers, on such devices, cannot follow.
    """
    check_shares(config.train, config.ray.train_workers)
    check_resources(config)
    ray = config.ray
    check_graph(config.train.graph, gpu=ray.use_gpu, world=ray.train_workers, sharded=ray.parallel == "fsdp")


def _of_each_worker(config: Config) -> dict[str, float]:
    cpus = config.ray.train_cpus_per_worker or max(1, available_cpus() // config.ray.train_workers)
    return {"CPU": cpus} | ({"GPU": 1} if config.ray.use_gpu else {})


def _check_enough(kind: str, wanted: float, present: float, names: str) -> None:
    if wanted > present:
        raise ValueError(f"training wants {wanted:g} {kind}s, this machine gives Ray {present:g}; lower {names}")
