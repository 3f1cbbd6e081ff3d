"""What training workers run where they shall fail; goes to them by value."""

from pathlib import Path
from unittest.mock import patch

import ray.train
import torch

from libra_ray.on_ray import faults
from libra_ray.on_ray import train as training


def failing_at_the_first_validation(settings):
    """The real loop, with a held-out measure that cannot be taken."""

    def validate(model):
        raise TypeError("no such measure")

    with patch("libra_ray.training.data.TrainingData.validator", lambda data, device: validate):
        training.train_loop(settings)


def failing_on_the_second_rank(settings):
    """The others wait for it in an exchange."""
    rank = ray.train.get_context().get_world_rank()
    with faults.lasting_errors_logged(Path(settings["folder"]) / training.ERRORS_NAME, rank):
        if rank == 1:
            raise ValueError("rank 1 cannot")
        torch.distributed.all_reduce(torch.zeros(1))
