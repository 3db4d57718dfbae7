// From cells to what the plotting library draws: which cells, their traces, axes and ticks.

const task = () => data.tasks[Number(taskBox.value)];

function visibleCells() {
  return data.cells.filter((cell) => cell.task === Number(taskBox.value)
    && (!methodBox.value || cell.method === methodBox.value) && onAxes(cell));
}

const bestCells = () => visibleCells().filter((cell) => cell.best);
const bySeries = (cells) => [...groups(cells, (cell) => cell.series).values()];
const colour = (series) => theme().series[series % theme().series.length];

function trace(cells, x, y, options = {}) {
  const by = options.order || x;
  const ordered = [...cells].sort((a, b) => a[by] - b[by]);
  const series = cells[0].series;
  const joined = new Set(ordered.map((cell) => cell[by])).size === ordered.length && options.join;
  const spread = ordered.map((cell) => cell[`${y}_sd`]);
  return {
    type: "scatter",
    mode: joined ? "lines+markers" : "markers",
    x: ordered.map((cell) => cell[x]),
    y: ordered.map((cell) => cell[y]),
    error_y: { type: "data", array: spread, visible: spread.some((sd) => sd !== null), thickness: 1.2, width: 3 },
    text: ordered.map(hover),
    hoverinfo: "text",
    customdata: ordered.map((cell) => cell.runs),
    name: plain(data.series[series]),
    legendgroup: String(series),
    legendrank: 1000 + series,
    line: { color: colour(series), width: 1.2 },
    marker: {
      color: colour(series), symbol: SYMBOLS[series % SYMBOLS.length],
      opacity: 1,
      // The best on val is larger in every figure.
      size: ordered.map((cell) => (cell.leads ? 15 : 10)),
      line: { color: theme().text, width: ordered.map((cell) => (cell.leads ? 2 : 0.8)) },
    },
  };
}

function level(cell, number, low, high) {
  // Enough points that one is near wherever the line is pointed at.
  const x = Array.from({ length: 41 }, (_, i) => low * (high / low) ** (i / 40));
  return {
    type: "scatter", mode: "lines", x, y: x.map(() => cell.test), text: x.map(() => hover(cell)),
    hoverinfo: "text", customdata: x.map(() => cell.runs), name: plain(cell.name), legendrank: 1000 + cell.series,
    line: { color: colour(cell.series), width: 1.8, dash: DASHES[number % DASHES.length] },
  };
}

function layout(xaxis, yTitle, extra = {}) {
  const { text, quiet, grid, back } = theme();
  const axis = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, tickfont: { color: quiet } };
  return {
    height: 400,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, Liberation Sans, sans-serif", size: 13, color: text },
    margin: { l: 56, r: 12, t: 28, b: 48 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: quiet, activecolor: text },
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, traceorder: "normal" },
    hoverlabel: { bgcolor: back, bordercolor: quiet, font: { color: text }, align: "left", namelength: 0 },
    hovermode: "closest",
    showlegend: true,
    xaxis: { ...axis, ...xaxis, title: { text: plain(xaxis.title), standoff: 8 } },
    yaxis: { ...axis, title: { text: plain(yTitle), standoff: 12 } },
    ...extra,
  };
}

