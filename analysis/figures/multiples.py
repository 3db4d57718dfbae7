"""Small multiples: where a panel would be crowded, axes for each family of conditions, on the same scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from analysis.comparisons import ranked_by
from analysis.figures.panels import Panel, PlottedCell

# So many conditions are told apart in one pair of axes, and so many families joined by lines.
MAX_IN_ONE = 13
MAX_FAMILIES_IN_ONE = 4
# Conditions without a rank, or of families with one rank, share axes.
_MAX_OTHERS = 6
_ROW_INCHES = 2.0
# So many fill a page; of more groups those whose best condition is best on val.
MAX_GROUPS = 18
# So many lines with names are read in the axes of a group; of more ranks some, the lowest and the highest among them.
MAX_LINES = 8

# Draws conditions into axes, each named by the last argument.
DrawOne = Callable[[Axes, Sequence[PlottedCell], Callable[[PlottedCell], str]], None]


def grid_of(number: int) -> tuple[int, int]:
    """Rows and columns for so many axes, at most three side by side."""
    columns = 2 if number == 4 else min(3, number)
    return -(-number // columns), columns


def groups_of(
    panel: Panel, cells: Sequence[PlottedCell], *, by_line: bool = False, most: int = MAX_IN_ONE
) -> list[tuple[str, list[PlottedCell]]]:
    """The conditions that share axes, with a title; of a few conditions one group without one.

    Where each condition is a line, a group has at most `MAX_LINES` of them, evenly over its ranks.

    Args:
        panel: where they are from.
        cells: what is drawn.
        by_line: whether a line joins the conditions of a family, of which some have room in one.
        most: so many conditions have room in one.
    """
    groups = _whole_groups(panel, cells, by_line=by_line, most=most)
    if by_line or len(cells) <= most:
        return groups
    return [(title, _evenly(members, MAX_LINES)) for title, members in groups]


def _whole_groups(
    panel: Panel, cells: Sequence[PlottedCell], *, by_line: bool, most: int
) -> list[tuple[str, list[PlottedCell]]]:
    drawn = set(cells)
    families = [(family, [cell for cell in members if cell in drawn]) for family, members in panel.families().items()]
    num_families = sum(bool(members) for _, members in families)
    if len(cells) <= most or (by_line and num_families <= MAX_FAMILIES_IN_ONE):
        return [("", [*cells])]
    several = [(family, members) for family, members in families if len(members) > 1]
    in_families = {cell for _, members in several for cell in members}
    others = [cell for cell in cells if cell not in in_families]
    batches = [others[start : start + _MAX_OTHERS] for start in range(0, len(others), _MAX_OTHERS)]
    groups = [*several, *(("others" if several else "", batch) for batch in batches)]
    if len(groups) > MAX_GROUPS:
        order = [cells[index] for index in ranked_by([cell.row for cell in cells], panel.val)]
        places = {cell: place for place, cell in enumerate(order)}
        best = [min(places.get(cell, len(places)) for cell in members) for _, members in groups]
        kept = sorted(range(len(groups)), key=lambda number: best[number])[:MAX_GROUPS]
        groups = [groups[number] for number in sorted(kept)]
    return groups if len(groups) > 1 else [("", [*cells])]


def _evenly(cells: Sequence[PlottedCell], number: int) -> list[PlottedCell]:
    """So many of them, the first and the last among them; all where there are no more."""
    if len(cells) <= number:
        return [*cells]
    return [cells[round(place * (len(cells) - 1) / (number - 1))] for place in range(number)]


def shown_in(groups: Sequence[tuple[str, Sequence[PlottedCell]]]) -> list[PlottedCell]:
    """The conditions of all groups."""
    return [cell for _, cells in groups for cell in cells]


def multiples_remarks(groups: Sequence[tuple[str, Sequence[PlottedCell]]], cells: Sequence[PlottedCell]) -> list[str]:
    """What the footnote says of conditions that no group holds."""
    shown = set(shown_in(groups))
    families = {cell.family for cell in shown}
    thinned = [cell for cell in cells if cell.family in families and cell not in shown]
    others = len(cells) - len(shown) - len(thinned)
    remarks = [f"the {len(groups)} groups that are best on val, without {others} other conditions"] if others else []
    return [*remarks, f"{MAX_LINES} ranks of each group, evenly over them"] if thinned else remarks


def draw_multiples(
    subfigure: SubFigure, groups: Sequence[tuple[str, Sequence[PlottedCell]]], draw_one: DrawOne
) -> list[Axes]:
    """Axes for each group, on the same scales, with titles at the left and below alone."""
    rows, columns = grid_of(len(groups))
    grid = subfigure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    used, unused = grid.ravel()[: len(groups)], grid.ravel()[len(groups) :]
    for axes, (title, cells) in zip(used, groups, strict=True):
        # What the title says, names need not.
        is_family = title != "" and all(cell.family == title for cell in cells)
        draw_one(axes, cells, _rank_name if is_family else _label)
        axes.set_title(title)
    for axes in unused:
        axes.set_visible(False)
    for number, axes in enumerate(used):
        if len(groups) > 1:
            axes.minorticks_off()  # of no use at this size, and most of the time that many axes take
        if number % columns:
            axes.set_ylabel("")
        if number + columns < len(groups):
            axes.set_xlabel("")
        else:
            axes.tick_params(labelbottom=True)
    return [*used]


def multiples_height(groups: Sequence[object], single: float) -> float:
    """Inches for so many groups, or of one alone."""
    return single if len(groups) == 1 else 0.4 + _ROW_INCHES * grid_of(len(groups))[0]


def _rank_name(cell: PlottedCell) -> str:
    return f"r{cell.rank:g}"


def _label(cell: PlottedCell) -> str:
    return cell.label
