// The page: an image, a question, the answer as it comes, and what the model looked at.

import { ask, Refused, servedModel, useToken } from "./api.js";
import { Viewer } from "./viewer.js";

const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const byId = (id) => document.getElementById(id);

let model = null; // as /v1/models describes it
let image = null; // {url, bitmap}
let asking = null; // AbortController of the answers that are awaited
let seen = { images: [], tokens: [] }; // what the last answer looked at
let follow = true; // whether the newest token is shown as it comes

const viewer = new Viewer(byId("view"), (scale) => {
  byId("scale").textContent = `${Math.round(scale * 100)} %`;
});

// -------------------------------------------------------------------------------------------------------------- model

async function connect() {
  try {
    model = await servedModel();
  } catch (error) {
    byId("token-form").hidden = error.status !== 401;
    byId("model").textContent = "";
    problem(error.status === 401 ? "" : error.message);
    return;
  }
  problem("");
  byId("token-form").hidden = true;
  byId("model").textContent = model.id;
  byId("compare-line").hidden = !model.flexattn.compare;
  byId("lowres-line").hidden = !model.flexattn.lowres_size;
  if (!model.flexattn.layers.length) byId("with-hr").querySelector("h2").firstChild.data = "Answer ";
}

byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(byId("secret").value.trim());
  connect();
});

function problem(sentence) {
  byId("problem").textContent = sentence;
  byId("problem").hidden = !sentence;
}

// -------------------------------------------------------------------------------------------------------------- image

async function open(file) {
  asking?.abort();
  problem("");
  try {
    const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
    const blob = SENT_AS_THEY_ARE.includes(file.type) ? file : await asPng(bitmap);
    const limit = model?.flexattn.max_request_mib ?? Infinity;
    if (blob.size * 4 / 3 > limit * 2 ** 20 - 65536) {
      throw new Refused(0, `The image has ${(blob.size / 2 ** 20).toFixed(0)} MiB; this server takes up to ${(limit * 0.74).toFixed(0)}. Choose a smaller one.`);
    }
    image = { url: await dataUrl(blob), bitmap };
  } catch (error) {
    problem(error instanceof Refused ? error.message : "This file is not an image that your browser can show. Choose a PNG or JPEG.");
    return;
  }
  clearAnswers();
  byId("drop").hidden = true;
  byId("zoom").hidden = false;
  viewer.setImage(image.bitmap, model?.flexattn.lowres_size);
  byId("question").focus({ preventScroll: true });
}

function asPng(bitmap) {
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

byId("file").addEventListener("change", (event) => {
  if (event.target.files[0]) open(event.target.files[0]);
  event.target.value = "";
});
byId("another").addEventListener("click", () => byId("file").click());
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files[0]) open(event.clipboardData.files[0]);
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    byId("stage").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
  });
}

byId("zoom-in").addEventListener("click", () => viewer.zoom(1.5));
byId("zoom-out").addEventListener("click", () => viewer.zoom(1 / 1.5));
byId("zoom-fit").addEventListener("click", () => viewer.fit());
byId("zoom-full").addEventListener("click", () => viewer.zoom(1 / viewer.scale));

// ------------------------------------------------------------------------------------------------------------- answers

byId("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (asking) {
    asking.abort();
    return;
  }
  const question = byId("question").value.trim();
  const missing = !model ? "There is no connection to the server." : !image ? "Choose an image first." : !question ? "Ask a question." : "";
  problem(missing);
  if (missing) return;
  clearAnswers();
  asking = new AbortController();
  byId("send").textContent = "Stop";
  const compared = byId("compare").checked && model.flexattn.compare;
  const traced = model.flexattn.layers.length > 0;
  try {
    await Promise.all([
      answer("with-hr", { question, hr: true, trace: traced }),
      ...(compared ? [answer("without-hr", { question, hr: false, trace: false })] : []),
    ]);
  } catch (error) {
    if (error.name !== "AbortError") problem(error.message);
    if (error.status === 401) byId("token-form").hidden = false;
    asking.abort();
  }
  asking = null;
  byId("send").textContent = "Ask";
});

byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});

function clearAnswers() {
  for (const id of ["with-hr", "without-hr"]) {
    byId(id).hidden = true;
    byId(id).querySelector(".answer").replaceChildren();
    byId(id).querySelector("time").textContent = "";
  }
  seen = { images: [], tokens: [] };
  follow = true;
  byId("steps").hidden = true;
  if (viewer.image) viewer.setLooked(null);
}

async function answer(id, { question, hr, trace }) {
  const card = byId(id), text = card.querySelector(".answer"), begun = performance.now();
  card.hidden = false;
  card.classList.add("waiting");
  try {
    const events = ask({ model: model.id, question, image: image.url, hr, trace, signal: asking.signal });
    for await (const event of events) {
      if (event.images) seen.images = event.images;
      if (event.token) addToken(text, event.token);
      else if (!trace) text.append(event.text);
    }
    card.querySelector("time").textContent = `${((performance.now() - begun) / 1000).toFixed(2)} s`;
  } finally {
    card.classList.remove("waiting");
  }
}

// -------------------------------------------------------------------------------------------------- tokens and layers

function addToken(text, token) {
  const number = seen.tokens.push(token) - 1;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = token.end ? "end" : number === 0 ? token.text.trimStart() : token.text;
  button.classList.toggle("end", token.end);
  button.addEventListener("click", () => choose(number));
  text.append(button);
  byId("steps").hidden = false;
  byId("token").max = number;
  if (number === 0) {
    byId("layer").max = Object.keys(token.layers).length - 1;
    byId("layer").value = 0;
  }
  if (follow && (!token.end || number === 0)) byId("token").value = number;
  showStep();
}

function choose(number) {
  follow = false;
  byId("token").value = number;
  showStep();
}

// Draw the token and layer that the sliders stand at.
function showStep() {
  const number = Number(byId("token").value), token = seen.tokens[number];
  const layers = Object.keys(token.layers).map(Number).sort((a, b) => a - b);
  const layer = layers[Number(byId("layer").value)], looked = token.layers[layer];
  byId("token-name").textContent = `${number + 1} of ${seen.tokens.length}: ${token.end ? "the end" : `“${token.text.trim()}”`}`;
  byId("layer-name").textContent = `${layer}`;
  const share = `${(100 * looked.share).toFixed(looked.share < 0.1 ? 1 : 0)} %`;
  byId("meaning").textContent = layer === layers.at(-1)
    ? `Layer ${layer} is the last: its map selects ${share} of the image, which no layer reads any more.`
    : `The map of layer ${layer} selects ${share} of the image, which layer ${layer + 1} reads at high resolution.`;
  for (const [index, button] of document.querySelectorAll("#with-hr .answer button").entries()) {
    button.setAttribute("aria-pressed", index === number);
  }
  viewer.setLooked({ frame: seen.images[0].frame, map: looked.map, selected: looked.selected });
}

byId("token").addEventListener("input", () => choose(Number(byId("token").value)));
byId("layer").addEventListener("input", showStep);
for (const what of ["attention", "regions", "lowres"]) {
  byId(`show-${what}`).addEventListener("change", (event) => viewer.setShown(what, event.target.checked));
}

window.flexattn = { viewer }; // for tests
connect();
