"""Recorded episodes in, training batches out."""
