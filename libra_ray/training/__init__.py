"""The trainer and what it needs of a data set; no engine in it."""

from libra_ray.extras import needs

needs("torch", extra="train")
