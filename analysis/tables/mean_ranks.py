"""The table of mean ranks over five datasets or more, with the tests behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import pandas as pd

from analysis.interquartile import NUM_RESAMPLES, InterquartileMean
from analysis.mean_ranks import MeanRanks, mean_ranks
from analysis.metrics import format_spread, metric
from analysis.select import records, score
from analysis.tables.cells import MISSING, recipe_mark
from analysis.tables.columns import axis_columns, cell_names, methods_of, rank_values
from analysis.tables.notes import recipe_notes
from analysis.tables.structure import Column, PaperTable, text_table


def mean_ranks_table(best: pd.DataFrame) -> PaperTable | None:
    """A row for each method with scores on every dataset: mean rank, difference from the best, interquartile mean."""
    found = mean_ranks(records(best))
    if not found:
        return None
    rows = [next(iter(line.values())) for one in found for line in one.lines]
    against = [_against_best(one, place) for one in found for place in range(len(one.lines))]
    ranks = [rank for one in found for rank in one.ranks]
    means = [mean for one in found for mean in one.interquartile]
    columns = [
        Column("model", [row["model"] for row in rows]),
        Column("method", [row["method"] + recipe_mark(row) for row in rows]),
        Column("rank", [MISSING if row["rank"] is None else str(row["rank"]) for row in rows], rank_values(rows)),
        Column("target layers", [row["target_layers"] or MISSING for row in rows]),
        *axis_columns(rows),
    ]
    num_keys = len(columns)
    columns += [
        Column("mean rank over datasets ↓", [f"{rank:.2f}" for rank in ranks], [*ranks]),
        Column("p against the best", [MISSING if p is None else f"{p:.3f}" for p in against], against),
        *_interquartile_columns(means),
    ]
    cells = [list(line.values()) for one in found for line in one.lines]
    return PaperTable(
        name="mean_ranks",
        caption="Mean ranks over datasets, by the score on test by which each is judged; 1 is the best.",
        text=text_table(columns, num_key_columns=num_keys),
        numbers=pd.DataFrame(list(chain.from_iterable(map(_numbers, found))), dtype=object),
        notes=[
            *chain.from_iterable(map(_notes, found)),
            *_interquartile_notes(means),
            *recipe_notes(list(chain.from_iterable(cells))),
        ],
        run_ids=[tuple(run_id for row in line for run_id in row["run_ids"]) for line in cells],
        methods=methods_of(rows),
    )


def _interquartile_columns(means: Sequence[InterquartileMean | None]) -> list[Column]:
    if not any(means):
        return []
    texts = []
    for one in means:
        text = MISSING if one is None else _share(one.mean)
        if one is not None and one.interval is not None:
            text += f" ({_share(one.interval[0])} to {_share(one.interval[1])})"
        texts.append(text)
    unit = metric(_AS_SHARE).display_unit
    heading = f"interquartile mean{f' ({unit})' if unit else ''} ↑"
    return [Column(heading, texts, [None if one is None else one.mean for one in means])]


# Shown as accuracy is, in the style of the table.
_AS_SHARE = "test_accuracy"


def _share(value: float) -> str:
    return format_spread(_AS_SHARE, value)


def _interquartile_notes(means: Sequence[InterquartileMean | None]) -> Iterator[str]:
    if any(means):
        yield (
            "Interquartile mean: of the middle half of the scores of all runs on all datasets, each a part of its "
            "scale (accuracy of 1, BLEU of 100) and not normalised further, so that very easy and very hard datasets "
            f"are what it leaves out. In brackets its 95 % interval by {NUM_RESAMPLES:,} bootstrap resamples of the "
            "runs within each dataset: other seeds, the same datasets; none with one run on each."
        )
    if not all(means):
        yield (
            "No interquartile mean of a row whose datasets have different numbers of runs, or are judged by a score "
            "without a scale, as nll."
        )


def _against_best(ranks: MeanRanks, place: int) -> float | None:
    return None if place == 0 else ranks.pairs[0, place]


def _notes(ranks: MeanRanks) -> Iterator[str]:
    num_datasets, num_lines = len(ranks.datasets), len(ranks.lines)
    tested = f"{ranks.model}, {num_datasets} datasets ({', '.join(ranks.datasets)}): "
    if ranks.friedman is not None:
        tested += f"Friedman's test that all {num_lines} are alike: p = {ranks.friedman:.3g}. "
    yield (
        f"{tested}Pairs: Wilcoxon's signed-rank test over the datasets, with Holm's correction for {len(ranks.pairs)} "
        f"pairs; below 0.05 they differ."
    )
    smallest = 2.0 ** (1 - num_datasets)  # of the exact test: all differences of one sign
    if smallest * len(ranks.pairs) >= 0.05:
        yield (
            f"With {num_datasets} datasets and {len(ranks.pairs)} pairs no corrected p can be below "
            f"{min(1.0, smallest * len(ranks.pairs)):.2g}: that no pair differs shows nothing here."
        )


def _numbers(ranks: MeanRanks) -> Iterator[dict[str, object]]:
    """A line for each pair, the best first, and the ranks of both."""
    firsts = [next(iter(line.values())) for line in ranks.lines]
    means = ranks.interquartile
    for (one, other), p in ranks.pairs.items():
        names = [name for name in cell_names(firsts[one]) if name not in ("dataset", "learning_rate")]
        yield {
            **{name: firsts[one][name] for name in names},
            **{f"other_{name}": firsts[other][name] for name in names if name != "model"},
            "mean_rank": ranks.ranks[one],
            "other_mean_rank": ranks.ranks[other],
            "interquartile_mean": None if (mean := means[one]) is None else mean.mean,
            "other_interquartile_mean": None if (mean := means[other]) is None else mean.mean,
            "p_holm": p,
            "friedman_p": ranks.friedman,
            "num_datasets": len(ranks.datasets),
            "metrics": tuple(score(row, "test") for row in ranks.lines[one].values()),
        }
