"""Files that are whole or not there: checkpoints, metrics, the heartbeat. Knows no model."""
