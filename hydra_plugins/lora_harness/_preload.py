"""Imported by the fork server and nobody else: all that a run needs, once, before the first run is forked."""

import gc

import sklearn.metrics
import torch.optim.adamw

import harness.run
import hydra_plugins.lora_harness._worker
from harness.extensions import load_extensions

__all__ = ["harness", "hydra_plugins", "sklearn", "torch"]

load_extensions()
# A run collects garbage before it measures memory, and would look through everything imported here (0.3 s each time),
# and copy the pages it touches.
gc.collect()
gc.freeze()
