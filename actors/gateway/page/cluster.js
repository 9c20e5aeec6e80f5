// Pools and workers, prefill on the left and decode on the right, and the hand-offs between them.

import { $, bar, h, keyed, say, svg } from "./dom.js";
import { count, percent, rate, short } from "./format.js";

const COLUMNS = ["prefill", "mixed", "decode"];
const SILENT_MS = 3000;

/** The column where a pool stands: the role that most of its workers have. */
function columnOf(pool) {
  const [[role] = ["mixed"]] = Object.entries(pool.roles).sort((a, b) => b[1] - a[1]);
  return COLUMNS.includes(role) ? role : "mixed";
}

function createWorker({ id }) {
  const element = h("article", { class: "worker", "aria-label": id });
  Object.assign(element, {
    badge: h("span", { class: "badge" }),
    queue: bar("queue"),
    kv: bar("KV"),
    drafts: bar("drafts"),
    facts: h("p", { class: "facts" }),
  });
  const head = h("div", { class: "head" }, h("h4", { title: id }, id), element.badge);
  element.append(head, element.queue, element.kv, element.drafts, element.facts);
  return element;
}

function updateWorker(element, worker, home, longest, drafts) {
  const used = worker.kv_blocks_total ? 1 - worker.kv_blocks_free / worker.kv_blocks_total : 0;
  const silent = worker.age_ms > SILENT_MS;
  const odd = worker.role !== home || silent;
  element.dataset.role = worker.role;
  element.dataset.id = worker.id;
  element.classList.toggle("silent", silent);
  element.badge.hidden = !odd;
  element.badge.dataset.role = silent ? "silent" : worker.role;
  say(element.badge, silent ? `silent ${(worker.age_ms / 1000).toFixed(0)} s` : worker.role);
  const tokens = worker.pending_prefill + worker.pending_new;
  element.queue.set([["prefill", worker.pending_prefill / longest], ["decode", worker.pending_new / longest]], short(tokens));
  element.queue.title = `${count(worker.pending_prefill)} prompt tokens and ${count(worker.pending_new)} tokens to generate are pending`;
  element.kv.set([[used > 0.9 ? "full" : "kv", used]], worker.kv_blocks_total ? percent(used) : "–");
  element.kv.title = `${count(worker.kv_blocks_total - worker.kv_blocks_free)} of ${count(worker.kv_blocks_total)} blocks`;
  element.drafts.hidden = !drafts;
  if (drafts) {
    element.drafts.set([["mixed", drafts.share]], percent(drafts.share));
    element.drafts.title = `${count(drafts.accepted)} of ${count(drafts.drafted)} drafted tokens were accepted`;
  }
  const facts = [`${worker.running} running`];
  if (worker.waiting) facts.push(`${worker.waiting} waiting`);
  if (worker.role !== "prefill" && worker.decode_step_ms) facts.push(`${worker.decode_step_ms.toFixed(1)} ms/step`);
  if (drafts?.gain) facts.push(`${drafts.gain.toFixed(1)} tok/step`);
  if (worker.role !== "decode" && worker.prefill_tokens_per_s) facts.push(`${short(worker.prefill_tokens_per_s)} tok/s`);
  say(element.facts, facts.join(" · "));
}

function createPool({ pool }) {
  const element = h("section", { class: "pool" });
  element.sums = h("p", { class: "quiet" });
  element.grid = h("div", { class: "workers" });
  element.append(h("div", { class: "head" }, h("h3", {}, pool), element.sums), element.grid);
  return element;
}

function updatePool(element, pool, workers, longest, drafts) {
  const roles = Object.entries(pool.roles).map(([role, number]) => `${number} ${role}`);
  say(element.sums, `${roles.join(", ")} · ${count(pool.sequences)} sequences`);
  const column = columnOf(pool);
  element.grid.dataset.many = workers.length > 6;
  element.dataset.role = column;
  keyed(element.grid, workers, (worker) => worker.id, createWorker, (card, worker) =>
    updateWorker(card, worker, column, longest, drafts.get(worker.id)));
}

function createModel(model) {
  const element = h("section", { class: "served", "aria-label": model });
  element.columns = h("div", { class: "map-columns" });
  element.append(h("h3", { class: "model" }, model), element.columns);
  return element;
}

function updateModel(element, pools, workersOf, longest, drafts) {
  const columns = COLUMNS.map((role) => [role, pools.filter((pool) => columnOf(pool) === role)]).filter(([, some]) => some.length);
  element.columns.dataset.columns = columns.length;
  const create = ([role]) => h("div", { class: "map-column", "data-role": role });
  keyed(element.columns, columns, ([role]) => role, create, (column, [, some]) =>
    keyed(column, some, (pool) => pool.pool, createPool, (place, pool) => updatePool(place, pool, workersOf(pool), longest, drafts)));
}

/** Curves from who prefills to who decodes, as wide as they are busy; they pass behind the pools. */
function drawHandOffs(map, handOffs) {
  map.wires ??= map.insertBefore(svg("svg", { class: "wires", "aria-hidden": "true" }), map.firstChild);
  const frame = map.getBoundingClientRect();
  const places = new Map();
  for (const card of map.querySelectorAll(".worker")) {
    const [own, pool] = [card.getBoundingClientRect(), card.closest(".pool").getBoundingClientRect()];
    places.set(card.dataset.id, { left: pool.left - frame.left, right: pool.right - frame.left, y: own.top + own.height / 2 - frame.top });
  }
  const busiest = Math.max(0.1, ...handOffs.map(([, , often]) => often));
  const drawn = handOffs.filter(([from, to]) => places.has(from) && places.has(to) && places.get(from).right < places.get(to).left);
  map.wires.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
  keyed(map.wires, drawn, ([from, to]) => `${from}\n${to}`, () => svg("path"), (path, [from, to, often]) => {
    const [a, b] = [places.get(from), places.get(to)];
    const bend = (b.left - a.right) / 2;
    path.setAttribute("d", `M${a.right} ${a.y}C${a.right + bend} ${a.y} ${b.left - bend} ${b.y} ${b.left} ${b.y}`);
    path.style.strokeWidth = `${1 + 3.5 * (often / busiest)}px`;
    path.style.opacity = 0.35 + 0.6 * (often / busiest);
  });
}

export function drawCluster({ pulse, acceptance }) {
  const map = $("map");
  const workers = grouped(pulse.workers, (each) => `${each.pool}\n${each.model}`);
  const drafts = new Map(acceptance.map((each) => [each.worker_id, each]));
  const models = grouped(pulse.pools, (each) => each.model);
  const longest = Math.max(1000, ...pulse.workers.map((each) => each.pending_prefill + each.pending_new));
  map.models ??= map.appendChild(h("div", { class: "models" }));
  keyed(map.models, [...models.keys()].sort(), (model) => model, createModel, (element, model) =>
    updateModel(element, models.get(model), (pool) => workers.get(`${pool.pool}\n${pool.model}`) ?? [], longest, drafts));
  drawHandOffs(map, pulse.hand_offs);
  const busy = pulse.hand_offs.reduce((sum, [, , often]) => sum + often, 0);
  say($("map-note"), `${count(pulse.workers.length + pulse.more_workers)} workers · ${rate(busy)} hand-offs/s`);
  $("more-workers").hidden = !pulse.more_workers;
  say($("more-workers"), `and ${count(pulse.more_workers)} less loaded workers`);
}

function grouped(items, keyOf) {
  const groups = new Map();
  for (const each of items) {
    const key = keyOf(each);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(each);
  }
  return groups;
}
