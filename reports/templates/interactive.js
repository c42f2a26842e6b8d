"use strict";
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const colours = [0, 1, 2, 3, 4, 5].map((index) => colour("--l" + index));
  const ink = colour("--ink"), paper = colour("--paper"), rule = colour("--rule");
  const place = document.getElementById("interactive");
  const axis = (title, more) => Object.assign(
    { title: { text: title }, gridcolor: rule, zerolinecolor: rule, linecolor: rule, automargin: true }, more);
  for (const figure of figures) {
    const box = document.createElement("div");
    box.className = "plot";
    place.appendChild(box);
    const kinds = figure.name === "scatter" || figure.name === "targets" || figure.name === "knobs";
    const ofKind = [colours[0], colours[2], colours[5], colours[1]];
    const traces = figure.traces.map((trace) => ({
      type: "scatter", mode: trace.mode, name: trace.name, x: trace.x, y: trace.y, text: trace.text,
      hovertemplate: "%{text}<br>%{x}, %{y}<extra></extra>",
      showlegend: figure.name !== "knobs",
      line: { color: kinds ? ofKind[trace.style] : colours[trace.style % 6], width: 1.5 },
      marker: { color: kinds ? ofKind[trace.style] : colours[trace.style % 6], size: 7 },
      opacity: figure.name === "knobs" ? 0.55 : 0.9,
    }));
    if (figure.name === "knobs") {
      for (const trace of traces) trace.hovertemplate = "%{text}<extra></extra>";
    }
    const ticks = figure.ticks
      ? { tickmode: "array", tickvals: figure.ticks.map((_, index) => index), ticktext: figure.ticks } : {};
    Plotly.newPlot(box, traces, {
      title: { text: figure.title, font: { size: 15 } },
      xaxis: axis(figure.x, ticks),
      yaxis: axis(figure.y, figure.log ? { type: "log" } : {}),
      paper_bgcolor: paper, plot_bgcolor: paper, font: { color: ink, family: "system-ui, sans-serif", size: 12 },
      hovermode: "closest", margin: { t: 44, r: 16 }, legend: { orientation: "h", y: -0.25 }, height: 420,
    }, { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["toImage"] });
  }
})();
