// A client that knows NATS's own client for Node.js, CBOR and the guide, and nothing of aiqueue: told what to do in lines
// of JSON on stdin.

import { createInterface } from "node:readline";
import { jetstream, jetstreamManager } from "@nats-io/jetstream";
import { connect, headers } from "@nats-io/transport-node";
import { decode } from "cborg";

const [url, user, pass] = process.argv.slice(2);
const FINAL = new Set(["result", "failed", "cancelled"]);

const nc = await connect({ servers: url, user, pass, maxReconnectAttempts: 3 });
const js = jetstream(nc);
const jsm = await jetstreamManager(nc, { checkAPI: false });

// The guide's snippets by the comments above them there, in the words of this client.
const snippets = {
  "Publishing agent message": ({ tenant_id, target_agent_id, source_agent_id, encoded_message }) =>
    nc.publish(`ai.agent.message.${tenant_id}`, encoded_message, {
      headers: told({ target_agent_id, source_agent_id }),
    }),

  "Subscribing to agent messages": ({ tenant_id, agent_id, message_handler }) => {
    nc.subscribe(`ai.agent.message.${tenant_id}`, { queue: `agent.${agent_id}`, callback: message_handler });
  },

  "Publishing task": ({ tenant_id, encoded_task }) => nc.publish(`ai.agent.tasks.${tenant_id}`, encoded_task),

  "Subscribing to tasks": ({ tenant_id, task_handler }) => {
    nc.subscribe(`ai.agent.tasks.${tenant_id}`, { queue: "agent.workers", callback: task_handler });
  },

  "Publishing LLM request": ({ tenant_id, request_id, model, encoded_request }) =>
    nc.publish(`ai.gateway.requests.${tenant_id}`, encoded_request, {
      headers: told({ request_id, model, priority: "normal" }),
    }),

  "Requesting response": ({ tenant_id, encoded_request }) =>
    nc.request(`ai.gateway.responses.${tenant_id}`, encoded_request, { timeout: 60_000 }),

  "Publishing document for ingestion": ({ tenant_id, encoded_document }) =>
    nc.publish(`ai.rag.ingest.${tenant_id}`, encoded_document),

  "Publishing query": ({ tenant_id, encoded_query }) => nc.publish(`ai.rag.queries.${tenant_id}`, encoded_query),

  "Requesting results": ({ tenant_id, encoded_query }) =>
    nc.request(`ai.rag.results.${tenant_id}`, encoded_query, { timeout: 30_000 }),
};

const verbs = {
  titles: () => Object.keys(snippets),

  async run({ title, sub, ...names }) {
    const handler = (error, msg) => say(error ? { sub, error: String(error) } : { sub, ...shown(msg) });
    const answer = await snippets[title]({ ...names, message_handler: handler, task_handler: handler });
    await nc.flush();
    return answer === undefined ? null : shown(answer);
  },

  async listen({ subject, queue, sub }) {
    nc.subscribe(subject, { queue, callback: (_, msg) => say({ sub, ...shown(msg) }) });
    await nc.flush();
  },

  async respond({ subject, queue, answer, sub }) {
    nc.subscribe(subject, {
      queue,
      callback: (_, msg) => {
        say({ sub, ...shown(msg) });
        msg.respond(answer);
      },
    });
    await nc.flush();
  },

  // A publish that the server confirms.
  async store({ subject, body, headers: given }) {
    const ack = await js.publish(subject, body, { headers: told(given ?? {}) });
    return { stream: ack.stream, seq: ack.seq, duplicate: ack.duplicate };
  },

  async request({ subject, body, headers: given }) {
    return shown(await nc.request(subject, body, { timeout: 20_000, headers: told(given ?? {}) }));
  },

  // Wait for a job's last word: live first, then what is there already.
  async outcome({ subject, run }) {
    const live = nc.subscribe(`aiq.live.${subject}`, { timeout: 20_000 });
    const over = (each) => FINAL.has(each.headers["Aiq-Event"]) && Number(each.headers["Aiq-Run"]) >= run;
    const stored = await jsm.direct.getMessage("AI_RESULTS", { last_by_subj: subject });
    if (stored !== null && over(shown(stored))) {
      live.unsubscribe();
      return shown(stored);
    }
    for await (const msg of live) {
      if (over(shown(msg))) return shown(msg); // which unsubscribes
    }
  },

  // All entries that are stored, by direct get: no consumer is made.
  async journal({ subject }) {
    const found = [];
    for (let seq = 1; ; ) {
      const msg = await jsm.direct.getMessage("AI_RESULTS", { seq, next_by_subj: subject });
      if (msg === null) return found;
      found.push(shown(msg));
      seq = msg.seq + 1;
    }
  },
};

function told(given) {
  const made = headers();
  for (const [name, value] of Object.entries(given)) made.set(name, value);
  return made;
}

function shown(msg) {
  const given = {}; // `headers` of a message that was sent, `header` of one that is stored
  for (const [name, values] of msg.headers ?? msg.header ?? []) given[name] = values[0];
  return { subject: msg.subject, headers: given, data: decoded(msg.data, given) };
}

function decoded(body, given) {
  if (body.length === 0) return null;
  if (given["Content-Type"] === "application/cbor") return decode(body);
  const text = new TextDecoder().decode(body);
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

function say(line) {
  process.stdout.write(`${JSON.stringify(line)}\n`);
}

async function obey({ id, do: verb, ...order }) {
  try {
    say({ id, value: (await verbs[verb](order)) ?? null });
  } catch (error) {
    say({ id, error: `${error.name}: ${error.message}` });
  }
}

say({ ready: [] });
for await (const line of createInterface({ input: process.stdin })) obey(JSON.parse(line));
await nc.close();
