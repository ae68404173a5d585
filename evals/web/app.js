// The shell: navigation, the state of the connection, and the one clock that keeps the views up to date.

import { connection, get, onConnection, Refused, Unreachable } from "./api.js";
import { age, h, setText } from "./dom.js";
import { current, go, link, onRoute } from "./route.js";
import { store } from "./store.js";
import { hideTip, say } from "./tip.js";
import { Compare } from "./view-compare.js";
import { Curves } from "./view-curves.js";
import { HeatMap } from "./view-heatmap.js";
import { Leaderboard } from "./view-leaderboard.js";
import { QueueView } from "./view-queue.js";
import { Samples } from "./view-samples.js";

const POLL = 4000;
const POLL_DOWN = 2000;
const VIEWS = [
  ["leaderboard", "Leaderboard", Leaderboard],
  ["curves", "Curves", Curves],
  ["heatmap", "Heat map", HeatMap],
  ["samples", "Samples", Samples],
  ["compare", "Compare", Compare],
  ["queue", "Queue", QueueView],
];

const main = document.getElementById("main");
const views = new Map(); // name -> view, made when it is first shown and kept with its scroll
const tabs = new Map();
let active = null;
let health = null;
let timer = null;
let ticking = false;
let again = false;
let synced = ""; // what of the state said so when the results were last read

function start() {
  main.replaceChildren();
  const nav = document.getElementById("nav");
  for (const [name, label] of VIEWS) {
    const tab = h("a", { href: link(name) }, label, name === "queue" && h("span", { class: "count", id: "queue-count" }));
    tab.addEventListener("click", (event) => {
      if (event.metaKey || event.ctrlKey || event.shiftKey) return;
      event.preventDefault();
      history.pushState(null, "", tab.getAttribute("href"));
      show(current());
    });
    tabs.set(name, tab);
    nav.append(tab);
  }
  onRoute(show);
  onConnection(showConnection);
  store.onChange(() => active?.changed?.());
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : tick()));
  document.addEventListener("keydown", (event) => active?.key?.(event));
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the hash is the route
    main.focus();
  });
  setInterval(() => document.hidden || showConnection(), 1000);
  show(current());
  tick();
}

/** Show the view of the route with its parameters. */
function show({ view: name, params }) {
  const entry = VIEWS.find(([id]) => id === name);
  if (!entry) {
    go("leaderboard", {}, { replace: true });
    return;
  }
  hideTip();
  if (!views.has(name)) {
    views.set(name, new entry[2]());
    main.append(views.get(name).element);
  }
  active = views.get(name);
  for (const [id, view] of views) view.element.hidden = id !== name;
  for (const [id, tab] of tabs) {
    if (id === name) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  tabs.get(name).href = link(name, params); // a tab goes back to what was last seen in it
  active.show(params);
  if (health) active.health?.(health);
  setTitle();
}

/** Ask how things are; read what is new; let the view that is shown do its part. Never two at a time. */
async function tick() {
  clearTimeout(timer);
  if (ticking) {
    again = true;
    return;
  }
  ticking = true;
  try {
    await refresh();
  } catch (error) {
    if (error instanceof Refused) say(error.message, { error: true });
    else if (!(error instanceof Unreachable)) throw error;
  } finally {
    ticking = false;
    const wait = again ? 0 : connection.state === "down" ? POLL_DOWN : POLL;
    again = false;
    if (!document.hidden) timer = setTimeout(tick, wait);
  }
}

async function refresh() {
  health = await get("health");
  setTitle();
  active?.health?.(health);
  // A result may come to a run whose checkpoint was scored elsewhere, or leave one that was trained anew.
  const mark = [health.jobs.done, health.results, health.counters.superseded].join();
  const sync = async () => {
    if (mark === synced) return;
    await store.sync();
    synced = mark;
  };
  await Promise.all([sync(), active?.tick?.()]);
}

function showConnection() {
  const status = document.getElementById("status");
  const { state, since } = connection;
  status.dataset.state = state;
  document.body.classList.toggle("down", state === "down");
  const [text, seconds] = status.children;
  setText(text, { connecting: "connecting", live: "live", down: "no answer" }[state]);
  setText(seconds, state === "down" ? ` for ${age((Date.now() - since) / 1000)}, trying again` : "");
}

function setTitle() {
  const { queued = 0, running = 0, failed = 0 } = health?.jobs ?? {};
  const busy = queued + running;
  setText(document.getElementById("queue-count"), busy ? String(busy) : "");
  const label = VIEWS.find(([id]) => id === current().view)?.[1] ?? "";
  document.title = `${busy ? `(${busy}) ` : ""}${label} - Evaluations${failed ? ` - ${failed} failed` : ""}`;
}

/** Make the view that is shown read again now, after something was submitted or cancelled. */
window.addEventListener("evaluations:refresh", tick);

start();
