// Two checkpoints on one task: difference by group with its interval, and the samples on which they differ.

import { get, Refused, Unreachable } from "./api.js";
import { field, h, integer, s, setOptions, setText, signed } from "./dom.js";
import { CheckpointPicker, sampledTasks } from "./pickers.js";
import { link, set } from "./route.js";
import { lengthName } from "./scalars.js";
import { block, excerpt, marked, verdict } from "./sample-text.js";
import { readAll } from "./sample-source.js";
import { checkpointId, store } from "./store.js";

const NARROW = 640;
const METHOD = "Second minus first in percent points, on the samples that both answered; 95% intervals by paired bootstrap.";
const SHOWN = 200;

export class Compare {
  #params = new URLSearchParams();
  #chosen = null; // { task, first, second }
  #drawn = "";
  #answer = null; // GET /compare
  #pairs = new Map(); // what was read of both, by keys and group

  constructor() {
    this.task = h("select", { on: { change: () => set({ task: this.task.value, group: "" }) } });
    this.first = new CheckpointPicker("First run", (first) => set({ first }));
    this.second = new CheckpointPicker("Second run", (second) => set({ second }));
    this.swap = h("button", { type: "button", on: { click: () => this.#swap() } }, "Swap");
    this.note = h("p", { class: "note", role: "status" }, "Reading the results ...");
    this.result = h("div", { class: "scroll" });
    new ResizeObserver(() => this.#answer && this.#draw()).observe(this.result);
    this.differing = h("div", { class: "differing" });
    this.element = h("section", { "aria-label": "Compare" },
      h("form", { class: "controls", on: { submit: (event) => event.preventDefault() } },
        field("Task", this.task), this.first.fields, this.second.fields, this.swap),
      this.note, this.result, this.differing);
  }

  show(params) {
    this.#params = params;
    this.changed();
  }

  tick() {
    if (this.failed) this.changed();
  }

  async changed() {
    if (!store.loaded) return;
    const tasks = sampledTasks();
    const task = tasks.includes(this.#params.get("task")) ? this.#params.get("task") : tasks[0];
    if (!task) {
      this.note.textContent = "No task with samples has been scored yet.";
      return;
    }
    setOptions(this.task, tasks.map((name) => [name, name]), task);
    const first = this.first.sync(task, this.#params.get("first"));
    const second = this.second.sync(task, this.#params.get("second") ?? this.#other(task, first));
    this.#chosen = { task, first, second };
    try {
      await this.#read();
      this.failed = false;
    } catch (error) {
      if (!(error instanceof Unreachable || error instanceof Refused)) throw error;
      this.failed = error instanceof Unreachable;
      this.note.textContent = `These cannot be compared: ${error.message}`;
    }
  }

  /** Another run with this task, or an earlier step of the same. */
  #other(task, first) {
    const runs = store.runs().filter((run) => store.steps(run).some((step) => store.result(run, step, task)));
    const run = runs.find((name) => name !== first.run) ?? first.run;
    const steps = store.steps(run).filter((step) => store.result(run, step, task));
    const other = steps.findIndex((step) => run !== first.run || step !== first.step);
    return checkpointId(run, other < 0 ? first.step : steps[other]);
  }

  #swap() {
    const { first, second } = this.#chosen;
    set({ first: checkpointId(second.run, second.step), second: checkpointId(first.run, first.step) });
  }

  async #read() {
    const { first, second } = this.#chosen;
    const keys = `${first.result.key} ${second.result.key}`;
    if (this.#drawn !== keys) {
      const answer = await get("compare", { first: first.result.key, second: second.result.key });
      if (this.#chosen.first !== first || this.#chosen.second !== second) return;
      [this.#drawn, this.#answer] = [keys, answer];
      this.#draw();
    }
    await this.#drawDiffering();
  }

  #draw() {
    const entries = Object.entries(this.#answer.groups);
    const width = this.result.clientWidth < NARROW ? 130 : 280;
    const shown = `${this.#drawn} ${width}`;
    if (this.result.dataset.shown === shown) return;
    this.result.dataset.shown = shown;
    setText(this.note, entries.length ? METHOD : "The two have no sample in common.");
    const reach = Math.max(1, ...entries.flatMap(([, group]) => [Math.abs(group.low), Math.abs(group.high)])) * 1.08;
    const numbers = ["first, %", "second, %", "difference"];
    const head = h("tr", null, h("th", { scope: "col" }, "group"), numbers.map((text) => h("th", { scope: "col", class: "number" }, text)),
      h("th", { scope: "col", class: "bars" }, forestHead(reach, width)),
      ["95% interval", "samples", "P(better)"].map((text) => h("th", { scope: "col", class: "number extra" }, text)),
      h("th", { scope: "col" }, "differ"));
    this.result.replaceChildren(h("table", { class: "forest" }, h("thead", null, head),
      h("tbody", null, entries.map(([name, group]) => this.#row(name, group, reach, width)))));
  }

  #row(name, group, reach, width) {
    const range = `${signed(group.low)} to ${signed(group.high)}`;
    const clear = group.low > 0 ? "better" : group.high < 0 ? "worse" : "";
    return h("tr", { class: clear },
      h("th", { scope: "row" }, lengthName(name)),
      h("td", { class: "number" }, group.first.toFixed(1)), h("td", { class: "number" }, group.second.toFixed(1)),
      h("td", { class: "number difference" }, clear ? h("strong", null, signed(group.difference)) : signed(group.difference)),
      h("td", { class: "bars", title: range }, forestRow(group, reach, width, clear)),
      h("td", { class: "number extra" }, range), h("td", { class: "number extra" }, integer(group.samples)),
      h("td", { class: "number extra" }, group.p_better.toFixed(3)),
      h("td", null, h("button", { type: "button", "aria-label": `samples of ${name} that differ`, on: { click: () => set({ group: name }) } }, "list")));
  }

  /** The samples of the chosen group on which the two differ. */
  async #drawDiffering() {
    const group = this.#params.get("group");
    const { first, second } = this.#chosen;
    const id = JSON.stringify([first.result.key, second.result.key, group]);
    if (this.differing.dataset.of === id) return;
    this.differing.dataset.of = id;
    this.differing.replaceChildren();
    if (group === null) return;
    const note = h("p", { class: "note", role: "status" }, "Reading the samples of both ...");
    this.differing.append(h("h2", null, `Group ${lengthName(group)}: samples on which they differ`), note);
    try {
      const pairs = this.#pairs.get(id) ?? (await pairsOf(first.result.key, second.result.key, group, note));
      this.#pairs.set(id, pairs);
      if (this.differing.dataset.of === id) this.#drawPairs(pairs, note);
    } catch (error) {
      delete this.differing.dataset.of;
      throw error;
    }
  }

  #drawPairs(pairs, note) {
    const gained = pairs.filter(({ a, b }) => b.score > a.score).length;
    note.textContent = pairs.length
      ? `${integer(pairs.length)} differ: the second is better on ${integer(gained)}, worse on ${integer(pairs.length - gained)}.` +
        (pairs.length > SHOWN ? ` The first ${SHOWN} are listed.` : "")
      : "They do not differ on any sample of this group.";
    this.differing.append(...pairs.slice(0, SHOWN).map((pair) => drawPair(pair, this.#chosen)));
  }
}

/** Samples of both results, joined by id, where the scores differ. */
async function pairsOf(first, second, group, note) {
  const progress = (read, total) => {
    note.textContent = `Reading the samples of both: ${integer(read)} of ${integer(total)} ...`;
  };
  const [one, other] = [await readAll(first, { group, progress }), await readAll(second, { group, progress })];
  const known = new Map(one.samples.map((sample) => [sample.id, sample]));
  return other.samples
    .map((b) => ({ a: known.get(b.id), b }))
    .filter(({ a, b }) => a && a.prompt === b.prompt && a.answer === b.answer) // the same question, not only its id
    .filter(({ a, b }) => a.score !== b.score)
    .sort((x, y) => (y.a.score - y.b.score) - (x.a.score - x.b.score)); // what was lost comes first
}

/** What a checkpoint wrote for a sample, with a link to it among its samples. */
function outputBlock(which, { run, result }, { output, answer, group }) {
  const href = link("samples", { key: result.key, group, search: answer.slice(0, 200) });
  return block(`${which}: ${run}`, marked(output || "(empty)", answer), h("a", { href }, "open"));
}

/** One sample with both outputs; its prompt is drawn when it is opened. */
function drawPair({ a, b }, { first, second }) {
  const [x, y] = [verdict(a.score), verdict(b.score)];
  const summary = h("summary", null,
    h("span", { class: `mark ${x.kind}`, title: `first: ${x.text}` }, x.sign), "\u2192",
    h("span", { class: `mark ${y.kind}`, title: `second: ${y.text}` }, y.sign),
    h("b", null, excerpt(a.answer, 60)), h("code", null, a.id));
  const item = h("details", null, summary);
  item.addEventListener("toggle", () => {
    if (!item.open || item.children.length > 1) return;
    item.append(
      h("div", { class: "two" }, outputBlock("First", first, a), outputBlock("Second", second, b)),
      block("Prompt", marked(a.prompt, a.answer)));
  });
  return item;
}

function place(value, reach, width) {
  return width / 2 + (value / reach) * (width / 2 - 6);
}

/** Round values on both sides of zero, one or two on each. */
function marksOf(reach, count) {
  const base = 10 ** Math.floor(Math.log10(reach));
  const step = base * [0.2, 0.5, 1, 2, 5].find((m) => reach / (base * m) < count + 0.9);
  return [-2, -1, 0, 1, 2].map((i) => i * step).filter((value) => Math.abs(value) < 0.93 * reach && Math.abs(value) <= count * step);
}

/** The axis above the rows: zero and the marks on both sides of it. */
function forestHead(reach, width) {
  const marks = marksOf(reach, width < 200 ? 1 : 2).map((value) => {
    const text = signed(value, Number.isInteger(value) ? 0 : 1);
    return s("text", { x: place(value, reach, width), y: 14, "text-anchor": "middle" }, text);
  });
  return s("svg", { width, height: 18, "aria-label": "difference, percent points", role: "img" }, marks);
}

function forestRow({ low, high, difference }, reach, width, clear) {
  const at = (value) => place(value, reach, width);
  const line = s("line", { class: "interval", x1: at(low), x2: at(high), y1: 11, y2: 11 });
  const ends = [low, high].map((value) => s("line", { class: "interval", x1: at(value), x2: at(value), y1: 7, y2: 15 }));
  const dot = s("rect", { x: at(difference) - 4, y: 7, width: 8, height: 8, class: "dot" });
  const marks = marksOf(reach, width < 200 ? 1 : 2).map((value) =>
    s("line", { class: value ? "grid" : "zero", x1: at(value), x2: at(value), y1: 0, y2: 22 }));
  return s("svg", { width, height: 22, "aria-hidden": "true", class: clear }, marks, line, ends, dot);
}
