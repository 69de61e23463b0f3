// The server's API: what models there are, and an answer as a stream.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let token = sessionStorage.getItem("token") ?? "";

export function useToken(value) {
  token = value;
  sessionStorage.setItem("token", value);
}

// An address that ends in #token=... brings the token along; it is not kept in the address bar.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  useToken(given);
  history.replaceState(null, "", location.pathname);
}

async function send(path, options = {}) {
  const headers = { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Refused(0, "The server cannot be reached. Is it still running?");
  });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Refused(response.status, body.error?.message ?? `The server answers with status ${response.status}.`);
}

// The model that is served, as /v1/models describes it.
export async function servedModel() {
  const models = await (await send("v1/models")).json();
  return models.data[0];
}

// Ask a question about an image; yields {images}, {text} and {text, token}.
export async function* ask({ model, question, image, hr, trace, signal }) {
  const content = [{ type: "image_url", image_url: { url: image } }, { type: "text", text: question }];
  const body = { model, stream: true, messages: [{ role: "user", content }], flexattn: { hr, trace } };
  const response = await send("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  for await (const data of serverSent(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(0, chunk.error.message);
    const text = chunk.choices[0]?.delta.content ?? "";
    const { images, token: seen } = chunk.flexattn ?? {};
    if (images) yield { images, text };
    else if (seen) yield { text, token: decodedToken(seen) };
    else if (text) yield { text };
  }
  throw new Refused(0, "The server ended the answer too early. Ask again.");
}

async function* serverSent(stream) {
  let rest = "";
  for await (const part of chunks(stream.pipeThrough(new TextDecoderStream()))) {
    const events = (rest + part).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const line = event.split("\n").find((one) => one.startsWith("data: "));
      if (line) yield line.slice(6);
    }
  }
}

async function* chunks(stream) {
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

// ------------------------------------------------------------------------------------------------------------- traces

function decodedToken({ text, end, layers }) {
  const decoded = {};
  for (const [layer, [image]] of Object.entries(layers)) {
    decoded[layer] = { map: grid(image.map, false), selected: grid(image.selected, true), share: image.share };
  }
  return { text, end, layers: decoded };
}

// A grid of bytes or, packed eight to a byte, of bits.
function grid({ rows, columns, data }, packed) {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  if (!packed) return { rows, columns, values: bytes };
  const values = Uint8Array.from({ length: rows * columns }, (_, cell) => (bytes[cell >> 3] >> (7 - (cell & 7))) & 1);
  return { rows, columns, values };
}
