"""The networks: planner, refiner and what joins them. Nothing here knows of data sets, simulators or Ray."""

from libra_ray.extras import needs

needs("torch", extra="policy")
