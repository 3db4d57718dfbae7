"""The figures of what was found in weights; what random directions would give is drawn in each."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib.figure
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import MaxNLocator, NullFormatter

from analysis.adapters.findings import Findings
from analysis.adapters.measures import similarity_floor
from analysis.adapters.summaries import over_seeds
from analysis.axes import axes_texts, varied
from analysis.comparisons import Cell
from analysis.figures import Figure
from analysis.figures.multiples import grid_of
from analysis.figures.panels import MIN_SEEDS_OF_INTERVAL, short_name
from analysis.figures.style import (
    DPI,
    INK,
    LINES,
    LOOK_OF_FULL,
    LOOK_WITHOUT_RANK,
    MARKERS,
    PAGE_INCHES,
    RANK_COLOURS,
    SMALL,
    in_turn,
    our_settings,
)
from analysis.methods import is_full

# So many lines can be told apart; of more conditions those of the lowest and highest ranks are drawn.
_MAX_LINES = 12
# Intervals of more points are drawn as a band: bars would run into one another.
_MAX_BARS = 10


def adapter_figures(found: Findings) -> list[Figure]:
    """Every figure that the runs allow, each of one model on one dataset."""
    subjects = list(dict.fromkeys((cell["model"], cell["dataset"]) for cell in _with_rows(found)))
    figures = []
    for number, subject in enumerate(subjects, start=1):
        ending = "" if len(subjects) == 1 else f"_{number}"
        of = [index for index, cell in enumerate(found.cells) if (cell["model"], cell["dataset"]) == subject]
        where = f"{subject[0]} on {subject[1]}"
        for name, title, draw in _kinds(found, of):
            figures.append(Figure(f"{name}{ending}", f"{title}, {where}", partial(draw, found, of, where)))
    return figures


_Draw = Callable[[Findings, Sequence[int], str], matplotlib.figure.Figure]


def _kinds(found: Findings, of: Sequence[int]) -> list[tuple[str, str, _Draw]]:
    kinds: list[tuple[str, str, _Draw]] = [
        ("adapter_spectra", "Singular values of delta weights", _draw_spectra),
        ("adapter_amplification", "Amplification by rank", _draw_amplification),
        ("adapter_intruders", "Intruder dimensions by epsilon", _draw_intruders),
        ("adapter_drift", "Drift by block", _draw_drift),
    ]
    for kind, title in (
        ("ranks", "Subspaces of two ranks"),
        ("seeds", "Subspaces of two seeds"),
        ("full", "Subspaces of an adapter and of full fine-tuning"),
    ):
        if _pairs(found, of, kind):
            kinds.append((f"adapter_similarity_{kind}", title, partial(_draw_grids, kind)))
    own = found.similarity[found.similarity["condition"].isin(of)]
    if (own["kind"] == "blocks").any():
        kinds.append(("adapter_similarity_blocks", "Subspaces of two blocks", _draw_blocks))
    return kinds


def _with_rows(found: Findings) -> list[Cell]:
    return [found.cells[index] for index in dict.fromkeys(found.spectra["condition"])]


# ---------------------------------------------------------------- small multiples by role


def page_of_axes(
    where: str, titles: Sequence[str], footnote: str, *, row_inches: float = 2.0
) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    """A page with axes for each title."""
    num_rows, num_columns = grid_of(len(titles))
    # Lines of the footnote, and of a legend above them, need separate room.
    figure = matplotlib.figure.Figure(figsize=(PAGE_INCHES, 0.9 + row_inches * num_rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for each, title in zip(axes, titles, strict=False):
        each.set_title(title)
    for each in axes[len(titles) :]:
        each.set_visible(False)
    text = textwrap.fill(": ".join(filter(None, [where, footnote])), round(PAGE_INCHES * 19.5))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=SMALL, color=INK)
    return figure, list(axes[: len(titles)])


def laid_out(figure: matplotlib.figure.Figure) -> matplotlib.figure.Figure:
    """The figure with its layout made once, and not again for every format that it is written in."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)
    return figure


def shared_legend(figure: matplotlib.figure.Figure, axes: Sequence[Axes]) -> None:
    """One legend for all axes, each label once, above them."""
    found: dict[str, Any] = {}
    for each in axes:
        handles, labels = each.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=min(5, len(found)), frameon=False)


