// Requests to the server that the page came from, and its answers as a stream.

const ADVICE = {
  401: "The API key is missing or wrong: enter it under Settings, then send again.",
  402: "The balance of this API key is used up: top it up, then send again.",
  429: "Too many requests at once with this API key: wait for another answer to end, then send again.",
  500: "The server failed at this request: send it again, or tell whoever runs the server.",
  502: "The server behind this address does not answer: tell whoever runs it.",
  503: "The server is busy or starting: wait a moment, then send again.",
};
export const BROKE_OFF = "The connection was lost: see that the server runs, then send again.";

/** Its message is the one line that a person sees: what happened and what to do. */
export class ServerError extends Error {
  constructor(status, said) {
    const line = ADVICE[status] ?? said ?? "The server refuses this request.";
    super(status ? `${status}: ${line}` : line);
    this.status = status;
  }
}

/** What the server serves: {model, context, max_body_bytes, needs_key, currency, prices, dense_prices,
 * documents, dsa}. */
export async function loadInfo() {
  const response = await fetchOrExplain("fulmen/info");
  return response.json();
}

export const megabytes = (bytes) => `${Math.floor(bytes / 2 ** 16) / 16} MB`;

/**
 * Ask; returns the body of the answer's stream. body: in OpenAI's format, without what makes it a stream;
 * most: of its bytes that the server takes.
 */
export async function requestAnswer(body, key, signal, most) {
  const text = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
  if (new Blob([text]).size > most)
    throw new ServerError(0, `All in all that is more than ${megabytes(most)}: attach less, or begin a new chat.`);
  return post("v1/chat/completions", text, key, signal);
}

/** What happens for a question about documents, as it happens; the last is an answer or an error. */
export async function* questionEvents(question, key, signal) {
  const body = await post("fulmen/ask", JSON.stringify(question), key, signal);
  for await (const data of serverEvents(body)) yield JSON.parse(data);
}

async function post(path, body, key, signal) {
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  return (await fetchOrExplain(path, { method: "POST", signal, headers, body })).body;
}

async function fetchOrExplain(path, options) {
  const response = await fetch(path, options).catch((error) => {
    throw options?.signal?.aborted
      ? error
      : new ServerError(0, "The server cannot be reached: see that it runs, then try again.");
  });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ServerError(response.status, body?.error?.message);
}

/** Fill `answer` ({text, usage, finish}) from the stream; calls onText after each piece of text. */
export async function receive(body, answer, onText) {
  let done = false;
  for await (const data of serverEvents(body)) {
    // Read on to the end: hanging up here would look as if the reader had left.
    if (data === "[DONE]") done = true;
    if (done) continue;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(Number(chunk.error.code) || 500, chunk.error.message);
    answer.usage = chunk.usage ?? answer.usage;
    const choice = chunk.choices?.[0];
    answer.finish = choice?.finish_reason ?? answer.finish;
    if (choice?.delta?.content) {
      answer.text += choice.delta.content;
      onText();
    }
  }
  if (!done) throw new ServerError(0, BROKE_OFF);
}

/** The `data:` fields of a stream of server-sent events. Its other lines only keep the connection alive. */
async function* serverEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection may be gone already
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(0, BROKE_OFF);
  }
}
