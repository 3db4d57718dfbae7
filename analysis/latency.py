"""`python -m analysis latency rank=r8 target_layers=qv`: the time of a pass, with an adapter merged and unmerged.

The overrides are those of `python -m harness`. What is printed is measured by `harness.forecast`, on drawn weights.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.tables.structure import TextTable
    from harness.forecast.latency import Latency, Timing

MEASURED, CANNOT_SAY = 0, 2

_NOTHING = "\N{EN DASH}"
_PHASES = {
    "forward": "a pass over the batch",
    "prefill": "prefill: a pass over the prompts, up to the logits of their last tokens",
    "decode": "decode: one more token for each text, with a key-value cache",
}
_RECORDED = ("torch", "transformers", "lora-harness")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line may say."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of one run, as for python -m harness")
    parser.add_argument("--config-dir", metavar="DIR", help="own configs, as for python -m harness")
    parser.add_argument(
        "--batches", type=numbers, default=(1, 16), metavar="NUMBERS", help="texts in a batch; default: 1,16"
    )
    parser.add_argument(
        "--lengths",
        type=numbers,
        default=(64, 128),
        metavar="NUMBERS",
        help="tokens of a text, or of the prompt of a language model; default: 64,128",
    )
    parser.add_argument(
        "--rounds", type=int, default=20, metavar="N", help="measurements of each variant; default: %(default)s"
    )
    parser.add_argument(
        "--warm-up", type=int, default=3, metavar="N", help="rounds before them, left out; default: %(default)s"
    )
    parser.add_argument(
        "--new-tokens",
        type=int,
        metavar="N",
        help="that a language model decodes after each prompt; default: 16",
    )
    parser.add_argument(
        "--adapters",
        type=int,
        default=8,
        metavar="N",
        help="different adapters in one batch, as a further variant; 0 for none; default: %(default)s",
    )
    parser.add_argument("--labels", type=int, metavar="N", help="outputs of a task head; default: 2")


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them.

    >>> numbers("1,16")
    (1, 16)
    """
    if re.fullmatch(r"\d+(,\d+)*", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: must be whole numbers with commas between them, as 1,16")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def print_latency(options: argparse.Namespace) -> int:
    """Prints the tables as Markdown and returns the exit code; what is being measured is printed to stderr."""
    # Imported late: the other commands come without waiting for torch.
    from harness.forecast.latency import Passes, measure_latency
    from harness.forecast.request import ForecastError, of_its_task, own_configs, read_config

    try:
        with own_configs(options.config_dir):
            config = read_config(options.overrides)
            passes = Passes(
                batches=options.batches,
                lengths=options.lengths,
                rounds=options.rounds,
                warm_up=options.warm_up,
                new_tokens=of_its_task(config, "--new-tokens", options.new_tokens, Passes.new_tokens, of_language=True),
                num_adapters=options.adapters,
                num_labels=of_its_task(config, "--labels", options.labels, Passes.num_labels, of_language=False),
            )
            found = measure_latency(config, passes, progress=lambda text: print(text, file=sys.stderr, flush=True))
    except ForecastError as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return CANNOT_SAY
    print(as_markdown(found, _asked(options), date=datetime.now(UTC).date().isoformat()), end="")
    return MEASURED


def as_markdown(found: Latency, asked: str, *, date: str) -> str:
    """A table in the form of the paper's Table 1 for each phase, the distributions, and what was measured by what."""
    # Imported late, as what draws figures is: the status of a sweep comes without waiting for it.
    from analysis.tables.writers import note_in_markdown, to_markdown

    parts = [f"# Latency of `{asked}`\n"]
    for phase in dict.fromkeys(one.phase for one in found.timings):
        parts.append(f"{_PHASES[phase]}; median in ms, and against the base\n\n{to_markdown(_by_shape(found, phase))}")
    parts.append(f"all measurements\n\n{to_markdown(_distributions(found))}")
    parts.append("".join(f"- {note_in_markdown(line)}\n" for line in _facts(found, date)))
    return "\n".join(parts)


def _by_shape(found: Latency, phase: str) -> TextTable:
    """A row for each variant, a column for each batch and length."""
    from analysis.tables.structure import TextTable

    timings = [one for one in found.timings if one.phase == phase]
    shapes = list(dict.fromkeys((one.batch, one.length) for one in timings))
    variants = list(dict.fromkeys(one.variant for one in timings))
    cells = {(one.variant, one.batch, one.length): _cell(found, one) for one in timings}
    return TextTable(
        ["variant", *(f"batch {batch}, length {length}" for batch, length in shapes)],
        [[variant, *(cells.get((variant, *shape), _NOTHING) for shape in shapes)] for variant in variants],
        [False, *(True for _ in shapes)],
        num_key_columns=1,
    )


def _cell(found: Latency, timing: Timing) -> str:
    ratio = found.ratio_to_base(timing)
    return _milliseconds(timing.median) + ("" if timing.variant == "base" else f" ({ratio - 1:+.1%})")


def _distributions(found: Latency) -> TextTable:
    from analysis.tables.structure import TextTable

    titles = ["phase", "batch", "length", "variant", "lower quartile (ms)", "median (ms)", "upper quartile (ms)", "n"]
    rows = [
        [
            *(one.phase, str(one.batch), str(one.length), one.variant),
            *map(_milliseconds, one.quartiles),
            str(len(one.seconds)),
            f"{found.ratio_to_base(one):.3f}",
        ]
        for one in found.timings
    ]
    is_number = [False, True, True, False, True, True, True, True, True]
    return TextTable([*titles, "ratio of medians to base"], rows, is_number, num_key_columns=4)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.1 else f"{seconds * 1e3:.1f}"


def _facts(found: Latency, date: str) -> Sequence[str]:
    """What a reader needs to measure the same."""
    facts = found.environment
    commit = f", commit {facts['git_commit'][:12]}" if "git_commit" in facts else ""
    changed = " with changes" if facts.get("git_dirty") else ""
    merging = "" if found.merging_error is None else f", and merging changes them by at most {found.merging_error:.2g}"
    return [
        f"{date}, {_machine(facts)}",
        f"Python {facts['python']}, {_versions(facts)}{commit}{changed}",
        f"{found.dtype}; every weight is drawn, and the adapter changes logits by up to {found.logit_change:.2g}"
        f"{merging}",
        *found.notes,
    ]


def _machine(facts: dict[str, Any]) -> str:
    host = "" if facts["device_type"] == "cpu" else f", CUDA {facts['cuda_version']}" if "cuda_version" in facts else ""
    named = facts.get("device_name", facts["device_type"])
    return f"{named}{host}, {facts['num_cores']} cores, {facts['num_threads']} threads, {facts['platform']}"


def _versions(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {facts['versions'][name]}" for name in _RECORDED if name in facts["versions"])


def _asked(options: argparse.Namespace) -> str:
    return shlex.join(options.overrides)
