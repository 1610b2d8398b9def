(() => {
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

  Charts.start((figures) => {
    for (const plot of document.querySelectorAll(".plot")) {
      const { data, layout } = figures[plot.id];
      if (data[0]?.type === "heatmap") {
        data[0].text = data[0].z.map(() => data[0].meta);
        // On a phone the names of the runs would take the room of what is drawn; pointing at a cell shows them.
        if (plot.clientWidth < 480) layout.yaxis.showticklabels = false;
      }
      Plotly.newPlot(plot, data, Charts.handled(layout), Charts.config);
    }
  });
})();
