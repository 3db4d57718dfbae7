"""`python -m harness ...`: Hydra's entry. Composes a config, runs it, and exits with what became of it.

Exit codes: 0 finished; 1 a run failed, diverged or ran out of memory; 2 the config or the data cannot be used; 75
stopped by SIGTERM or Ctrl-C, and the same command resumes it; 130 interrupted with nothing to resume, or a sweep.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from harness.commands import Request, carry_out, find_request
from harness.config.composing import compose, from_composed, register
from harness.config.folders import CONF_DIR, OwnFolders, find_own, use_own
from harness.config.overrides import came_from_composing, explain_refusal, literal_texts, require_one_option
from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.content.identity import Identity, identify
from harness.extensions import ExtensionError, load_extensions
from harness.folder import require_writable
from harness.results.launches import command_line, record_launch
from harness.results.schema import Status

logger = logging.getLogger("harness")


def main() -> int:
    """Runs what the command line says and returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    # Before PyTorch is loaded: threads that wait for each other let others compute. Beside a busy neighbour a step then
    # takes two thirds of its time, and on an idle machine one or two hundredths more (LOG.md, "dropout").
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        load_extensions()
        own = find_own(sys.argv[1:])
        request = find_request(sys.argv[1:])
    except (ExtensionError, ConfigError) as error:
        _print_problem(error)
        return 2
    use_own(own)
    for line in own.describe():
        logger.info(line)
    register()
    if request is not None:
        return _carry_out(request)
    # A run hears the signal itself, in every phase; this is for the seconds before it begins.
    heard_before = signal.signal(signal.SIGTERM, _stop_before_a_run)
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
        from harness.plan import plan
        from harness.processes.stopping import PreemptedError
        from harness.results.claims import ClaimLostError, RunClaimedError
        from harness.run import USER_ERRORS, run

        # A run collects garbage before it measures memory, and need not look through all that these imported.
        gc.freeze()
        try:
            plan(config)  # a wrong placement is an error before anything is downloaded or tokenised
            identity = identify(config)
            _record_single_run(config, identity)
            result = run(config, identity)
        except (*USER_ERRORS, RunClaimedError, ClaimLostError) as error:
            _print_problem(error)
            exit_codes.append(2)
            return
        except PreemptedError as error:
            if HydraConfig.get().mode is RunMode.MULTIRUN:  # Hydra's own launcher would begin the next run
                raise KeyboardInterrupt from error
            _print_problem(error)
            exit_codes.append(75)
            return
        exit_codes.append(0 if result.status is Status.FINISHED else 1)

    typed = sys.argv
    is_sweep = not {"-m", "--multirun"}.isdisjoint(typed) or any(word.startswith("sweeps=") for word in typed)
    sys.argv = [typed[0], *literal_texts(typed[1:], multirun=is_sweep)]
    # Hydra then raises what it would print and exit on: it names a wrong key without saying which keys there are.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if not is_sweep:  # of a sweep each run is looked at
            require_one_option(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(job)()
    except ConfigError as error:  # of the line above, or from the sweeper
        _print_problem(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, the same command does the rest", file=sys.stderr)
        return 130
    except BrokenPipeError:  # what reads the output has seen enough, as in `--help | head`
        if started:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        return 1
    except Exception as error:  # Hydra lets whatever an override makes it do come through
        if not isinstance(error, HydraException) and (started or not came_from_composing(error)):
            raise
        overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        _print_problem(explain_refusal(error, overrides, compose=compose))
        return 2
    finally:
        sys.argv = typed
        use_own(OwnFolders())
        signal.signal(signal.SIGTERM, heard_before)
    return max(exit_codes, default=0)


def _carry_out(request: Request) -> int:
    """Does what is asked of runs that have ended, and returns the exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _print_problem(f"{request.command}: runs in one process; start it without accelerate launch or torchrun.")
        return 2
    try:
        carry_out(request)
    except ConfigError as error:
        _print_problem(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from harness.run import USER_ERRORS

        if not isinstance(error, USER_ERRORS):
            raise
        _print_problem(error)
        return 2
    finally:
        use_own(OwnFolders())
    return 0


def _record_single_run(config: RunConfig, identity: Identity) -> None:
    """A run that names its sweep belongs to it, as W&B's agents launch them; the sweeper records those of `-m`."""
    is_single = HydraConfig.get().mode is RunMode.RUN
    if config.sweep is not None and is_single and os.environ.get("RANK", "0") == "0":
        require_writable(config.runs_dir)
        record_launch(Path(config.runs_dir), config.sweep, run_ids=[identity.run_id], command=command_line())


def _stop_before_a_run(number: int, frame: FrameType | None) -> None:
    print("stopped before a run began; the same command starts it", file=sys.stderr)
    sys.exit(75)


def _print_problem(problem: Exception | str) -> None:
    for line in str(problem).splitlines():
        print(f"error: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