def plain_ticks(axis: Axis) -> None:
    """Numbers as they are: our settings write no formulas, which logarithmic axes have by themselves."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _roles(found: Findings, frame: pd.DataFrame, of: Sequence[int]) -> list[str]:
    return list(dict.fromkeys(frame[frame["condition"].isin(of)]["role"]))


def _shown(found: Findings, frame: pd.DataFrame, of: Sequence[int]) -> tuple[list[int], str]:
    """The conditions that are drawn, and what the footnote says of the others."""
    there = [index for index in of if index in set(frame["condition"])]
    if len(there) <= _MAX_LINES:
        return there, ""
    ordered = sorted(there, key=lambda index: (found.cells[index]["rank"] or 0, index))
    kept = sorted({*ordered[: _MAX_LINES // 2], *ordered[-(_MAX_LINES // 2) :]})
    return kept, f"; {len(there) - len(kept)} conditions between the lowest and highest ranks are in the table alone"


def condition_label(cell: Cell, others: Sequence[Cell]) -> str:
    """A condition in a legend."""
    rank = [] if cell["rank"] is None else [f"r{cell['rank']:g}"]
    placement = [] if cell["target_layers"] is None else [short_name(cell["target_layers"])]
    own = [short_name(text, 30) for text in axes_texts(cell, varied(others))]
    return " ".join([short_name(cell["method"]), *rank, *placement, *own])


def condition_look(cell: Cell, cells: Sequence[Cell]) -> dict[str, Any]:
    """Colour by rank, marker and line by placement and method."""
    if cell["rank"] is None:
        colour, marker, line = LOOK_OF_FULL if is_full(cell) else LOOK_WITHOUT_RANK
        return {"color": colour, "marker": marker, "linestyle": line}
    ranks = sorted({each["rank"] for each in cells if each["rank"] is not None})
    families = list(dict.fromkeys((each["method"], each["target_layers"]) for each in cells if each["rank"]))
    number = families.index((cell["method"], cell["target_layers"]))
    shade = RANK_COLOURS(0.05 + 0.85 * ranks.index(cell["rank"]) / max(1, len(ranks) - 1))
    return {"color": shade, "marker": in_turn(MARKERS, number), "linestyle": in_turn(LINES, number)}


def _bars(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Half the 95 % interval of each mean; 0 below three seeds, as in other figures."""
    return [row[f"{name}_ci"] if row[f"{name}_n"] >= MIN_SEEDS_OF_INTERVAL else 0.0 for row in rows]


def _draw_lines(
    axes: Axes, rows: Sequence[dict[str, Any]], x: str, name: str, label: str, look: dict[str, Any]
) -> None:
    kept = [row for row in rows if row[name] is not None]
    bars = _bars(kept, name)
    positions, means = np.array([row[x] for row in kept]), np.array([row[name] for row in kept])
    if len(kept) > _MAX_BARS and any(bars):
        axes.fill_between(positions, means - bars, means + bars, color=look["color"], alpha=0.25, linewidth=0)
        bars = []
    axes.errorbar(
        positions,
        means,
        yerr=bars if any(bars) else None,
        elinewidth=0.7,
        capsize=1.5,
        label=label,
        **look,
    )


_MEANS = "means over blocks and seeds, 95 % interval from three seeds on"


def _lines_by_role(
    found: Findings,
    of: Sequence[int],
    where: str,
    frame: pd.DataFrame,
    x: str,
    name: str,
    *,
    random: str | None,
    footnote: str,
    finish: Callable[[Axes, str], None],
    markers: bool = True,
) -> matplotlib.figure.Figure:
    """A pair of axes for each role, and in it a line for each condition; `random` is dashed in its colour."""
    frame = frame[frame["condition"].isin(of) & frame[x].notna()]
    roles = _roles(found, frame, of)
    shown, left_out = _shown(found, frame, of)
    rows = over_seeds(frame, ("condition", "role", x), [name, *([random] if random else [])])
    with our_settings():
        figure, axes = page_of_axes(where, roles, footnote + left_out)
        for each, role in zip(axes, roles, strict=True):
            for index in shown:
                own = [row for row in rows if row["role"] == role and row["condition"] == index]
                if not own:
                    continue
                own.sort(key=lambda row: row[x])
                look = condition_look(found.cells[index], _with_rows(found)) | ({} if markers else {"marker": "none"})
                _draw_lines(each, own, x, name, condition_label(found.cells[index], _with_rows(found)), look)
                if random is not None:
                    each.plot(
                        [row[x] for row in own],
                        [row[random] for row in own],
                        color=look["color"],
                        linestyle=":",
                        linewidth=0.7,
                        alpha=0.8,
                    )
            finish(each, role)
        shared_legend(figure, axes)
        return laid_out(figure)


