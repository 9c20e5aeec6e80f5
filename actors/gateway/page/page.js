// The page: who is looking, the stream and what has come over it.

import { drawCluster } from "./cluster.js";
import { openRequest, prepareDetail } from "./detail.js";
import { $, say } from "./dom.js";
import { drawDecisions, drawLegends, drawLinks, drawRequests, drawVerdicts } from "./lists.js";
import { credential, listen, Refusal } from "./stream.js";
import { drawTiles } from "./tiles.js";

const KEPT = { decisions: 40, requests: 60 };
const HISTORY = 120;
const HIDDEN_MS = 60_000;
const LATEST_RETRY_MS = 15_000;

const known = { hello: null, pulse: null, links: [], acceptance: [], decisions: [], requests: [], history: [] };
let paused = false;
let stream = null; // the AbortController of the open one
let heard = 0; // when something last came
let hiding = 0;

function state(name, text) {
  $("state").dataset.state = name;
  say($("state"), text);
}

function trouble(message) {
  $("trouble").hidden = !message;
  say($("trouble"), message);
}

function draw() {
  if (paused || !known.pulse || document.hidden) return;
  drawTiles(known);
  drawCluster(known);
  drawLinks(known);
  drawVerdicts(known.pulse);
  drawRequests(known.requests, openRequest);
  drawDecisions(known.decisions, openRequest);
}

function throughput(links, before, elapsed_s) {
  const earlier = new Map(before.map((link) => [`${link.sender} ${link.receiver}`, link]));
  for (const link of links) {
    const last = earlier.get(`${link.sender} ${link.receiver}`);
    link.now = last && elapsed_s > 0 ? Math.max(0, link.bytes - last.bytes) / elapsed_s : 0;
  }
}

/** Of drafts since the last look; since the start where there were none. */
function lately(now, before) {
  const earlier = new Map(before.map((each) => [each.worker_id, each]));
  return now.map((each) => {
    const last = earlier.get(each.worker_id);
    const fresh = last && each.drafted > last.drafted ? last : { drafted: 0, accepted: 0, steps: 0 };
    const [drafted, steps] = [each.drafted - fresh.drafted, each.steps - fresh.steps];
    if (last && each.drafted === last.drafted) return last;
    return { ...each, share: drafted ? (each.accepted - fresh.accepted) / drafted : 0, gain: steps ? 1 + (each.accepted - fresh.accepted) / steps : 0 };
  });
}

function hear(name, data) {
  heard = performance.now();
  if (name === "hello") {
    Object.assign(known, { hello: data, decisions: [], requests: [] });
    say($("cluster-name"), data.cluster);
    document.title = `${data.cluster} · joinwise console`;
    show("view");
  } else if (name === "pulse") {
    known.pulse = data;
    const traffic = known.links.reduce((sum, link) => sum + (link.now ?? 0), 0);
    known.history = [...known.history, { ...data, workers: null, traffic }].slice(-HISTORY);
    trouble("");
    state("live", paused ? "paused" : "live");
  } else if (name === "links") {
    throughput(data, known.links, (heard - known.linksAt) / 1000);
    Object.assign(known, { links: data, linksAt: heard });
  } else if (name === "acceptance") {
    known.acceptance = lately(data, known.acceptance);
  } else if (name === "trouble") {
    trouble(data.message);
    state("trouble", "no news");
  } else if (name in KEPT) {
    known[name] = [...data.reverse(), ...known[name]].slice(0, KEPT[name]);
  }
  requestAnimationFrame(draw);
}

function show(what) {
  $("view").hidden = what !== "view";
  $("sign-in").hidden = what !== "sign-in";
  $("pause").hidden = what !== "view";
  $("sign-out").hidden = what !== "view" || !credential.get();
}

function askWho(why) {
  credential.forget();
  trouble("");
  state("out", "signed out");
  say($("refusal"), why);
  show("sign-in");
  $("credential").focus();
}

const rest = (ms, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => resolve(clearTimeout(timer)), { once: true });
  });

/** Listens, and again when the stream has ended, until it is stopped or nobody knows who is looking. */
async function follow() {
  stream?.abort();
  const mine = (stream = new AbortController());
  let wait = 500;
  while (!mine.signal.aborted) {
    const shown = Boolean(credential.get());
    try {
      await listen((...event) => {
        wait = 500;
        hear(...event);
      }, mine.signal);
    } catch (error) {
      if (mine.signal.aborted) return;
      if (error instanceof Refusal && [401, 403].includes(error.status)) {
        askWho(shown ? error.message : "");
        return;
      }
      state("trouble", "reconnecting");
      trouble(error instanceof Refusal ? error.message : "The gateway does not answer. Trying again.");
    }
    await rest(wait, mine.signal);
    wait = Math.min(LATEST_RETRY_MS, 2 * wait);
  }
}

function stop() {
  stream?.abort();
  stream = null;
}

/** A stream that has fallen silent is begun anew; one that nobody looks at is ended. */
function watch() {
  const silent = performance.now() - heard;
  const patience = 5000 + 3000 * (known.hello?.every_s ?? 1);
  if (stream && known.pulse && silent > patience) {
    state("trouble", `no news for ${Math.round(silent / 1000)} s`);
    if (silent > 2 * patience) {
      heard = performance.now();
      follow();
    }
  }
}

function theme(choice) {
  const names = { auto: "as the system has them", dark: "dark", light: "light" };
  if (choice === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
  say($("theme"), choice[0].toUpperCase() + choice.slice(1));
  $("theme").setAttribute("aria-label", `Colours: ${names[choice]}`);
  localStorage.setItem("joinwise-theme", choice);
}

$("sign-in-form").addEventListener("submit", (event) => {
  event.preventDefault();
  credential.set($("credential").value.trim());
  $("credential").value = "";
  say($("refusal"), "");
  follow();
});
$("sign-out").addEventListener("click", () => {
  stop();
  Object.assign(known, { pulse: null, links: [], acceptance: [], decisions: [], requests: [], history: [] });
  askWho("");
});
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", paused);
  say($("pause"), paused ? "Go on" : "Pause");
  state("live", paused ? "paused" : "live");
  document.documentElement.classList.toggle("paused", paused);
  draw();
});
$("theme").addEventListener("click", () => {
  const order = ["auto", "dark", "light"];
  theme(order[(order.indexOf(localStorage.getItem("joinwise-theme") ?? "auto") + 1) % order.length]);
});
$("find").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("find-id").value.trim()) openRequest($("find-id").value.trim());
});
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(stop, HIDDEN_MS);
  else if (!stream && $("sign-in").hidden) follow();
  else draw();
});
window.addEventListener("resize", () => requestAnimationFrame(draw));

theme(localStorage.getItem("joinwise-theme") ?? "auto");
drawLegends();
prepareDetail();
setInterval(watch, 1000);
follow();
