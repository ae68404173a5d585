// Choosing a checkpoint's task: run, step, task, each list with what there is a result of.

import { field, h, integer, setOptions } from "./dom.js";
import { checkpointId, splitId, store } from "./store.js";

/** Selects for run and step among the checkpoints with a result of a task; `choose` gets "run@step". */
export class CheckpointPicker {
  constructor(label, choose) {
    this.run = h("select", { on: { change: () => choose(checkpointId(this.run.value, this.#nearest(this.run.value))) } });
    this.step = h("select", { on: { change: () => choose(`${this.run.value}@${this.step.value}`) } });
    this.fields = [field(label, this.run), field("Step", this.step, { class: "field narrow" })];
  }

  /** Fill the lists for a task and show the checkpoint; returns the one that is shown, or null. */
  sync(task, id) {
    this.task = task;
    const runs = store.runs().filter((run) => this.#steps(run).length);
    const wanted = id ? splitId(id) : {};
    const run = runs.includes(wanted.run) ? wanted.run : newestRun(task) ?? runs[0];
    const steps = run === undefined ? [] : this.#steps(run);
    const step = steps.includes(wanted.step) ? wanted.step : steps[0];
    setOptions(this.run, runs.map((name) => [name, name]), run ?? "");
    setOptions(this.step, steps.map((one) => [one ?? "-", one === null ? "-" : integer(one)]), steps.length ? step ?? "-" : "");
    return run === undefined ? null : { run, step, result: store.result(run, step, task) };
  }

  #steps(run) {
    return store.steps(run).filter((step) => store.result(run, step, this.task));
  }

  /** The chosen run's step nearest to the one that was shown: runs are compared at the same step. */
  #nearest(run) {
    const shown = Number(this.step.value); // NaN of a baseline: then the newest
    return this.#steps(run).sort((a, b) => Math.abs(a - shown) - Math.abs(b - shown))[0];
  }
}

/** The run that a task was scored on last. */
function newestRun(task) {
  let newest;
  for (const row of store.results.values()) if (row.task === task && !(newest?.created > row.created)) newest = row;
  return newest?.run;
}

/** Tasks whose results have groups of samples. */
export function sampledTasks() {
  const rows = [...store.results.values()];
  const sampled = new Set(rows.filter((row) => Object.keys(row.groups ?? {}).length).map((row) => row.task));
  return store.taskNames().filter((task) => sampled.has(task));
}
