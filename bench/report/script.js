"use strict";
(() => {
  // The innermost row of headings has one for each column.
  const headings = (table) => [...[...table.tHead.rows].at(-1).cells];
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
    headings(table).forEach((head, place) => {
      if (direction && place === column) head.setAttribute("aria-sort", direction);
      else head.removeAttribute("aria-sort");
    });
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    headings(table).forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const next = { ascending: "descending", descending: "" };
        sort(table, column, next[head.getAttribute("aria-sort")] ?? "ascending");
      });
    });
  }

  // What a cell says of itself: all but its commands, which name the grid in every cell.
  const said = (group) => {
    let text = group.textContent;
    for (const command of group.querySelectorAll(".command")) text = text.replace(command.textContent, "");
    return text.toLowerCase();
  };

  for (const form of document.querySelectorAll("form[data-table]")) {
    const table = document.getElementById(form.dataset.table);
    const search = form.querySelector("[type=search]");
    const count = form.querySelector("output");
    const by = form.querySelector(".sort-by");
    const selects = [...form.querySelectorAll("[data-filter]")];
    const words = new Map();
    const filter = () => {
      const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const group of table.tBodies) {
        let fits = selects.every((s) => !s.value || group.dataset[s.dataset.filter] === s.value);
        if (fits && wanted.length) {
          if (!words.has(group)) words.set(group, said(group));
          fits = wanted.every((word) => words.get(group).includes(word));
        }
        group.hidden = !fits;
        shown += fits;
      }
      count.textContent = `${shown} of ${table.tBodies.length} ${count.dataset.unit}`;
    };
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    headings(table).forEach((head, column) => {
      for (const [direction, mark] of [["ascending", "▲"], ["descending", "▼"]]) {
        by.add(new Option(`${head.textContent.trim()} ${mark}`, `${column} ${direction}`));
      }
    });
    by.addEventListener("input", () => {
      const [column, direction] = by.value.split(" ");
      sort(table, Number(column), direction ?? "");
    });
    form.addEventListener("reset", () => setTimeout(() => { filter(); sort(table, 0, ""); }));
  }

  const unfold = (line, open) => {
    line.nextElementSibling.hidden = !open;
    line.querySelector(".more").setAttribute("aria-expanded", String(open));
  };
  document.getElementById("cells-table").addEventListener("click", (event) => {
    const line = event.target.closest("tr.line");
    if (!line || event.target.closest("a") || String(getSelection())) return;
    unfold(line, line.nextElementSibling.hidden);
  });

  // A link to a cell unfolds it, whatever the filters hide.
  const follow = () => {
    const group = document.getElementById(location.hash.slice(1));
    if (group?.parentElement.id !== "cells-table") return;
    group.hidden = false;
    unfold(group.rows[0], true);
    group.scrollIntoView();
  };
  addEventListener("hashchange", follow);
  document.addEventListener("click", (event) => {
    if (event.target.closest("a")?.hash === location.hash) follow();
  });
  follow();

  // Paper shows the tables that are folded on the screen; style.css does it for the rows.
  let folded = [];
  const print = (on) => {
    if (on && !folded.length) folded = [...document.querySelectorAll(".table:not([open])")];
    folded.forEach((details) => { details.open = on; });
    if (!on) folded = [];
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  matchMedia("print").addEventListener("change", (event) => print(event.matches));
})();
