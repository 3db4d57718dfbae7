// Tables: sorted by a click on a title, filtered by text, method and own axes, rows that open the details of their runs.

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
    const cells = (row.dataset.runIds || "").split(" ").map((run) => cellOfRun.get(run)).filter(Boolean);
    const isElsewhere = cells.length > 0 && !cells.some(onAxes);
    row.hidden = ofOther || isElsewhere || !words.every((word) => text.includes(word));
  });
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("shown").textContent = `${shown} of ${rows.length} rows`;
}

// Paper has nothing to click: in print the notes are open, and after it as the reader had them.
function unfoldNotes() {
  state.unfolded = [...document.querySelectorAll("details.notes:not([open])")];
  state.unfolded.forEach((notes) => { notes.open = true; });
}

function foldNotes() {
  state.unfolded.forEach((notes) => { notes.open = false; });
}
