"""The default launcher: one fresh process per run, a queue over devices, nothing computed twice.

Each process is forked from a server that has imported PyTorch and the rest once: it starts in a fraction of a second
and shares nothing with the runs before it, so a run that exhausted its memory cannot spoil the next one's figures. A
run that fails does not stop the others. Runs that another launcher is computing in the same folder are waited for.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from statistics import median
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from harness.config.schema import Device, RunConfig
from harness.config.validation import ConfigError
from harness.content.identity import PlannedRun
from harness.folder import kept_result, result_stamp, run_dir
from harness.methods.packable import why_alone
from harness.processes.cores import asked_threads, available_cores
from harness.results.claims import current_owner
from harness.results.files import LOG_FILE, RESULT_FILE
from harness.results.schema import ResultError, Status, read_result
from hydra_plugins.lora_harness import _worker as worker
from hydra_plugins.lora_harness._composing import compose_run
from hydra_plugins.lora_harness._packs import in_order, pack_key, pack_size
from hydra_plugins.lora_harness._screen import RunningRun, Screen, open_screen
from hydra_plugins.lora_harness._worker import Outcome, outcome_of
from hydra_plugins.lora_harness._workers import AUTO, Tried, check_workers, choose_workers, measure_together

logger = logging.getLogger("harness")

# How long a run may take to write its checkpoint when the sweep is interrupted.
GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.1
_STOPPING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
PRELOADED = "hydra_plugins.lora_harness._preload"
_LOOK_SECONDS = 2.0


@dataclass
class QueueLauncherConf:
    """Settings under `hydra.launcher`."""

    _target_: str = "hydra_plugins.lora_harness.launcher.QueueLauncher"
    runs_per_device: int = 1
    workers: Any = None
    pack: Any = 1


ConfigStore.instance().store(
    group="hydra/launcher", name="lora_harness", node=QueueLauncherConf, provider="lora_harness"
)


@dataclass(frozen=True)
class Slot:
    """A place where one run at a time computes: what its process gets to see, and how many threads it may use.

    On a shared device other runs of this launcher compute beside it.
    """

    name: str
    variables: dict[str, str] = field(default_factory=dict)
    num_threads: int | None = None
    is_shared: bool = False


@dataclass
class Job:
    """Runs that a process is computing and that have no outcome yet.

    `stamps_before`: of their results, by run id. `no_room`: those that found too little memory beside the others.
    """

    runs: dict[str, PlannedRun]
    slot: Slot
    process: Any
    reply: Connection
    started: float
    stamps_before: dict[str, object]
    is_pack: bool = False
    no_room: set[str] = field(default_factory=set)


class QueueLauncher(Launcher):
    """Keeps every slot busy until all runs have ended.

    Args:
        runs_per_device: runs at a time on one GPU.
        workers: runs at a time where there is no GPU; each gets an equal share of the cores. Null: one; "auto" for as
            many as make it faster.
        pack: runs that are trained together wherever one runs at a time, if they can be; "auto" for as many as make it
            faster.
    """

    def __init__(self, runs_per_device: int, workers: int | str | None, pack: int | str) -> None:
        self._runs_per_device = runs_per_device
        self._workers = workers
        self._pack = pack
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra once. The fork server starts here, so that it loads while configs are composed."""
        self.hydra_context = hydra_context
        self.config = config
        # Asks the driver library for the number of GPUs: asking CUDA itself would make every fork unusable.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([PRELOADED])
        if not OmegaConf.select(config, "hydra.sweeper.dry_run"):  # which starts no run
            multiprocessing.forkserver.ensure_running()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs every config; returns one JobReturn each, whose value is the status or why there is none."""
        assert self.config is not None and self.hydra_context is not None
        size, num_workers = pack_size(self._pack), check_workers(self._workers)
        runs = [compose_run(self.hydra_context, self.config, overrides) for overrides in job_overrides]
        configs = [run.config for run in runs]
        gpus = find_gpus(configs)
        if num_workers is None and not gpus:
            num_workers = self._choose_workers(runs)
        slots = find_slots(configs, gpus, runs_per_device=self._runs_per_device, num_workers=num_workers or 1)
        if size != 1:
            reasons = Counter(why_alone(config) for config in configs)
            for reason, count in reasons.items():
                if reason is not None:
                    logger.info("pack=%s: %d of %d runs are trained alone: %s", self._pack, count, len(runs), reason)
        queue = Queue(runs, slots, self._processes, pack=size)
        with open_screen(len(runs)) as screen:
            outcomes = queue.run(screen)
        return [job_return(overrides, outcomes[run.run_id]) for overrides, run in zip(job_overrides, runs, strict=True)]

    def _choose_workers(self, runs: Sequence[PlannedRun]) -> int | None:
        """As many workers as make the runs faster, which the next rounds of a search keep; None where that is open."""
        # Imported late: a sweep whose configs are wrong says so without waiting for torch.
        import torch

        from harness.measure.device import free_bytes

        if self._pack != 1:
            logger.info("workers=%s: 1, because runs that train together (pack=%s) share the cores", AUTO, self._pack)
            self._workers = 1
            return 1

        def measure(config: RunConfig, num_workers: int) -> Tried:
            num_threads = config.num_threads or _threads_of(num_workers)
            return measure_together(self._processes, config, num_workers, num_threads=num_threads)

        available = free_bytes(torch.device("cpu"))
        chosen = choose_workers(runs, num_cores=available_cores(), measure=measure, available=available)
        self._workers = AUTO if chosen is None else chosen
        return chosen


def find_gpus(configs: Sequence[RunConfig]) -> list[str]:
    """The GPUs that are here, by the name that makes one visible to a process; none where the runs do not want them."""
    import torch

    wants_gpu = {config.device for config in configs} <= {Device.auto, Device.cuda}
    num_gpus = torch.cuda.device_count() if wants_gpu else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible and num_gpus else [str(index) for index in range(num_gpus)]


def find_slots(
    configs: Sequence[RunConfig], gpus: Sequence[str], *, runs_per_device: int, num_workers: int
) -> list[Slot]:
    """One slot per run at a time: GPUs times `runs_per_device`, or `num_workers` shares of the cores.

    Raises `ConfigError` when the runs want more threads than there are cores, or no place on a GPU.
    """
    if gpus:
        if runs_per_device < 1:
            raise ConfigError([f"hydra.launcher.runs_per_device={runs_per_device}: a GPU computes one run at least."])
        is_shared = runs_per_device > 1
        slots = [Slot(f"gpu {name}", {"CUDA_VISIBLE_DEVICES": name}, is_shared=is_shared) for name in gpus]
        return slots * runs_per_device
    num_cores = available_cores()
    asked = max((config.num_threads or 1 for config in configs), default=1)
    if not 1 <= num_workers * asked <= max(num_cores, asked):
        raise ConfigError(
            [
                f"hydra.launcher.workers={num_workers}: with num_threads={asked} that is {num_workers * asked} threads "
                f"on {num_cores} cores; allowed is at most {max(1, num_cores // asked)}."
            ]
        )
    return [Slot(f"cpu {index}", num_threads=_threads_of(num_workers)) for index in range(num_workers)]


def _threads_of(num_workers: int) -> int:
    """The threads of each of so many processes."""
    num_cores = available_cores()
    return max(1, min(num_cores // num_workers, asked_threads() or num_cores))


class Queue:
    """The runs of one sweep on their way through the slots."""

    def __init__(
        self, runs: Sequence[PlannedRun], slots: Sequence[Slot], processes: Any, *, pack: int | None = 1
    ) -> None:
        self._todo = deque(runs)
        self._pack = pack  # None: as many as make it faster
        self._num_slots = len(slots)
        # Runs that are computed in no pack, because they cannot be or because they did not end in one.
        self._alone = {run.run_id for run in runs if pack == 1 or why_alone(run.config) is not None}
        self._after_packs: list[PlannedRun] = []
        self._elsewhere: list[PlannedRun] = []
        self._free = list(slots)
        self._jobs: list[Job] = []
        self._processes = processes
        self._outcomes: dict[str, Outcome] = {}
        self._looked = 0.0
        self._last_end: float | None = None
        self._gaps: list[float] = []

    def run(self, screen: Screen) -> dict[str, Outcome]:
        """Runs everything. Ctrl-C or SIGTERM ends what is running, keeps what is finished: raises KeyboardInterrupt."""
        # SIGTERM, from a cluster or from `kill`, ends a sweep like Ctrl-C does.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while self._todo or self._jobs or self._elsewhere or self._after_packs:
                if not self._todo and not any(job.is_pack for job in self._jobs):
                    self._todo.extend(self._after_packs)
                    self._after_packs.clear()
                self._start(screen)
                self._reap(screen)
                self._look_elsewhere(screen)
                screen.show(
                    [one for job in self._jobs for one in _running(job)],
                    len(self._todo) + len(self._elsewhere) + len(self._after_packs),
                )
                self._wait()
        except KeyboardInterrupt:
            self._interrupt(screen)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
            for job in self._jobs:
                job.process.kill()
        if self._gaps:
            logger.info("from one run's end to the next one's first step: median %.2f s", median(self._gaps))
        screen.summarise(self._outcomes)
        return self._outcomes

    def _start(self, screen: Screen) -> None:
        while self._free and self._todo:
            run = self._todo.popleft()
            if not self._is_to_run(run, screen):
                continue
            slot = self._free.pop(0)
            if slot.is_shared:
                # A run cannot tell a neighbour from a stranger: the device is checked before the first of them.
                busy = "" if self._is_used(slot) or run.config.allow_busy_device else self._find_busy(slot)
                if busy:
                    self._free.append(slot)
                    self._end(run, worker.write_failure(run, busy), screen)
                    continue
            runs = in_order([run, *self._take_companions(run, screen)])
            if slot.is_shared:
                runs = [replace(one, config=replace(one.config, allow_busy_device=True)) for one in runs]
            self._jobs.append(self._spawn(runs, slot))
            for one in runs:
                screen.started(one.run_id, slot.name)

    def _is_to_run(self, run: PlannedRun, screen: Screen) -> bool:
        """Whether a run has neither a result that stands nor another owner; what it has is noted."""
        kept = kept_result(run)
        if kept is not None:
            self._outcomes[run.run_id] = outcome_of(kept, was_kept=True)
            screen.ended(run.run_id, self._outcomes[run.run_id])
        elif current_owner(run_dir(run)) is not None:
            self._elsewhere.append(run)
        else:
            return True
        return False

    def _take_companions(self, run: PlannedRun, screen: Screen) -> list[PlannedRun]:
        """The waiting runs that one process computes together with `run`: its share of all that can be with it."""
        if run.run_id in self._alone:
            return []
        key = pack_key(run.config)
        others = [one for one in self._todo if one.run_id not in self._alone and pack_key(one.config) == key]
        # More than are trained at once enter as others leave, but no slot takes what another one could begin.
        share = max(self._pack or 1, math.ceil((len(others) + 1) / self._num_slots)) - 1
        taken = []
        for one in others[:share]:
            self._todo.remove(one)
            if self._is_to_run(one, screen):
                taken.append(one)
        return taken

    def _is_used(self, slot: Slot) -> bool:
        return any(job.slot.name == slot.name for job in self._jobs)

    def _find_busy(self, slot: Slot) -> str:
        """Why the device of a slot cannot be used; empty when it can."""
        receiver, sender = self._processes.Pipe(duplex=False)
        process = self._processes.Process(target=worker.find_busy, args=(slot.variables, sender), daemon=True)
        process.start()
        sender.close()
        try:
            return str(receiver.recv())
        except EOFError:
            return f"{slot.name}: the process that was to look at the device ended without a word"
        finally:
            process.join()

    def _wait(self) -> None:
        """Until a run ends, or it is time to look at the screen and at the other launchers again."""
        if self._jobs:
            wait([waited for job in self._jobs for waited in (job.process.sentinel, job.reply)], timeout=_POLL_SECONDS)
        else:
            time.sleep(_POLL_SECONDS)

    def _spawn(self, runs: Sequence[PlannedRun], slot: Slot) -> Job:
        stamps_before: dict[str, object] = {run.run_id: result_stamp(run) for run in runs}
        receiver, sender = self._processes.Pipe(duplex=False)
        process = self._processes.Process(
            target=worker.run_in_process,
            kwargs={
                "runs": [replace(run, config=_with_threads(run.config, slot)) for run in runs],
                "pack": self._pack,
                "log_path": str(run_dir(runs[0]) / LOG_FILE),
                "variables": slot.variables,
                "launcher_pid": os.getpid(),
                "reply": sender,
            },
            daemon=True,
        )
        process.start()
        sender.close()
        by_id = {run.run_id: run for run in runs}
        return Job(by_id, slot, process, receiver, time.time(), stamps_before, is_pack=len(runs) > 1)

    def _reap(self, screen: Screen) -> None:
        for job in list(self._jobs):
            is_alive = job.process.is_alive()  # asked first: what it sent before it ended is read below
            for run_id, outcome in _replies(job):
                if outcome.status == worker.NO_ROOM:
                    job.no_room.add(run_id)
                    continue
                run = job.runs.pop(run_id)
                if self._end(run, outcome, screen):
                    self._note_gap(run, job)
            if is_alive:
                continue
            job.process.join()
            self._jobs.remove(job)
            self._free.append(job.slot)
            for run in job.runs.values():
                is_over = result_stamp(run) not in (None, job.stamps_before[run.run_id])
                if not is_over and run.run_id in job.no_room:
                    self._compute_alone(run, "there was not enough memory in its pack", screen)
                elif not is_over and job.is_pack and _may_be_a_neighbours_fault(job):
                    self._compute_alone(run, f"the process of its pack {_how_it_ended(job)}", screen)
                elif self._end(run, _outcome_of_dead(job, run), screen):
                    self._note_gap(run, job)

    def _compute_alone(self, run: PlannedRun, reason: str, screen: Screen) -> None:
        """Puts back a run that others of its pack have kept from its end, until no pack takes memory any more."""
        screen.say(f"{run.run_id}: {reason}; it is computed alone")
        self._alone.add(run.run_id)
        self._after_packs.append(run)

    def _end(self, run: PlannedRun, outcome: Outcome, screen: Screen) -> bool:
        """Keeps what became of a run, unless that is for another launcher to say."""
        if outcome.status == worker.CLAIMED:
            self._elsewhere.append(run)
            return False
        self._outcomes[run.run_id] = outcome
        screen.ended(run.run_id, outcome)
        return True

    def _look_elsewhere(self, screen: Screen) -> None:
        """Takes back runs that another launcher had when it has ended them or let go."""
        if not self._elsewhere or time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        waiting, self._elsewhere = self._elsewhere, []
        for run in waiting:
            if current_owner(run_dir(run)) is not None:
                self._elsewhere.append(run)
            else:
                self._todo.append(run)

    def _note_gap(self, run: PlannedRun, job: Job) -> None:
        """Measures from the end of the previous run to the first step of this one; meaningful with one slot."""
        try:
            times = read_result(run_dir(run) / RESULT_FILE).environment
        except ResultError:
            return
        first_step = times.get("first_step_at")
        if self._last_end is not None and first_step is not None and job.started >= self._last_end:
            self._gaps.append(first_step - self._last_end)
        self._last_end = times.get("ended_at")

    def _interrupt(self, screen: Screen) -> None:
        screen.say("interrupted: the running runs write a checkpoint and end (once more: at once)")
        for job in self._jobs:
            job.process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for job in self._jobs:
            job.process.join(max(0.0, deadline - time.monotonic()))


def _with_threads(config: RunConfig, slot: Slot) -> RunConfig:
    if config.num_threads is None and slot.num_threads is not None:
        return replace(config, num_threads=slot.num_threads)
    return config


def _running(job: Job) -> list[RunningRun]:
    """The runs that a process is computing: of a pack, those that have entered it."""
    owners = {run_id: current_owner(run_dir(run)) for run_id, run in job.runs.items()}
    seconds = time.time() - job.started
    return [
        RunningRun(run_id, job.slot.name, seconds, owner.progress if owner else {})
        for run_id, owner in owners.items()
        if owner is not None or not job.is_pack
    ]


def _replies(job: Job) -> Iterator[tuple[str, Outcome]]:
    """What a process has sent: a run that has an outcome has nothing more to say, however its process ended."""
    while job.reply.poll():
        try:
            yield job.reply.recv()
        except EOFError:
            return


def _may_be_a_neighbours_fault(job: Job) -> bool:
    """Whether a process that has ended was not asked to."""
    code = job.process.exitcode
    return code is None or -code not in _STOPPING


def _how_it_ended(job: Job) -> str:
    code = job.process.exitcode
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    memory = " (Linux does that when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{memory}"


def _outcome_of_dead(job: Job, run: PlannedRun) -> Outcome:
    """What became of a run whose process has ended without a word of it; without a result it gets one that says so."""
    error: str | None = None  # before the run could hear it, or after its end
    if _may_be_a_neighbours_fault(job):
        exited = job.process.exitcode is None or job.process.exitcode >= 0
        error = f"the process {_how_it_ended(job)}" + ("; see log.txt" if exited else "")
    return worker.outcome_of_dead(run, error, stamp_before=job.stamps_before[run.run_id])


def job_return(overrides: Sequence[str], outcome: Outcome) -> JobReturn:
    """The outcome in Hydra's terms."""
    fine = outcome.status == Status.FINISHED
    value = outcome.status if fine else RuntimeError(f"{outcome.status}: {outcome.error}")
    return JobReturn(
        overrides=list(overrides),
        status=JobStatus.COMPLETED if fine else JobStatus.FAILED,
        _return_value=value,
    )
