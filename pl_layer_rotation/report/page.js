(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Rows of a table by the column that was clicked; what has no value stays last.
  const sortable = (table) => {
    const body = table.tBodies[0];
    const words = new Intl.Collator("en", { numeric: true });
    const number = (text) => text.replaceAll(",", "").split(" × ").reduce((product, part) => product * Number(part), 1);
    const compare = (kind) => (kind === "text" ? words.compare : (a, b) => number(a) - number(b));
    const missing = (kind, text) => kind !== "text" && Number.isNaN(number(text));
    for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const kind = head.dataset.kind;
        const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const text = (row) => row.cells[column].textContent.trim();
        const rows = [...body.rows].sort((a, b) => {
          const [first, second] = [text(a), text(b)];
          const gaps = missing(kind, first) - missing(kind, second);
          return gaps || (missing(kind, first) ? 0 : sign * compare(kind)(first, second));
        });
        body.append(...rows);
      });
    }
  };

  // A part of a name leaves its layers in the table and lets the other lines fade.
  const filterable = (section) => {
    const fields = all(".search", section);
    const rows = all(".layers tbody tr", section);
    const status = section.querySelector(".matches");
    const apply = () => {
      const part = fields[0].value.trim().toLowerCase();
      const found = rows.map((row) => row.cells[1].textContent.toLowerCase().includes(part));
      rows.forEach((row, depth) => { row.hidden = !found[depth]; });
      status.textContent = part ? `${found.filter(Boolean).length} of ${rows.length} layers` : "";
      for (const line of all(".panel .scatterlayer", section)) {
        all(".trace", line).forEach((trace, depth) => { trace.style.opacity = found[depth] === false ? 0.06 : null; });
      }
    };
    for (const field of fields) {
      field.hidden = false;
      field.addEventListener("input", () => {
        for (const other of fields) other.value = field.value;
        apply();
      });
    }
    return apply;
  };

  all("table").forEach(sortable);
  const filters = new Map(all("section").filter((s) => s.querySelector(".layers")).map((s) => [s, filterable(s)]));

  const compact = (layout) => ({
    ...layout,
    margin: { l: 40, r: 8, t: 8, b: 28 },
    annotations: [],
    coloraxis: { ...layout.coloraxis, showscale: false },
    xaxis: { ...layout.xaxis, title: undefined, nticks: 5 },
    yaxis: { ...layout.yaxis, title: undefined },
  });
  const logarithmic = (layout) => ({
    ...layout,
    yaxis: { ...layout.yaxis, type: "log", range: undefined, rangemode: "normal" },
  });

  const draw = (figures, plot, kind, log) => {
    const { data, layout } = structuredClone(figures[`${kind}-${plot.dataset.run}`]);
    const sized = "compact" in plot.dataset ? compact(layout) : layout;
    const scaled = log ? logarithmic(sized) : sized;
    return Plotly.react(plot, data, Charts.handled(scaled), Charts.config);
  };

  const switched = (figures, panel) => {
    const chosen = (name) => panel.querySelector(`[data-choice=${name}] input:checked`).value;
    const update = () => {
      const kind = chosen("view");
      for (const plot of all(".plot", panel)) draw(figures, plot, kind, chosen("scale") === "log");
      for (const caption of all("[data-view]", panel)) caption.hidden = caption.dataset.view !== kind;
      filters.get(panel.closest("section"))?.();
    };
    panel.addEventListener("change", (event) => { if (event.target.type === "radio") update(); });
    panel.querySelector(".controls").hidden = false;
    update();
  };

  const drawAll = (figures) => {
    for (const panel of all(".panel")) switched(figures, panel);
    for (const plot of all(".plot[data-kind]")) draw(figures, plot, plot.dataset.kind, false);
  };
  Charts.start(drawAll, (plot) => ("compact" in plot.dataset ? 2 : 1));
})();
