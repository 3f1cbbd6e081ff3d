"""Closed-loop evaluation, without an engine."""
