"use strict";
(() => {
  const value = (group, column) => {
    const cell = group.rows[0].cells[column];
    return (cell.dataset.v ?? cell.textContent).trim();
  };
  // Numbers by size, words by alphabet, what is missing last whichever way.
  const compare = (a, b, sign) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const x = Number(a), y = Number(b);
    const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
    return sign * order;
  };
  const sort = (table, column, direction) => {
    const groups = [...table.tBodies];
    groups.forEach((group, place) => { group.dataset.place ??= place; });
    const sign = direction === "descending" ? -1 : 1;
    groups.sort((a, b) =>
      (direction ? compare(value(a, column), value(b, column), sign) : 0) || a.dataset.place - b.dataset.place);
    table.append(...groups);
    [...table.tHead.rows[0].cells].forEach((head, place) => {
      if (direction && place === column) head.setAttribute("aria-sort", direction);
      else head.removeAttribute("aria-sort");
    });
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const next = { ascending: "descending", descending: "" };
        sort(table, column, next[head.getAttribute("aria-sort")] ?? "ascending");
      });
    });
  }

  const cells = document.getElementById("cells-table");
  const form = document.getElementById("filters");
  const search = document.getElementById("search");
  const count = document.getElementById("count");
  const selects = [...form.querySelectorAll("[data-filter]")];
  const words = new Map();
  const filter = () => {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const group of cells.tBodies) {
      let fits = selects.every((s) => !s.value || group.dataset[s.dataset.filter] === s.value);
      if (fits && wanted.length) {
        if (!words.has(group)) words.set(group, group.textContent.toLowerCase());
        fits = wanted.every((word) => words.get(group).includes(word));
      }
      group.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${cells.tBodies.length} cells`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());

  const by = document.getElementById("sort-by");
  [...cells.tHead.rows[0].cells].forEach((head, column) => {
    for (const [direction, mark] of [["ascending", "▲"], ["descending", "▼"]]) {
      by.add(new Option(`${head.textContent.trim()} ${mark}`, `${column} ${direction}`));
    }
  });
  by.addEventListener("input", () => {
    const [column, direction] = by.value.split(" ");
    sort(cells, Number(column), direction ?? "");
  });
  form.addEventListener("reset", () => setTimeout(() => { filter(); sort(cells, 0, ""); }));

  cells.addEventListener("click", (event) => {
    const line = event.target.closest("tr.line");
    if (!line || event.target.closest("a") || String(getSelection())) return;
    const detail = line.nextElementSibling;
    detail.hidden = !detail.hidden;
    line.querySelector(".more").setAttribute("aria-expanded", String(!detail.hidden));
  });
})();
