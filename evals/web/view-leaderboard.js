// Checkpoints against scalars: sorted, filtered, the best of every column in bold.

import { age, compact, debounce, field, h, integer, matcher, naturally, setOptions, switcher } from "./dom.js";
import { go, link, set } from "./route.js";
import { families, familyOf, format, interval, lowerIsBetter, shortName } from "./scalars.js";
import { store } from "./store.js";
import { hideTip, showTip } from "./tip.js";

const ROWS = 500;
const FIXED = 3; // run, step, tokens

export class Leaderboard {
  #params = new URLSearchParams();
  #rows = [];
  #columns = [];
  #picked = new Set(); // "run@step"
  #limit = ROWS;
  #cell = [0, 0]; // row and column of the cell that the tab key reaches

  constructor() {
    this.#makeControls();
    this.head = h("thead");
    this.body = h("tbody");
    this.table = h("table", { class: "board", role: "grid", "aria-label": "Leaderboard" }, this.head, this.body);
    this.scroll = h("div", { class: "scroll tall" }, this.table);
    this.note = h("p", { class: "note", role: "status" }, "Reading the results ...");
    this.more = h("button", { type: "button", hidden: true, on: { click: () => this.#showMore() } });
    this.element = h("section", { "aria-label": "Leaderboard" }, this.controls, this.note, this.scroll, this.more);
    this.#listen();
  }

  #makeControls() {
    const typed = debounce((runs) => set({ runs }, { replace: true }));
    this.runs = h("input", { type: "search", placeholder: "part of a name, or /regex/", spellcheck: "false" });
    this.runs.addEventListener("input", () => typed(this.runs.value));
    this.at = h("select", { on: { change: () => set({ at: this.at.value, step: "", by: "" }) } });
    this.by = h("select", { on: { change: () => set({ by: this.by.value }) } });
    this.step = h("select", { on: { change: () => set({ step: this.step.value }) } });
    this.byField = field("Best by", this.by);
    this.stepField = field("Step", this.step);
    this.family = switcher("Tasks", [["", "all"], ...families.slice(0, 4)], (family) => set({ family, tasks: "" }));
    this.tasks = h("div", { class: "menu" });
    this.taskMenu = h("details", { class: "dropdown" }, h("summary", null, "choose ..."), this.tasks);
    this.curves = h("a", { class: "button" }, "Curves");
    this.compare = h("a", { class: "button" }, "Compare");
    const picked = h("div", { class: "field" }, h("span", null, "Ticked rows"), h("div", { class: "pair" }, this.curves, this.compare));
    this.controls = h("form", { class: "controls", on: { submit: (event) => event.preventDefault() } },
      field("Runs", this.runs), field("Checkpoint", this.at), this.byField, this.stepField, this.family,
      h("div", { class: "field" }, h("span", null, "Single tasks"), this.taskMenu), picked);
  }

  #listen() {
    this.head.addEventListener("click", (event) => this.#sort(event.target.closest("button")?.dataset.sort));
    this.body.addEventListener("change", (event) => this.#pick(event.target));
    this.body.addEventListener("pointerover", (event) => this.#tip(event.target.closest("td")));
    this.body.addEventListener("pointerleave", hideTip);
    this.body.addEventListener("focusin", (event) => this.#focus(event.target.closest("td, th")));
    this.body.addEventListener("focusout", hideTip);
    this.body.addEventListener("keydown", (event) => this.#key(event));
    this.body.addEventListener("click", (event) => this.#open(event.target.closest("td")));
    this.tasks.addEventListener("change", () => this.#chooseTasks());
    document.addEventListener("click", (event) => {
      if (!this.taskMenu.contains(event.target)) this.taskMenu.open = false;
    });
  }

  show(params) {
    this.#params = params;
    if (document.activeElement !== this.runs) this.runs.value = params.get("runs") ?? "";
    this.#render();
  }

  changed() {
    this.#render();
  }

  #get(name) {
    return this.#params.get(name) ?? "";
  }

  #render() {
    if (!store.loaded) return;
    this.#columns = this.#scalars();
    this.#syncControls();
    const filter = matcher(this.#get("runs"));
    this.runs.setAttribute("aria-invalid", String(!filter));
    this.#rows = this.#sorted(store.runs().filter(filter ?? (() => true)).flatMap((run) => this.#checkpoints(run)));
    this.#drawHead();
    this.#drawBody();
    this.#syncPicked();
    this.#say(filter);
  }

  #say(filter) {
    const shown = Math.min(this.#rows.length, this.#limit);
    if (!store.results.size) this.note.textContent = "No results yet: they come as checkpoints are scored. The queue shows what waits.";
    else if (!filter) this.note.textContent = "That is no regular expression; all runs are shown.";
    else if (!this.#rows.length) this.note.textContent = "No run passes this filter.";
    else this.note.textContent = `${integer(this.#rows.length)} checkpoints of ${integer(store.runs().length)} runs, ${this.#columns.length} scalars. ` +
      "Bold: best of its column. Hover or focus a value for its interval; click it for its samples.";
    this.more.hidden = shown === this.#rows.length;
    this.more.textContent = `Show ${integer(Math.min(ROWS, this.#rows.length - shown))} more of ${integer(this.#rows.length)}`;
  }

  /** Scalars that are columns: of the chosen tasks, or of the chosen family. */
  #scalars() {
    const family = this.#get("family");
    const tasks = this.#get("tasks") ? new Set(this.#get("tasks").split(",")) : null;
    return store.scalars().filter((name) => {
      const task = store.tasks.get(name);
      return tasks ? tasks.has(task) : !family || familyOf(task) === family;
    });
  }

  #syncControls() {
    const at = this.#get("at") || "newest";
    setOptions(this.at, [["newest", "newest of each run"], ["best", "best of each run"], ["step", "of one step"], ["all", "all"]], at);
    this.byField.hidden = at !== "best";
    this.stepField.hidden = at !== "step";
    if (at === "best") setOptions(this.by, this.#columns.map((name) => [name, name]), this.#bestBy());
    if (at === "step") setOptions(this.step, this.#allSteps().map((step) => [step, integer(step)]), this.#step());
    this.family.choose(this.#get("tasks") ? "none" : this.#get("family"));
    this.#syncTasks();
  }

  #syncTasks() {
    const names = store.taskNames().filter((task) => [...store.tasks.values()].includes(task));
    if (this.tasks.dataset.names !== String(names)) {
      this.tasks.replaceChildren(...names.map((name) => h("label", null, h("input", { type: "checkbox", value: name }), name)));
      this.tasks.dataset.names = String(names);
    }
    const on = new Set(this.#columns.map((name) => store.tasks.get(name)));
    for (const box of this.tasks.querySelectorAll("input")) box.checked = on.has(box.value);
    this.taskMenu.firstChild.textContent = `${on.size} of ${names.length}`;
  }

  #chooseTasks() {
    const boxes = [...this.tasks.querySelectorAll("input")];
    const on = boxes.filter((box) => box.checked).map((box) => box.value);
    set({ tasks: on.length === boxes.length ? "" : on.join(","), family: "" });
  }

  #allSteps() {
    return [...new Set(store.runs().flatMap((run) => store.steps(run)))].sort((a, b) => b - a);
  }

  #step() {
    return Number(this.#get("step") || this.#allSteps()[0]);
  }

  #bestBy() {
    return this.#columns.includes(this.#get("by")) ? this.#get("by") : this.#columns[0];
  }

  /** The rows of a run: one checkpoint, or all of them. */
  #checkpoints(run) {
    const steps = store.steps(run);
    const at = this.#get("at") || "newest";
    const chosen = { newest: () => steps.slice(0, 1), all: () => steps, best: () => this.#best(run, steps),
      step: () => steps.filter((step) => step === this.#step()) }[at]?.() ?? [];
    return chosen.map((step) => {
      const values = this.#columns.map((name) => store.value(run, step, name));
      const first = store.checkpoints.get(run).get(step).values().next().value;
      return { run, step, tokens: first?.tokens ?? null, id: `${run}@${step}`, values };
    });
  }

  #best(run, steps) {
    const by = this.#bestBy();
    const sign = lowerIsBetter(by) ? 1 : -1;
    const scored = steps.map((step) => [step, store.value(run, step, by)?.value]).filter(([, value]) => value !== undefined);
    return scored.sort((a, b) => sign * (a[1] - b[1])).slice(0, 1).map(([step]) => step);
  }

  #sortBy() {
    const name = this.#get("sort");
    if (["run", "step", "tokens"].includes(name) || this.#columns.includes(name)) return name;
    return this.#columns[0] ?? "run";
  }

  #descending() {
    const name = this.#sortBy();
    const natural = name === "run" ? "up" : this.#columns.includes(name) && lowerIsBetter(name) ? "up" : "down";
    return (this.#get("dir") || natural) === "down";
  }

  /** Rows in order; those without a value come last in both directions. */
  #sorted(rows) {
    const name = this.#sortBy();
    const column = this.#columns.indexOf(name);
    const sign = this.#descending() ? -1 : 1;
    const value = (row) => (column >= 0 ? row.values[column]?.value : row[name]) ?? null;
    return rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null) || naturally(a.run, b.run);
      const order = name === "run" ? naturally(x, y) : x - y;
      return sign * order || naturally(a.run, b.run) || b.step - a.step;
    });
  }

  #sort(name) {
    if (!name) return;
    const same = name === this.#sortBy();
    set({ sort: name, dir: same ? (this.#descending() ? "up" : "down") : "" }, { replace: true });
    this.head.querySelector(`[data-sort="${CSS.escape(name)}"]`)?.focus();
  }

  #drawHead() {
    const tasks = [];
    for (const name of this.#columns) {
      const task = store.tasks.get(name);
      if (tasks.at(-1)?.[0] === task) tasks.at(-1)[1] += 1;
      else tasks.push([task, 1]);
    }
    const top = h("tr", null, h("td", { colspan: FIXED, class: "corner" }),
      tasks.map(([task, span]) => h("th", { colspan: span, scope: "colgroup", class: "task" }, task)));
    const starts = new Set();
    const names = h("tr", null, ["run", "step", "tokens"].map((name) => this.#heading(name, name, name !== "run")),
      this.#columns.map((name) => {
        const task = store.tasks.get(name);
        const first = !starts.has(task);
        starts.add(task);
        const better = lowerIsBetter(name) ? "lower is better" : "higher is better";
        return this.#heading(name, shortName(name, task), true, { title: `${name}: ${better}`, first, low: lowerIsBetter(name) });
      }));
    this.starts = new Set([...starts].map((task) => this.#columns.findIndex((name) => store.tasks.get(name) === task)));
    this.head.replaceChildren(top, names);
  }

  #heading(id, text, numeric, { title, first, low } = {}) {
    const on = this.#sortBy() === id;
    const sort = on ? (this.#descending() ? "descending" : "ascending") : null;
    const arrow = on ? (this.#descending() ? "\u25bc" : "\u25b2") : "";
    const button = h("button", { type: "button", "data-sort": id, title }, text,
      low && h("span", { class: "low", "aria-label": "lower is better" }, "\u2193"), h("span", { class: "arrow", "aria-hidden": "true" }, arrow));
    const kind = `${numeric ? "number" : "name"}${first ? " first" : ""}`;
    return h("th", { scope: "col", class: kind, "aria-sort": sort }, button);
  }

  #drawBody() {
    const inside = this.body.contains(document.activeElement);
    const best = this.#columns.map((name, i) => this.#bestOf(name, i));
    const rows = this.#rows.slice(0, this.#limit).map((row, i) => this.#row(row, i, best));
    this.body.replaceChildren(...rows);
    this.#cell = [Math.min(this.#cell[0], rows.length - 1), Math.min(this.#cell[1], this.#columns.length - 1)];
    this.#reach(...this.#cell, inside);
  }

  /** The text of the best value of a column with two values or more; rows that show the same text share it. */
  #bestOf(name, column) {
    const values = this.#rows.map((row) => row.values[column]?.value).filter((value) => Number.isFinite(value));
    if (values.length < 2) return null;
    const best = values.reduce((a, b) => (lowerIsBetter(name) ? Math.min(a, b) : Math.max(a, b)));
    return format(name, best);
  }

  #row(row, index, best) {
    const box = h("input", { type: "checkbox", "aria-label": `tick ${row.id}`, "data-id": row.id });
    box.checked = this.#picked.has(row.id);
    const run = h("a", { href: link("curves", { runs: row.run }), title: row.run }, row.run);
    const cells = row.values.map((entry, i) => {
      const kind = `number${this.starts.has(i) ? " first" : ""}`;
      if (!entry) return h("td", { class: `${kind} none`, "data-at": `${index},${i}`, tabindex: "-1" }, "-");
      const text = format(this.#columns[i], entry.value);
      return h("td", { class: kind, "data-at": `${index},${i}`, tabindex: "-1" }, text === best[i] ? h("strong", null, text) : text);
    });
    return h("tr", null, h("th", { scope: "row", class: "name" }, h("div", null, box, run)),
      h("td", { class: "number step" }, integer(row.step)),
      h("td", { class: "number" }, row.tokens === null ? "-" : compact(row.tokens)), cells);
  }

  #entry(cell) {
    const [row, column] = (cell?.dataset.at ?? "").split(",").map(Number);
    return this.#rows[row]?.values[column] ? { row: this.#rows[row], name: this.#columns[column], ...this.#rows[row].values[column] } : null;
  }

  #tip(cell) {
    const entry = this.#entry(cell);
    if (!entry) {
      hideTip();
      return;
    }
    const { row, name, value, share, result } = entry;
    showTip(cell.getBoundingClientRect(),
      h("p", null, `${row.run}, step ${integer(row.step)}`),
      h("p", { class: "big" }, format(name, value, { unit: true }), h("span", null, name)),
      share && h("p", null, `95% interval ${interval(share)}; ${integer(share.samples)} samples`),
      h("p", null, `scored in ${age(result.seconds)}`));
  }

  #focus(cell) {
    if (!cell?.dataset.at) return;
    this.#reach(...cell.dataset.at.split(",").map(Number), false);
    this.#tip(cell);
  }

