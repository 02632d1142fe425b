"""Corpora: their lists, building records from them, validating records."""
