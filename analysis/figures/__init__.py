"""Figures for the paper: each drawn from cells and curves, as PDF and PNG.

A panel shows one model on one dataset, at one value of each own axis that methods share (`analysis.axes`); a figure for
each own axis shows the scores along it.

    cells, curves --paper_figures--> list of Figure --write_figures--> <name>.pdf and <name>.png

Every figure but `learning_rates` and `lowest_curves` shows a condition at the learning rate that was best on val. Only
finished runs give numbers; what has none is named under the figure. Colour never stands alone: markers, line styles,
hatches and labels say the same. Names from configs are printed as they are and never read as formulas.

A new kind of figure is a `FigureKind` in the file of its family, and its place in `KINDS`.
"""

from __future__ import annotations

import pandas as pd

from analysis.curves import Curves
from analysis.figures.curves import LOWEST_CURVES, TRAINING_CURVES
from analysis.figures.engine import Figure, figures_of, write_figures
from analysis.figures.forgetting import FORGETTING_BY_LEARNING
from analysis.figures.mean_ranks import mean_rank_figures
from analysis.figures.memory import MEMORY
from analysis.figures.own_axes import own_axis_figures
from analysis.figures.panels import panels_of
from analysis.figures.ranks import RANK_BY_PLACEMENT, RANK_CURVES
from analysis.figures.rates import BEST_RATES, LEARNING_RATES
from analysis.figures.search import SEARCHED_VALUES
from analysis.figures.tradeoffs import SCORE_BY_COMPUTE, SCORE_BY_MEMORY, SCORE_BY_PARAMS, SCORE_BY_STEP_TIME
from analysis.figures.tuning import TUNING_CURVES
from analysis.trials import Searches

__all__ = ["KINDS", "Figure", "paper_figures", "write_figures"]

# In the order in which they appear in a report.
KINDS = (
    SCORE_BY_MEMORY,
    SCORE_BY_PARAMS,
    SCORE_BY_COMPUTE,
    FORGETTING_BY_LEARNING,
    RANK_CURVES,
    RANK_BY_PLACEMENT,
    LEARNING_RATES,
    SEARCHED_VALUES,
    TUNING_CURVES,
    BEST_RATES,
    LOWEST_CURVES,
    TRAINING_CURVES,
    MEMORY,
    SCORE_BY_STEP_TIME,
)


def paper_figures(cells: pd.DataFrame, curves: Curves, *, searches: Searches | None = None) -> list[Figure]:
    """The figures that the data allow, always in the same order.

    Args:
        cells: as `select.cells` makes them, at all learning rates.
        curves: by run id, the rows of its `metrics.jsonl`; may be empty.
        searches: what was tried before the runs were reported.
    """
    panels = panels_of(cells, curves, searches=searches)
    return [*figures_of(KINDS, panels), *own_axis_figures(cells, curves), *mean_rank_figures(cells)]
