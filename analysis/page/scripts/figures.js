// The figures by their ids; each gives its traces and layout, or null without data.

function against(name, title, axis) {
  const cells = bestCells().filter(has("test"));
  const points = cells.filter((cell) => cell[name] > 0);
  if (!points.length) return null;
  const low = Math.min(...points.map((cell) => cell[name])) / 1.5;
  const high = Math.max(...points.map((cell) => cell[name])) * 1.5;
  const levels = cells.filter((cell) => !(cell[name] > 0)).map((cell, i) => level(cell, i, low, high));
  const traces = bySeries(points).map((members) => trace(members, name, "test", { join: true }));
  return { traces: [...levels, ...traces], layout: layout({ type: "log", title, ...axis(points) }, task().test) };
}

function drawMemory() {
  const cells = bestCells().filter(has("test", "memory"));
  if (!cells.length) return null;
  const traces = bySeries(cells).map((members) => trace(members, "memory", "test"));
  const sign = task().higher ? 1 : -1;
  const front = [];
  [...cells].sort((a, b) => a.memory - b.memory || sign * (b.test - a.test)).forEach((cell) => {
    if (!front.length || sign * cell.test > sign * front[front.length - 1].test) front.push(cell);
  });
  traces.unshift({
    type: "scatter", mode: "lines", x: front.map((cell) => cell.memory), y: front.map((cell) => cell.test),
    line: { shape: "hv", dash: "dot", width: 1.5, color: theme().quiet }, hoverinfo: "skip", name: "Pareto front",
  });
  const middle = cells.reduce((sum, cell) => sum + cell.memory, 0) / cells.length;
  const annotations = cells.filter((cell) => cell.leads).map((cell) => ({
    x: cell.memory, y: cell.test, text: `best on val${isNarrow() ? "" : `: ${plain(cell.name)}`}`, font: { size: 12 }, bgcolor: theme().back,
    opacity: 0.9, arrowwidth: 1, arrowhead: 0, standoff: 8, ay: -26, ax: cell.memory > middle ? -34 : 34,
    xanchor: cell.memory > middle ? "right" : "left",
  }));
  return { traces, layout: layout({ title: data.memory, rangemode: "normal" }, task().test, { annotations }) };
}

function drawForgetting() {
  const cells = bestCells().filter(has("learned", "forgetting"));
  if (!cells.length) return null;
  const traces = bySeries(cells).map((members) => {
    const made = trace(members, "learned", "forgetting", { join: true, order: "rank" });
    const spread = [...members].sort((a, b) => a.rank - b.rank).map((cell) => cell.learned_sd);
    made.error_x = { ...made.error_y, array: spread, visible: spread.some((sd) => sd !== null) };
    return made;
  });
  traces.unshift({
    type: "scatter", mode: "markers", x: [0], y: [0], name: "base model", text: ["<b>base model</b>, before training"],
    hoverinfo: "text", marker: { symbol: "cross", size: 11, color: theme().quiet },
  });
  return { traces, layout: layout({ title: data.learned }, data.forgetting) };
}

function drawAxis() {
  const at = state.axis;
  const cells = bestCells().filter((cell) => cell.test !== null && (cell.axes[at] ?? null) !== null);
  const rest = (cell) => [cell.bare, ...cell.axes.map((text, i) => (text === null || i === at ? null : `${data.axes[i]} ${text}`))];
  const lines = [...groups(cells, (cell) => JSON.stringify(rest(cell))).values()]
    .filter((members) => new Set(members.map((cell) => cell.axes[at])).size > 1);
  if (!lines.length) return null;
  const shown = lines.flat();
  const isNumber = shown.every((cell) => cell.places[at] !== null);
  const isLog = isNumber && shown.every((cell) => cell.places[at] > 0);
  const traces = lines.map((members, i) => {
    const ordered = isNumber ? [...members].sort((a, b) => a.places[at] - b.places[at]) : members;
    const spread = ordered.map((cell) => cell.test_sd);
    return {
      type: "scatter", mode: "lines+markers", x: ordered.map((cell) => (isNumber ? cell.places[at] : cell.axes[at])),
      y: ordered.map((cell) => cell.test), text: ordered.map(hover), hoverinfo: "text",
      customdata: ordered.map((cell) => cell.runs), name: plain(rest(ordered[0]).filter(Boolean).join(", ")),
      error_y: { type: "data", array: spread, visible: spread.some((sd) => sd !== null), thickness: 1.2, width: 3 },
      line: { color: colour(i), width: 1.2 },
      marker: { color: colour(i), symbol: SYMBOLS[i % SYMBOLS.length], size: 10, line: { color: theme().text, width: 0.8 } },
    };
  });
  const texts = new Map(shown.map((cell) => [cell.places[at], cell.axes[at]]));
  const named = isNumber ? { tickvals: [...texts.keys()], ticktext: [...texts.values()].map(plain) } : { type: "category" };
  return { traces, layout: layout({ title: data.axes[at], ...named, ...(isLog ? { type: "log" } : {}) }, task().test) };
}

