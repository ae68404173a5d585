// How one sample is shown: its texts as they are, the answer marked where it stands in them.

import { h, integer } from "./dom.js";
import { lengthName } from "./scalars.js";

const MARKS = 50;

/** Right, wrong or in between: sign and words, so that colour is not all that tells. */
export function verdict(score) {
  if (score >= 1) return { kind: "right", sign: "\u2713", text: "right" };
  if (score <= 0) return { kind: "wrong", sign: "\u2717", text: "wrong" };
  return { kind: "partly", sign: "\u25d0", text: `${Math.round(100 * score)}% right` };
}

/** The first line of a text, short. */
export function excerpt(text, length = 90) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > length ? `${line.slice(0, length)}\u2026` : line;
}

/** A text with every occurrence of `wanted` marked. */
export function marked(text, wanted) {
  const needle = wanted.trim().toLowerCase();
  if (needle.length < 2) return [text];
  const lower = text.toLowerCase();
  const parts = [];
  let from = 0;
  for (let at = lower.indexOf(needle); at >= 0 && parts.length < 2 * MARKS; at = lower.indexOf(needle, from)) {
    parts.push(text.slice(from, at), h("mark", null, text.slice(at, at + needle.length)));
    from = at + needle.length;
  }
  return [...parts, text.slice(from)];
}

/** The facts of a sample in one line. */
export function facts(sample) {
  const parts = [`group ${sample.group}`];
  if (typeof sample.length === "number") parts.push(`${integer(sample.length)} tokens (${lengthName(String(sample.length))})`);
  if (typeof sample.depth === "number") parts.push(`depth ${(100 * sample.depth).toFixed(1)}%`);
  return parts.join(" \u00b7 ");
}

/** A titled text in the form it has. */
export function block(label, content, extra = null) {
  return h("div", { class: "block" }, h("h3", null, label, extra), h("pre", null, content));
}

/** The details of a sample: a table of names and values, nested ones as tables of their own. */
export function detailsTable(details) {
  const rows = Object.entries(details ?? {});
  if (!rows.length) return null;
  return h("div", { class: "scroll" }, h("table", { class: "details" }, h("tbody", null,
    rows.map(([name, value]) => h("tr", null, h("th", { scope: "row" }, name.replaceAll("_", " ")), h("td", null, detail(value)))))));
}

function detail(value) {
  if (Array.isArray(value) && value.length && value.every((item) => item !== null && typeof item === "object" && !Array.isArray(item))) {
    const names = [...new Set(value.flatMap((item) => Object.keys(item)))];
    return h("table", null, h("thead", null, h("tr", null, names.map((name) => h("th", { scope: "col" }, name.replaceAll("_", " "))))),
      h("tbody", null, value.map((item) => h("tr", null, names.map((name) => h("td", null, plain(item[name])))))));
  }
  return plain(value);
}

function plain(value) {
  if (typeof value === "number") return Number.isInteger(value) ? integer(value) : String(Number(value.toPrecision(6)));
  if (typeof value === "string") return value;
  if (value === undefined) return "";
  return JSON.stringify(value);
}
