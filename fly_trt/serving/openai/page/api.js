// The server's API as the page uses it. Paths are relative to the page, so that it works below any root path.

const OFFLINE = "The server cannot be reached: is fly-serve still running?";

/** What the server answered instead of what was asked for. `status` is 0 where it did not answer. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export class Api {
  key = "";

  /** The cards of the models that are served: one engine, perhaps under several names. */
  async models() {
    return (await (await this._ask("v1/models", {})).json()).data;
  }

  /** The settings of acceptance, as the form needs them. */
  async acceptance() {
    return (await this._ask("page/acceptance.json", {})).json();
  }

  /** The chunks of a streamed answer. Raises ApiError, also for an error within the stream, and AbortError. */
  async *stream(path, body, signal) {
    const answer = await this._ask(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    for await (const data of events(pieces(answer.body))) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, answer.status);
      yield chunk;
    }
    throw new ApiError("The connection broke before the answer was whole.", 0);
  }

  async _ask(path, options) {
    const headers = { ...options.headers };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    const answer = await reach(() => fetch(path, { ...options, headers, credentials: "same-origin" }));
    if (!answer.ok) throw new ApiError(await messageOf(answer), answer.status);
    return answer;
  }
}

/** The data of each server-sent event in pieces of text, wherever these were cut. */
export async function* events(texts) {
  let held = "";
  let data = [];
  for await (const text of texts) {
    held += text;
    const lines = held.split(/\r\n|\n|\r(?!$)/);
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

async function* pieces(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reach(() => reader.read());
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {}); // of a stream that ended by itself there is nothing to cancel
  }
}

async function reach(ask) {
  try {
    return await ask();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(OFFLINE, 0);
  }
}

async function messageOf(answer) {
  const text = await answer.text();
  try {
    const message = JSON.parse(text).error.message;
    if (typeof message === "string") return message;
  } catch {
    // a proxy's page, or no JSON at all
  }
  return `The server answered ${answer.status} ${answer.statusText}`.trim();
}
