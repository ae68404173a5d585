// Checkpoints and baselines against scalars: which runs, which of their checkpoints, which tasks.

import { allSteps, baselineRows, bestTexts, columnsOf, rowsOf, sortRows } from "./board-rows.js";
import { BoardTable } from "./board-table.js";
import { debounce, field, h, integer, matcher, setOptions, switcher } from "./dom.js";
import { link, set } from "./route.js";
import { baselineOf, families, lowerIsBetter } from "./scalars.js";
import { store } from "./store.js";

const ROWS = 60; // drawn at first, and again whenever the last of them come near
const AT = [["newest", "newest of each run"], ["best", "best of each run"], ["step", "of one step"], ["all", "all"]];

export class Leaderboard {
  #params = new URLSearchParams();
  #columns = [];
  #ticked = new Set(); // "run@step"
  #limit = ROWS;
  #hasMore = false;

  constructor() {
    this.table = new BoardTable({ sort: (name) => this.#sort(name), tick: (id, on) => this.#tick(id, on), more: () => this.#more() });
    this.note = h("p", { class: "note", role: "status" }, "Reading the results ...");
    this.element = h("section", { "aria-label": "Leaderboard" }, this.#controls(), this.note, this.table.element);
  }

  #controls() {
    const typed = debounce((runs) => set({ runs }, { replace: true }));
    this.runs = h("input", { type: "search", placeholder: "part of a name, or /regex/", spellcheck: "false" });
    this.runs.addEventListener("input", () => typed(this.runs.value));
    this.at = h("select", { on: { change: () => set({ at: this.at.value === "newest" ? "" : this.at.value }) } });
    this.by = h("select", { on: { change: () => set({ by: this.by.value }) } });
    this.step = h("select", { on: { change: () => set({ step: this.step.value }) } });
    this.byField = field("Best by", this.by, { hidden: true });
    this.stepField = field("Step", this.step, { hidden: true });
    this.family = switcher("Tasks", [["", "all"], ...families.slice(0, 4)], (family) => set({ family, tasks: "" }));
    this.tasks = h("div", { class: "menu", on: { change: () => this.#chooseTasks() } });
    this.menu = h("details", { class: "dropdown" }, h("summary", null, "0 of 0"), this.tasks);
    document.addEventListener("click", (event) => {
      if (!this.menu.contains(event.target)) this.menu.open = false;
    });
    this.curves = h("a", { class: "button" }, "Curves");
    this.compare = h("a", { class: "button" }, "Compare");
    return h("form", { class: "controls", on: { submit: (event) => event.preventDefault() } },
      field("Runs", this.runs), field("Checkpoint", this.at), this.byField, this.stepField, this.family,
      h("div", { class: "field" }, h("span", null, "Single tasks"), this.menu),
      h("div", { class: "field" }, h("span", null, "Ticked rows"), h("div", { class: "pair" }, this.curves, this.compare)));
  }

  #get(name) {
    return this.#params.get(name) ?? "";
  }

  show(params) {
    this.#params = params;
    if (document.activeElement !== this.runs) this.runs.value = this.#get("runs");
    this.changed();
  }

  changed() {
    if (!store.loaded) return;
    const tasks = this.#get("tasks") ? new Set(this.#get("tasks").split(",")) : null;
    this.#columns = columnsOf({ family: this.#get("family"), tasks });
    const choice = this.#choice();
    this.#syncControls(choice);
    const filter = matcher(this.#get("runs"));
    this.runs.setAttribute("aria-invalid", String(!filter));
    const checkpoints = rowsOf(store.runs().filter(filter ?? (() => true)), this.#columns, choice);
    const [sorted, descending] = [this.#sortBy(), this.#descending()];
    const rows = sortRows([...checkpoints, ...baselineRows(checkpoints, this.#columns)], this.#columns, sorted, descending);
    const best = bestTexts(rows, this.#columns);
    this.table.draw({ rows: rows.slice(0, this.#limit), columns: this.#columns, best, sorted, descending, ticked: this.#ticked });
    this.#hasMore = rows.length > this.#limit;
    this.#syncTicked();
    this.#say(checkpoints, filter);
  }

  /** Which checkpoint of a run is its row. */
  #choice() {
    const by = this.#columns.includes(this.#get("by")) ? this.#get("by") : this.#columns[0] ?? "";
    return { at: this.#get("at") || "newest", by, step: Number(this.#get("step") || allSteps()[0]) };
  }

  #say(checkpoints, filter) {
    const models = checkpoints.filter((row) => row.step === null).length;
    const trained = checkpoints.filter((row) => row.step !== null);
    const runs = new Set(trained.map((row) => row.run)).size;
    const beside = models ? `${integer(models)} ${models > 1 ? "baselines" : "baseline"}, ` : "";
    const found = `${integer(trained.length)} checkpoints of ${integer(runs)} runs, ${beside}${this.#columns.length} scalars. `;
    const texts = [
      [!store.results.size, "No results yet: they come as checkpoints are scored. The queue shows what waits."],
      [!filter, "That is no regular expression; all runs are shown."],
      [!checkpoints.length, "No checkpoint passes these filters."],
      [true, `${found}Bold: best of its column. Hover or focus a value for its interval; click it for its samples.`],
    ];
    this.note.textContent = texts.find(([when]) => when)[1];
  }

  #syncControls({ at, by, step }) {
    setOptions(this.at, AT, at);
    this.byField.hidden = at !== "best";
    this.stepField.hidden = at !== "step";
    if (at === "best") setOptions(this.by, this.#columns.map((name) => [name, name]), by);
    if (at === "step") setOptions(this.step, allSteps().map((one) => [one, integer(one)]), step);
    this.family.choose(this.#get("tasks") ? "none" : this.#get("family"));
    const names = [...new Set(store.scalars().filter((name) => !baselineOf(name)).map((name) => store.tasks.get(name)))];
    if (this.tasks.dataset.names !== String(names)) {
      this.tasks.replaceChildren(...names.map((name) => h("label", null, h("input", { type: "checkbox", value: name }), name)));
      this.tasks.dataset.names = String(names);
    }
    const on = new Set(this.#columns.map((name) => store.tasks.get(name)));
    for (const box of this.tasks.querySelectorAll("input")) box.checked = on.has(box.value);
    this.menu.firstChild.textContent = `${on.size} of ${names.length}`;
  }

  #chooseTasks() {
    const boxes = [...this.tasks.querySelectorAll("input")];
    const on = boxes.filter((box) => box.checked).map((box) => box.value);
    set({ tasks: on.length === boxes.length ? "" : on.join(","), family: "" });
  }

  #sortBy() {
    const name = this.#get("sort");
    if (["run", "step", "tokens"].includes(name) || this.#columns.includes(name)) return name;
    return this.#columns[0] ?? "run";
  }

  #descending() {
    const name = this.#sortBy();
    const upwards = name === "run" || (this.#columns.includes(name) && lowerIsBetter(name));
    return (this.#get("dir") || (upwards ? "up" : "down")) === "down";
  }

  /** By another column, the best first; by the same one, the other way round. */
  #sort(name) {
    const same = name === this.#sortBy();
    set({ sort: name, dir: same ? (this.#descending() ? "up" : "down") : "" }, { replace: true });
  }

  #tick(id, on) {
    this.#ticked[on ? "add" : "delete"](id);
    this.#syncTicked();
  }

  #syncTicked() {
    const ids = [...this.#ticked];
    const runs = [...new Set(ids.map((id) => id.slice(0, id.lastIndexOf("@"))))];
    setLink(this.curves, runs.length ? link("curves", { pick: runs.join(",") }) : null);
    setLink(this.compare, ids.length === 2 ? link("compare", { first: ids[0], second: ids[1] }) : null);
    this.compare.textContent = ids.length === 2 ? "Compare" : "Compare two";
  }

  /** The end of the rows that are drawn came near. */
  #more() {
    if (!this.#hasMore) return;
    this.#limit += ROWS;
    this.changed();
  }
}

/** A link that leads somewhere, or one that is shown as not available. */
function setLink(anchor, href) {
  if (href) anchor.setAttribute("href", href);
  else anchor.removeAttribute("href");
  anchor.setAttribute("aria-disabled", String(!href));
}
