// Talks to the server. Knows nothing of the page.

let token = sessionStorage.getItem("token") || "";

export function useToken(value) {
  token = value;
  sessionStorage.setItem("token", value);
}

function headers(body) {
  const found = {};
  if (token) found.authorization = `Bearer ${token}`;
  if (body !== undefined) found["content-type"] = "application/json";
  return found;
}

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function refused(answer) {
  let message = `The server answered with status ${answer.status}.`;
  try {
    message = (await answer.json()).error.message;
  } catch { /* no error object: the status has to do */ }
  return new ServerError(message, answer.status);
}

async function send(method, path, body, signal) {
  let answer;
  try {
    const text = body === undefined ? undefined : JSON.stringify(body);
    answer = await fetch(path, { method, headers: headers(body), body: text, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached; is it still running?", 0);
  }
  if (!answer.ok) throw await refused(answer);
  return answer;
}

export const call = async (method, path, body) => (await send(method, path, body)).json();
export const blob = async (path) => (await send("GET", path)).blob();

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return { done: true }; // the connection broke
  }
}

// Calls onText with each new piece of a chat's answer, and returns why it ended.
export async function chat(body, { signal, onText }) {
  const answer = await send("POST", "/v1/chat/completions", { ...body, stream: true }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "", end = null;
  for (;;) {
    const { done, value } = await read(reader);
    if (done) throw new ServerError("The connection to the server was lost before the answer ended.", 0);
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return end;
      const news = JSON.parse(data);
      if (news.error) throw new ServerError(news.error.message, 0);
      for (const choice of news.choices) {
        if (choice.delta.content) onText(choice.delta.content);
        end = choice.finish_reason || end;
      }
    }
  }
}
