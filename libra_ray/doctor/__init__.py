"""What a machine needs for the jobs, one check a function; `jobs/doctor.py` prints what they find."""

from libra_ray.extras import needs

needs("psutil", extra="train")
