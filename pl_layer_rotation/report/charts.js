"use strict";

// What pages with charts share: the packed library and figures are unpacked and drawn, and fit what they are printed on.
const Charts = (() => {
  // Under a finger a drag must scroll the page, not zoom into the chart.
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: touch ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  const handled = (layout) => (touch ? { ...layout, dragmode: false } : layout);

  const unpack = async (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).text();
  };

  const load = async (draw, columns) => {
    const [library, figures] = await Promise.all([unpack("plotly"), unpack("figures")]);
    const script = document.createElement("script");
    script.textContent = library;
    document.head.append(script);
    draw(JSON.parse(figures));
    // Plotly fixes widths in pixels, and paper is narrower than most screens.
    const paperWidth = 680;
    const plots = [...document.querySelectorAll(".plot")];
    addEventListener("beforeprint", () => plots.forEach((p) => Plotly.relayout(p, { width: paperWidth / columns(p) })));
    addEventListener("afterprint", () => plots.forEach((p) => Plotly.relayout(p, { width: null })));
  };

  // `columns` says how many charts stand beside each other on paper.
  const start = (draw, columns = () => 1) =>
    load(draw, columns).catch((error) => {
      document.getElementById("no-charts").hidden = false;
      console.error(error);
    });
  return { config, handled, start };
})();
