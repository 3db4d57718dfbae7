"""`python -m harness ...`: Hydra's entry. Composes a config, runs it, and exits with what became of it.

Exit codes: 0 finished; 1 a run failed, diverged or ran out of memory; 2 the config or the data cannot be used.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from harness.config import from_composed, register
from harness.results import Status

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"


def main() -> int:
    """Runs what the command line says and returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("harness").setLevel(logging.INFO)
    register()
    exit_codes = [0]

    def job(composed: DictConfig) -> None:
        # Imported late: composing, --help and every error in the config come without waiting for torch.
        from harness.config import ConfigError

        try:
            config = from_composed(composed)
        except ConfigError as error:
            _print_problem(error)
            exit_codes.append(2)
            return
        from harness.run import USER_ERRORS, run

        try:
            result = run(config)
        except USER_ERRORS as error:
            _print_problem(error)
            exit_codes.append(2)
            return
        exit_codes.append(0 if result.status is Status.FINISHED else 1)

    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(job)()
    return max(exit_codes)


def _print_problem(error: Exception) -> None:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
