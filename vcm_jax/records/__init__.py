"""Records of extracted clips: their lengths, schema, files, and mixtures of several sources."""
