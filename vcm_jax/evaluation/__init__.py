"""Scores of generated sounds, from caches of av-benchmark or from the sounds themselves."""
