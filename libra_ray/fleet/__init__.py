"""Robots that drive a server in real time."""

from libra_ray.extras import needs

needs("rich", extra="sim")
