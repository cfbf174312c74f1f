"use strict";
// Draws the figures of a report. All it needs stands in the page, and nothing is asked for.
// `meta` of a trace says what the page decides: see hybrid_train/tracking/plotly.py.

const page = JSON.parse(document.getElementById("data").textContent);
const boxes = page.figures.map((_, number) =>
  document.querySelector(`.plot[data-figure="${number}"]`));
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches; // there, a finger scrolls and does not zoom
const hidden = new Set(); // keys of curves that the reader has switched off
const logs = page.figures.map((figure) => figure.layout.yaxis.type === "log");
const smoothing = document.getElementById("smoothing");
const over = document.getElementById("over");
const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Tokens at a step: `runs` has the corners of a line.
function tokensAt(run, step) {
  const { steps, tokens } = page.runs[run];
  let low = 0;
  let high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle;
  }
  const share = high > low ? (step - steps[low]) / (steps[high] - steps[low] || 1) : 0;
  return tokens[low] + share * (tokens[high] - tokens[low]);
}

function short(number) {
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (number >= unit) return Number((number / unit).toPrecision(3)) + letter;
  }
  return String(Math.round(number));
}

// Steps or tokens, whichever is asked for; and the other of the two, for the pointer.
function placed(trace) {
  const { run, own_text: ownText, heat } = trace.meta;
  const byTokens = over.value === "tokens";
  const x = byTokens ? trace.x.map((step) => step && tokensAt(run, step)) : trace.x;
  if (ownText || heat) return { x };
  const text = byTokens
    ? trace.x.map((step) => `step ${grouped.format(step)}`)
    : trace.x.map((step) => `${short(tokensAt(run, step))} tok`);
  return { x, text };
}

// A trace as it is now; null if it is not to be seen.
function styled(trace) {
  const { meta } = trace;
  const strong = meta.smoothing === undefined || meta.smoothing === smoothing.value;
  if ((!strong && !meta.faint) || hidden.has(meta.key)) return null;
  const one = { ...trace, ...(meta.run === undefined ? {} : placed(trace)) };
  if (meta.colours) {
    const colours = meta.colours.map(colour);
    one.marker = { color: colours, line: { ...trace.marker.line, color: colours } };
    one.insidetextfont = { color: colour("on") };
  }
  if (meta.heat) one.colorscale = [[0, colour("cool")], [1, colour("c0")]];
  if (meta.colour) {
    one.line = { ...trace.line, color: colour(meta.colour) };
    one.marker = { ...trace.marker, color: colour(meta.colour) };
  }
  if (!strong) {
    one.opacity = 0.32;
    one.line.width = 1;
    one.hoverinfo = "skip";
    delete one.hovertemplate;
  }
  return one;
}

function laidOut(figure, number, narrow) {
  const axis = { gridcolor: colour("grid"), zeroline: false, linecolor: colour("edge") };
  const layout = figure.layout;
  const isTime = Boolean(layout.xaxis && layout.xaxis.tickvals);
  const x = isTime
    ? {}
    : { title: { text: over.value, standoff: 8 }, exponentformat: "B", nticks: narrow ? 5 : 8,
        unifiedhovertitle: {
          text: over.value === "tokens" ? "%{x:.4s} tokens" : "step %{x:,.0f}" } };
  return {
    ...layout,
    autosize: true,
    showlegend: false,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("soft"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: layout.yaxis.visible === false ? 8 : 56, r: 14, t: 24, b: 44, ...layout.margin },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("soft"), activecolor: colour("ink") },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("edge"),
      font: { color: colour("ink"), size: 12 }, namelength: narrow ? 18 : 40, align: "left" },
    dragmode: touch ? false : "zoom",
    xaxis: { ...axis, ...x, ...layout.xaxis },
    yaxis: { ...axis, exponentformat: "SI", ...layout.yaxis, type: kind(layout, number),
      ...(kind(layout, number) === "log" ? { dtick: figure.log_dtick } : {}) },
  };
}

function kind(layout, number) {
  const own = layout.yaxis.type;
  return own === "log" || own === "linear" ? (logs[number] ? "log" : "linear") : own;
}

function draw(number) {
  const box = boxes[number];
  const figure = page.figures[number];
  const layout = laidOut(figure, number, box.clientWidth < 480);
  Plotly.react(box, figure.data.map(styled).filter(Boolean), layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: touch ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  });
}

function drawAll() {
  boxes.forEach((_, number) => draw(number));
}

for (const choice of [smoothing, over]) choice.addEventListener("change", drawAll);
dark.addEventListener("change", drawAll);
for (const input of document.querySelectorAll("input.log")) {
  const number = Number(input.dataset.figure);
  input.checked = logs[number];
  input.addEventListener("change", () => {
    logs[number] = input.checked;
    draw(number);
  });
}
for (const button of document.querySelectorAll("button.entry")) {
  button.addEventListener("click", () => {
    const key = button.dataset.key;
    if (!hidden.delete(key)) hidden.add(key);
    for (const same of document.querySelectorAll("button.entry")) {
      if (same.dataset.key === key) same.setAttribute("aria-pressed", String(!hidden.has(key)));
    }
    page.figures.forEach((figure, number) => {
      if (figure.data.some((trace) => trace.meta.key === key)) draw(number);
    });
  });
}
drawAll();
