"""Imported by the fork server and nobody else: all that a run needs, once, before the first run is forked."""

import contextlib
import gc

import sklearn.metrics
import torch.optim.adamw

import harness.models.saving
import harness.run
import harness.training.packs
import hydra_plugins.lora_harness._worker
from harness.extensions import load_extensions
from harness.measure.environment import loaded_checkout
from harness.methods.registry import find_method_module
from harness.results.methods import METHODS

__all__ = ["harness", "hydra_plugins", "sklearn", "torch"]

load_extensions()
for name in METHODS:
    with contextlib.suppress(ImportError):  # of an extension that lacks a package: a run with it says so
        find_method_module(name)
loaded_checkout()
# A run collects garbage before it measures memory, and would look through everything imported here (0.3 s each time),
# and copy the pages it touches.
gc.collect()
gc.freeze()
