// Pages of samples of one result: from the service where it can filter, else filtered here.

import { get } from "./api.js";

export const PAGE = 50;
const BULK = 200;
// The service filters by group, and not by depth: so many samples of a group are read to filter them here.
const MOST = 20_000;

/** All samples of a group (or of the whole result), page by page; `progress` is told how many there are yet. */
export async function readAll(key, { group, wrong, search, signal, progress }) {
  const found = [];
  for (;;) {
    const answer = await get(`results/${key}/samples`, { group, wrong, search, limit: BULK, offset: found.length }, { signal });
    found.push(...answer.samples);
    progress?.(found.length, answer.total);
    if (!answer.samples.length || found.length >= Math.min(answer.total, MOST)) return { ...answer, samples: found };
  }
}

/** One page: { samples, total, groups }. `filters` has group, wrong, search and depth ("0.1-0.2"). */
export async function readPage(key, filters, offset, signal) {
  const { depth, ...rest } = filters;
  if (!depth) return get(`results/${key}/samples`, { ...rest, limit: PAGE, offset }, { signal });
  const all = await readAll(key, { ...rest, signal });
  const inside = all.samples.filter((sample) => within(sample.depth, depth));
  return { samples: inside.slice(offset, offset + PAGE), total: inside.length, groups: all.groups };
}

/** Whether a depth is in a bin; the last bin has its upper edge. */
function within(depth, text) {
  const [low, high] = text.split("-").map(Number);
  return typeof depth === "number" && depth >= low && (depth < high || (high === 1 && depth === 1));
}

/** A bin's name: "10-20%". */
export function depthName(text) {
  const [low, high] = text.split("-").map(Number);
  return Number.isFinite(low) && Number.isFinite(high) ? `${Math.round(100 * low)}-${Math.round(100 * high)}%` : text;
}
