// Where a request's time went, in the order in which it went: the phases that a trace of it has, too.

import { h, keyed } from "./dom.js";

/** Class and name of each phase. */
export const PHASES = [
  ["route", "route"],
  ["queue", "queue"],
  ["prefill", "prefill"],
  ["wire", "KV hidden"],
  ["exposed", "KV exposed"],
  ["decode", "decode"],
];

/**
 * The phases of a ledger: [class, name, begin, end] in seconds since it was rendered. KV that crossed while prefill still
 * ran ends with it; the rest comes after it.
 */
export function phases(ledger) {
  const scheduled = ledger.routed_s + ledger.queued_s;
  const first = Math.max(scheduled, ledger.ttft_s);
  const parts = {
    route: [0, ledger.routed_s],
    queue: [ledger.routed_s, scheduled],
    prefill: [scheduled, first],
    wire: [Math.max(0, first - ledger.wire_seconds_hidden), first],
    exposed: [first, first + ledger.wire_seconds_exposed],
    decode: [first, ledger.total_s],
  };
  return PHASES.map(([kind, name]) => [kind, name, ...parts[kind]]).filter(([, , begin, end]) => end > begin);
}

/** Draws all phases of a ledger into one track, `longest` seconds wide. */
export function waterfall(track, ledger, longest) {
  keyed(track, phases(ledger), ([kind]) => kind, ([kind]) => h("i", { class: kind }), (part, [, , begin, end]) => place(part, begin, end, longest));
}

/** Puts a part of a track where it belongs in time. */
export function place(part, begin, end, longest) {
  part.style.left = `${(100 * begin) / longest}%`;
  part.style.width = `max(2px, ${(100 * (Math.min(end, longest) - begin)) / longest}%)`;
}