def _draw_spectra(found: Findings, of: Sequence[int], where: str) -> matplotlib.figure.Figure:
    def finish(axes: Axes, role: str) -> None:
        axes.set_yscale("log")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="singular value", ylabel="size / largest")
        axes.set_ylim(bottom=1e-3)
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis)

    return _lines_by_role(
        found,
        of,
        where,
        found.values,
        "index",
        "value",
        random="value_random",
        footnote=f"{_MEANS}; dotted: random factors of the same rank, for full fine-tuning a random matrix",
        finish=finish,
        markers=False,
    )


def _draw_intruders(found: Findings, of: Sequence[int], where: str) -> matplotlib.figure.Figure:
    frame = found.intruders[found.intruders["k"] == 10]

    def finish(axes: Axes, role: str) -> None:
        axes.set(xlabel="epsilon", ylabel="intruders of 10", ylim=(-0.3, 10.3))

    return _lines_by_role(
        found,
        of,
        where,
        frame,
        "epsilon",
        "count",
        random="count_random",
        footnote=f"{_MEANS}; dotted: the same singular values on random directions",
        finish=finish,
    )


def _draw_drift(found: Findings, of: Sequence[int], where: str) -> matplotlib.figure.Figure:
    def finish(axes: Axes, role: str) -> None:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        axes.set(xlabel="block", ylabel="norm of delta weight / of W")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _lines_by_role(
        found,
        of,
        where,
        found.spectra,
        "block",
        "drift",
        random=None,
        footnote="means over seeds, 95 % interval from three seeds on; a norm has no random floor",
        finish=finish,
    )


def _draw_amplification(found: Findings, of: Sequence[int], where: str) -> matplotlib.figure.Figure:
    """By role the amplification by so many directions, a line for each placement, and what random ones would have."""
    frame = found.amplification[found.amplification["condition"].isin(of)]
    frame = frame.assign(random=frame["factor"] * frame["projected"] / frame["floor"])
    roles = _roles(found, frame, of)
    rows = over_seeds(frame, ("condition", "role", "rank"), ["factor", "random"])
    families: dict[tuple[Any, ...], list[int]] = {}
    for index in dict.fromkeys(frame["condition"]):
        cell = found.cells[index]
        families.setdefault((cell["method"], cell["target_layers"], is_full(cell)), []).append(index)
    footnote = (
        f"{_MEANS}; norm of the delta weight over that of W in its first directions; dotted: over that of W in as many "
        "random ones"
    )
    if any(row["factor"] <= bar for row, bar in zip(rows, _bars(rows, "factor"), strict=True) if bar):
        footnote += "; an interval that reaches zero ends at the lower edge"
    with our_settings():
        figure, axes = page_of_axes(where, roles, footnote)
        for each, role in zip(axes, roles, strict=True):
            for number, ((method, placement, full), members) in enumerate(families.items()):
                own = [row for row in rows if row["role"] == role and row["condition"] in members]
                if not own:
                    continue
                own.sort(key=lambda row: row["rank"])
                label = " ".join(filter(None, [short_name(method), placement and short_name(placement)]))
                look = {"marker": in_turn(MARKERS, number), "linestyle": "-", "color": f"C{number}"}
                if full:
                    look |= {"color": LOOK_OF_FULL[0], "marker": LOOK_OF_FULL[1]}
                _draw_lines(each, own, "rank", "factor", label, look)
                points = [(row["rank"], row["random"]) for row in own if row["random"] is not None]
                if points:
                    each.plot(*zip(*points, strict=True), color=look["color"], linestyle=":", linewidth=0.8)
            each.set_xscale("log", base=2)
            each.set_yscale("log")
            plain_ticks(each.xaxis)
            plain_ticks(each.yaxis)
            each.set(xlabel="directions", ylabel="amplification")
        shared_legend(figure, axes)
        return laid_out(figure)


# ---------------------------------------------------------------- phi


def _pairs(found: Findings, of: Sequence[int], kind: str) -> list[tuple[int, int]]:
    """The pair of conditions that a figure of a kind shows of each placement: those of the highest ranks."""
    keys = [key for key in found.grids if key[0] == kind and key[1] in of]
    best: dict[Any, tuple[tuple[float, float], tuple[int, int]]] = {}
    for _, one, other, _ in keys:
        cells = found.cells[one], found.cells[other]
        ranks = sorted(cell["rank"] or 0 for cell in cells)
        placement = tuple(dict.fromkeys(cell["target_layers"] for cell in cells if cell["target_layers"]))
        size = (float(ranks[-1]), float(ranks[0]))
        if placement not in best or size > best[placement][0]:
            best[placement] = (size, (one, other))
    return [pair for _, pair in best.values()]


