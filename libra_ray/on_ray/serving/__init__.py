"""Serving a fleet of robots: planner, refiner and gateway as Ray Serve deployments."""
