"""The gateway and the replicas' work, without an engine."""

from libra_ray.extras import needs

needs("starlette", extra="serve")
