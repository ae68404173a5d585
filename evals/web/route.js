// The hash is the state of a view: #/curves?scalar=piqa%2Facc&x=tokens. A link shows what its sender saw.

const listeners = new Set();
let told = location.hash;

/** The view's name and its parameters. */
export function current() {
  const hash = location.hash.replace(/^#\/?/, "");
  const mark = hash.indexOf("?");
  const view = mark < 0 ? hash : hash.slice(0, mark);
  return { view, params: new URLSearchParams(mark < 0 ? "" : hash.slice(mark + 1)) };
}

/** The hash of a view with parameters; empty ones are left out. */
export function link(view, params = {}) {
  const query = new URLSearchParams();
  const entries = params instanceof URLSearchParams ? params : Object.entries(params);
  for (const [name, value] of entries) if (value !== null && value !== undefined && value !== "") query.set(name, value);
  const text = query.toString();
  return `#/${view}${text ? `?${text}` : ""}`;
}

/** Go to a view; `replace` leaves no entry for the back button. */
export function go(view, params = {}, { replace = false } = {}) {
  const hash = link(view, params);
  if (hash === location.hash) return;
  history[replace ? "replaceState" : "pushState"](null, "", hash);
  tell();
}

/** Change some parameters of the view that is shown; "" or null removes one. */
export function set(changes, { replace = false } = {}) {
  const { view, params } = current();
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "") params.delete(name);
    else params.set(name, value);
  }
  go(view, params, { replace });
}

/** Call `listener` whenever the hash is another one. */
export function onRoute(listener) {
  listeners.add(listener);
}

function tell() {
  if (location.hash === told) return;
  told = location.hash;
  for (const listener of listeners) listener(current());
}

window.addEventListener("popstate", tell);
window.addEventListener("hashchange", tell);