def _draw_grids(kind: str, found: Findings, of: Sequence[int], where: str) -> matplotlib.figure.Figure:
    """phi(i, j) as squares, as Figures 3 and 4 of the paper have it, and the floor in the same colours."""
    shown = [
        (pair, role)
        for pair in _pairs(found, of, kind)
        for role in dict.fromkeys(key[3] for key in found.grids if key[:3] == (kind, *pair))
    ]
    titles = []
    for pair, role in shown:
        others = _with_rows(found)
        names = dict.fromkeys(condition_label(found.cells[index], others) for index in pair)
        titles += [f"{role}: {' and '.join(names)}", f"{role}: random"]
    footnote = (
        "phi(i, j): how much of the first j directions (across) lies in the first i (down); mean over blocks and "
        f"{'pairs of seeds' if kind == 'seeds' else 'seeds'}; random: max(i, j) / columns of the matrix"
    )
    with our_settings():
        num_columns = 4
        num_rows = -(-len(titles) // num_columns)
        figure = matplotlib.figure.Figure(figsize=(PAGE_INCHES, 0.7 + 1.75 * num_rows), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        mesh = None
        for number, (pair, role) in enumerate(shown):
            grids = found.grids[kind, *pair, role]
            num_down, num_across = (min(each.shape[place] for each in grids) for place in (0, 1))
            mean = torch.stack([each[:num_down, :num_across] for each in grids]).mean(0).numpy()
            floor = np.array(
                [
                    [similarity_floor(i, j, found.features[role]) for j in range(1, num_across + 1)]
                    for i in range(1, num_down + 1)
                ]
            )
            for each, values, title in zip(
                axes[2 * number :], (mean, floor), titles[2 * number : 2 * number + 2], strict=False
            ):
                mesh = each.imshow(
                    values,
                    cmap="cividis",
                    vmin=0,
                    vmax=1,
                    aspect="auto",
                    interpolation="nearest",
                    extent=(0.5, num_across + 0.5, num_down + 0.5, 0.5),
                )
                each.set_title(textwrap.fill(title, 24), fontsize=SMALL)
                each.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                each.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        for each in axes[len(titles) :]:
            each.set_visible(False)
        if mesh is not None:
            figure.colorbar(mesh, ax=list(axes[: len(titles)]), label="phi", shrink=0.6, aspect=30)
        text = textwrap.fill(f"{where}: {footnote}", round(PAGE_INCHES * 19.5))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=SMALL, color=INK)
        return laid_out(figure)


def _draw_blocks(found: Findings, of: Sequence[int], where: str) -> matplotlib.figure.Figure:
    """phi(k, k) of every two blocks, of the condition with the most roles and then the highest rank."""
    own = found.similarity[(found.similarity["kind"] == "blocks") & found.similarity["condition"].isin(of)]
    index = max(
        dict.fromkeys(own["condition"]),
        key=lambda each: (own[own["condition"] == each]["role"].nunique(), found.cells[each]["rank"] or 0),
    )
    own = own[own["condition"] == index]
    roles = list(dict.fromkeys(own["role"]))
    most = min(8, int(own.groupby(["role", "block", "other_block"])["k"].max().min()))
    k = max(each for each in own["k"].unique() if each <= most)
    rows = over_seeds(own[own["k"] == k], ("role", "block", "other_block"), ["phi", "floor"])
    floors = ", ".join(dict.fromkeys(f"{row['floor']:.3f}" for row in rows))
    label = condition_label(found.cells[index], _with_rows(found))
    footnote = (
        f"{label}: phi({k}, {k}) of the directions of two blocks, mean over seeds; random directions have {floors}"
    )
    with our_settings():
        figure, axes = page_of_axes(where, roles, footnote)
        mesh = None
        # Blocks have little in common: on a scale up to 1 all squares would look alike.
        largest = max(0.1, *(row["phi"] for row in rows))
        blocks = sorted({int(row[name]) for row in rows for name in ("block", "other_block")})
        for each, role in zip(axes, roles, strict=True):
            grid = np.full((len(blocks), len(blocks)), np.nan)
            for row in rows:
                if row["role"] == role:
                    one, other = blocks.index(int(row["block"])), blocks.index(int(row["other_block"]))
                    grid[one, other] = grid[other, one] = row["phi"]
            mesh = each.imshow(
                np.ma.masked_invalid(grid), cmap="cividis", vmin=0, vmax=largest, interpolation="nearest"
            )
            each.set(xlabel="block", ylabel="block")
            each.set_xticks(range(len(blocks)), [str(block) for block in blocks])
            each.set_yticks(range(len(blocks)), [str(block) for block in blocks])
        if mesh is not None:
            figure.colorbar(mesh, ax=axes, label="phi", shrink=0.6)
        return laid_out(figure)
