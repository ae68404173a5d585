// Scalars against step or tokens, one chart per scalar, one line per run.

import { chancesOf } from "./board-rows.js";
import { key, LineChart } from "./charts.js";
import { debounce, field, h, integer, matcher, naturally, patch, setOptions, switcher } from "./dom.js";
import { set } from "./route.js";
import { format, lowerIsBetter } from "./scalars.js";
import { shareOf, store } from "./store.js";

const RUNS = 12;
const CHARTS = 12;

export class Curves {
  #params = new URLSearchParams();
  #slots = new Map(); // run -> number of its line; a run keeps it while it is shown
  #charts = new Map(); // scalar -> chart

  constructor() {
    const typed = debounce((runs) => set({ runs, off: "" }, { replace: true }));
    this.runs = h("input", { type: "search", placeholder: "part of a name, or /regex/", spellcheck: "false" });
    this.runs.addEventListener("input", () => typed(this.runs.value));
    this.scalar = h("select", { on: { change: () => set({ scalar: this.scalar.value }) } });
    this.x = switcher("Against", [["step", "step"], ["tokens", "tokens"]], (x) => set({ x: x === "step" ? "" : x }));
    this.logX = this.#box("log x", "logx");
    this.logY = this.#box("log y", "logy");
    this.bars = this.#box("95% intervals", "bars");
    this.picked = h("button", { type: "button", on: { click: () => set({ pick: "" }) } });
    this.note = h("p", { class: "note", role: "status" }, "Reading the results ...");
    this.legend = h("ul", { class: "legend", "aria-label": "Runs; press one to hide or show it" });
    this.grid = h("div", { class: "charts" });
    this.element = h("section", { "aria-label": "Curves" },
      h("form", { class: "controls", on: { submit: (event) => event.preventDefault() } },
        field("Scalar", this.scalar), field("Runs", this.runs), this.x,
        h("div", { class: "field" }, h("span", null, "Axes"), h("div", { class: "pair" }, this.logX, this.logY, this.bars)), this.picked),
      this.note, this.legend, this.grid);
  }

