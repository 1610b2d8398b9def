"use strict";
(() => {
  const plots = [...document.querySelectorAll(".plot")];
  // Under a finger a drag must scroll the page, not zoom into the chart.
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: touch ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  const body = document.querySelector("tbody");
  const heads = [...document.querySelectorAll("thead th")];
  const value = (row, column) => {
    const cell = row.cells[column];
    return "sort" in cell.dataset ? Number(cell.dataset.sort) : cell.textContent.trim();
  };
  const sortBy = (head, column) => {
    const order = head.ariaSort === "descending" ? 1 : -1;
    const compare = (a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1; // unknown ones last
      return order * (typeof x === "number" ? x - y : x.localeCompare(y));
    };
    body.append(...[...body.rows].sort(compare));
    heads.forEach((other) => (other.ariaSort = null));
    head.ariaSort = order === 1 ? "ascending" : "descending";
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sortBy(head, column)));

  const unpack = async (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).text();
  };

  const charts = async () => {
    const [library, drawings] = await Promise.all([unpack("plotly"), unpack("figures")]);
    const script = document.createElement("script");
    script.textContent = library;
    document.head.append(script);
    const figures = JSON.parse(drawings);
    for (const plot of plots) {
      const { data, layout } = figures[plot.id];
      if (data[0]?.type === "heatmap") {
        data[0].text = data[0].z.map(() => data[0].meta);
        // On a phone the names of the runs would take the room of what is drawn; pointing at a cell shows them.
        if (plot.clientWidth < 480) layout.yaxis.showticklabels = false;
      }
      Plotly.newPlot(plot, data, touch ? { ...layout, dragmode: false } : layout, config);
    }
    // Plotly fixes widths in pixels, and paper is narrower than most screens.
    const paperWidth = 680;
    addEventListener("beforeprint", () => plots.forEach((plot) => Plotly.relayout(plot, { width: paperWidth })));
    addEventListener("afterprint", () => plots.forEach((plot) => Plotly.relayout(plot, { width: null })));
  };

  charts().catch((error) => {
    document.getElementById("no-charts").hidden = false;
    console.error(error);
  });
})();
