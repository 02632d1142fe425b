"""Corpora: reading their lists, building records from them, and validating records."""
