// Sorting and filtering of the runs' tables. Without this script the tables are whole and in the study's order.
"use strict";
for (const table of document.querySelectorAll("table.runs")) {
  const body = table.tBodies[0], said = document.createElement("p");
  said.className = "note"; said.setAttribute("role", "status");
  const value = (row, column) => {
    const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent.trim(), number = parseFloat(text);
    return cell.dataset.value !== undefined && !Number.isNaN(number) ? number : text.toLowerCase();
  };
  table.querySelectorAll("thead th").forEach((head, column) => {
    if (head.dataset.plain !== undefined) return;
    const button = document.createElement("button");
    button.type = "button"; button.append(...head.childNodes); head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [value(row, column), row]);
      const empty = (v) => v === "" || v === "–";
      rows.sort(([a], [b]) => empty(a) - empty(b) || (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1));
      body.append(...rows.map(([, row]) => row));
    });
  });
  if (body.rows.length < 2) continue;
  const label = document.createElement("label"), field = document.createElement("input");
  field.type = "search"; label.append("Filter these runs ", field);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
      shown += !row.hidden;
    }
    said.textContent = words.length ? `${shown} of ${body.rows.length} runs` : "";
  });
  const bar = document.createElement("div");
  bar.className = "filter"; bar.append(label, said);
  table.closest(".scroll").before(bar);
}
