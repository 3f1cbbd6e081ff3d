"""Serving a fleet of robots: a policy's levels and the gateway as Ray Serve deployments."""
