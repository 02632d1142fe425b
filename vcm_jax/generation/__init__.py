"""Sounds from a trained run, for videos, prompts or records."""
