// Talks to the gateway: server-sent events over fetch(), since an EventSource could only show a credential in its address.

const KEY = "joinwise-credential";

/** The credential, kept in this tab alone. */
export const credential = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** What the gateway answers with instead of data. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(address, signal) {
  const headers = credential.get() ? { authorization: `Bearer ${credential.get()}` } : {};
  const answer = await fetch(address, { headers, signal, cache: "no-store", credentials: "same-origin", redirect: "error" });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Refusal(answer.status, body?.error?.message ?? `the gateway answers ${answer.status}`);
}

/** All that is known of a request. */
export async function request(id) {
  return (await ask(`request?id=${encodeURIComponent(id)}`)).json();
}

/** Calls `hear(name, data)` for each event, until the stream ends. Throws a Refusal, or what fetch() throws. */
export async function listen(hear, signal) {
  const reader = (await ask("events", signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const [, name, data] = /^event: (.*)\ndata: (.*)$/.exec(event) ?? [];
      if (name) hear(name, JSON.parse(data));
    }
  }
}
