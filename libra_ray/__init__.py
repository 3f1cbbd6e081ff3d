"""Dual-system robot policies on Ray."""
