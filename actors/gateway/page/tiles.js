// The figures at the top, each with its last two minutes.

import { $, h, keyed, say, spark } from "./dom.js";
import { bytes, count, median, percent, rate, seconds } from "./format.js";

const used = (moment) => {
  const total = moment.pools.reduce((sum, pool) => sum + pool.kv_blocks_total, 0);
  const free = moment.pools.reduce((sum, pool) => sum + pool.kv_blocks_free, 0);
  return total ? (total - free) / total : 0;
};

const pending = (moment) =>
  moment.pools.reduce((sum, pool) => sum + pool.pending_prefill + pool.pending_decode, 0);

function tiles({ pulse, history, requests }) {
  const first = requests.map((each) => each.ttft_s).filter((value) => value > 0);
  const traffic = history.at(-1).traffic;
  const line = (pick, most) => [history.map(pick), most];
  return [
    { name: "in flight", value: count(pulse.leases), note: `${count(pulse.waiting)} waiting`, kind: "flight", line: line((m) => m.leases) },
    { name: "assigned", value: `${rate(pulse.assigned_per_s)}/s`, note: `${rate(pulse.refused_per_s)}/s refused`, kind: pulse.refused_per_s ? "bad" : "good", line: line((m) => m.assigned_per_s) },
    { name: "first token", value: first.length ? seconds(median(first)) : "–", note: `median of ${first.length} here`, kind: "prefill", line: [first.slice().reverse(), 0] },
    { name: "tokens pending", value: count(pending(pulse)), note: `${pulse.workers.length + pulse.more_workers} workers`, kind: "flight", line: line(pending) },
    { name: "KV cache", value: percent(used(pulse)), note: "of all blocks in use", kind: "decode", line: line(used, 1) },
    { name: "KV on the wire", value: traffic ? `${bytes(traffic)}/s` : "–", note: "between workers", kind: "wire", line: line((m) => m.traffic) },
  ];
}

function create({ name, kind }) {
  const element = h("div", { class: "tile" }, h("span", { class: "name" }, name), h("strong"), h("span", { class: "quiet" }));
  element.append((element.spark = spark(kind)));
  return element;
}

export function drawTiles(known) {
  keyed($("tiles"), tiles(known), (tile) => tile.name, create, (element, tile) => {
    say(element.children[1], tile.value);
    say(element.children[2], tile.note);
    element.spark.setAttribute("class", `spark ${tile.kind}`);
    element.spark.set(...tile.line);
  });
}
