// Listens to the controls and draws everything once.

document.querySelectorAll("table").forEach(prepareTable);
filterBox.addEventListener("input", filterRows);
methodBox.addEventListener("change", () => { filterRows(); drawFigures(); });
axisBoxes.forEach((box) => box.addEventListener("change", () => { filterRows(); drawFigures(); }));
taskBox.addEventListener("change", drawFigures);
[darkness, narrowness].forEach((query) => query.addEventListener("change", drawFigures));
window.addEventListener("beforeprint", () => { state.printing = true; unfoldNotes(); drawFigures(); });
window.addEventListener("afterprint", () => { state.printing = false; foldNotes(); drawFigures(); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !panel.hidden) closeDetails(); });
spoken.setAttribute("aria-live", "polite");
document.body.append(spoken);
addCurveChoice();
addAxisChoice();
filterRows();
drawFigures();
