"""What a training run stands on: device, processes, checkpoints, log, error lines."""