  #box(label, name) {
    const input = h("input", { type: "checkbox", on: { change: () => set({ [name]: input.checked ? "1" : "" }) } });
    const box = h("label", { class: "box" }, input, label);
    box.input = input;
    return box;
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
    const scalars = this.#scalars();
    this.#syncControls();
    const all = this.#filtered();
    const shown = this.#chosen(all, scalars[0]);
    this.#assign(shown);
    this.#drawLegend(shown);
    this.#say(all, shown, scalars);
    const off = new Set(this.#get("off").split(","));
    const drawn = shown.filter((run) => !off.has(run));
    patch(this.grid, scalars.slice(0, CHARTS), { key: (name) => name, create: (name) => this.#chart(name).element });
    for (const name of scalars.slice(0, CHARTS)) this.#chart(name).draw(this.#model(name, drawn));
    for (const name of this.#charts.keys()) if (!scalars.includes(name)) this.#charts.delete(name);
  }

  #chart(name) {
    if (!this.#charts.has(name)) this.#charts.set(name, new LineChart());
    return this.#charts.get(name);
  }

  /** The chosen scalar, or with "TASK/*" all of a task. */
  #scalars() {
    const names = store.scalars();
    const wanted = this.#get("scalar");
    if (wanted.endsWith("/*")) return names.filter((name) => store.tasks.get(name) === wanted.slice(0, -2));
    return names.includes(wanted) ? [wanted] : names.slice(0, 1);
  }

  #syncControls() {
    const names = store.scalars();
    const options = store.taskNames().flatMap((task) => {
      const own = names.filter((name) => store.tasks.get(name) === task);
      const all = own.length > 1 ? [[`${task}/*`, `all ${own.length} of ${task}`, task]] : [];
      return [...all, ...own.map((name) => [name, name, task])];
    });
    const wanted = this.#get("scalar");
    setOptions(this.scalar, options, options.some(([value]) => value === wanted) ? wanted : names[0] ?? "");
    this.x.choose(this.#get("x") || "step");
    for (const [box, name] of [[this.logX, "logx"], [this.logY, "logy"], [this.bars, "bars"]]) box.input.checked = Boolean(this.#get(name));
    this.picked.hidden = !this.#get("pick");
    this.picked.textContent = `Leave the ${this.#picks().length} ticked runs`;
  }

  #picks() {
    return this.#get("pick") ? this.#get("pick").split(",") : [];
  }

  #filtered() {
    const filter = matcher(this.#get("runs"));
    this.runs.setAttribute("aria-invalid", String(!filter));
    const picks = new Set(this.#picks());
    return store.runs().filter((run) => (!picks.size || picks.has(run)) && (filter?.(run) ?? true));
  }

  /** As many runs as lines can be told apart: those whose newest value is best. */
  #chosen(runs, scalar) {
    if (runs.length <= RUNS) return runs;
    const sign = lowerIsBetter(scalar) ? 1 : -1;
    const last = (run) => store.steps(run).map((step) => store.value(run, step, scalar)?.value).find((value) => value !== undefined);
    const scored = runs.map((run) => [run, last(run)]).filter(([, value]) => value !== undefined);
    return scored.sort((a, b) => sign * (a[1] - b[1])).slice(0, RUNS).map(([run]) => run).sort(naturally);
  }

  #assign(shown) {
    for (const run of this.#slots.keys()) if (!shown.includes(run)) this.#slots.delete(run);
    const used = new Set(this.#slots.values());
    for (const run of shown.filter((one) => !this.#slots.has(one))) {
      let slot = 0;
      while (used.has(slot)) slot += 1;
      used.add(slot);
      this.#slots.set(run, slot);
    }
  }

  #say(all, shown, scalars) {
    const best = `The ${shown.length} best of ${integer(all.length)} runs by their newest value: filter to see others.`;
    const models = shown.filter((run) => store.isBaseline(run)).length;
    const beside = models ? `, ${models} ${models > 1 ? "baselines" : "baseline"}` : "";
    const runs = shown.length < all.length ? best : `${shown.length - models} runs${beside}.`;
    const charts = scalars.length > CHARTS ? ` The first ${CHARTS} of ${scalars.length} scalars.` : "";
    const tokens = this.#get("x") === "tokens" ? " Runs that do not tell their tokens are left out." : "";
    this.note.textContent = store.results.size ? runs + charts + tokens : "No results yet.";
  }

  #drawLegend(shown) {
    const off = new Set(this.#get("off").split(","));
    patch(this.legend, shown, {
      key: (run) => `${this.#slots.get(run)} ${run}`,
      create: (run) => {
        const parts = [key(this.#slots.get(run), { level: store.isBaseline(run) }), h("span", null, run)];
        return h("li", null, h("button", { type: "button", on: { click: () => this.#toggle(run) } }, parts));
      },
      update: (item, run) => item.firstChild.setAttribute("aria-pressed", String(!off.has(run))),
    });
  }

  #toggle(run) {
    const off = new Set(this.#get("off").split(",").filter(Boolean));
    if (!off.delete(run)) off.add(run);
    set({ off: [...off].join(",") }, { replace: true });
  }

  #model(name, runs) {
    const x = this.#get("x") || "step";
    const series = runs.map((run) => ({ name: run, slot: this.#slots.get(run), points: this.#points(run, name, x) }));
    return {
      title: name,
      series,
      levels: levelsOf(runs, name, this.#slots),
      xName: x,
      xLabel: x === "tokens" ? "tokens trained on" : "training step",
      logX: Boolean(this.#get("logx")),
      logY: Boolean(this.#get("logy")),
      bars: Boolean(this.#get("bars")),
      format: (value) => format(name, value, { unit: true }),
    };
  }

  #points(run, name, x) {
    const points = store.steps(run).map((step) => {
      const found = store.value(run, step, name);
      const at = x === "tokens" ? found?.result.tokens : step;
      if (!found || !Number.isFinite(at)) return null;
      const share = shareOf(found.result, name);
      return { x: at, y: found.value, low: share?.low, high: share?.high };
    });
    return points.filter(Boolean).sort((a, b) => a.x - b.x);
  }
}

/** Horizontal lines: baselines, which have no step, and what a guess would get. */
function levelsOf(runs, name, slots) {
  const models = runs.map((run) => ({ name: run, slot: slots.get(run), y: store.value(run, null, name)?.value }));
  const entries = runs.flatMap((run) => store.steps(run).map((step) => store.value(run, step, name)));
  const chances = chancesOf(entries, name).map(({ value }) => ({ name: "chance", y: value }));
  return [...models.filter(({ y }) => y !== undefined), ...chances];
}
