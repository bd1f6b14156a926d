"""Token selection: policies, exact and predicted thresholds, and the strategies of a training step."""
