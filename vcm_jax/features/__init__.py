"""Media files, encoders, and the extraction command."""
