"use strict";

// The page of one annotator. What the server sends is shown as text only: textContent, never HTML.

const byId = (id) => document.getElementById(id);
const token = document.querySelector('meta[name="label-token"]').content;
const KEYS = { 1: "first", ArrowLeft: "first", 2: "second", ArrowRight: "second", t: "tie", s: "skip", u: "undo" };

let annotator = new URLSearchParams(location.search).get("annotator");
let state = null;
let shownAt = 0;
let busy = false; // one keystroke is one label: while one is on its way, further ones are not taken

async function call(path, body) {
  const headers = { "X-Label-Token": token };
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The server does not answer, so nothing was stored. When it runs again, load this page again.");
  }
  const values = await response.json();
  if (!response.ok) throw new Error(`${values.error[0].toUpperCase()}${values.error.slice(1)}.`);
  return values;
}

async function during(work) {
  if (busy) return;
  busy = true;
  try {
    await work();
    byId("problem").hidden = true;
  } catch (error) {
    byId("problem-text").textContent = error.message;
    byId("problem").hidden = false;
  } finally {
    busy = false;
  }
}

function show(next, said) {
  state = next;
  annotator = state.annotator;
  history.replaceState(null, "", `?annotator=${encodeURIComponent(annotator)}`);
  const { pair, noun, total, done } = state;
  byId("start").hidden = true;
  byId("label").hidden = !pair;
  byId("end").hidden = Boolean(pair);
  for (const button of document.querySelectorAll("button.undo")) button.disabled = !state.undo;
  if (pair) {
    byId("question").textContent = state.question;
    byId("prompt-title").textContent = state.material;
    byId("first-title").textContent = `${noun} 1`;
    byId("second-title").textContent = `${noun} 2`;
    byId("first-name").textContent = `${noun} 1`;
    byId("second-name").textContent = `${noun} 2`;
    byId("tie").hidden = !state.ties;
    byId("bar").max = total;
    byId("bar").value = done;
    byId("count").textContent = `${done} of ${total} done`;
    byId("who").textContent = annotator;
    for (const place of ["prompt", "first", "second"]) fill(byId(place), pair[place]);
    byId("prompt").scrollTop = 0;
    window.scrollTo(0, 0);
    document.body.dataset.pair = pair.id;
    shownAt = performance.now();
  } else {
    const decided = done - state.tied - state.skipped;
    byId("end-text").textContent =
      `${annotator}, you are through with all ${total} pairs: ${decided} decided, ${state.tied} tied, ` +
      `${state.skipped} skipped.`;
    document.body.dataset.pair = "";
  }
  byId("status").textContent = `${said} ${pair ? `${done} of ${total} done.` : byId("end-text").textContent}`;
}

function fill(element, text) {
  const trimmed = text.trim();
  element.textContent = trimmed || "nothing was written";
  element.classList.toggle("empty", !trimmed);
}

function choose(choice) {
  if (!state?.pair || (choice === "tie" && !state.ties)) return;
  const seconds = (performance.now() - shownAt) / 1000;
  const said = { first: `${state.noun} 1.`, second: `${state.noun} 2.`, tie: "A tie.", skip: "Skipped." }[choice];
  during(async () => show(await call("/api/label", { annotator, pair: state.pair.id, choice, seconds }), said));
}

function undo() {
  if (!state?.undo) return;
  during(async () => show(await call("/api/undo", { annotator, pair: state.undo }), "Taken back."));
}

function start(name) {
  return during(async () => show(await call(`/api/state?annotator=${encodeURIComponent(name)}`), ""));
}

document.addEventListener("keydown", (event) => {
  if (event.target instanceof HTMLInputElement) return;
  const held = event.repeat && ["Enter", " "].includes(event.key) && event.target instanceof HTMLButtonElement;
  if (held) event.preventDefault(); // a key that is held down is one keystroke
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action || !state || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (action === "undo") undo();
  else choose(action);
});

for (const button of document.querySelectorAll("button[data-choice]")) {
  button.addEventListener("click", () => choose(button.dataset.choice));
}
for (const button of document.querySelectorAll("button.undo")) button.addEventListener("click", undo);
byId("problem-button").addEventListener("click", () => location.reload());
byId("start-form").addEventListener("submit", (event) => {
  event.preventDefault();
  start(byId("name").value);
});

(async () => {
  if (annotator !== null) await start(annotator);
  if (!state) {
    byId("start").hidden = false;
    byId("name").value = annotator ?? "";
    byId("name").focus();
  }
})();
