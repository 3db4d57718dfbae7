// The panel at the side: a cell, its runs, and of each run curves, metrics and settings.

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
  document.querySelectorAll("[aria-current]").forEach((row) => row.removeAttribute("aria-current"));
  if (opener) opener.setAttribute("aria-current", "true");
  state.opener = opener;
  panel.hidden = false;
  panel.scrollTop = 0;
  panel.focus({ preventScroll: true });
}

function closeDetails() {
  panel.hidden = true;
  panel.replaceChildren();
  document.querySelectorAll("[aria-current]").forEach((row) => row.removeAttribute("aria-current"));
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
