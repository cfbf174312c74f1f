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

// The places of a trace: steps or tokens; and the other of the two, for the pointer.
function placed(trace) {
  const run = trace.meta.run;
  trace.tokens ??= trace.x.map((step) => (step === null ? null : tokensAt(run, step)));
  const byTokens = over.value === "tokens";
  const text = () =>
    byTokens
      ? trace.x.map((step) => `step ${Math.round(step).toLocaleString("en")}`)
      : trace.tokens.map((seen) => `${short(seen)} tok`);
  const fixed = trace.meta.own_text || trace.meta.heat;
  return { x: byTokens ? trace.tokens : trace.x, text: fixed ? trace.text : text() };
}

function styled(trace) {
  const meta = trace.meta;
  const one = { ...trace, ...(meta.run === undefined ? {} : placed(trace)) };
  delete one.tokens;
  if (meta.colours) {
    const colours = meta.colours.map(colour);
    one.marker = { color: colours, line: { ...trace.marker.line, color: colours } };
    one.insidetextfont = { color: colour("on") };
  }
  if (meta.heat) {
    one.colorscale = [[0, colour("cool")], [1, colour("c0")]];
    one.colorbar = { ...trace.colorbar, tickfont: { size: 11 } };
  }
  if (meta.colour) {
    const strong = smoothing.value === meta.smoothing || meta.smoothing === undefined;
    one.line = { ...trace.line, color: colour(meta.colour) };
    one.marker = { ...trace.marker, color: colour(meta.colour) };
    one.visible = (strong || meta.faint) && !hidden.has(meta.key);
    if (!strong) {
      one.opacity = 0.32;
      one.line = { ...one.line, width: 1 };
      one.hoverinfo = "skip";
      delete one.hovertemplate;
    }
  }
  return one;
}

function laidOut(figure, number, narrow) {
  const axis = { gridcolor: colour("grid"), zeroline: false, linecolor: colour("edge") };
  const layout = figure.layout;
  const isTime = Boolean(layout.xaxis && layout.xaxis.tickvals);
  const x = isTime
    ? {}
    : { title: { text: over.value, standoff: 6 }, exponentformat: "B", nticks: narrow ? 5 : 8,
        hoverformat: over.value === "tokens" ? ".4s" : ",.0f" };
  return {
    ...layout,
    autosize: true,
    showlegend: false,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("soft"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: layout.yaxis.visible === false ? 8 : 56, r: 14, t: 24, b: 44 },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("edge"),
      font: { color: colour("ink"), size: 12 }, namelength: narrow ? 18 : 40, align: "left" },
    dragmode: touch ? false : "zoom",
    xaxis: { ...axis, ...x, ...layout.xaxis },
    yaxis: { ...axis, exponentformat: "SI", ...layout.yaxis, type: kind(layout, number) },
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
  Plotly.react(box, figure.data.map(styled), layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: touch ? false : "hover",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
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
