// Requests to the service: the token, what a refusal says, and whether anybody answers.

const TOKEN = "trellis-token";
const TIMEOUT = 20_000;
const listeners = new Set();

/** Nobody answers (or only a gateway does). */
export class Unreachable extends Error {}

/** The service said no; the message is what it said. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** State of the connection: "connecting", "live" or "down", and since when (ms). */
export const connection = { state: "connecting", since: Date.now(), skew: 0 };

/** Call `listener` when the connection's state changes. */
export function onConnection(listener) {
  listeners.add(listener);
}

function become(state) {
  if (connection.state === state) return;
  Object.assign(connection, { state, since: Date.now() });
  for (const listener of listeners) listener(connection);
}

/** Seconds of the service's clock, as far as its answers tell. */
export function serverNow() {
  return (Date.now() + connection.skew) / 1000;
}

/** GET a path with parameters; parsed JSON. */
export function get(path, params = {}, options = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) {
    if (value !== null && value !== undefined && value !== "") query.set(name, value);
  }
  const text = query.toString();
  return request(text ? `${path}?${text}` : path, { ...options, method: "GET" });
}

/** POST a JSON body. */
export function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", body: JSON.stringify(body), headers });
}

/** DELETE a path. */
export function remove(path) {
  return request(path, { method: "DELETE" });
}

async function request(path, options) {
  for (;;) {
    const token = sessionStorage.getItem(TOKEN);
    const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
    const response = await send(path, { ...options, headers });
    if (response.status === 401) await askToken(token);
    else if (response.ok) return await body(response);
    else throw new Refused(response.status, await reason(response));
  }
}

async function send(path, options) {
  const signals = [AbortSignal.timeout(TIMEOUT), ...(options.signal ? [options.signal] : [])];
  let response;
  try {
    // Relative, so that the page also works below a path of a proxy. Nothing is followed elsewhere.
    response = await fetch(path, { ...options, signal: AbortSignal.any(signals), cache: "no-store", redirect: "error" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    become("down");
    throw new Unreachable("the service does not answer");
  }
  if ([502, 503, 504].includes(response.status)) {
    become("down");
    throw new Unreachable(`the service is overloaded or behind a gateway that cannot reach it (${response.status})`);
  }
  const date = Date.parse(response.headers.get("Date") ?? "");
  if (Number.isFinite(date)) connection.skew = Math.abs(date - Date.now()) < 2000 ? 0 : date - Date.now();
  become("live");
  return response;
}

async function body(response) {
  try {
    return await response.json();
  } catch {
    become("down");
    throw new Unreachable("the answer broke off");
  }
}

/** What a refusal says: FastAPI's "detail" (a text, or a list with messages), or a plain text. */
async function reason(response) {
  const text = await response.text().catch(() => "");
  try {
    const { detail } = JSON.parse(text);
    if (typeof detail === "string") return detail;
    if (Array.isArray(detail)) return detail.map((entry) => `${(entry.loc ?? []).at(-1) ?? "request"}: ${entry.msg}`).join("; ");
  } catch {
    // Not JSON: the text is the reason.
  }
  return text.slice(0, 300) || `the service answered ${response.status}`;
}

let asking = null;

/** Ask for the token, once for all requests that wait for it. `refused` is the token that did not do. */
function askToken(refused) {
  if (sessionStorage.getItem(TOKEN) !== refused) return Promise.resolve(); // answered in the meantime
  asking ??= new Promise((resolve) => openTokenDialog(refused, resolve)).finally(() => {
    asking = null;
  });
  return asking;
}

function openTokenDialog(refused, resolve) {
  const dialog = document.getElementById("token");
  const value = document.getElementById("token-value");
  const note = document.getElementById("token-note");
  if (refused) note.textContent = "That token was refused. It is the value of TRELLIS_TOKEN where the service was started.";
  value.value = "";
  dialog.oncancel = (event) => event.preventDefault(); // nothing can be shown without one
  dialog.querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    sessionStorage.setItem(TOKEN, value.value.trim());
    dialog.close();
    resolve();
  };
  if (!dialog.open) dialog.showModal();
}
