"""What a run keeps on disk: checkpoints, EMA weights and its description."""
