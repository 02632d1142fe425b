"""From a trained run and a request (or records) to sounds."""
