"use strict";
// Sorting and filtering of the table of runs, and its links with the points of the plots.
(() => {
  const table = document.getElementById("runs");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  const form = document.getElementById("filters");
  const words = document.getElementById("words");
  const selects = [...form.querySelectorAll("select")];
  const points = new Map(rows.map((row) => [row, document.querySelectorAll(`a.point[href="#${row.id}"]`)]));

  const collator = new Intl.Collator(undefined, { numeric: true });

  // A missing number comes last, whatever the direction.
  function compare(first, second, column, numeric, sign) {
    const [a, b] = [first.cells[column], second.cells[column]];
    if (!numeric) return sign * collator.compare(a.textContent, b.textContent);
    const [x, y] = [a.dataset.value, b.dataset.value];
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (Number(x) - Number(y));
  }

  function sort(header) {
    const now = header.getAttribute("aria-sort");
    const opposite = { ascending: "descending", descending: "ascending" };
    const direction = now ? opposite[now] : header.dataset.first;
    headers.forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    rows.sort((a, b) => compare(a, b, header.cellIndex, "numeric" in header.dataset, sign));
    body.append(...rows);
  }

  function filter() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const matches =
        wanted.every((word) => text.includes(word)) &&
        selects.every((select) => !select.value || row.dataset[select.dataset.filter] === select.value);
      row.hidden = !matches;
      points.get(row).forEach((point) => point.classList.toggle("dim", !matches));
      shown += matches;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length} runs`;
  }

  // A link may lead to a row that is filtered out.
  function reveal() {
    const row = document.getElementById(location.hash.slice(1));
    if (row && row.hidden) {
      form.reset();
      filter();
      row.scrollIntoView();
    }
  }

  for (const header of headers) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    button.addEventListener("click", () => sort(header));
    header.replaceChildren(button);
  }
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", reveal);
  form.hidden = false;
  filter();
})();
