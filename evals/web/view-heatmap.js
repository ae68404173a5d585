// Needle accuracy by prompt length and depth; a cell leads to its samples.

import { get, Refused, Unreachable } from "./api.js";
import { field, h, integer, patch, setOptions } from "./dom.js";
import { CheckpointPicker, sampledTasks } from "./pickers.js";
import { link, set } from "./route.js";
import { lengthName } from "./scalars.js";
import { checkpointId, store, titleOf } from "./store.js";
import { hideTip, showTip } from "./tip.js";

// Cividis (Nunez, Anderton and Renslow 2018): the same order of lightness for every colour vision.
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const CACHE = 200;

/** Background and ink of a score from 0 to 100. */
function colours(score) {
  const at = (Math.min(Math.max(score, 0), 100) / 100) * (CIVIDIS.length - 1);
  const [low, high] = [CIVIDIS[Math.floor(at)], CIVIDIS[Math.ceil(at)]];
  const mix = [1, 3, 5].map((i) => {
    const [a, b] = [parseInt(low.slice(i, i + 2), 16), parseInt(high.slice(i, i + 2), 16)];
    return Math.round(a + (b - a) * (at - Math.floor(at)));
  });
  return { background: `rgb(${mix.join(" ")})`, ink: at > 4.6 ? "#111" : "#fff" };
}

export class HeatMap {
  #params = new URLSearchParams();
  #maps = new Map(); // key -> GET /heatmap
  #shown = "";

  constructor() {
    this.task = h("select", { on: { change: () => set({ task: this.task.value }) } });
    this.first = new CheckpointPicker("Run", (id) => set({ first: id }));
    this.second = new CheckpointPicker("Beside it", (id) => set({ second: id }));
    this.beside = h("button", { type: "button", on: { click: () => this.#toggleBeside() } });
    this.note = h("p", { class: "note", role: "status" }, "Reading the results ...");
    this.maps = h("div", { class: "maps" });
    this.element = h("section", { "aria-label": "Heat map" },
      h("form", { class: "controls", on: { submit: (event) => event.preventDefault() } },
        field("Task", this.task), this.first.fields, this.second.fields, this.beside),
      this.note, this.maps, scale());
    this.maps.addEventListener("pointerover", (event) => this.#tip(event.target.closest("a")));
    this.maps.addEventListener("focusin", (event) => this.#tip(event.target.closest("a")));
    this.maps.addEventListener("pointerleave", hideTip);
    this.maps.addEventListener("focusout", hideTip);
  }

  show(params) {
    this.#params = params;
    this.changed();
  }

  /** The service answers again: what was missing is read. */
  tick() {
    return this.failed ? this.changed() : null;
  }

  async changed() {
    if (!store.loaded) return;
    this.failed = false;
    const tasks = needleTasks();
    if (!tasks.length) {
      this.note.textContent = "No needle task has been scored yet.";
      return;
    }
    const task = tasks.includes(this.#params.get("task")) ? this.#params.get("task") : tasks[0];
    setOptions(this.task, tasks.map((name) => [name, name]), task);
    const two = this.#params.has("second");
    const chosen = [this.first.sync(task, this.#params.get("first")), two && this.second.sync(task, this.#params.get("second"))];
    for (const one of this.second.fields) one.hidden = !two;
    this.beside.textContent = two ? "One map" : "Two maps";
    await this.#draw(chosen.filter(Boolean));
  }

  #toggleBeside() {
    const beside = this.#params.has("second") ? "" : store.runs().find((run) => run !== this.first.run.value) ?? this.first.run.value;
    set({ second: beside && `${beside}@${this.first.step.value}` });
  }

  async #draw(chosen) {
    const wanted = chosen.map(({ result }) => result.key).join();
    this.#shown = wanted;
    const tables = await Promise.all(chosen.map((one) => this.#table(one)));
    if (this.#shown !== wanted) return; // another choice was made while these were read
    patch(this.maps, tables, { key: (table) => table.dataset.of, create: (table) => table });
    this.note.textContent = "Share of right answers in percent, by prompt length and by where in it the answer stands. A cell leads to its samples.";
  }

  async #table({ run, step, result }) {
    const caption = titleOf(run, step);
    try {
      const map = this.#maps.get(result.key) ?? (await get(`heatmap/${result.key}`));
      this.#maps.set(result.key, map);
      if (this.#maps.size > CACHE) this.#maps.delete(this.#maps.keys().next().value);
      return heatTable(map, { caption, key: result.key, checkpoint: checkpointId(run, step) });
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
      this.failed ||= error instanceof Unreachable;
      return h("figure", { "data-of": `${result.key} ${error.message}` }, h("figcaption", null, caption), h("p", { class: "empty" }, error.message));
    }
  }

  #tip(cell) {
    if (!cell?.dataset.samples) {
      hideTip();
      return;
    }
    const { score, samples, length, depth } = cell.dataset;
    showTip(cell.getBoundingClientRect(), h("p", { class: "big" }, `${score}%`, h("span", null, `of ${samples} samples`)),
      h("p", null, `${integer(Number(length))} tokens, depth ${depth}`));
  }
}

/** Tasks with a heat map: groups are prompt lengths. */
function needleTasks() {
  const rows = [...store.results.values()];
  const byLength = new Set(rows.filter((row) => Object.keys(row.groups ?? {}).some((name) => /^\d+$/.test(name))).map((row) => row.task));
  return sampledTasks().filter((task) => byLength.has(task));
}

/** Depths are rows, lengths are columns. */
function heatTable({ lengths, depths, cells }, { caption, key, checkpoint }) {
  const of = `${key} ${checkpoint}`;
  if (!lengths.length) {
    return h("figure", { "data-of": of }, h("figcaption", null, caption), h("p", { class: "empty" }, "This task does not vary the depth."));
  }
  const head = h("tr", null, h("th", { scope: "col", class: "corner" }, "depth \\ length"),
    lengths.map((length) => h("th", { scope: "col" }, lengthName(String(length)))));
  const rows = depths.slice(0, -1).map((low, j) => {
    const range = `${Math.round(100 * low)}-${Math.round(100 * depths[j + 1])}%`;
    return h("tr", null, h("th", { scope: "row" }, range),
      lengths.map((length, i) => heatCell(cells[i][j], { length, range, key, checkpoint, edges: `${low}-${depths[j + 1]}` })));
  });
  const table = h("table", { class: "heat" }, h("thead", null, head), h("tbody", null, rows));
  return h("figure", { "data-of": of }, h("figcaption", null, caption), h("div", { class: "scroll" }, table));
}

function heatCell(cell, { length, range, key, checkpoint, edges }) {
  if (!cell) return h("td", { class: "none" }, "-");
  const score = Math.round(cell.score);
  const { background, ink } = colours(cell.score);
  const anchor = h("a", {
    href: link("samples", { key, checkpoint, group: length, depth: edges }),
    "aria-label": `${score} percent of ${cell.samples} samples, length ${length}, depth ${range}: show them`,
    "data-score": cell.score.toFixed(1), "data-samples": cell.samples, "data-length": length, "data-depth": range,
  }, String(score));
  anchor.style.background = background;
  anchor.style.color = ink;
  return h("td", null, anchor);
}

/** The colours with their numbers. */
function scale() {
  const steps = Array.from({ length: 11 }, (_, i) => {
    const swatch = h("span", null, String(10 * i));
    const { background, ink } = colours(10 * i);
    swatch.style.background = background;
    swatch.style.color = ink;
    return swatch;
  });
  return h("p", { class: "scale", "aria-hidden": "true" }, steps, h("b", null, "% right"));
}
