// Pages of samples of one result.

import { get } from "./api.js";

export const PAGE = 50;
const BULK = 200;
const MOST = 20_000; // samples of a group that are read to be compared

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
  const [depth_from, depth_to] = depth ? depth.split("-") : [];
  return get(`results/${key}/samples`, { ...rest, depth_from, depth_to, limit: PAGE, offset }, { signal });
}

/** A bin's name: "10-20%". */
export function depthName(text) {
  const [low, high] = text.split("-").map(Number);
  return Number.isFinite(low) && Number.isFinite(high) ? `${Math.round(100 * low)}-${Math.round(100 * high)}%` : text;
}
