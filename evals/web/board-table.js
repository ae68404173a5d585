// The leaderboard's table: two rows of headings, sorting, one cell in the order of the tab key, a read-out per value.

import { age, compact, h, integer, patch } from "./dom.js";
import { go, link } from "./route.js";
import { format, interval, lowerIsBetter, shortName } from "./scalars.js";
import { shareOf, store, titleOf } from "./store.js";
import { hideTip, showTip } from "./tip.js";

const FIXED = ["run", "step", "tokens"];

export class BoardTable {
  #rows = new Map(); // id -> row
  #columns = [];
  #best = [];
  #reached = null; // the cell that the tab key reaches

  /** `sort` gets the name of a heading, `tick` a row's id and whether it is ticked; `more` is asked for further rows. */
  constructor({ sort, tick, more }) {
    this.head = h("thead");
    this.body = h("tbody");
    const table = h("table", { class: "board", role: "grid", "aria-label": "Leaderboard" }, this.head, this.body);
    this.end = h("div", { class: "end" });
    this.element = h("div", { class: "scroll tall" }, table, this.end);
    this.observer = new IntersectionObserver(([entry]) => entry.isIntersecting && more(), { root: this.element, rootMargin: "900px" });
    this.head.addEventListener("click", (event) => {
      const name = event.target.closest("button")?.dataset.sort;
      if (name) sort(name);
    });
    this.body.addEventListener("change", (event) => tick(event.target.dataset.id, event.target.checked));
    this.body.addEventListener("pointerover", (event) => this.#tip(event.target.closest("td")));
    this.body.addEventListener("pointerleave", hideTip);
    this.body.addEventListener("focusin", (event) => this.#focus(event.target.closest("td")));
    this.body.addEventListener("focusout", hideTip);
    this.body.addEventListener("keydown", (event) => this.#key(event));
    this.body.addEventListener("click", (event) => this.#open(event.target.closest("td")));
  }

  /** Draw rows and columns; rows that show what they showed stay as they are. */
  draw({ rows, columns, best, sorted, descending, ticked }) {
    if (String(columns) !== String(this.#columns)) this.body.replaceChildren();
    this.#rows = new Map(rows.map((row) => [row.id, row]));
    [this.#columns, this.#best] = [columns, best];
    this.firsts = columns.map((name, i) => store.tasks.get(name) !== store.tasks.get(columns[i - 1]));
    this.#drawHead(sorted, descending);
    patch(this.body, rows, { key: (row) => row.id, create: () => h("tr"), update: (line, row) => this.#drawRow(line, row, ticked.has(row.id)) });
    this.observer.unobserve(this.end); // observed anew it tells again where it is
    this.observer.observe(this.end);
    if (!this.#reached?.isConnected) this.#reach(this.body.querySelector("td[data-column]"));
  }

  #drawHead(sorted, descending) {
    const shown = JSON.stringify([this.#columns, sorted, descending]);
    if (this.head.dataset.shown === shown) return;
    this.head.dataset.shown = shown;
    const focused = this.head.contains(document.activeElement) ? document.activeElement.dataset.sort : null;
    const tasks = [];
    this.#columns.forEach((name, i) => {
      if (this.firsts[i]) tasks.push([store.tasks.get(name), 0]);
      tasks.at(-1)[1] += 1;
    });
    const top = tasks.map(([task, span]) => h("th", { colspan: span, scope: "colgroup", class: span > 1 ? "task" : "task number" }, task));
    const names = this.#columns.map((name, i) => {
      const low = lowerIsBetter(name);
      const title = `${name}: ${low ? "lower" : "higher"} is better`;
      return heading(name, shortName(name, store.tasks.get(name)), { sorted, descending, low, title, kind: `number${this.firsts[i] ? " first" : ""}` });
    });
    const fixed = FIXED.map((name) => heading(name, name, { sorted, descending, kind: name === "run" ? "name" : "number" }));
    this.head.replaceChildren(h("tr", null, h("td", { class: "corner" }), h("td", { colspan: 2 }), top), h("tr", null, fixed, names));
    if (focused) this.head.querySelector(`[data-sort="${CSS.escape(focused)}"]`)?.focus();
  }

  #drawRow(line, row, ticked) {
    const texts = row.values.map((entry, i) => (entry ? format(this.#columns[i], entry.value) : "-"));
    const bold = texts.map((text, i) => !row.baseline && text === this.#best[i]);
    const shown = JSON.stringify([texts, bold, row.tokens]);
    if (line.dataset.shown !== shown) {
      line.dataset.shown = shown;
      line.className = row.baseline ? "baseline" : "";
      line.replaceChildren(rowName(row), h("td", { class: "number" }, row.step === null ? "" : integer(row.step)),
        h("td", { class: "number" }, row.tokens === null ? "" : compact(row.tokens)),
        ...texts.map((text, i) => this.#cell(text, i, { bold: bold[i], none: !row.values[i] })));
    }
    const box = line.querySelector("input");
    if (box) box.checked = ticked;
  }

  #cell(text, column, { bold, none }) {
    const kind = `number${this.firsts[column] ? " first" : ""}${none ? " none" : ""}`;
    return h("td", { class: kind, "data-column": column, tabindex: "-1" }, bold ? h("strong", null, text) : text);
  }

  #entry(cell) {
    const row = this.#rows.get(cell?.parentElement.dataset.key);
    const column = Number(cell?.dataset.column ?? NaN);
    const entry = row?.values[column];
    return entry ? { row, name: this.#columns[column], ...entry } : null;
  }

  #tip(cell) {
    const entry = this.#entry(cell);
    if (!entry) {
      hideTip();
      return;
    }
    const { row, name, value, result } = entry;
    const share = row.baseline ? null : shareOf(result, name);
    showTip(cell.getBoundingClientRect(),
      h("p", null, row.baseline ? `baseline ${row.run}` : titleOf(row.run, row.step)),
      h("p", { class: "big" }, format(name, value, { unit: true }), h("span", null, name)),
      share && h("p", null, `95% interval ${interval(share)}; ${integer(share.samples)} samples`),
      !row.baseline && Number.isFinite(result.seconds) && h("p", null, `scored in ${age(result.seconds)}`));
  }

  #focus(cell) {
    if (cell?.dataset.column === undefined) return;
    this.#reach(cell);
    this.#tip(cell);
  }

  #reach(cell) {
    this.#reached?.setAttribute("tabindex", "-1");
    this.#reached = cell;
    cell?.setAttribute("tabindex", "0");
  }

  #key(event) {
    const cell = event.target.closest("td[data-column]");
    if (!cell) return;
    if (event.key === "Enter") this.#open(cell);
    const line = cell.parentElement;
    const above = { ArrowUp: line.previousElementSibling, ArrowDown: line.nextElementSibling }[event.key];
    const next = { ArrowLeft: cell.previousElementSibling, ArrowRight: cell.nextElementSibling }[event.key]
      ?? above?.querySelector(`[data-column="${cell.dataset.column}"]`);
    if (!event.key.startsWith("Arrow")) return;
    event.preventDefault();
    if (next?.dataset.column !== undefined) next.focus();
  }

  /** The samples behind a value. */
  #open(cell) {
    const entry = this.#entry(cell);
    if (!entry || entry.row.baseline || getSelection().toString()) return;
    if (!Object.keys(entry.result.groups ?? {}).length) return;
    go("samples", { key: entry.result.key, checkpoint: entry.row.id, group: shareOf(entry.result, entry.name)?.group });
  }
}

function heading(id, text, { sorted, descending, low, title, kind }) {
  const on = sorted === id;
  const arrow = h("span", { class: "arrow", "aria-hidden": "true" }, on ? (descending ? "\u25bc" : "\u25b2") : "");
  const lower = low && h("span", { class: "low", title: "lower is better", "aria-label": "lower is better" }, "\u2193");
  const button = h("button", { type: "button", "data-sort": id, title }, arrow, lower, text);
  return h("th", { scope: "col", class: kind, "aria-sort": on ? (descending ? "descending" : "ascending") : null }, button);
}

function rowName(row) {
  if (row.baseline) return h("th", { scope: "row", class: "name" }, h("div", null, h("span", null, row.run)));
  const box = h("input", { type: "checkbox", "aria-label": `tick ${row.id}`, "data-id": row.id });
  const run = h("a", { href: link("curves", { pick: row.run }), title: `${row.run}: its curves` }, row.run);
  return h("th", { scope: "row", class: "name" }, h("div", null, box, run));
}
