"""Robots that drive a server in real time."""
