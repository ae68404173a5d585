// What is known about a scalar by its name: family, direction, format.

import { naturally } from "./dom.js";

const FAMILIES = [
  ["lm", "Language modelling", ["perplexity", "context_length"]],
  ["commonsense", "Commonsense", ["lambada", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "siqa", "harness"]],
  ["retrieval", "Retrieval", ["niah_single_1", "niah_single_2", "niah_single_3", "niah_single_word", "niah_multikey_1",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "mqar", "needle"]],
  ["cost", "Cost", ["decode"]],
  ["other", "Other", ["sample"]],
];
const ORDER = new Map(FAMILIES.flatMap(([family, , tasks], i) => tasks.map((task, j) => [task, { family, place: 100 * i + j }])));
const LOWER = /(^context_length\/)|(^|[/_])(perplexity|ppl|bits_per_byte|bpb|loss|nll|ms|bytes|seconds|latency)([/_,]|$)/;

/** [id, label] of every family, in order. */
export const families = FAMILIES.map(([id, label]) => [id, label]);

/** The family of a task: "lm", "commonsense", "retrieval", "cost" or "other". */
export function familyOf(task) {
  return ORDER.get(task)?.family ?? "other";
}

/** Order of tasks: by family, then as the paper's tables have them. */
export function compareTasks(a, b) {
  const [x, y] = [ORDER.get(a)?.place ?? 999, ORDER.get(b)?.place ?? 999];
  return x - y || naturally(a, b);
}

/** Order of the scalars of a task: by their numbers; what is chosen among given answers after what is written. */
export function compareScalars(a, b) {
  return a.includes("/choice/") - b.includes("/choice/") || naturally(a, b);
}

/** Whether less is better. */
export function lowerIsBetter(scalar) {
  return LOWER.test(scalar);
}

/** A scalar that is another one of a baseline: "eval/bigram_loss" is { name: "bigram", of: "eval/loss" }; or null. */
export function baselineOf(scalar) {
  const found = /^(.*\/)(bigram|unigram|uniform|chance|oracle)_(.+)$/.exec(scalar);
  return found ? { name: found[2], of: found[1] + found[3] } : null;
}

/** What a column is called below its task's name: "acc", "gen. 4K", "state, MiB". */
export function shortName(scalar, task) {
  const parts = scalar.split("/");
  const rest = parts.length > 1 ? parts.slice(1) : parts;
  const numbers = rest.every((part) => /^\d+$/.test(part));
  const name = rest.map((part) => lengthName(part)).join(numbers ? "/" : " ").replaceAll("_", " ").replace("generation", "gen.");
  if (!name || name === task) return task;
  return isBytes(scalar) ? `${name.replace(/ ?bytes/, "")}, MiB` : name;
}

/** 4096 as 4K; other names as they are. */
export function lengthName(text) {
  const length = /^\d+$/.test(text) ? Number(text) : 0;
  return length >= 1024 && length % 1024 === 0 ? `${length / 1024}K` : text;
}

function isBytes(scalar) {
  return /(^|[/_])bytes$/.test(scalar);
}

/** The text of a value; `unit` adds the unit that the column's name would tell. */
export function format(scalar, value, { unit = false } = {}) {
  if (!Number.isFinite(value)) return String(value);
  if (isBytes(scalar)) return (value / 2 ** 20).toFixed(2) + (unit ? " MiB" : "");
  if (/bits_per_byte|loss|nll|^context_length/.test(scalar)) return value.toFixed(4);
  if (/ms(_per_token)?$/.test(scalar)) return value.toFixed(2) + (unit ? " ms" : "");
  if (LOWER.test(scalar)) return value.toFixed(2);
  return value.toFixed(1) + (unit ? "%" : "");
}

/** "63.2 to 71.5" of a share, in percent. */
export function interval(share) {
  return `${share.low.toFixed(1)} to ${share.high.toFixed(1)}`;
}
