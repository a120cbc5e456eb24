// -- charts: uPlot in place of every drawn figure that has data ------------------------------------------------------

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = name => (name.startsWith("--") ? css(name) : name);
const drawn = [];

// What a line, or an edge of its band, is at x: a straight line between its points; null outside of them.
function at(xs, ys, x) {
  const next = xs.findIndex(one => one >= x);
  if (x == null || next < 0 || (next === 0 && xs[0] > x)) return null;
  if (xs[next] === x || next === 0) return ys[next];
  const [x0, x1, y0, y1] = [xs[next - 1], xs[next], ys[next - 1], ys[next]];
  return y0 == null || y1 == null ? null : y0 + ((y1 - y0) * (x - x0)) / (x1 - x0);
}

const shown = value => (value == null ? "–" : String(+value.toPrecision(3)));

function valueAt(line, x) {
  const [y, low, high] = [line.y, line.low, line.high].map(part => (part.length ? at(line.x, part, x) : null));
  return shown(y) + (low == null || high == null ? "" : ` [${shown(low)}, ${shown(high)}]`);
}

// Every line is three series: its value, and the two edges of its band.
function seriesOf(line) {
  const edge = { stroke: "transparent", width: 0, points: { show: false }, class: "band", spanGaps: true };
  const few = line.x.length <= 32;
  return [
    {
      label: line.name, stroke: () => colour(line.color), width: line.width, dash: line.dash, spanGaps: true,
      points: { show: few, size: 5, fill: () => colour(line.color) }, 
      value: (plot, y, series, place) => valueAt(line, place == null ? null : plot.data[0][place]),
    },
    ...(line.low.length ? [edge, edge] : []),
  ];
}

function drawRules(plot, rules) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.strokeStyle = css("--muted");
  ctx.setLineDash([3, 4]);
  for (const rule of rules) {
    const y = plot.valToPos(rule, "y", true);
    if (y < bbox.top || y > bbox.top + bbox.height) continue;
    ctx.beginPath();
    ctx.moveTo(bbox.left, y);
    ctx.lineTo(bbox.left + bbox.width, y);
    ctx.stroke();
  }
  ctx.restore();
}

function draw(chart, place) {
  const data = uPlot.join(chart.lines.map(line => [line.x, line.y, ...(line.low.length ? [line.high, line.low] : [])]));
  const series = [{ label: chart.x, value: (_, x) => shown(x) }];
  const bands = [];
  const parts = []; // by series of a value: the series of its edges
  for (const line of chart.lines) {
    const first = series.length;
    series.push(...seriesOf(line));
    if (!line.low.length) continue;
    bands.push({ series: [first + 1, first + 2], fill: () => colour(line.color) + "22" });
    parts[first] = [first + 1, first + 2];
  }
  const axis = { stroke: () => css("--muted"), grid: { stroke: () => css("--rule"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
  const plot = new uPlot({
    title: chart.title, width: place.clientWidth, height: 240, series, bands,
    scales: { x: { time: false }, y: chart.limits ? { range: () => chart.limits } : {} },
    axes: [{ ...axis, grid: { show: false }, size: 28 }, { ...axis, size: 52 }],
    cursor: { points: { size: 7 }, drag: { x: true, y: false } },
    hooks: {
      draw: [own => drawRules(own, chart.rules)],
      setSeries: [(own, place, options) => {
        if (options.show != null) for (const edge of parts[place] || []) own.setSeries(edge, { show: options.show });
      }],
    },
  }, data, place);
  for (const label of place.querySelectorAll(".u-legend .u-series:not(.band) th")) {
    label.tabIndex = 0;
    label.setAttribute("role", "button");
    label.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); label.click(); }
    });
  }
  drawn.push(() => plot.setSize({ width: place.clientWidth, height: 240 }));
}

function drawFigure(figure) {
  const places = document.createElement("div");
  places.className = "charts";
  places.setAttribute("role", "group");
  places.setAttribute("aria-label", figure.querySelector("svg").getAttribute("aria-label"));
  const hint = document.createElement("p");
  hint.className = "hint";
  hint.textContent = "Hover for values. Drag to zoom, double-click to zoom out. Click a name to hide it.";
  figure.prepend(places, hint);
  figure.classList.add("drawn");
  const charts = JSON.parse(figure.dataset.charts);
  const each = charts.map(() => places.appendChild(document.createElement("div")));
  charts.forEach((chart, number) => draw(chart, each[number]));
}

// -- tables: sorted by a click on a header, filtered by text ---------------------------------------------------------

const POWERS = { k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15, E: 1e18 };

// The number that a cell begins with: 1,200 · −0.3 · < 2.1 [1, 3] · 12.3 T · 1:02:03 · 4 (33 %); null where there is none.
function numberOf(text) {
  const plain = text.replaceAll(",", "").replaceAll("−", "-").trim();
  const clock = plain.match(/^(?:(\d+):)?(\d+):(\d\d)\b/);
  if (clock) return (clock[1] || 0) * 3600 + clock[2] * 60 + +clock[3];
  const number = plain.match(/^[<+ ]*(-?\d*\.?\d+(?:e[-+]?\d+)?)(?: ([kMGTPE])\b)?/);
  return number ? number[1] * (POWERS[number[2]] || 1) : null;
}

function compare(one, other) {
  const [a, b] = [numberOf(one), numberOf(other)];
  if (a == null && b == null) return one.localeCompare(other);
  return a == null ? 1 : b == null ? -1 : a - b;
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach(each => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const body = table.tBodies[0];
      const text = row => row.cells[column].textContent;
      const last = row => row.cells[0].textContent === "all"; // a sum stays below what it sums
      const rows = [...body.rows].sort((a, b) => last(a) - last(b) || sign * compare(text(a), text(b)));
      body.append(...rows);
    });
  });
}

function filterable(table) {
  const [label, input] = [document.createElement("label"), document.createElement("input")];
  label.className = "filter";
  input.type = "search";
  label.append("Filter rows", input);
  table.closest(".scroll").before(label);
  input.addEventListener("input", () => {
    for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(input.value.toLowerCase());
  });
}

document.querySelectorAll("figure[data-charts]").forEach(drawFigure);
for (const table of document.querySelectorAll(".scroll > table")) {
  const rows = table.tBodies[0].rows.length;
  const numbers = table.querySelector("th.number"); // words alone stand in an order that means something
  if (numbers && rows > 2) sortable(table);
  if (numbers && rows > 9) filterable(table);
}
const redraw = () => drawn.forEach(each => each());
window.addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
