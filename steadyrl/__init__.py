"""What a run needs beside its algorithm: folder, clock, logs, environments, evaluation, checkpoints, acceleration."""
