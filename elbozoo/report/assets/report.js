"use strict";
const page = document.documentElement;
page.classList.add("scripts");

// ---- tables: a click on a column's name sorts by it, and a second one the other way; cells without a figure stay last
const before = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);

const sort = (table, head) => {
  const ascending = head.ariaSort === "descending";
  const body = table.tBodies[0];
  const known = [...body.rows].map((row) => [row.cells[head.cellIndex].dataset.sort, row]);
  const [filled, empty] = [known.filter(([value]) => value !== ""), known.filter(([value]) => value === "")];
  filled.sort(([a], [b]) => (ascending ? before(a, b) : before(b, a)));
  body.append(...[...filled, ...empty].map(([, row]) => row));
  for (const other of head.parentElement.cells) other.ariaSort = null;
  head.ariaSort = ascending ? "ascending" : "descending";
};

for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(table, head));
    head.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      sort(table, head);
    });
  }
}

// ---- charts: each is data in the element "charts", and Plotly draws it where its box stands
const figures = JSON.parse(document.getElementById("charts").textContent);
const isTouched = matchMedia("(pointer: coarse)").matches;

const draw = async () => {
  for (const box of document.querySelectorAll("[data-chart]")) {
    const { data, layout } = figures[box.dataset.chart];
    // On a touch screen a finger that passes over a chart scrolls the page.
    const touched = { ...layout, dragmode: isTouched ? false : "zoom" };
    await Plotly.newPlot(box, data, touched, { responsive: true, displayModeBar: false });
    await new Promise((resolve) => setTimeout(resolve));
  }
  page.dataset.charts = "drawn";
};

// Paper is narrower than a screen, and a chart keeps the width that it was drawn in.
const PAPER = 680;
const redraw = (sizeOf) => {
  for (const box of document.querySelectorAll("[data-chart].js-plotly-plot")) Plotly.relayout(box, sizeOf(box));
};
addEventListener("beforeprint", () => redraw((box) => ({ width: Math.min(PAPER, box.clientWidth) })));
addEventListener("afterprint", () => redraw(() => ({ width: null, autosize: true })));

// The library takes a browser longer to read than all the rest, so words and tables are on the screen before it.
requestAnimationFrame(() =>
  setTimeout(() => {
    const library = document.createElement("script");
    library.textContent = document.getElementById("plotly").textContent;
    document.head.append(library);
    draw();
  })
);
