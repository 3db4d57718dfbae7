"""Best score against the number of trials: the curve and its band by hand and by planted searches, and the figure."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.figure
import matplotlib.text
import numpy as np
import pytest
from test_analysis_load import save_run
from test_analysis_tables import measured
from test_analysis_trials import save_searched

from analysis.figures import paper_figures
from analysis.load import load_runs
from analysis.select import cells
from analysis.trials import searches_of
from analysis.tuning import best_so_far, tuning_curve


def test_the_curve_by_hand() -> None:
    """Ten trials 0.1 to 1.0; the band is sqrt(ln 40 / 20) = 0.4295 of the distribution wide on both sides."""
    curve = tuning_curve([n / 10 for n in range(10, 0, -1)])
    # 0.5, 0.707, 0.794, 0.841, ... of ten trials, rounded up.
    assert curve.median[:4] == [0.5, 0.8, 0.8, 0.9] and curve.median[-1] == 1.0
    # 0.5 - 0.4295 is the first of ten; 0.707 - 0.4295 the third; and so on.
    assert curve.low[:3] == [0.1, 0.3, 0.4]
    # 0.5 + 0.4295 is the tenth; 0.707 + 0.4295 is more than all: nothing bounds it.
    assert curve.high[:2] == [1.0, None] and set(curve.high[1:]) == {None}


def test_trials_without_a_score_are_the_worst() -> None:
    curve = tuning_curve([0.9, None, 0.8, None, 0.7])
    assert curve.median[0] == 0.7 and curve.low[:2] == [None, None]
    assert tuning_curve([None] * 3).median == [None] * 3
    assert best_so_far([None, 0.7, 0.9, 0.8]) == [None, 0.7, 0.9, 0.9]


def test_the_band_holds_everywhere_at_once() -> None:
    """Random searches of ten trials with uniform scores: the true median of the best of n is 0.5^(1/n)."""
    random = np.random.default_rng(0)
    truth = [0.5 ** (1 / n) for n in range(1, 11)]
    covered = []
    for _ in range(400):
        curve = tuning_curve(random.random(10).tolist())
        ends = zip(curve.low, curve.high, truth, strict=True)
        covered.append(all((low or 0) <= value <= (high or math.inf) for low, high, value in ends))
    assert np.mean(covered) >= 0.95
    # A band that were two thirds as wide would not.
    width = math.sqrt(math.log(40) / 20) * 2 / 3
    exceed = np.abs(np.sort(random.random((400, 10))) - np.arange(10) / 10).max(1) > width
    assert exceed.mean() > 0.05


def texts_of(figure: matplotlib.figure.Figure) -> str:
    return " ".join(" ".join(text.get_text().split()) for text in figure.findobj(matplotlib.text.Text))


def test_the_figure_has_the_median_of_a_grid_and_says_what_it_is(tmp_path: Path) -> None:
    scores = [0.5, 0.7, 0.9, 0.8, None]
    for rank in (1, 8):
        for n, score in enumerate(scores):
            status = "diverged" if score is None else "finished"
            metrics = {} if score is None else measured(val_accuracy=score - 0.01 * (rank == 1))
            run = {"rank": rank, "learning_rate": 1e-4 * 2**n, "status": status}
            save_run(tmp_path, f"r{rank}-{n}", metrics=metrics, **run)
    table = cells(load_runs(tmp_path).frame)
    (figure,) = (one for one in paper_figures(table, {}) if one.name == "tuning_curves")
    drawn = figure.draw()
    (axes,) = drawn.axes
    # One line, of the better rank.
    (line,) = axes.lines
    assert [*line.get_ydata()] == [value for value in tuning_curve(scores).median if value is not None]
    low, high = axes.get_ylim()
    assert 0.3 < low < 0.5 and 0.9 < high < 1.0  # the band does not flatten the curve
    text = texts_of(drawn)
    assert "Rates of a grid are not drawn" in text and "simultaneous (DKW)" in text
    few = table[table["learning_rate"] < 1e-3]
    assert "tuning_curves" not in {one.name for one in paper_figures(few, {})}


def test_a_search_is_drawn_in_the_order_of_its_plan_without_a_band(tmp_path: Path) -> None:
    save_searched(tmp_path, values={3e-3: 0.80, 1e-3: 0.75, 9e-3: None, 4e-3: 0.9, 2e-3: 0.85}, chosen=4e-3)
    runs = load_runs(tmp_path, sweep="demo")
    searches = searches_of(runs.launches, runs.trials)
    (figure,) = (one for one in paper_figures(cells(runs.frame), {}, searches=searches) if one.name == "tuning_curves")
    drawn = figure.draw()
    (axes,) = drawn.axes
    (line,) = axes.lines
    assert [*line.get_ydata()] == pytest.approx([0.8, 0.8, 0.8, 0.9, 0.9])
    assert not axes.collections
    assert "steps: best so far" in texts_of(drawn)
