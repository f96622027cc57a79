"use strict";
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  for (const header of table.tHead.rows[0].cells) {
    const button = header.querySelector("button");
    if (!button) continue;
    button.addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "descending" ? false
        : header.getAttribute("aria-sort") === "ascending" || header.classList.contains("n");
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const column = header.cellIndex;
      const rows = [...body.rows].sort((a, b) => {
        const x = value(a, column), y = value(b, column);
        const order = typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
        return descending ? -order : order;
      });
      body.append(...rows);
    });
  }
}
const search = document.getElementById("filter");
if (search) {
  const only = document.getElementById("only"), count = document.getElementById("count");
  const rows = [...document.querySelectorAll("#layers tbody tr")];
  const apply = () => {
    const words = search.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !(row.textContent.toLowerCase().includes(words) && (!only || !only.checked || row.classList.contains("conditional")));
      shown += !row.hidden;
    }
    count.textContent = shown + " of " + rows.length + " layers";
  };
  search.addEventListener("input", apply);
  if (only) only.addEventListener("change", apply);
  apply();
}
// paper cannot be clicked: open everything, except sections that add nothing to their summary
addEventListener("beforeprint", () => { for (const closed of document.querySelectorAll("details:not(.dull)")) closed.open = true; });
