"""Records of extracted clips: lengths, schema, reading and mixing."""
