// Links, requests and decisions.

import { $, h, keyed, say } from "./dom.js";
import { bytes, clock, count, rate, seconds, speed } from "./format.js";
import { PHASES, waterfall } from "./waterfall.js";

const ROLES = [["prefill", "prefill"], ["decode", "decode"], ["mixed", "mixed"], ["wire", "hand-offs"]];
const REFUSALS = new Set(["full", "limited", "slo", "none"]);

export function drawLegends() {
  const legend = (names) => names.map(([kind, name]) => h("li", {}, h("i", { class: kind }), name));
  $("roles-legend").replaceChildren(...legend(ROLES));
  $("phases-legend").replaceChildren(...legend(PHASES));
}

const COLUMNS = [
  ["from", (link) => link.sender],
  ["to", (link) => link.receiver],
  ["by", (link) => (link.codec === "none" ? link.transport : `${link.transport} + ${link.codec}`)],
  ["now", (link) => speed(link.now ?? 0), "number"],
  ["wire", (link) => speed(link.bytes_per_s), "number"],
  ["in all", (link) => bytes(link.bytes), "number"],
  ["transfers", (link) => count(link.streams), "number"],
  ["trouble", (link) => troubles(link) || "none", "quiet"],
  ["why", (link) => [link.why, link.codec_why].filter(Boolean).join("; "), "quiet why"],
];

function troubles(link) {
  const refused = Object.entries(link.refused).map(([reason, number]) => `${number} ${reason}`);
  const parts = [link.failed && `${link.failed} failed`, link.retries && `${link.retries} retried`, ...refused];
  return parts.filter(Boolean).join(", ");
}

function linkRow() {
  return h("tr", {}, ...COLUMNS.map(([name, , kind]) => h("td", { class: kind, "data-name": name })));
}

export function drawLinks({ links }) {
  const place = $("links");
  if (!place.rows) {
    place.rows = h("tbody");
    place.none = h("p", { class: "quiet" }, "No KV has crossed between workers yet.");
    const head = COLUMNS.map(([name, , kind]) => h("th", { scope: "col", class: kind === "number" ? kind : null }, name));
    place.table = h("table", {}, h("thead", {}, h("tr", {}, ...head)), place.rows);
    place.append(place.table, place.none);
  }
  place.table.hidden = !links.length;
  place.none.hidden = links.length > 0;
  const fastest = Math.max(1, ...links.map((link) => link.now ?? 0));
  keyed(place.rows, links, (link) => `${link.sender}\n${link.receiver}`, linkRow, (row, link) => {
    COLUMNS.forEach(([, text], index) => say(row.children[index], text(link)));
    row.classList.toggle("troubled", Boolean(troubles(link)));
    row.dataset.transport = link.transport;
    row.children[3].style.setProperty("--share", `${(100 * (link.now ?? 0)) / fastest}%`);
  });
}

export function drawVerdicts({ verdicts }) {
  const entries = Object.entries(verdicts).sort((a, b) => b[1] - a[1]);
  keyed($("verdicts"), entries, ([name]) => name, ([name]) => h("div", { class: "verdict" }, badge(name), h("div", { class: "track" }, h("i", { class: REFUSALS.has(name) ? "bad" : "good" })), h("span", { class: "value" })), (row, [, often]) => {
    row.children[1].firstChild.style.width = `${(100 * often) / entries[0][1]}%`;
    say(row.children[2], `${rate(often)}/s`);
  });
}

/** A decision's verdict, coloured by what it means. */
export function badge(verdict) {
  return h("span", { class: `badge ${REFUSALS.has(verdict) ? "bad" : verdict.startsWith("split") ? "split" : "whole"}` }, verdict);
}

const arrow = (names) => names.filter(Boolean).join(" → ");

/** A row that opens a request. */
function row(id, open, ...children) {
  const button = h("button", { type: "button", class: "row" }, ...children);
  button.addEventListener("click", () => open(id));
  return h("li", {}, button);
}

function requestRow(ledger, open) {
  const title = h("span", { class: "id", title: ledger.request_id }, ledger.request_id);
  const where = h("span", { class: "quiet" }, `${ledger.model} · ${arrow([ledger.prefill_worker, ledger.decode_worker])}`);
  const bad = ledger.recomputed || ["error", "abort"].includes(ledger.finish_reason);
  const how = h("span", { class: bad ? "how bad" : "how quiet" }, ledger.recomputed ? `${ledger.finish_reason}, recomputed` : ledger.finish_reason);
  const times = h("span", { class: "times" }, `${seconds(ledger.ttft_s)} / ${seconds(ledger.total_s)}`);
  const element = row(ledger.request_id, open, title, times, where, how);
  element.firstChild.append((element.track = h("span", { class: "track thin" })));
  return element;
}

const nothing = () => h("li", { class: "quiet nothing" }, "None has ended here lately.");

export function drawRequests(requests, open) {
  const longest = Math.max(0.001, ...requests.map((each) => each.total_s));
  const create = (each) => (each ? requestRow(each, open) : nothing());
  keyed($("requests"), requests.length ? requests : [null], (each) => each?.request_id, create, (element, each) => {
    if (each) waterfall(element.track, each, longest);
  });
}

function decisionRow(decision, open) {
  const words = decision.verdict === "limited" ? [`limit: ${decision.chosen.join(" ")}`] : decision.chosen;
  return row(
    decision.request_id,
    open,
    h("span", { class: "id", title: decision.request_id }, decision.request_id),
    badge(decision.verdict),
    h("span", { class: "quiet" }, `${clock(decision.at_ms)} · ${arrow(words) || "no worker"}`),
    h("span", { class: "times" }, `${decision.cost_ms.toFixed(1)} ms`),
  );
}

export function drawDecisions(decisions, open) {
  const key = (each) => `${each.at_ms} ${each.verdict} ${each.request_id}`;
  keyed($("decisions"), decisions, key, (each) => decisionRow(each, open), () => {});
}
