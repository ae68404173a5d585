// The queue as it is now: what waits, runs and failed; cancel and submit.

import { get, post, Refused, remove, serverNow, Unreachable } from "./api.js";
import { age, debounce, field, h, integer, patch, setOptions, setText } from "./dom.js";
import { set } from "./route.js";
import { SubmitForm } from "./submit-form.js";
import { compareTasks } from "./scalars.js";
import { store, titleOf } from "./store.js";
import { confirmed, say } from "./tip.js";

const PAGE = 100;
const STATES = ["running", "queued", "failed", "cancelled", "done"];
const SIGNS = { running: "\u25b6", queued: "\u2026", failed: "\u2717", cancelled: "\u2013", done: "\u2713" };

export class QueueView {
  #params = new URLSearchParams();
  #read = 0;
  #busy = new Set(); // keys whose cancelling is under way

  constructor() {
    const typed = debounce((run) => set({ run, offset: "" }, { replace: true }), 250);
    this.run = h("input", { type: "search", placeholder: "the whole name", spellcheck: "false", list: "queue-runs" });
    this.run.addEventListener("input", () => typed(this.run.value));
    this.runs = h("datalist", { id: "queue-runs" });
    this.task = h("select", { on: { change: () => set({ task: this.task.value, offset: "" }) } });
    this.states = h("div", { class: "switch", role: "group", "aria-label": "State" });
    this.submit = new SubmitForm((wanted) => this.#submit(wanted));
    const open = h("button", { type: "button", class: "primary", on: { click: () => this.#ask() } }, "Submit ...");
    this.note = h("p", { class: "note", role: "status" }, "Reading the queue ...");
    this.body = h("tbody", { role: "rowgroup" }); // roles: as cards on a narrow page it is still a table
    this.previous = h("button", { type: "button", on: { click: () => this.#turn(-PAGE) } }, "Newer");
    this.next = h("button", { type: "button", on: { click: () => this.#turn(PAGE) } }, "Older");
    this.pages = h("p", { class: "pair pages", hidden: true }, this.previous, this.next);
    this.element = h("section", { "aria-label": "Queue" },
      h("form", { class: "controls", on: { submit: (event) => event.preventDefault() } },
        h("div", { class: "field" }, h("span", null, "State"), this.states), field("Run", this.run), this.runs, field("Task", this.task), open),
      this.note, h("div", { class: "scroll" }, h("table", { class: "queue", role: "table" }, tableHead(), this.body)),
      this.pages, this.submit.dialog);
    this.#drawStates({});
  }

  #get(name) {
    return this.#params.get(name) ?? "";
  }

  show(params) {
    this.#params = params;
    if (document.activeElement !== this.run) this.run.value = this.#get("run");
    this.#drawStates(this.counts ?? {});
    this.#refresh();
  }

  health({ jobs }) {
    this.counts = jobs;
    this.#drawStates(jobs);
  }

  tick() {
    return this.#refresh();
  }

  #turn(by) {
    const offset = Math.max(0, (Number(this.#get("offset")) || 0) + by);
    set({ offset: offset || "" });
  }

  #drawStates(counts) {
    const total = Object.values(counts).reduce((a, b) => a + b, 0);
    patch(this.states, ["", ...STATES], {
      key: (state) => state || "all",
      create: (state) => h("button", { type: "button", on: { click: () => set({ state, offset: "" }) } }, state || "all", " ", h("span", { class: "count" })),
      update: (button, state) => {
        button.setAttribute("aria-pressed", String(this.#get("state") === state));
        setText(button.lastChild, integer(state ? counts[state] ?? 0 : total));
      },
    });
    const tasks = [...new Set([...store.listing.tasks, ...store.taskNames()])].sort(compareTasks);
    setOptions(this.task, [["", "all"], ...tasks.map((name) => [name, name])], this.#get("task"));
    patch(this.runs, Object.keys(store.listing.runs), { key: (name) => name, create: (name) => h("option", { value: name }) });
  }

  async #refresh() {
    const read = ++this.#read;
    const wanted = Object.fromEntries(["state", "run", "task", "offset"].map((name) => [name, this.#get(name)]));
    try {
      const answer = await get("jobs", { ...wanted, limit: PAGE });
      // What runs stands first, however many were queued after it.
      const running = wanted.state || wanted.offset ? [] : (await get("jobs", { ...wanted, state: "running", limit: PAGE })).jobs;
      const first = new Set(running.map((job) => job.key));
      const jobs = [...running, ...answer.jobs.filter((job) => !first.has(job.key))];
      if (read === this.#read) this.#draw({ ...answer, jobs });
    } catch (error) {
      if (error instanceof Refused) this.note.textContent = error.message;
      else if (!(error instanceof Unreachable)) throw error;
    }
  }

  #draw({ jobs, total }) {
    const offset = Number(this.#get("offset")) || 0;
    const last = Math.min(offset + PAGE, total);
    const range = total > PAGE ? `Jobs ${integer(offset + 1)} to ${integer(last)} of ${integer(total)}: what runs, then the newest first.`
      : `${integer(total)} jobs: what runs, then the newest first.`;
    const filtered = this.#get("state") || this.#get("run") || this.#get("task");
    const empty = filtered ? "No job passes these filters." : "The queue is empty: checkpoints are queued as they are committed.";
    setText(this.note, total ? range : empty);
    patch(this.body, jobs, { key: (job) => job.key, create: () => newRow(), update: (row, job) => this.#update(row, job) });
    this.pages.hidden = total <= PAGE;
    this.previous.disabled = offset === 0;
    this.next.disabled = last >= total;
  }

  #update(row, job) {
    const [state, run, step, task, tries, past, error, action] = row.cells;
    setText(state.firstChild, `${SIGNS[job.state] ?? ""} ${job.state}`);
    state.className = `state ${job.state}`;
    setText(run, job.run);
    setText(step, job.step === null ? "" : integer(job.step));
    setText(task, job.task);
    setText(tries, String(job.attempts));
    setText(past, age(serverNow() - job.created));
    past.title = new Date(1000 * job.created).toLocaleString();
    setText(error, job.error ?? "");
    const button = action.firstChild;
    button.hidden = !["queued", "running"].includes(job.state);
    button.disabled = this.#busy.has(job.key);
    button.setAttribute("aria-label", `Cancel ${job.task} on ${titleOf(job.run, job.step)}`);
    button.onclick = () => this.#cancel(job);
  }

  async #cancel(job) {
    const text = `${job.task} on ${titleOf(job.run, job.step)}. ` +
      (job.state === "running" ? "It runs: what it has done so far is lost." : "It has not begun.");
    if (!(await confirmed({ title: "Cancel this job?", text, yes: "Cancel the job", danger: true }))) return;
    this.#busy.add(job.key);
    await told(async () => {
      await remove(`jobs/${job.key}`);
      say("Cancelled.");
    });
    this.#busy.delete(job.key);
    window.dispatchEvent(new Event("evaluations:refresh"));
  }

  async #ask() {
    await told(() => store.readListing());
    this.submit.open();
  }

  /** Queue the chosen tasks on a checkpoint; what one refusal says is told, the others are still asked for. */
  async #submit({ run, step, tasks, priority }) {
    let added = 0;
    let there = 0;
    const refusals = [];
    for (const task of tasks) {
      try {
        const { new: fresh } = await post("jobs", { run, task, priority, ...(step === null ? {} : { step }) });
        if (fresh) added += 1;
        else there += 1;
      } catch (error) {
        if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
        refusals.push(`${task}: ${error.message}`);
      }
    }
    const done = there ? `${added} queued, ${there} were there already.` : `${added} queued.`;
    say([done, ...refusals].join(" "), { error: refusals.length > 0 });
    window.dispatchEvent(new Event("evaluations:refresh"));
  }
}

async function told(action) {
  try {
    await action();
  } catch (error) {
    if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
    say(error.message, { error: true });
  }
}

function tableHead() {
  const names = ["state", "run", "step", "task", "tries", "age", "error"];
  const cells = names.map((name) => {
    const kind = ["step", "tries", "age"].includes(name) ? "number" : null;
    return h("th", { scope: "col", role: "columnheader", class: kind, title: name === "age" ? "since it was queued" : null }, name);
  });
  const actions = h("th", { scope: "col", role: "columnheader" }, h("span", { class: "hidden" }, "actions"));
  return h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, cells, actions));
}

function newRow() {
  const kinds = ["state", "run", "number step", "task", "number tries", "number age", "error"];
  const cells = kinds.map((kind) => h("td", { role: "cell", class: kind }, kind === "state" && h("span")));
  const button = h("button", { type: "button", class: "small" }, "Cancel");
  return h("tr", { role: "row" }, cells, h("td", { role: "cell", class: "action" }, button));
}
