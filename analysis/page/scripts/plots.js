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
    legend: { orientation: "h", y: -0.2, yanchor: "top", x: 0, traceorder: "normal" },
    hoverlabel: { bgcolor: back, bordercolor: quiet, font: { color: text }, align: "left", namelength: 0 },
    hovermode: "closest",
    showlegend: true,
    xaxis: { ...axis, ...xaxis, title: { text: plain(xaxis.title), standoff: 8 } },
    yaxis: { ...axis, title: { text: plain(yTitle), standoff: 12 } },
    ...extra,
  };
}

// Ticks at the values themselves while they are few, else at 1, 2, 5, or on a long axis at powers of ten.
function ticks(name, most) {
  return (cells) => {
    const values = [...new Set(cells.map((cell) => cell[name]))].sort((a, b) => a - b);
    if (values.length <= most) return { tickvals: values, ticktext: values.map(String) };
    const span = values[values.length - 1] / values[0];
    return { tickformat: "~s", dtick: span > 1000 ? 1 : span > 4 ? "D2" : "D1" };
  };
}

const CONFIG = {
  displaylogo: false, responsive: true,
  // Nothing leaves the page: one of the default buttons would send the figure's data to a server.
  showSendToCloud: false, plotlyServerURL: "", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};