function drawRates() {
  const tried = [...groups(visibleCells().filter(has("val", "rate")), (cell) => cell.condition).values()]
    .filter((members) => new Set(members.map((cell) => cell.rate)).size > 1);
  if (!tried.length) return null;
  const named = new Set();
  const pairs = tried.map((members) => {
    const made = trace(members, "rate", "val", { join: true });
    const ordered = [...members].sort((a, b) => a.rate - b.rate);
    made.showlegend = !named.has(made.legendgroup);
    named.add(made.legendgroup);
    made.error_y.visible = false;
    made.marker.size = 8;
    made.marker.color = ordered.map((cell) => (cell.best ? colour(cell.series) : theme().back));
    made.marker.line = { color: colour(members[0].series), width: 1.8 };
    return [members[0], made];
  });
  const axis = ticks("rate", 6)(tried.flat());
  return inMultiples(pairs, layout({ type: "log", title: "learning rate", ...axis, tickformat: "~g" }, task().val));
}

function drawParts() {
  const all = bestCells().filter((cell) => cell.parts.some((part) => part !== null));
  if (!all.length) return null;
  const cells = all.slice(0, MAX_BARS);
  const traces = data.parts.map((title, part) => ({
    type: "bar", orientation: "h", name: plain(title.replace(/ \(.*/, "")),
    x: cells.map((cell) => cell.parts[part]), y: cells.map((_, i) => i),
    text: cells.map(hover), textposition: "none", hoverinfo: "text", customdata: cells.map((cell) => cell.runs),
    marker: {
      color: theme().series[[0, 4, 2, 1][part]], line: { color: theme().back, width: 1 },
      pattern: {
        shape: ["", "/", "x", "."][part], size: 6, solidity: 0.25,
        fillmode: "overlay", fgcolor: theme().back, fgopacity: 0.4,
      },
    },
  }));
  const short = (name) => plain(name.length > 36 ? `${name.slice(0, 35)}…` : name);
  const limit = all.length > MAX_BARS ? `, first ${MAX_BARS} of ${all.length} cells` : "";
  const title = data.memory.replace(/^[^(]*/, "memory ") + limit;
  const made = layout({ title }, "", { barmode: "stack", height: Math.max(400, 130 + 24 * cells.length) });
  Object.assign(made.yaxis, {
    tickvals: cells.map((_, i) => i), ticktext: cells.map((cell) => short(cell.name)), autorange: "reversed",
  });
  return { traces, layout: made };
}

function drawCurves() {
  const cells = bestCells().filter((cell) => data.bands[cell.index]?.[state.curve]);
  if (!cells.length) return null;
  const shown = cells.slice(0, MAX_CURVES);
  const places = new Map(bySeries(shown).flatMap((members) => members.map((cell, place) => [cell, place])));
  const pairs = shown.flatMap((cell) => {
    const [steps, means, lows, highs, num] = data.bands[cell.index][state.curve];
    const shared = { type: "scatter", mode: "lines", legendgroup: String(cell.index), legendrank: 1000 + cell.series };
    const seeds = (i) => (num > 1 ? ` (${lows[i]} to ${highs[i]}, ${num} seeds)` : "");
    const line = {
      ...shared, x: steps, y: means, name: plain(cell.name), hoverinfo: "text", customdata: steps.map(() => cell.runs),
      text: steps.map((step, i) => `<b>${plain(cell.name)}</b><br>step ${step}: ${means[i]}${seeds(i)}`),
      line: { color: colour(cell.series), width: 1.5, dash: ["solid", ...DASHES][places.get(cell) % (DASHES.length + 1)] },
    };
    const band = {
      ...shared, x: [...steps, ...[...steps].reverse()], y: [...highs, ...[...lows].reverse()], showlegend: false,
      hoverinfo: "skip", fill: "toself", fillcolor: `${colour(cell.series)}26`, line: { color: colour(cell.series), width: 0 },
    };
    return num > 1 ? [[cell, band], [cell, line]] : [[cell, line]];
  });
  const limit = cells.length > MAX_CURVES ? ` (${MAX_CURVES} of ${cells.length} conditions)` : "";
  return inMultiples(pairs, layout({ title: `step${limit}` }, data.curve_labels[state.curve]));
}

const FIGURES = {
  params: () => against("params", data.params, ticks("params", 0)),
  memory: drawMemory,
  compute: () => against("compute", data.compute, ticks("compute", 0)),
  forgetting: drawForgetting,
  rank: () => against("rank", "rank", ticks("rank", 10)),
  axis: drawAxis,
  rate: drawRates,
  parts: drawParts,
  curves: drawCurves,
};

function drawFigures() {
  Object.entries(FIGURES).forEach(([name, make]) => {
    const figure = document.getElementById(`figure-${name}`);
    const plot = figure.querySelector(".plot");
    const made = make();
    figure.hidden = made === null;
    if (made === null) return;
    figure.classList.toggle("wide", name === "memory" || Boolean(made.layout.grid));
    // Room for a long legend, which would take it from the plot.
    const names = made.traces.filter((one) => one.showlegend !== false).map((one) => one.name);
    const longest = Math.max(...names.map((text) => text.length));
    const perRow = longest > (isNarrow() ? 14 : 24) ? 1 : 2;
    made.layout.height += 18 * Math.max(0, Math.ceil(names.length / perRow) - 4);
    if (state.printing) made.layout.width = 640;
    const there = {
      bars: made.traces.some((one) => one.error_y?.visible), levels: made.traces.some((one) => DASHES.includes(one.line?.dash)),
    };
    figure.querySelectorAll("[data-when]").forEach((said) => { said.hidden = !there[said.dataset.when]; });
    const isNew = !plot.classList.contains("js-plotly-plot");
    const image = { filename: name, format: "svg" };
    Plotly.react(plot, made.traces, made.layout, { ...CONFIG, toImageButtonOptions: image });
    if (isNew) {
      plot.on("plotly_click", (event) => {
        const runs = event.points[0].customdata;
        if (runs) openDetails(runs, null);
      });
      listenToKeys(plot);
    }
  });
  document.getElementById("no-figures").hidden = document.querySelector(".grid figure:not([hidden])") !== null;
}

// A choice above a figure: texts by value, of which one is selected.
function addChoice(figure, label, texts, selected, choose) {
  if (texts.size < 2) return;
  const choice = element("select");
  choice.setAttribute("aria-label", label);
  texts.forEach((text, value) => {
    const option = element("option", text);
    option.value = value;
    option.selected = value === selected;
    choice.append(option);
  });
  choice.addEventListener("change", () => { choose(choice.value); drawFigures(); });
  document.getElementById(figure).prepend(choice);
}

function addCurveChoice() {
  const present = new Set(Object.values(data.curves).flatMap(Object.keys));
  const names = Object.keys(data.curve_labels).filter((name) => present.has(name));
  state.curve = names.find((name) => name.startsWith("train_")) || names[0] || null;
  const texts = new Map(names.map((name) => [name, data.curve_labels[name]]));
  addChoice("figure-curves", "Curve", texts, state.curve, (name) => { state.curve = name; });
}

function addAxisChoice() {
  const texts = new Map(data.axes.map((name, i) => [i, name]));
  addChoice("figure-axis", "Axis", texts, state.axis, (i) => { state.axis = Number(i); });
}
