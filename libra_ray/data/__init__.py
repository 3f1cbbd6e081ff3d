"""Recorded episodes in, training batches out."""

from libra_ray.extras import needs

needs("pyarrow", extra="policy")
