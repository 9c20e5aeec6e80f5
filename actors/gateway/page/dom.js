// Builds and updates elements. Text is always set as text: names and ids come from clients.

export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** An element; children are elements or text. */
export const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

/** The same in SVG. */
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/** Sets a text only where it has changed. */
export function say(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

/**
 * Makes the children of `parent` those of `items`, in order, and keeps the elements of those that stay: focus and
 * scrolling survive. `create(item)` makes an element, `update(element, item)` brings it up to date.
 */
export function keyed(parent, items, keyOf, create, update) {
  const known = (parent.known ??= new Map());
  const wanted = new Set(items.map(keyOf));
  for (const [key, element] of known) {
    if (!wanted.has(key)) {
      element.remove();
      known.delete(key);
    }
  }
  let at = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let element = known.get(key);
    if (!element) known.set(key, (element = create(item)));
    update(element, item);
    if (element === at) at = at.nextElementSibling;
    else parent.insertBefore(element, at);
  }
}

/** A bar with a value from 0 to 1, and parts of it in other colours: [[class, share], ...]. */
export function bar(label) {
  const track = h("div", { class: "track", role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 });
  const text = h("span", { class: "value" });
  const element = h("div", { class: "measure" }, h("span", { class: "label" }, label), track, text);
  element.set = (parts, shown) => {
    const whole = Math.min(1, parts.reduce((sum, [, share]) => sum + share, 0));
    track.setAttribute("aria-valuenow", Math.round(100 * whole));
    track.setAttribute("aria-valuetext", shown);
    keyed(track, parts, ([kind]) => kind, ([kind]) => h("i", { class: kind }), (part, [, share]) => {
      part.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
    });
    say(text, shown);
  };
  return element;
}

/** A line of the last values, with the area below it. */
export function spark(kind) {
  const area = svg("path", { class: "area" });
  const line = svg("path", { class: "line" });
  const element = svg("svg", { class: `spark ${kind}`, viewBox: "0 0 100 28", preserveAspectRatio: "none", "aria-hidden": "true" }, area, line);
  element.set = (values, most) => {
    if (values.length < 2) return;
    const top = Math.max(most ?? 0, ...values) || 1;
    const x = (index) => (100 * index) / (values.length - 1);
    const points = values.map((value, index) => `${x(index).toFixed(2)} ${(26.5 - (24 * value) / top).toFixed(2)}`);
    line.setAttribute("d", `M${points.join("L")}`);
    area.setAttribute("d", `M0 28L${points.join("L")}L100 28Z`);
  };
  return element;
}
