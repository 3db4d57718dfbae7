"use strict";
(() => {
  // All text from the runs reaches the page by textContent, or by `plain` where the plotting library reads markup.
  const data = JSON.parse(document.getElementById("data").textContent);
  const MAX_BARS = 60;
  const MAX_CURVES = 40;
  const THEMES = {
    light: {
      text: "#1c2126", quiet: "#57606a", grid: "#e3e7eb", back: "#ffffff",
      series: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b"],
    },
    dark: {
      text: "#e4e8ec", quiet: "#a3adb7", grid: "#2b343d", back: "#1c2228",
      series: ["#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#4C9BD6", "#b5b5b5"],
    },
  };
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star", "pentagon", "hexagram"];
  const DASHES = ["dash", "dot", "longdash", "dashdot"];
  const darkness = window.matchMedia("(prefers-color-scheme: dark)");
  const filterBox = document.getElementById("filter");
  const methodBox = document.getElementById("method");
  const taskBox = document.getElementById("task");
  const panel = document.getElementById("details");
  const state = { printing: false, curve: null, opener: null };
  data.cells.forEach((cell, index) => { cell.index = index; });
  const cellOfRun = new Map(data.cells.flatMap((cell) => cell.runs.map((run) => [run, cell])));

  const theme = () => (darkness.matches && !state.printing ? THEMES.dark : THEMES.light);
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const hover = (cell) => [`<b>${plain(cell.name)}</b>`, ...cell.lines.map(plain)].join("<br>");
  const has = (...names) => (cell) => names.every((name) => cell[name] !== null);

  function element(tag, text = "", className = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  // Items by key, the keys in order of appearance.
  function groups(items, key) {
    const found = new Map();
    items.forEach((item) => found.set(key(item), [...(found.get(key(item)) || []), item]));
    return found;
  }

  // ---------------------------------------------------------------- tables

  const isMissing = (key) => key === "" || key === "–" || Number.isNaN(key);

  function sortKeys(rows, column) {
    const fields = rows.map((row) => row.cells[column]);
    const isNumber = fields.some((field) => field && field.dataset.value !== undefined);
    return fields.map((field) => {
      if (!field) return "";
      if (!isNumber) return field.textContent.trim();
      return field.dataset.value ? Number(field.dataset.value) : NaN;
    });
  }

  function compare(first, second) {
    if (typeof first === "number") return first - second;
    return first.localeCompare(second, "en", { numeric: true });
  }

  function sortTable(table, header) {
    const body = table.tBodies[0];
    const order = { "": "ascending", ascending: "descending", descending: "" }[header.ariaSort || ""];
    const rows = [...body.rows].sort((a, b) => a.dataset.place - b.dataset.place);
    const keys = new Map();
    sortKeys(rows, header.cellIndex).forEach((key, i) => keys.set(rows[i], key));
    const sign = order === "descending" ? -1 : 1;
    if (order) {
      rows.sort((a, b) => {
        const missing = isMissing(keys.get(a)) - isMissing(keys.get(b));
        return missing || (isMissing(keys.get(a)) ? 0 : sign * compare(keys.get(a), keys.get(b)));
      });
    }
    table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    if (order) header.setAttribute("aria-sort", order);
    body.append(...rows);
  }

  function prepareTable(table) {
    if (!table.tHead || !table.tBodies.length) return;
    const rows = [...table.tBodies[0].rows];
    rows.forEach((row, place) => {
      row.dataset.place = place;
      if (row.dataset.runIds) prepareRow(row);
    });
    [...table.tHead.rows[table.tHead.rows.length - 1].cells].forEach((header) => {
      if (rows.some((row) => row.cells[header.cellIndex]?.dataset.value !== undefined)) {
        [header, ...rows.map((row) => row.cells[header.cellIndex])].forEach((field) => field?.classList.add("number"));
      }
      const button = element("button");
      button.type = "button";
      button.title = "Sort";
      button.append(...header.childNodes);
      button.addEventListener("click", () => sortTable(table, header));
      header.append(button);
    });
  }

  function prepareRow(row) {
    const open = () => openDetails(row.dataset.runIds.split(/\s+/).filter(Boolean), row);
    row.classList.add("opens");
    row.tabIndex = 0;
    row.addEventListener("click", () => { if (String(window.getSelection()) === "") open(); });
    row.addEventListener("keydown", (event) => {
      if (event.target === row && (event.key === "Enter" || event.key === " ")) {
        event.preventDefault();
        open();
      }
    });
  }

  function filterRows() {
    const words = filterBox.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...document.querySelectorAll("#tables tbody tr")];
    rows.forEach((row) => {
      const text = row.textContent.toLowerCase();
      const ofOther = methodBox.value !== "" && "method" in row.dataset && row.dataset.method !== methodBox.value;
      row.hidden = ofOther || !words.every((word) => text.includes(word));
    });
    const shown = rows.filter((row) => !row.hidden).length;
    document.getElementById("shown").textContent = `${shown} of ${rows.length} rows`;
  }

  // ---------------------------------------------------------------- figures

  const task = () => data.tasks[Number(taskBox.value)];

  function visibleCells() {
    return data.cells.filter(
      (cell) => cell.task === Number(taskBox.value) && (!methodBox.value || cell.method === methodBox.value));
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
        color: colour(series), symbol: SYMBOLS[series % SYMBOLS.length], size: 10,
        line: { color: theme().text, width: 0.8 },
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

  // Ticks at the values themselves while they are few, else at 1, 2, 5, or on a long axis at powers of ten.
  function ticks(name, most) {
    return (cells) => {
      const values = [...new Set(cells.map((cell) => cell[name]))].sort((a, b) => a - b);
      if (values.length <= most) return { tickvals: values, ticktext: values.map(String) };
      const span = values[values.length - 1] / values[0];
      return { tickformat: "~s", dtick: span > 1000 ? 1 : span > 4 ? "D2" : "D1" };
    };
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
    return { traces, layout: layout({ title: data.memory, rangemode: "normal" }, task().test) };
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

  function drawRates() {
    const tried = [...groups(visibleCells().filter(has("val", "rate")), (cell) => cell.condition).values()]
      .filter((members) => new Set(members.map((cell) => cell.rate)).size > 1);
    if (!tried.length) return null;
    const named = new Set();
    const traces = tried.map((members) => {
      const made = trace(members, "rate", "val", { join: true });
      const ordered = [...members].sort((a, b) => a.rate - b.rate);
      made.showlegend = !named.has(made.legendgroup);
      named.add(made.legendgroup);
      made.error_y.visible = false;
      made.marker.size = 8;
      made.marker.color = ordered.map((cell) => (cell.best ? colour(cell.series) : theme().back));
      made.marker.line = { color: colour(members[0].series), width: 1.8 };
      return made;
    });
    const axis = ticks("rate", 6)(tried.flat());
    return { traces, layout: layout({ type: "log", title: "learning rate", ...axis, tickformat: "~g" }, task().val) };
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
    made.legend.y = -75 / (made.height - 60);
    return { traces, layout: made };
  }

  function drawCurves() {
    const cells = bestCells();
    const longest = Math.max(0, ...cells.map((cell) => cell.runs.length));
    // The first seed of every cell before the second of any, so that a limit drops seeds and not cells.
    const runs = Array.from({ length: longest }, (_, i) => cells.map((cell) => [cell, cell.runs[i]])).flat()
      .filter(([, run]) => run && Object.hasOwn(data.curves, run) && data.curves[run][state.curve]);
    if (!runs.length) return null;
    const named = new Set();
    const traces = runs.slice(0, MAX_CURVES).map(([cell, run]) => {
      const [steps, values] = data.curves[run][state.curve];
      const first = !named.has(cell.series);
      named.add(cell.series);
      return {
        type: "scatter", mode: "lines", x: steps, y: values, name: plain(data.series[cell.series]), showlegend: first,
        legendgroup: String(cell.series), legendrank: 1000 + cell.series, opacity: 0.85,
        line: { color: colour(cell.series), width: 1.3 },
        text: steps.map((step, i) => `<b>${plain(run)}</b><br>${plain(cell.name)}<br>step ${step}: ${values[i]}`),
        hoverinfo: "text", customdata: steps.map(() => [run]),
      };
    });
    const limit = runs.length > MAX_CURVES ? ` (${MAX_CURVES} of ${runs.length} runs)` : "";
    return { traces, layout: layout({ title: `step${limit}` }, data.curve_labels[state.curve]) };
  }

  const FIGURES = {
    params: () => against("params", data.params, ticks("params", 0)),
    memory: drawMemory,
    compute: () => against("compute", data.compute, ticks("compute", 0)),
    forgetting: drawForgetting,
    rank: () => against("rank", "rank", ticks("rank", 10)),
    rate: drawRates,
    parts: drawParts,
    curves: drawCurves,
  };
  const CONFIG = {
    displaylogo: false, responsive: true,
    // Nothing leaves the page: one of the default buttons would send the figure's data to a server.
    showSendToCloud: false, plotlyServerURL: "", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };

  function drawFigures() {
    Object.entries(FIGURES).forEach(([name, make]) => {
      const figure = document.getElementById(`figure-${name}`);
      const plot = figure.querySelector(".plot");
      const made = make();
      figure.hidden = made === null;
      if (made === null) return;
      if (state.printing) made.layout.width = 640;
      const isNew = !plot.classList.contains("js-plotly-plot");
      const image = { filename: name, format: "svg" };
      Plotly.react(plot, made.traces, made.layout, { ...CONFIG, toImageButtonOptions: image });
      if (isNew) {
        plot.on("plotly_click", (event) => {
          const runs = event.points[0].customdata;
          if (runs) openDetails(runs, null);
        });
      }
    });
    document.getElementById("no-figures").hidden = document.querySelector(".grid figure:not([hidden])") !== null;
  }

  function addCurveChoice() {
    const present = new Set(Object.values(data.curves).flatMap(Object.keys));
    const names = Object.keys(data.curve_labels).filter((name) => present.has(name));
    state.curve = names.find((name) => name.startsWith("train_")) || names[0] || null;
    if (names.length < 2) return;
    const choice = element("select");
    choice.setAttribute("aria-label", "Curve");
    names.forEach((name) => {
      const option = element("option", data.curve_labels[name]);
      option.value = name;
      option.selected = name === state.curve;
      choice.append(option);
    });
    choice.addEventListener("change", () => { state.curve = choice.value; drawFigures(); });
    document.getElementById("figure-curves").prepend(choice);
  }

  // ---------------------------------------------------------------- details

  function openDetails(runs, opener) {
    const cell = cellOfRun.get(runs[0]);
    const isCell = cell && runs.every((run) => cellOfRun.get(run) === cell);
    const close = element("button", "Close", "close");
    close.type = "button";
    close.addEventListener("click", closeDetails);
    const lines = element("ul", "", "lines");
    if (isCell) lines.append(...cell.lines.map((line) => element("li", line)));
    panel.replaceChildren(close, element("h3", isCell ? cell.name : `${runs.length} runs`), lines);
    panel.append(...runs.map((run, i) => runDetails(run, i === 0)));
    document.querySelectorAll("tr[aria-current]").forEach((row) => row.removeAttribute("aria-current"));
    if (opener) opener.setAttribute("aria-current", "true");
    state.opener = opener;
    panel.hidden = false;
    panel.scrollTop = 0;
    panel.focus({ preventScroll: true });
  }

  function closeDetails() {
    panel.hidden = true;
    panel.replaceChildren();
    document.querySelectorAll("tr[aria-current]").forEach((row) => row.removeAttribute("aria-current"));
    if (state.opener) state.opener.focus();
  }

  function runDetails(id, open) {
    const run = Object.hasOwn(data.runs, id) ? data.runs[id] : null;
    const box = element("details", "", "run");
    const summary = element("summary", id);
    box.append(summary);
    if (run === null) {
      summary.append(element("span", "not in this page", "status"));
      box.append(element("p", "Its settings, metrics and curve are in its run folder."));
      return box;
    }
    const kind = run.status === "finished" ? "status" : "status bad";
    summary.append(element("span", run.status.replaceAll("_", " "), kind));
    box.addEventListener("toggle", () => { if (box.open && box.childElementCount === 1) fillRun(box, id, run); });
    box.open = open;
    return box;
  }

  function fillRun(box, id, run) {
    if (run.error) box.append(element("pre", run.error));
    drawRunCurves(box, Object.hasOwn(data.curves, id) ? data.curves[id] : {});
    const metrics = element("dl");
    run.metrics.forEach((text, i) => {
      if (text !== null) metrics.append(element("dt", data.metrics[i]), element("dd", text));
    });
    if (metrics.childElementCount) box.append(element("h4", "Metrics"), metrics);
    const settings = new Map(Object.entries(data.settings));
    data.varying.forEach((name, i) => settings.set(name, run.settings[i]));
    for (const part of ["config", "environment"]) {
      const own = [...settings].filter(([name]) => name.startsWith(`${part}.`));
      own.sort((a, b) => compare(a[0], b[0]));
      box.append(element("h4", part === "config" ? "Config" : "Environment"), nested(own, part.length + 1, "settings"));
    }
  }

  function nested(settings, start, className = "") {
    const list = element("ul", "", className);
    groups(settings, ([name]) => name.slice(start).split(".")[0]).forEach((members, key) => {
      const item = element("li");
      item.append(element("b", `${key}: `));
      const inner = members.filter(([name]) => name.length > start + key.length);
      item.append(...members.filter((member) => !inner.includes(member)).map((member) => element("span", member[1])));
      if (inner.length) item.append(nested(inner, start + key.length + 1));
      list.append(item);
    });
    return list;
  }

  function drawRunCurves(box, curves) {
    // One plot per quantity: training and validation loss share one.
    groups(Object.keys(curves), (name) => name.split("_").slice(1).join("_")).forEach((names) => {
      const plot = element("div");
      box.append(plot);
      const traces = names.map((name, i) => ({
        type: "scatter", mode: "lines", x: curves[name][0], y: curves[name][1], name: plain(data.curve_labels[name]),
        line: { color: colour(i), width: 1.5 },
      }));
      const yTitle = names.length > 1 ? "" : data.curve_labels[names[0]];
      const made = layout({ title: "step" }, yTitle, { height: 210, showlegend: names.length > 1 });
      made.legend = { orientation: "h", y: 1.02, yanchor: "bottom" };
      Plotly.newPlot(plot, traces, made, { ...CONFIG, displayModeBar: false });
    });
  }

  // ---------------------------------------------------------------- start

  document.querySelectorAll("table").forEach(prepareTable);
  filterBox.addEventListener("input", filterRows);
  methodBox.addEventListener("change", () => { filterRows(); drawFigures(); });
  taskBox.addEventListener("change", drawFigures);
  darkness.addEventListener("change", drawFigures);
  window.addEventListener("beforeprint", () => { state.printing = true; drawFigures(); });
  window.addEventListener("afterprint", () => { state.printing = false; drawFigures(); });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !panel.hidden) closeDetails(); });
  addCurveChoice();
  filterRows();
  drawFigures();
})();
