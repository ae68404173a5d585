// Line charts in SVG: axes, grid, lines, a read-out that follows the pointer or the arrow keys.

import { compact, h, s } from "./dom.js";
import { hideTip, showTip } from "./tip.js";

const HEIGHT = 300;
const MARGIN = { left: 58, right: 14, top: 10, bottom: 42 };
const COLOURS = 6;
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "12 4", "4 4"];

const LEVEL = "9 6";

/** Attributes of the line with this number: 6 colours, then the same with other dashes. */
function stroke(slot) {
  return { class: `c${slot % COLOURS}`, "stroke-dasharray": DASHES[Math.floor(slot / COLOURS) % DASHES.length] };
}

/** Attributes of a horizontal line: that of a model has its colour, that of a guess is thin. */
function levelStroke(slot) {
  if (slot === undefined) return { class: "guess", "stroke-width": 1, "stroke-dasharray": "2 4" };
  return { ...stroke(slot), "stroke-width": 1.75, "stroke-dasharray": LEVEL };
}

/** A short piece of a run's line, or of a baseline's, for legends. */
export function key(slot, { level = false } = {}) {
  const line = s("line", { x1: 0, x2: 28, y1: 5, y2: 5, "stroke-width": 2.5, ...(level ? levelStroke(slot) : stroke(slot)) });
  return s("svg", { class: "key", viewBox: "0 0 28 10", "aria-hidden": "true" }, line);
}

/** A chart that redraws itself when its width changes; its height is fixed, so nothing below it moves. */
export class LineChart {
  #model = null;
  #at = -1; // index into the sorted x values, of the read-out

