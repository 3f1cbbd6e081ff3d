"""The engine: the only place, beside serve_apps and tune_spaces, that imports Ray."""

import os

# Here, because Ray reads them when it is imported, by whichever module below comes first.
if "RAY_ADDRESS" not in os.environ:
    # On one machine every worker is a child of this very environment; starting each through `uv run` again costs seconds
    # apiece. On a cluster (RAY_ADDRESS) Ray's own default stays, which brings the environment to the nodes.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # Ray's workers are nice to whatever else runs; here the run is what the machine is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A machine of one's own is not preempted; the watcher would cost every training run seconds of imports.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # How soon a worker's reports, and its end, are noticed. Asking one machine often costs nothing.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
