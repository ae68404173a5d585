// Every scored question of a result: a list beside the one that is read, j and k to go through it.

import { Refused, Unreachable } from "./api.js";
import { debounce, field, h, integer, patch, setOptions } from "./dom.js";
import { CheckpointPicker, sampledTasks } from "./pickers.js";
import { set } from "./route.js";
import { block, detailsTable, excerpt, facts, marked, verdict } from "./sample-text.js";
import { depthName, PAGE, readPage } from "./sample-source.js";
import { checkpointId, store, titleOf } from "./store.js";

export class Samples {
  #params = new URLSearchParams();
  #page = null; // { id, offset, samples, total, groups }
  #reading = null;
  #result = null;

  constructor() {
    this.#makeControls();
    this.note = h("p", { class: "note", role: "status" }, "Reading the results ...");
    this.list = h("ol", { class: "samples", role: "listbox", tabindex: "0", "aria-label": "Samples" });
    this.list.addEventListener("click", (event) => this.#choose(Number(event.target.closest("li")?.dataset.key ?? NaN)));
    this.detail = h("article", { class: "sample", "aria-label": "The chosen sample" });
    this.older = h("button", { type: "button", on: { click: () => this.#choose(this.#page.offset - PAGE) } }, "Previous page");
    this.newer = h("button", { type: "button", on: { click: () => this.#choose(this.#page.offset + PAGE) } }, "Next page");
    this.pages = h("p", { class: "pair pages" }, this.older, this.newer);
    this.element = h("section", { "aria-label": "Samples" }, this.controls, this.note,
      h("div", { class: "reader" }, h("div", { class: "index" }, this.list, this.pages), this.detail));
  }

  #makeControls() {
    const typed = debounce((search) => set({ search, at: "" }, { replace: true }), 250);
    const chosen = (id) => set({ checkpoint: id, task: this.task.value, key: "", at: "" });
    const other = () => set({ task: this.task.value, checkpoint: this.#checkpoint(), key: "", group: "", depth: "", at: "" });
    this.task = h("select", { on: { change: other } });
    this.picker = new CheckpointPicker("Run", chosen);
    this.group = h("select", { on: { change: () => set({ group: this.group.value, depth: "", at: "" }) } });
    this.wrong = h("input", { type: "checkbox", on: { change: () => set({ wrong: this.wrong.checked ? "1" : "", at: "" }) } });
    this.search = h("input", { type: "search", placeholder: "in prompt, answer, output", spellcheck: "false" });
    this.search.addEventListener("input", () => typed(this.search.value));
    this.depth = h("button", { type: "button", on: { click: () => set({ depth: "", at: "" }) } });
    this.controls = h("form", { class: "controls", on: { submit: (event) => event.preventDefault() } },
      field("Task", this.task), this.picker.fields, field("Group", this.group), field("Search", this.search),
      h("div", { class: "field" }, h("span", null, "Only"), h("div", { class: "pair" }, h("label", { class: "box" }, this.wrong, "wrong"), this.depth)));
  }

  #get(name) {
    return this.#params.get(name) ?? "";
  }

  #checkpoint() {
    return `${this.picker.run.value}@${this.picker.step.value}`; // as `checkpointId` names it
  }

  show(params) {
    this.#params = params;
    this.changed();
  }

  /** What is read next after the service came back. */
  tick() {
    if (this.failed) this.#read();
  }

  changed() {
    if (!store.loaded) return;
    const tasks = sampledTasks();
    const given = store.find(this.#get("key"), this.#get("checkpoint"));
    const task = given?.task ?? (tasks.includes(this.#get("task")) ? this.#get("task") : tasks[0]);
    if (!task) {
      this.note.textContent = "No task with samples has been scored yet.";
      return;
    }
    setOptions(this.task, tasks.map((name) => [name, name]), task);
    const chosen = this.picker.sync(task, given ? checkpointId(given.run, given.step) : this.#get("checkpoint"));
    this.#result = given ?? chosen?.result ?? null;
    this.wrong.checked = Boolean(this.#get("wrong"));
    if (document.activeElement !== this.search) this.search.value = this.#get("search");
    this.depth.hidden = !this.#get("depth");
    this.depth.textContent = `depth ${depthName(this.#get("depth"))} \u2715`;
    this.depth.setAttribute("aria-label", `all depths instead of ${depthName(this.#get("depth"))}`);
    this.#syncGroups(Object.keys(this.#result?.groups ?? {}));
    this.#read();
  }

  #syncGroups(names) {
    const group = this.#get("group");
    const all = group && !names.includes(group) ? [...names, group] : names;
    setOptions(this.group, [["", "all"], ...all.map((name) => [name, name])], group);
  }

  #filters() {
    const filters = Object.fromEntries(["group", "search", "depth"].map((name) => [name, this.#get(name)]));
    return { ...filters, wrong: this.#get("wrong") ? "true" : "" };
  }

  /** Read the page that holds the chosen sample, unless it is the one that is here. */
  async #read() {
    if (!this.#result) return;
    const at = Math.max(0, Number(this.#get("at")) || 0);
    const offset = at - (at % PAGE);
    const id = JSON.stringify([this.#result.key, this.#filters(), offset]);
    if (this.#page?.id === id) {
      this.#draw(at);
      return;
    }
    this.#reading?.abort();
    const reading = new AbortController();
    this.#reading = reading;
    this.element.setAttribute("aria-busy", "true");
    try {
      this.failed = true;
      const answer = await readPage(this.#result.key, this.#filters(), offset, reading.signal);
      this.#page = { id, offset, ...answer };
      this.failed = false;
      this.#syncGroups(answer.groups);
      this.#draw(at);
    } catch (error) {
      if (!reading.signal.aborted) this.#fail(error);
    } finally {
      if (this.#reading === reading) this.element.removeAttribute("aria-busy");
    }
  }

  #fail(error) {
    if (!(error instanceof Unreachable || error instanceof Refused)) throw error;
    this.failed = error instanceof Unreachable;
    this.note.textContent = `These samples cannot be read: ${error.message}`;
  }

  #draw(at) {
    const { samples, total, offset } = this.#page;
    const { run, step, task } = this.#result;
    const last = offset + samples.length;
    this.note.textContent = total
      ? `${task}, ${titleOf(run, step)}: samples ${integer(offset + 1)} to ${integer(last)} of ${integer(total)}. Keys: j next, k previous.`
      : `${task}, ${titleOf(run, step)}: no sample passes these filters.`;
    const items = samples.map((sample, i) => ({ sample, place: offset + i }));
    patch(this.list, items, { key: ({ place }) => place, create: () => h("li", { role: "option" }), update: (item, one) => drawItem(item, one, at) });
    this.list.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" });
    this.older.disabled = offset === 0;
    this.newer.disabled = last >= total;
    this.pages.hidden = total <= PAGE;
    const chosen = samples[at - offset];
    this.detail.replaceChildren(...(chosen ? sampleBlocks(chosen) : []));
    this.detail.scrollTop = 0;
  }

  #choose(place) {
    if (!Number.isFinite(place) || !this.#page) return;
    const at = Math.min(Math.max(place, 0), this.#page.total - 1);
    set({ at: at > 0 ? at : "" }, { replace: true });
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog")) return;
    const inList = this.list.contains(event.target);
    const move = { j: 1, k: -1, ...(inList && { ArrowDown: 1, ArrowUp: -1 }) }[event.key];
    if (!move) return;
    event.preventDefault();
    this.#choose((Number(this.#get("at")) || 0) + move);
  }
}

function drawItem(item, { sample, place }, at) {
  const mark = verdict(sample.score);
  const text = JSON.stringify([sample.id, sample.score]);
  item.setAttribute("aria-selected", String(place === at));
  if (item.dataset.drawn === text) return;
  item.dataset.drawn = text;
  item.replaceChildren(
    h("span", { class: `mark ${mark.kind}`, title: mark.text }, mark.sign),
    h("span", { class: "place" }, integer(place + 1)),
    h("span", { class: "what" }, h("b", null, excerpt(sample.answer, 60)), h("span", null, excerpt(sample.output) || "(empty)")),
    h("span", { class: "group" }, sample.group));
}

/** The parts of the article about one sample. */
function sampleBlocks(sample) {
  const mark = verdict(sample.score);
  return [
    h("h2", null, h("span", { class: `mark ${mark.kind}` }, mark.sign), ` ${mark.text}`),
    h("p", { class: "facts" }, facts(sample), h("code", null, sample.id)),
    h("div", { class: "two" }, block("Answer", sample.answer), block("Output", marked(sample.output || "(empty)", sample.answer))),
    block("Prompt", marked(sample.prompt, sample.answer)),
    detailsTable(sample.details) && h("div", { class: "block" }, h("h3", null, "Details"), detailsTable(sample.details)),
  ].filter(Boolean);
}
