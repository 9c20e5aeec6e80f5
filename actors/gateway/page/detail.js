// All that is known of one request: its ledger as a waterfall, its figures, and why it went where it did.

import { $, h, say } from "./dom.js";
import { bytes, clock, count, seconds } from "./format.js";
import { badge } from "./lists.js";
import { request } from "./stream.js";
import { phases, place } from "./waterfall.js";

const FIGURES = [
  ["model", (ledger) => ledger.model],
  ["routed as", (ledger) => ledger.assignment_reason],
  ["prefill worker", (ledger) => ledger.prefill_worker],
  ["decode worker", (ledger) => ledger.decode_worker],
  ["transport", (ledger) => ledger.transport],
  ["KV sent", (ledger) => ledger.wire_bytes && bytes(ledger.wire_bytes)],
  ["import", (ledger) => ledger.import_s && seconds(ledger.import_s)],
  ["prompt", (ledger) => `${count(ledger.prompt_tokens)} tokens, ${count(ledger.cached_tokens)} cached`],
  ["answer", (ledger) => `${count(ledger.output_tokens)} tokens`],
  ["drafts", (ledger) => ledger.draft_tokens && `${count(ledger.accepted_drafts)} of ${count(ledger.draft_tokens)} right, in ${count(ledger.draft_rounds)} steps`],
  ["ended by", (ledger) => ledger.finish_reason],
  ["first token", (ledger) => seconds(ledger.ttft_s)],
  ["second token", (ledger) => ledger.second_token_gap_s && `${seconds(ledger.second_token_gap_s)} after the first`],
  ["later tokens", (ledger) => ledger.token_gap_median_s && `${seconds(ledger.token_gap_median_s)}, at most ${seconds(ledger.token_gap_max_s)}`],
  ["replayed steps", (ledger) => ledger.replayed_steps && `${ledger.replayed_steps} in ${seconds(ledger.replayed_step_s)}`],
  ["moves", (ledger) => ledger.attempt],
  ["recomputed", (ledger) => ledger.recomputed && "yes"],
];
const COSTS = [
  ["wait", "wait_ms"],
  ["prefill", "prefill_ms"],
  ["harm", "harm_ms"],
  ["queue", "queue_ms"],
  ["stall", "stall_ms"],
  ["hand-off", "move_ms"],
];

function steps(ledger) {
  const list = h("ol", { class: "waterfall" });
  for (const [kind, name, begin, end] of phases(ledger)) {
    const part = h("i", { class: kind });
    place(part, begin, end, ledger.total_s || 1);
    list.append(h("li", {}, h("span", {}, name), h("span", { class: "track" }, part), h("span", { class: "value" }, seconds(end - begin))));
  }
  list.append(h("li", { class: "quiet" }, h("span", {}, "total"), h("span", {}), h("span", { class: "value" }, seconds(ledger.total_s))));
  return list;
}

function figures(ledger) {
  const list = h("dl", { class: "figures" });
  for (const [name, read] of FIGURES) {
    const value = read(ledger);
    if (value) list.append(h("div", {}, h("dt", {}, name), h("dd", {}, String(value))));
  }
  return list;
}

function candidates(decision) {
  const chosen = new Set(decision.chosen);
  const names = ["worker", "role", ...COSTS.map(([name]) => name), "uncached", "pending"];
  const head = names.map((name, index) => h("th", { scope: "col", class: index > 1 ? "number" : null }, name));
  const rows = decision.candidates.map((each) =>
    h(
      "tr",
      { class: chosen.has(each.worker_id) ? "chosen" : null },
      h("th", { scope: "row" }, chosen.has(each.worker_id) ? `✓ ${each.worker_id}` : each.worker_id),
      h("td", {}, each.role),
      ...COSTS.map(([, field]) => h("td", { class: "number" }, each[field].toFixed(1))),
      h("td", { class: "number" }, count(each.uncached_tokens)),
      h("td", { class: "number" }, count(each.pending_tokens)),
    ));
  return h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...rows));
}

function why(decision) {
  const head = h(
    "p",
    { class: "decision" },
    badge(decision.verdict),
    ` ${decision.chosen.join(" → ") || "no worker"} · ${decision.cost_ms.toFixed(1)} ms · ${clock(decision.at_ms)}`,
  );
  const table = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Candidates, in milliseconds" }, candidates(decision));
  return [head, decision.candidates.length ? table : null];
}

function content({ ledgers, decisions }) {
  const parts = ledgers.flatMap((ledger) => [steps(ledger), figures(ledger)]);
  if (!ledgers.length) parts.push(h("p", { class: "quiet" }, "No ledger here: it still runs, has ended long ago, or went through another gateway."));
  parts.push(h("h3", {}, "Why it went there"));
  if (!decisions.length) parts.push(h("p", { class: "quiet" }, "No decision on it is kept any more."));
  return [...parts, ...decisions.flatMap(why)].filter(Boolean);
}

/** Asks for a request and shows it. */
export async function openRequest(id) {
  const dialog = $("detail");
  say($("detail-title"), id);
  $("detail-body").replaceChildren(h("p", { class: "quiet" }, "asking the gateway"));
  dialog.asked = id;
  if (!dialog.open) dialog.showModal();
  let shown;
  try {
    shown = content(await request(id));
  } catch (error) {
    shown = [h("p", { class: "refusal", role: "alert" }, error.message)];
  }
  if (dialog.asked === id) $("detail-body").replaceChildren(...shown);
}

export function prepareDetail() {
  const dialog = $("detail");
  $("detail-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop
  });
}
