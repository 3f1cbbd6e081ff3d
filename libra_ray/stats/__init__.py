"""Intervals, bootstrap and the peak over granularity; numpy only."""
