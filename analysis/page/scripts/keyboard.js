// Figures from the keyboard: Tab reaches a figure, arrow keys move among its marks, Enter opens the runs of one.

const spoken = element("output", "", "spoken");

// By trace the marks with a text; of neighbours that say the same, as along a level, one.
function stopsOf(plot) {
  return plot.data.map((one, curve) => {
    const texts = Array.isArray(one.text) && one.hoverinfo === "text" && one.visible !== "legendonly" ? one.text : [];
    return texts.map((text, point) => ({ curve, point, text })).filter((stop, i, all) => !i || stop.text !== all[i - 1].text);
  }).filter((stops) => stops.length);
}

function currentStop(plot, stops) {
  const line = Math.min(plot.at.line, stops.length - 1);
  plot.at = { line, place: Math.min(plot.at.place, stops[line].length - 1) };
  return stops[line][plot.at.place];
}

function showStop(plot) {
  const stops = stopsOf(plot);
  if (!stops.length) return;
  const stop = currentStop(plot, stops);
  const one = plot.data[stop.curve];
  Plotly.Fx.hover(plot, [{ curveNumber: stop.curve, pointNumber: stop.point }], `${one.xaxis || "x"}${one.yaxis || "y"}`);
  const text = new DOMParser().parseFromString(stop.text.replaceAll("<br>", ", "), "text/html").body.textContent;
  spoken.textContent = text;
}

// Along a line and on into the next one, or from line to line.
function moveStop(plot, key) {
  const stops = stopsOf(plot);
  if (!stops.length) return;
  currentStop(plot, stops);
  let { line, place } = plot.at;
  const last = stops.length - 1;
  if (key === "Home") place = 0;
  if (key === "End") place = Infinity;
  if (key === "ArrowDown") line = Math.min(line + 1, last);
  if (key === "ArrowUp") line = Math.max(line - 1, 0);
  if (key === "ArrowRight" && (place < stops[line].length - 1 || line < last)) {
    [line, place] = place < stops[line].length - 1 ? [line, place + 1] : [line + 1, 0];
  }
  if (key === "ArrowLeft" && (place > 0 || line > 0)) [line, place] = place > 0 ? [line, place - 1] : [line - 1, Infinity];
  plot.at = { line, place };
  showStop(plot);
}

function openStop(plot) {
  const stops = stopsOf(plot);
  if (!stops.length) return;
  const stop = currentStop(plot, stops);
  const runs = plot.data[stop.curve].customdata?.[stop.point];
  if (runs) openDetails(runs, plot);
}

function listenToKeys(plot) {
  plot.at = { line: 0, place: 0 };
  plot.tabIndex = 0;
  plot.setAttribute("role", "group");
  const title = plot.closest("figure").querySelector("h3").textContent;
  plot.setAttribute("aria-label", `${title}: arrow keys move among its marks, Enter opens the runs of one`);
  // A click focuses too, and shows what it was at.
  plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) showStop(plot); });
  plot.addEventListener("blur", () => { Plotly.Fx.unhover(plot); spoken.textContent = ""; });
  plot.addEventListener("keydown", (event) => {
    if (event.target !== plot || event.ctrlKey || event.altKey || event.metaKey) return;
    const isMove = /^(Arrow(Left|Right|Up|Down)|Home|End)$/.test(event.key);
    if (!isMove && event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    if (isMove) moveStop(plot, event.key); else openStop(plot);
  });
}
