"""What a run needs apart from its algorithm: folder, clock, logs, environments, evaluation, checkpoints, acceleration."""
