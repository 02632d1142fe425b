"""Impacts, the simulated world of the demo: scenes, rendering, the data set, its report."""
