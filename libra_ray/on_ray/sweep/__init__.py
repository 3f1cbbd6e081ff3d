"""Sweeps on Ray Tune: a trial trains and is evaluated in closed loop, by the code that the main job uses."""
