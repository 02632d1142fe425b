"""Everything that touches PyTorch files; torch itself is imported lazily."""
