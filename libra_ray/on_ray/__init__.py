"""The engine: the only place, beside serve_apps and tune_spaces, that imports Ray."""

from libra_ray.extras import needs
from libra_ray.on_ray.machine import prepare

needs("ray", extra="all")

# Here, because Ray reads them when it is imported, by whichever module below comes first.
prepare()