// So many lines are told apart in one plot: of more, small multiples on the same scales, one for each series that has
// several; those of a single condition share the last ones. Each trace comes with its cell.
function inMultiples(pairs, made) {
  const num = new Set(pairs.map(([cell]) => cell)).size;
  const several = [...groups(pairs, ([cell]) => cell.series)].filter(([, members]) => new Set(members.map(([cell]) => cell)).size > 1);
  const inOwn = new Set(several.flatMap(([, members]) => members));
  const others = [...groups(pairs.filter((pair) => !inOwn.has(pair)), ([cell]) => cell).values()];
  const shared = Array.from({ length: Math.ceil(others.length / MAX_OTHERS) }, (_, i) => (
    [null, others.slice(i * MAX_OTHERS, (i + 1) * MAX_OTHERS).flat()]));
  const parts = [...several, ...shared];
  if (num <= MAX_IN_ONE || parts.length < 2) return { traces: pairs.map(([, one]) => one), layout: made };
  const columns = Math.min(parts.length, state.printing ? 2 : isNarrow() ? 1 : 3);
  const rows = Math.ceil(parts.length / columns);
  const { xaxis, yaxis } = made;
  Object.assign(made, {
    height: 210 * rows + 150, annotations: [], grid: { rows, columns, pattern: "independent", xgap: 0.12, ygap: Math.min(0.3, 60 / 210) },
    margin: { ...made.margin, t: 50 },
  });
  const ranks = [...new Set(pairs.map(([cell]) => cell.rank))].filter((rank) => rank !== null).sort((a, b) => a - b);
  const named = new Set();
  const traces = parts.flatMap(([series, members], i) => {
    const at = i ? String(i + 1) : "";
    const isLowest = i + columns >= parts.length;
    made[`xaxis${at}`] = { ...xaxis, title: isLowest ? xaxis.title : undefined, ...(i ? { matches: "x" } : {}) };
    made[`yaxis${at}`] = { ...yaxis, title: i % columns ? undefined : yaxis.title, ...(i ? { matches: "y" } : {}) };
    made.annotations.push({
      text: series === null ? "others" : plain(data.series[series]), showarrow: false, font: { size: 13 }, x: 0, y: 1,
      xref: `x${at} domain`, yref: `y${at} domain`, xanchor: "left", yanchor: "bottom", yshift: 4,
    });
    const cells = [...new Set(members.map(([cell]) => cell))];
    return members.map(([cell, one]) => {
      // Ranks have a colour each, the same in every one of them.
      const isRank = series !== null && cell.rank !== null;
      const name = isRank ? `rank ${cell.rank}` : one.name;
      const number = isRank ? ranks.indexOf(cell.rank) : cells.indexOf(cell);
      const isNew = one.hoverinfo !== "skip" && !named.has(name);
      if (isNew) named.add(name);
      return recoloured({ ...one, name, xaxis: `x${at}`, yaxis: `y${at}`, legendgroup: name, showlegend: isNew,
        legendrank: 1000 + (isRank ? number : 100 + number) }, colour(number));
    });
  });
  return { traces, layout: made };
}

function recoloured(one, to) {
  const from = one.line.color;
  const swap = (value) => (Array.isArray(value) ? value.map(swap) : value === from ? to : value);
  const made = { ...one, line: { ...one.line, color: to } };
  if (one.fillcolor) made.fillcolor = `${to}26`;
  if (one.marker) {
    made.marker = { ...one.marker, color: swap(one.marker.color), line: { ...one.marker.line, color: swap(one.marker.line.color) } };
  }
  return made;
}

// Ticks at the values themselves while they are few, else at 1, 2, 5, on a long axis at powers of ten, and on a short
// one at most digits, or at its ends where it has fewer than two. On a small screen an axis is long sooner, and a short
// one has fewer digits.
function ticks(name, most) {
  return (cells) => {
    const values = [...new Set(cells.map((cell) => cell[name]))].sort((a, b) => a - b);
    if (values.length <= most) return { tickvals: values, ticktext: values.map(String) };
    const span = values[values.length - 1] / values[0];
    if (span > (isNarrow() ? 100 : 1000)) return { tickformat: "~s", dtick: 1 };
    if (span > 4) return { tickformat: "~s", dtick: "D2" };
    const power = 10 ** Math.floor(Math.log10(values[0]));
    const digits = isNarrow() ? [1, 2, 3, 5, 7, 10, 20, 30] : [1, 2, 3, 4, 5, 6, 7, 8, 10, 20, 30];
    const within = digits.map((digit) => digit * power).filter((at) => at >= values[0] && at <= values[values.length - 1]);
    if (within.length < 2) return { tickformat: ".2~s", tickvals: [...new Set([values[0], values[values.length - 1]])] };
    return { tickformat: "~s", tickvals: digits.map((digit) => digit * power) };
  };
}

const CONFIG = {
  displaylogo: false, responsive: true,
  // Nothing leaves the page: one of the default buttons would send the figure's data to a server.
  showSendToCloud: false, plotlyServerURL: "", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};
