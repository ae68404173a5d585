// Elements and formats. Text always becomes a text node, so nothing from the server is ever read as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element; `on` holds event handlers, children are elements, strings or (nested) arrays of them. */
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function s(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Put the options [value, label] into a select, only when they changed: an open list stays open. */
export function setOptions(select, options, chosen) {
  const wanted = JSON.stringify(options);
  if (select.dataset.options !== wanted) {
    select.replaceChildren(...optionElements(options));
    select.dataset.options = wanted;
  }
  if (select.value !== String(chosen)) select.value = String(chosen);
}

function optionElements(options) {
  const groups = new Map([[undefined, []]]);
  for (const [value, label, group] of options) {
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(h("option", { value }, label));
  }
  return [...groups].flatMap(([group, items]) => (group === undefined ? items : h("optgroup", { label: group }, items)));
}

/** Make the children of `parent` those of `items`, re-using elements by key: scroll, focus and selection stay. */
export function patch(parent, items, { key, create, update }) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const id = String(key(item));
    let element = old.get(id);
    old.delete(id);
    if (!element) {
      element = create(item);
      element.dataset.key = id;
    }
    update?.(element, item);
    if (element === place) place = place.nextElementSibling;
    else parent.insertBefore(element, place);
  }
  for (const gone of old.values()) gone.remove();
}

/** Set a text without touching the node when it is the same already. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A labelled control: the label is above it. */
export function field(label, control, extra = {}) {
  return h("label", { class: "field", ...extra }, h("span", null, label), control);
}

/** Two or more buttons of which one is on; `choose` gets its value. */
export function switcher(label, choices, choose) {
  const buttons = choices.map(([value, text]) =>
    h("button", { type: "button", "data-value": value, on: { click: () => choose(value) } }, text),
  );
  const group = h("div", { class: "switch", role: "group", "aria-label": label }, buttons);
  const element = h("div", { class: "field" }, h("span", { "aria-hidden": "true" }, label), group);
  element.choose = (value) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.value === value));
  };
  return element;
}

/** Call `action` once things have been quiet for `ms`. */
export function debounce(action, ms = 150) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), ms);
  };
}

/** Names by their numbers: step-9 before step-10. */
export const naturally = new Intl.Collator("en", { numeric: true }).compare;

const INTEGER = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** 12,345 */
export function integer(value) {
  return INTEGER.format(value);
}

/** 1500 as 1.5k, 2,000,000 as 2M. */
export function compact(value) {
  for (const [bound, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= bound) return `${Number((value / bound).toPrecision(4))}${suffix}`;
  }
  return String(Number(value.toPrecision(3)));
}

/** Seconds as "12 s", "3 min", "5 h", "2 d". */
export function age(seconds) {
  const past = Math.max(0, seconds);
  if (past < 60) return `${Math.floor(past)} s`;
  if (past < 3600) return `${Math.floor(past / 60)} min`;
  if (past < 172800) return `${Math.floor(past / 3600)} h`;
  return `${Math.floor(past / 86400)} d`;
}

/** A number with a sign: +1.5, −0.3, 0.0. */
export function signed(value, digits = 1) {
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text;
  return `${value < 0 ? "\u2212" : "+"}${text}`;
}

/** The test of a filter text: a substring without case, or a regular expression between slashes. */
export function matcher(text) {
  const expression = /^\/(.*)\/?$/.exec(text ?? "");
  if (expression && expression[1]) {
    const body = expression[1].replace(/\/$/, "");
    try {
      const pattern = new RegExp(body, "i");
      return (name) => pattern.test(name);
    } catch {
      return null;
    }
  }
  const wanted = (text ?? "").toLowerCase();
  return (name) => name.toLowerCase().includes(wanted);
}
