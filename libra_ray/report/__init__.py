"""Reports, pages, tables and plots of runs, sweeps and studies."""

from libra_ray.extras import needs

needs("jinja2", extra="train")
