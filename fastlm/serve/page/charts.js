// Charts as SVG: lines over time with bands, and bars of a histogram. Colours come from the style
// sheet, texts become text nodes.

import { el } from "./common.js";

const NS = "http://www.w3.org/2000/svg";
const HEIGHT = 130, LEFT = 50, RIGHT = 8, TOP = 8, BOTTOM = 18;

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Return the smallest of 1, 2, 5, 10, ... that is at least ``value``. */
function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value * 0.999) * power;
}

const point = (value) => (Array.isArray(value) ? value[0] : value);

/** Create the figure of a chart; return its caption, its SVG element and the width. */
function frame(parent, title, label) {
  const caption = el("span", { className: "quiet" });
  const figure = el("figure", {}, el("figcaption", {}, title, caption));
  parent.append(figure);
  const style = getComputedStyle(figure);
  const width = Math.max(160, figure.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight));
  const drawing = svg("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": `${title}: ${label}`,
  });
  figure.append(drawing);
  return { caption, drawing, width };
}

function axis(drawing, width, max, format) {
  const y = (value) => HEIGHT - BOTTOM - (value / max) * (HEIGHT - TOP - BOTTOM);
  for (const share of [0, 0.5, 1]) {
    const height = y(share * max);
    drawing.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: height, y2: height }));
    drawing.append(svg("text", { x: LEFT - 5, y: height + 4, "text-anchor": "end" }, format(share * max)));
  }
  return y;
}

/** Draw lines over time. ``series``: [{name, color, values, dashed}], a value for each period between
 * ``edges`` (seconds): a number, [number, low, high], or null. ``minTop``: the smallest top of
 * the axis; ``maxTop``: the largest.
 */
export function lines(parent, title, series, edges, { format, time, minTop = 0, maxTop = Infinity }) {
  const values = series.flatMap((line) => line.values).filter((value) => value !== null);
  const last = (line) => line.values.findLast((value) => value !== null) ?? null;
  const formatted = (value) => (value === null ? "none" : format(point(value)));
  const names = [...new Set(series.map((line) => line.name))];
  const text = (value) => names.map((name) => `${name} ${series.filter((line) => line.name === name)
    .map((line) => formatted(value(line))).join(" / ")}`.trim()).join(", ");
  const label = text(last);
  const { caption, drawing, width } = frame(parent, title, values.length ? label : "no data");
  const peak = Math.max(minTop, ...values.map(point));
  const bound = Math.max(0, ...values.map((value) => (Array.isArray(value) ? value[2] : 0)));
  const high = Math.min(maxTop, ceiling(Math.max(peak * 1.02, Math.min(bound, 2.5 * peak)))); // a wide band may be cut
  const y = axis(drawing, width, high, format), count = edges.length - 1;
  const x = (i) => LEFT + ((i + 0.5) / count) * (width - LEFT - RIGHT);
  for (const line of series) {
    for (const run of runs(line.values)) {
      const up = run.map(([i, value]) => `${x(i)},${y(Math.min(high, point(value)))}`);
      if (Array.isArray(run[0][1])) {
        const edge = (k) => run.map(([i, value]) => `${x(i)},${y(Math.min(high, value[k]))}`);
        const band = svg("polygon", { class: "band", points: [...edge(2), ...edge(1).reverse()].join(" ") });
        band.style.fill = line.color;
        drawing.append(band);
      }
      const [cx, cy] = up[0].split(",");
      const shape = run.length > 1
        ? svg("polyline", { class: `line${line.dashed ? " dashed" : ""}`, points: up.join(" ") })
        : svg("circle", { cx, cy, r: 2.2 });
      shape.style[run.length > 1 ? "stroke" : "fill"] = line.color;
      drawing.append(shape);
    }
  }
  for (const [i, anchor] of [[0, "start"], [count / 2, "middle"], [count, "end"]]) {
    const left = LEFT + (i / count) * (width - LEFT - RIGHT);
    drawing.append(svg("text", { x: left, y: HEIGHT - 4, "text-anchor": anchor }, time(edges[Math.round(i)])));
  }
  if (!values.length) return void (caption.textContent = "no data in this period");
  const setCaption = (i, when) => {
    caption.textContent = `${when}: ${text((line) => (i === null ? last(line) : line.values[i]))}`;
  };
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  drawing.append(cursor);
  setCaption(null, "latest");
  drawing.onpointermove = (event) => {
    const box = drawing.getBoundingClientRect();
    const share = ((event.clientX - box.left) * (width / box.width) - LEFT) / (width - LEFT - RIGHT);
    const i = Math.max(0, Math.min(count - 1, Math.floor(share * count)));
    for (const name of ["x1", "x2"]) cursor.setAttribute(name, x(i));
    cursor.setAttribute("visibility", "visible");
    setCaption(i, time(edges[i]));
  };
  drawing.onpointerleave = () => { cursor.setAttribute("visibility", "hidden"); setCaption(null, "latest"); };
}

/** Return the longest runs without null, as [[index, value], ...]. */
function runs(values) {
  const result = [];
  values.forEach((value, i) => {
    if (value === null) return;
    if (i === 0 || values[i - 1] === null) result.push([]);
    result.at(-1).push([i, value]);
  });
  return result;
}

/** Draw bars: the share of each of ``series`` between ``edges``, below the first and above the last. ``series``: [{name, color, counts}].
 */
export function bars(parent, title, series, edges) {
  const shares = series.map(({ counts }) => {
    const sum = counts.reduce((a, b) => a + b, 0);
    return counts.map((n) => (sum ? n / sum : 0));
  });
  const percent = (value) => `${Math.round(value * 100)} %`;
  const names = [`under ${edges[0]}`, ...edges.slice(1).map((edge, i) => `${edges[i]} to ${edge - 1}`), `${edges.at(-1)} and more`];
  const peak = (share) => names[share.indexOf(Math.max(...share))];
  const empty = !shares.some((share) => share.some(Boolean));
  const label = series.map((group, i) => `${group.name} mostly ${peak(shares[i])} tokens`).join(", ");
  const { caption, drawing, width } = frame(parent, title, empty ? "no data" : label);
  caption.textContent = empty ? "no data in this period" : label;
  const max = ceiling(Math.max(0.05, ...shares.flat()));
  const y = axis(drawing, width, max, percent), step = (width - LEFT - RIGHT) / names.length;
  const barWidth = (step * 0.84) / series.length;
  shares.forEach((share, k) => share.forEach((value, i) => {
    const bar = svg("rect", {
      x: LEFT + i * step + step * 0.08 + k * barWidth, y: y(value), width: Math.max(1, barWidth - 0.5),
      height: Math.max(0, HEIGHT - BOTTOM - y(value)),
    }, svg("title", {}, `${series[k].name}, ${names[i]} tokens: ${percent(value)} (${series[k].counts[i]})`));
    bar.style.fill = series[k].color;
    drawing.append(bar);
  }));
  edges.forEach((edge, i) => {
    if (i % 2 === 0) drawing.append(svg("text", { x: LEFT + (i + 1) * step, y: HEIGHT - 4, "text-anchor": "middle" }, edge));
  });
}
