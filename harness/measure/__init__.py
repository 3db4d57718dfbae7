"""The measuring instruments: memory, clocks, devices, FLOPs, environment."""
