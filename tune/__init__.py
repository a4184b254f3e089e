"""Sweeps: Ray Tune schedules training runs over whatever a cluster has."""
