"""What a run will cost, before it starts and without a weight: parameters, bytes, operations.

`request` reads the run as it would be typed, `parameters` counts and solves ranks, `memory` runs the training step on
tensors without data, `fitting` asks what fits into a GPU. `latency` alone computes: it times passes, of drawn weights.
"""