  /** One cell is in the order of the tab key; the arrow keys move it. */
  #reach(row, column, focus) {
    this.body.querySelector('td[tabindex="0"]')?.setAttribute("tabindex", "-1");
    this.#cell = [row, column];
    const cell = this.body.querySelector(`[data-at="${row},${column}"]`);
    cell?.setAttribute("tabindex", "0");
    if (focus) cell?.focus({ preventScroll: false });
  }

  #key(event) {
    const cell = event.target.closest("td[data-at]");
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!cell) return;
    if (event.key === "Enter") this.#open(cell);
    if (!move) return;
    event.preventDefault();
    const shown = Math.min(this.#rows.length, this.#limit);
    const row = Math.min(Math.max(this.#cell[0] + move[0], 0), shown - 1);
    this.#reach(row, Math.min(Math.max(this.#cell[1] + move[1], 0), this.#columns.length - 1), true);
  }

  /** The samples behind a value. */
  #open(cell) {
    const entry = this.#entry(cell);
    if (!entry || getSelection().toString()) return;
    go("samples", { key: entry.result.key, group: entry.share?.group });
  }

  #pick(box) {
    if (!box.dataset.id) return;
    this.#picked[box.checked ? "add" : "delete"](box.dataset.id);
    this.#syncPicked();
  }

  #syncPicked() {
    const ids = [...this.#picked];
    const runs = [...new Set(ids.map((id) => id.slice(0, id.lastIndexOf("@"))))];
    setLink(this.curves, runs.length ? link("curves", { pick: runs.join(",") }) : null);
    setLink(this.compare, ids.length === 2 ? link("compare", { first: ids[0], second: ids[1] }) : null);
    this.compare.textContent = ids.length === 2 ? "Compare" : "Compare (tick two)";
  }

  #showMore() {
    this.#limit += ROWS;
    this.#render();
  }
}

/** A link that leads somewhere, or one that is shown as not available. */
function setLink(anchor, href) {
  if (href) anchor.setAttribute("href", href);
  else anchor.removeAttribute("href");
  anchor.setAttribute("aria-disabled", String(!href));
}
