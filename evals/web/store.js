// Every result of the service, kept here and brought up to date by reading only what is new.

import { get } from "./api.js";
import { integer, naturally } from "./dom.js";
import { compareScalars, compareTasks } from "./scalars.js";

const FIRST_PAGE = 100;
const PAGE = 1000;

/** Names a checkpoint: "run@1000"; a baseline, which has no step, is "name@-". */
export function checkpointId(run, step) {
  return `${run}@${step ?? "-"}`;
}

/** A checkpoint's name in two; the step is a number, or null. */
export function splitId(id) {
  const mark = id.lastIndexOf("@");
  const step = id.slice(mark + 1);
  return { run: id.slice(0, mark), step: step === "-" ? null : Number(step) };
}

/** "run, step 1,000", or the name of a baseline. */
export function titleOf(run, step) {
  return step === null ? run : `${run}, step ${integer(step)}`;
}

/** Names a row of GET /results: equal checkpoints of several runs share a key. */
function rowId(row) {
  return `${row.key} ${checkpointId(row.run, row.step)}`;
}

class Store {
  results = new Map(); // rowId -> row of GET /results
  checkpoints = new Map(); // run -> step (null: none) -> task -> row; of several the newest
  tasks = new Map(); // scalar -> task
  listing = { runs: {}, baselines: [], tasks: [] }; // GET /runs
  loaded = false;
  total = 0;
  #listeners = new Set();
  #syncing = null;

  /** Call `listener` when there are other results. */
  onChange(listener) {
    this.#listeners.add(listener);
  }

  /** Read what is new; calls at the same time share one read. */
  sync() {
    this.#syncing ??= this.#sync().finally(() => {
      this.#syncing = null;
    });
    return this.#syncing;
  }

  /** Read which runs and checkpoints there are: new ones come without a result. */
  async readListing() {
    this.listing = await get("runs");
  }

  async #sync() {
    await this.readListing();
    const before = this.results.size;
    let fresh = await this.#read(this.results);
    if (new Set([...this.results.keys(), ...fresh.keys()]).size !== this.total) {
      fresh = await this.#read(new Map()); // another database, or rows that went: all of it again
      this.results = new Map();
    }
    const changed = fresh.size > 0 || this.results.size !== before || !this.loaded;
    for (const [id, row] of fresh) this.results.set(id, row);
    this.loaded = true;
    if (changed) this.#changed();
  }

  /** Rows that are not among the known ones: newest first, until one is known. */
  async #read(known) {
    const fresh = new Map();
    let offset = 0;
    for (let limit = known.size ? FIRST_PAGE : PAGE; ; limit = PAGE) {
      const answer = await get("results", { limit, offset });
      this.total = answer.total;
      const strange = answer.results.filter((row) => !known.has(rowId(row)));
      for (const row of strange) fresh.set(rowId(row), row);
      offset += answer.results.length;
      if (strange.length < answer.results.length || answer.results.length < limit || offset >= answer.total) return fresh;
    }
  }

  #changed() {
    this.checkpoints = new Map();
    this.tasks = new Map();
    for (const row of [...this.results.values()].sort((a, b) => a.created - b.created)) this.#index(row);
    for (const listener of this.#listeners) listener();
  }

  #index(row) {
    if (!this.checkpoints.has(row.run)) this.checkpoints.set(row.run, new Map());
    const steps = this.checkpoints.get(row.run);
    if (!steps.has(row.step)) steps.set(row.step, new Map());
    steps.get(row.step).set(row.task, row);
    for (const name of Object.keys(row.scalars)) this.tasks.set(name, row.task);
  }

  /** The row of a result's key: at a checkpoint ("run@step") where it is given and has it, else any. */
  find(key, checkpoint) {
    if (!key) return undefined;
    return this.results.get(`${key} ${checkpoint}`) ?? [...this.results.values()].find((row) => row.key === key);
  }

  /** Whether a name is that of a model without steps. */
  isBaseline(run) {
    return this.steps(run).every((step) => step === null);
  }

  /** Runs and baselines with a result, by name. */
  runs() {
    return [...this.checkpoints.keys()].sort(naturally);
  }

  /** Steps of a run with a result, the newest first; null is that of a baseline. */
  steps(run) {
    return [...(this.checkpoints.get(run)?.keys() ?? [])].sort((a, b) => (b ?? -1) - (a ?? -1));
  }

  /** The row of a checkpoint's task, or undefined. */
  result(run, step, task) {
    return this.checkpoints.get(run)?.get(step)?.get(task);
  }

  /** Names of all scalars: by family and task, then by their numbers. */
  scalars() {
    return [...this.tasks.keys()].sort(
      (a, b) => compareTasks(this.tasks.get(a), this.tasks.get(b)) || compareScalars(a, b),
    );
  }

  /** Tasks with a result, by family. */
  taskNames() {
    return [...new Set([...this.results.values()].map((row) => row.task))].sort(compareTasks);
  }

  /** Value of a scalar at a checkpoint and the row it comes from; null without a result. */
  value(run, step, scalar) {
    const result = this.result(run, step, this.tasks.get(scalar));
    const value = result?.scalars[scalar];
    if (value === undefined || value === null) return null;
    return { value, result };
  }
}

/** The group whose mean a scalar is (the same value, and a name that the scalar's holds, or the only one), or null. */
export function shareOf(row, scalar) {
  const value = row.scalars[scalar];
  const groups = Object.entries(row.groups ?? {});
  const same = groups.filter(([, share]) => Math.abs(share.score - value) < 1e-6);
  const named = same.find(([name]) => scalar.endsWith(`/${name}`) || scalar.split("/").includes(name));
  const found = named ?? (groups.length === 1 ? same[0] : undefined);
  return found ? { group: found[0], ...found[1] } : null;
}

export const store = new Store();
