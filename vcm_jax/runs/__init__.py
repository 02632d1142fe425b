"""What a run leaves on disk: checkpoints, averaged weights, its description."""
