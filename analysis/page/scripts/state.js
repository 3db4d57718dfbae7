// What every part of the page uses: its data, its controls, the theme, and text made safe.
// All text from the runs reaches the page by textContent, or by `plain` where the plotting library reads markup.

const data = JSON.parse(document.getElementById("data").textContent);
const MAX_BARS = 60;
const MAX_CURVES = 40;
const MAX_IN_ONE = 13;
const MAX_OTHERS = 6;
// In pixels: below there is no room for names beside points, nor for two plots side by side.
const NARROW = 720;
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
const narrowness = window.matchMedia(`(width < ${NARROW}px)`);
const darkness = window.matchMedia("(prefers-color-scheme: dark)");
const filterBox = document.getElementById("filter");
const methodBox = document.getElementById("method");
const taskBox = document.getElementById("task");
const axisBoxes = [...document.querySelectorAll("select.axis")];
const panel = document.getElementById("details");
const state = { printing: false, curve: null, axis: 0, opener: null, unfolded: [] };
data.cells.forEach((cell, index) => { cell.index = index; });
const cellOfRun = new Map(data.cells.flatMap((cell) => cell.runs.map((run) => [run, cell])));

const isNarrow = () => !state.printing && narrowness.matches;
const theme = () => (darkness.matches && !state.printing ? THEMES.dark : THEMES.light);
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const hover = (cell) => [`<b>${plain(cell.name)}</b>`, ...cell.lines.map(plain)].join("<br>");
const has = (...names) => (cell) => names.every((name) => cell[name] !== null);
// Whether a cell has the chosen values of the own axes; what its method does not have excludes it from nothing.
const onAxes = (cell) => axisBoxes.every((box, i) => !box.value || cell.axes[i] === null || cell.axes[i] === box.value);

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
