"""Names in a training log. Standard library only: who reads a log needs no torch."""

SPEED = (
    "samples_per_s",
    "data_wait_share",
    "forward_share",
    "backward_share",
    "optimiser_share",
    "tflops",
    "mfu",
    "peak_tflops",
    "memory_gib",
)
"""What a training log says of speed and memory; the rest is what was learned."""
