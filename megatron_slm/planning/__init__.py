"""Plan runs without torch: memory, time, communication and layout, computed from the configuration."""
