"""`python -m harness ...`: Hydra's entry. Composes a config, runs it, and exits with what became of it.

Exit codes: 0 finished; 1 a run failed, diverged or ran out of memory; 2 the config or the data cannot be used; 75
stopped by SIGTERM, with a checkpoint to go on from; 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from harness.config import ConfigError, RunConfig, explain_omegaconf, from_composed, register, run_id
from harness.folder import require_writable
from harness.launches import command_line, record_launch
from harness.results import Status

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"


def main() -> int:
    """Runs what the command line says and returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("harness").setLevel(logging.INFO)
    if not CONF_DIR.is_dir():
        _print_problem(
            ConfigError([f"{CONF_DIR}: no such folder; the command line needs the checkout, not the package."])
        )
        return 2
    register()
    exit_codes: list[int] = []
    started = False

    def job(composed: DictConfig) -> None:
        nonlocal started
        started = True
        try:
            config = from_composed(composed)
        except ConfigError as error:
            _print_problem(error)
            exit_codes.append(2)
            return
        # Imported late: composing, --help and every error in the config come without waiting for torch.
        from harness.claims import RunClaimedError
        from harness.run import USER_ERRORS, PreemptedError, plan, run

        try:
            plan(config)  # a wrong placement is told before anything is downloaded or tokenised
            _record_single_run(config)
            result = run(config)
        except (*USER_ERRORS, RunClaimedError) as error:
            _print_problem(error)
            exit_codes.append(2)
            return
        except PreemptedError as error:
            _print_problem(error)
            exit_codes.append(75)
            return
        exit_codes.append(0 if result.status is Status.FINISHED else 1)

    # Hydra then raises what it would print and exit on: it names a wrong key without saying which keys there are.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(job)()
    except ConfigError as error:  # from the sweeper
        _print_problem(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, the same command does the rest", file=sys.stderr)
        return 130
    except (HydraException, AssertionError, ValueError) as error:
        if not isinstance(error, HydraException) and (started or not _came_from_composing(error)):
            raise
        _print_problem(_explain_composing(error))
        return 2
    return max(exit_codes, default=0)


def _record_single_run(config: RunConfig) -> None:
    """A run that names its sweep belongs to it, as W&B's agents launch them; the sweeper records those of `-m`."""
    is_single = HydraConfig.get().mode is RunMode.RUN
    if config.sweep is not None and is_single and os.environ.get("RANK", "0") == "0":
        require_writable(config.runs_dir)
        record_launch(Path(config.runs_dir), config.sweep, run_ids=[run_id(config)], command=command_line())


def _came_from_composing(error: Exception) -> bool:
    *_, (innermost, _line) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals["__name__"].partition(".")[0] in ("hydra", "omegaconf")


def _explain_composing(error: Exception) -> str:
    """What is wrong with the overrides, and what there is instead; Hydra's own text where nothing is to be added."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        parts = error.missing_cfg_file.split("/")
        group = "/".join(parts[:2] if parts[0] == "hydra" else parts[:1])
        # Hydra lists the folder alone and not what is below it.
        files = (CONF_DIR / group).rglob("*.yaml")
        options = sorted(path.relative_to(CONF_DIR / group).with_suffix("").as_posix() for path in files)
        option = error.missing_cfg_file.removeprefix(f"{group}/")
        return f"{group}={option}: no such option. There are: {', '.join(options or error.options)}."
    if isinstance(error.__cause__, OmegaConfBaseException):
        return explain_omegaconf(error.__cause__)
    if not isinstance(error, HydraException):
        return (
            f"these overrides cannot be applied ({error}). A setting in a group needs the group itself, as in "
            "rank=r8 rank.alpha=32; a group takes the name of an option, not null: leave it out instead."
        )
    lines = [line.strip() for line in str(error).splitlines()]
    return "\n".join(line for line in lines if line and not line.startswith("See https://"))


def _print_problem(problem: Exception | str) -> None:
    for line in str(problem).splitlines():
        print(f"error: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
