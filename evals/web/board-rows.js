// Which checkpoints and baselines are rows of the leaderboard, in which order, and what is best.

import { naturally } from "./dom.js";
import { baselineOf, familyOf, format, lowerIsBetter } from "./scalars.js";
import { checkpointId, store } from "./store.js";

/** Scalars that are columns: of the chosen tasks (a set), else of the family, else all; baselines are rows. */
export function columnsOf({ family, tasks }) {
  const names = store.scalars();
  const all = new Set(names);
  return names.filter((name) => {
    const task = store.tasks.get(name);
    const wanted = tasks ? tasks.has(task) : !family || familyOf(task) === family;
    return wanted && !all.has(baselineOf(name)?.of);
  });
}

/** Every step of any run, the newest first. */
export function allSteps() {
  const steps = store.runs().flatMap((run) => store.steps(run)).filter((step) => step !== null);
  return [...new Set(steps)].sort((a, b) => b - a);
}

/** The rows of some runs, and of baselines, which have but one. `at`: "newest", "best" (by the scalar `by`), "step" (the given `step`) or "all". */
export function rowsOf(runs, columns, { at, by, step }) {
  const choose = {
    newest: (run) => store.steps(run).slice(0, 1),
    best: (run) => bestStep(run, by),
    step: (run) => store.steps(run).filter((one) => one === step),
    all: (run) => store.steps(run),
  }[at];
  const steps = (run) => (store.isBaseline(run) ? [null] : choose?.(run) ?? []);
  return runs.flatMap((run) => steps(run).map((one) => checkpointRow(run, one, columns)));
}

function checkpointRow(run, step, columns) {
  const [first] = store.checkpoints.get(run).get(step).values();
  const values = columns.map((name) => store.value(run, step, name));
  return { run, step, tokens: first?.tokens ?? null, id: checkpointId(run, step), values };
}

function bestStep(run, by) {
  const sign = lowerIsBetter(by) ? 1 : -1;
  const scored = store.steps(run).map((step) => [step, store.value(run, step, by)?.value]);
  return scored.filter(([, value]) => value !== undefined).sort((a, b) => sign * (a[1] - b[1])).slice(0, 1).map(([step]) => step);
}

/** Rows of the baselines that were scored beside the checkpoints of `rows`: one for each value there is. */
export function baselineRows(rows, columns) {
  const found = new Map(); // "bigram 2.1184" -> row
  for (const name of store.scalars()) {
    const baseline = baselineOf(name);
    const column = columns.indexOf(baseline?.of);
    if (column < 0) continue;
    for (const row of rows) {
      const entry = store.value(row.run, row.step, name);
      if (!entry) continue;
      const id = `baseline ${baseline.name} ${format(name, entry.value)}`;
      if (!found.has(id)) found.set(id, { id, baseline: true, run: baseline.name, step: null, tokens: null, values: columns.map(() => null) });
      found.get(id).values[column] = entry;
    }
  }
  return [...found.values(), ...chanceRows(rows, columns)];
}

/** What a guess would get of the scalars: one row, and more where it depends on the settings of the rows. */
function chanceRows(rows, columns) {
  const found = [];
  columns.forEach((name, column) => {
    chancesOf(rows.map((row) => row.values[column]), name).forEach((entry, i) => {
      found[i] ??= { id: `baseline chance ${i}`, baseline: true, run: "chance", step: null, tokens: null, values: columns.map(() => null) };
      found[i].values[column] = entry;
    });
  });
  return found;
}

/** Different values of a guess for a scalar among entries { value, result } of it. */
export function chancesOf(entries, name) {
  const found = new Map(); // the text -> entry
  for (const entry of entries) {
    const value = entry?.result.chance?.[name];
    if (Number.isFinite(value)) found.set(format(name, value), { value, result: entry.result });
  }
  return [...found.values()];
}

/** Rows by a column, or by "run", "step" or "tokens"; those without a value come last in both directions. */
export function sortRows(rows, columns, name, descending) {
  const column = columns.indexOf(name);
  const sign = descending ? -1 : 1;
  const value = (row) => (column >= 0 ? row.values[column]?.value : row[name]) ?? null;
  return rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null) || naturally(a.run, b.run);
    const order = name === "run" ? naturally(x, y) : x - y;
    return sign * order || naturally(a.run, b.run) || b.step - a.step;
  });
}

/** By column the text of the best value of the checkpoints, null where they all show the same (or but one does). */
export function bestTexts(rows, columns) {
  return columns.map((name, i) => {
    const values = rows.filter((row) => !row.baseline).map((row) => row.values[i]?.value).filter((value) => Number.isFinite(value));
    if (new Set(values.map((value) => format(name, value))).size < 2) return null;
    return format(name, values.reduce((a, b) => (lowerIsBetter(name) ? Math.min(a, b) : Math.max(a, b))));
  });
}