  constructor() {
    this.caption = h("figcaption");
    this.plot = h("div", { class: "plot", tabindex: "0", role: "img" });
    this.element = h("figure", { class: "chart" }, this.caption, this.plot);
    this.plot.addEventListener("pointermove", (event) => this.#point(event));
    this.plot.addEventListener("pointerleave", () => this.#leave());
    this.plot.addEventListener("blur", () => this.#leave());
    this.plot.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.#redraw()).observe(this.plot);
  }

  /**
   * Draw { title, series: [{ name, slot, points: [{ x, y, low, high }] }], levels: [{ name, slot, y }], xLabel, logX,
   * logY, bars, format }. A level is a horizontal line; one without a slot is thin.
   */
  draw(model) {
    this.#model = model;
    this.caption.textContent = model.title;
    this.#redraw();
  }

  #redraw() {
    const width = this.plot.clientWidth;
    if (!this.#model || !width) return;
    const { series, logX, logY } = this.#model;
    const drawable = (p) => Number.isFinite(p.x) && Number.isFinite(p.y) && (p.x > 0 || !logX) && (p.y > 0 || !logY);
    this.kept = series.map((one) => ({ ...one, points: one.points.filter(drawable) })).filter((one) => one.points.length);
    this.levels = this.#model.levels.filter(({ y }) => Number.isFinite(y) && (y > 0 || !logY));
    this.plot.setAttribute("aria-label", this.#describe());
    if (!this.kept.length) {
      const models = this.levels.filter(({ slot }) => slot !== undefined).map(({ name, y }) => `${name} ${this.#model.format(y)}`);
      const text = models.length ? `No run has it yet; baselines: ${models.join(", ")}.` : "Nothing to draw with these settings.";
      this.plot.replaceChildren(h("p", { class: "empty" }, text));
      return;
    }
    const points = this.kept.flatMap((one) => one.points);
    this.x = axis(points.map((p) => p.x), logX, [MARGIN.left, width - MARGIN.right]);
    this.y = axis([...extent(points, this.#model.bars), ...this.levels.map(({ y }) => y)], logY, [HEIGHT - MARGIN.bottom, MARGIN.top]);
    this.values = [...new Set(points.map((p) => p.x))].sort((a, b) => a - b);
    this.cross = s("line", { class: "cross", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
    const lines = this.kept.flatMap((one) => drawLine(one, this.x, this.y, this.#model.bars));
    const svg = s("svg", { width, height: HEIGHT, "aria-hidden": "true" });
    const levels = this.levels.flatMap((one) => drawLevel(one, this.y, width));
    svg.append(...grid(this.x, this.y, width), title(this.#model.xLabel, width), this.cross, ...levels, ...lines);
    this.plot.replaceChildren(svg);
  }

  #describe() {
    const { title: name, xLabel, format } = this.#model;
    const ends = this.kept.map((one) => ({ name: one.name, y: one.points.at(-1).y }));
    const last = [...ends, ...this.levels].map((one) => `${one.name} ${format(one.y)}`);
    return `${name} against ${xLabel}; the last values: ${last.join(", ") || "none"}. Arrow keys read the points.`;
  }

  #point(event) {
    if (!this.kept?.length) return;
    const at = event.clientX - this.plot.getBoundingClientRect().left;
    let best = 0;
    this.values.forEach((x, i) => {
      if (Math.abs(this.x.place(x) - at) < Math.abs(this.x.place(this.values[best]) - at)) best = i;
    });
    this.#read(best);
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !this.kept?.length) return;
    event.preventDefault();
    this.#read(Math.min(Math.max(this.#at + step, 0), this.values.length - 1));
  }

  /** Every line's value at one x, the largest first, beside a vertical line. */
  #read(index) {
    this.#at = index;
    const x = this.values[index];
    const place = this.x.place(x);
    for (const [name, value] of Object.entries({ x1: place, x2: place, visibility: "visible" })) this.cross.setAttribute(name, value);
    const rows = [...this.kept, ...this.levels.map((one) => ({ ...one, points: [{ x, y: one.y }], level: true }))]
      .map((one) => ({ ...one, point: one.points.find((p) => p.x === x) }))
      .filter((one) => one.point)
      .sort((a, b) => b.point.y - a.point.y)
      .map((one) => {
        const value = h("td", { class: "number" }, this.#text(one.point));
        return h("tr", null, h("td", null, key(one.slot, one)), h("th", { scope: "row" }, one.name), value);
      });
    const box = this.plot.getBoundingClientRect();
    const near = { left: box.left + place + 12, top: box.top + MARGIN.top, bottom: box.top + MARGIN.top };
    showTip(near, h("p", null, `${this.#model.xName} ${compact(x)}`), h("table", null, h("tbody", null, rows)));
  }

  #text(point) {
    const text = this.#model.format(point.y);
    return point.low === undefined ? text : `${text} (${point.low.toFixed(1)} to ${point.high.toFixed(1)})`;
  }

  #leave() {
    this.#at = -1;
    this.cross?.setAttribute("visibility", "hidden");
    hideTip();
  }
}

/** All y values, with the ends of the intervals where they are drawn. */
function extent(points, bars) {
  return points.flatMap((p) => (bars && p.low !== undefined ? [p.y, p.low, p.high] : [p.y]));
}

function axis(values, log, [start, end]) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (log && value <= 0) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (log) [low, high] = [low / 1.1, high * 1.1];
  else {
    const pad = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
    [low, high] = [low >= 0 ? Math.max(low - pad, 0) : low - pad, high + pad]; // nothing below zero that never is
  }
  const map = log ? Math.log10 : (v) => v;
  const place = (value) => start + ((end - start) * (map(value) - map(low))) / (map(high) - map(low));
  return { low, high, log, place };
}

/** Round values inside an axis: steps of 1, 2 or 5; on a log axis powers of ten, or 1-2-5 in few decades. */
function ticks({ low, high, log }, wanted) {
  if (log) {
    const marks = Math.log10(high / low) < 3 ? [1, 2, 5] : [1];
    const found = [];
    for (let d = Math.floor(Math.log10(low)); d <= Math.ceil(Math.log10(high)); d++) {
      for (const m of marks) if (m * 10 ** d >= low && m * 10 ** d <= high) found.push(m * 10 ** d);
    }
    return found;
  }
  const raw = (high - low) / wanted;
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = base * [1, 2, 5, 10].find((m) => base * m >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) found.push(i * step);
  return found;
}

function grid(x, y, width) {
  const right = width - MARGIN.right;
  const bottom = HEIGHT - MARGIN.bottom;
  const columns = ticks(x, width < 500 ? 4 : 6).flatMap((value) => {
    const at = x.place(value);
    return [s("line", { class: "grid", x1: at, x2: at, y1: MARGIN.top, y2: bottom }), label(at, bottom + 17, compact(value), "middle")];
  });
  const rows = ticks(y, 6).flatMap((value) => {
    const at = y.place(value);
    const line = s("line", { class: "grid", x1: MARGIN.left, x2: right, y1: at, y2: at });
    return [line, label(MARGIN.left - 8, at + 4, compact(value), "end")];
  });
  return [...columns, ...rows];
}

function label(x, y, text, anchor) {
  return s("text", { x, y, "text-anchor": anchor }, text);
}

function title(text, width) {
  return label((MARGIN.left + width - MARGIN.right) / 2, HEIGHT - 6, text, "middle");
}

function drawLine({ points, slot }, x, y, bars) {
  const path = points.map((p) => `${x.place(p.x).toFixed(1)},${y.place(p.y).toFixed(1)}`).join(" ");
  const parts = [s("polyline", { points: path, fill: "none", "stroke-width": 2, ...stroke(slot) })];
  if (bars) parts.push(...points.filter((p) => p.low !== undefined).map((p) => whisker(p, slot, x, y)));
  if (points.length <= 24) {
    parts.push(...points.map((p) => s("circle", { cx: x.place(p.x), cy: y.place(p.y), r: 2.5, class: `dot c${slot % COLOURS}` })));
  }
  return parts;
}

function drawLevel({ name, slot, y: value }, y, width) {
  const at = y.place(value);
  const line = s("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at, ...levelStroke(slot) });
  return slot === undefined ? [line, label(width - MARGIN.right, at - 4, name, "end")] : [line];
}

function whisker(point, slot, x, y) {
  const at = x.place(point.x);
  const low = y.log ? Math.max(point.low, y.low) : point.low;
  return s("line", { x1: at, x2: at, y1: y.place(low), y2: y.place(point.high), class: `whisker c${slot % COLOURS}` });
}
