"""The metrics of serving in Prometheus, through Ray.

Ray exports a metric under its name with the prefix `ray_`, and adds the label `WorkerId`, one per replica.
It sends a histogram's buckets on as if every value lay in the middle of its bucket, so counts and quantiles are right and
`_sum` is approximate; nothing here reads it.
"""

from ray.util.metrics import Counter, Gauge, Histogram

from libra_ray.serving.metrics import Metric


def register(metric: Metric, deployment: str) -> Counter | Gauge | Histogram:
    """Announce the metric in this process; what is recorded carries the deployment's name."""
    labels = ("deployment", metric.label) if metric.label else ("deployment",)
    if metric.kind == "histogram":
        made: Counter | Gauge | Histogram = Histogram(metric.name, metric.description, list(metric.boundaries), labels)
    else:
        made = (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.description, labels)
    made.set_default_tags({"deployment": deployment})
    return made
