"use strict";
// The browser of examples. The data are untrusted text: it reaches the page through text nodes only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const examples = data.examples;
  if (!examples.length) return;

  const byId = (id) => document.getElementById(id);
  const form = document.querySelector("form.filters");
  const fields = form.elements; // by name
  const SEARCH_DELAY = 120; // ms after the last keystroke
  const ADDRESS_DELAY = 300; // browsers limit how often a page may change its address
  const methodOf = new Map(data.systems.map((system) => [system.name, system.method]));
  const measureOf = new Map(data.measures.map((measure) => [measure.key, measure]));
  const haystacks = []; // lower-case text, made when first searched

  let matches = [];
  let position = 0;

  // --- what is known of an example ---------------------------------------------------------------------

  const verdictOf = ({ score }) =>
    score === null ? "undecided" : score > 0.5 ? "won" : score < 0.5 ? "lost" : "tied";
  const isSuspect = (example) => example.suspicions_a.length + example.suspicions_b.length > 0;
  const hasFailure = (example, failure) =>
    example.verdicts.some(({ status }) => (failure === "any" ? status !== "ok" : status === failure));

  function haystack(index) {
    const { id, prompt, response_a, response_b, verdicts } = examples[index];
    const words = () => [id, prompt, response_a, response_b, ...verdicts.flatMap((v) => [v.text ?? "", v.detail])];
    return (haystacks[index] ??= words().join("\n").toLowerCase());
  }

  function sortKey(by) {
    if (by === "score") return (e) => e.score;
    if (by === "length") return (e) => e.response_a.length - e.response_b.length;
    const name = by.slice("value:".length);
    return (e) => (Object.hasOwn(e.values, name) ? e.values[name] : null);
  }

  // --- filters and address -----------------------------------------------------------------------------

  const chosen = () => Object.fromEntries(new FormData(form)); // checkboxes only where they are checked

  function write(values) {
    for (const field of fields) {
      const value = values.get(field.name) ?? "";
      if (field.type === "checkbox") field.checked = value === "yes";
      else field.value = value;
      if (field.selectedIndex === -1) field.value = ""; // no such option
    }
  }

  function filter() {
    const want = chosen();
    const kind = want.system.slice(0, want.system.indexOf(":"));
    const name = want.system.slice(want.system.indexOf(":") + 1);
    const search = want.search.trim().toLowerCase();
    const found = [];
    for (let i = 0; i < examples.length; i++) {
      const e = examples[i];
      if (kind === "system" && e.system !== name) continue;
      if (kind === "method" && methodOf.get(e.system) !== name) continue;
      if (want.verdict && verdictOf(e) !== want.verdict) continue;
      if (want.orders && e.consistent !== (want.orders === "consistent")) continue;
      if (want.failure && !hasFailure(e, want.failure)) continue;
      if (want.attack && !isSuspect(e)) continue;
      if (want.prefix && e.prefix_a === 0) continue;
      if (search && !haystack(i).includes(search)) continue;
      found.push(i);
    }
    if (!want.sort) return want.descending ? found.reverse() : found;
    const key = sortKey(want.sort);
    const sign = want.descending ? -1 : 1;
    const keyed = found.map((i) => [key(examples[i]), i]);
    keyed.sort(([a, i], [b, j]) => (a === null) - (b === null) || sign * (a - b) || i - j); // null always last
    return keyed.map(([, i]) => i);
  }

  function later(delay, act) {
    let timer;
    return () => {
      clearTimeout(timer);
      timer = setTimeout(act, delay);
    };
  }

  const writeAddress = later(ADDRESS_DELAY, () => {
    const fragment = new URLSearchParams(Object.entries(chosen()).filter(([, value]) => value));
    if (matches.length) fragment.set("example", examples[matches[position]].id);
    history.replaceState(null, "", "#" + fragment);
  });

  function apply(id) {
    const current = id ?? (matches.length ? examples[matches[position]].id : undefined);
    matches = filter();
    position = Math.max(0, matches.findIndex((i) => examples[i].id === current));
    show();
  }

  // A fragment without "=" is an anchor of the page, not a state.
  function readAddress() {
    const text = location.hash.slice(1);
    if (!text.includes("=")) return false;
    const fragment = new URLSearchParams(text);
    write(fragment);
    apply(fragment.get("example") ?? undefined);
    return true;
  }

  // --- one example -------------------------------------------------------------------------------------

  function el(tag, kind, ...children) {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    element.append(...children.filter((child) => child !== null && child !== ""));
    return element;
  }

  const badge = (text, kind = "") => [" ", el("span", `badge ${kind}`.trim(), text)];

  function textBox(text, prefix = 0) {
    const box = el("div", "text");
    box.dir = "auto";
    const cut = [...text].slice(0, prefix).join("").length; // Python counts code points
    if (cut) box.append(el("mark", "", text.slice(0, cut)));
    box.append(text.slice(cut));
    return box;
  }

  function resultText(e) {
    if (e.score === null) return "undecided";
    if (e.score === 0.5) return e.consistent === false ? "tied: the two orders disagree" : "tied";
    return `${e.score > 0.5 ? e.system : e.baseline} won${e.score === 0 || e.score === 1 ? "" : ", not in both orders"}`;
  }

  function panel(name, text, ended, suspicions, prefix, won) {
    const head = el("h4", "", el("bdi", "", name), ...(won ? badge("won", "good") : []));
    if (ended !== null) head.append(...(ended ? badge("ended") : badge("cut at its length limit", "bad")));
    const box = el("section", won ? "panel winner" : "panel", head);
    if (prefix) box.append(el("p", "note", el("mark", "", "Marked"), ": the forced prefix, not written by the policy"));
    for (const suspicion of suspicions) box.append(el("p", "warning", el("b", "", "Suspected attack: "), suspicion));
    box.append(textBox(text, prefix));
    return box;
  }

  function verdictPanel(e, verdict) {
    const first = verdict.order === "ab" ? e.system : e.baseline;
    const winner = { a: e.system, b: e.baseline, tie: "tie" }[verdict.winner];
    const outcome = verdict.status !== "ok" ? verdict.status : verdict.winner === "tie" ? "tie" : `${winner} won`;
    const kind = verdict.status === "ok" ? "" : "bad";
    const box = el("section", "panel", el("h4", "", el("bdi", "", `${first} shown first`), ...badge(outcome, kind)));
    if (verdict.detail) box.append(el("p", "note", verdict.detail));
    if (verdict.text !== null) box.append(textBox(verdict.text));
    return box;
  }

  function numberText(name, value) {
    if (value === null) return "–";
    const measure = measureOf.get(name);
    if (!measure) return String(Math.round(value * 1e4) / 1e4);
    return (value * (measure.unit === "%" ? 100 : 1)).toFixed(measure.digits);
  }

  function valuesOf(e) {
    const list = el("dl", "facts");
    for (const [name, value] of Object.entries(e.values)) {
      const measure = measureOf.get(name);
      const label = measure ? measure.name + (measure.unit ? ` (${measure.unit})` : "") : name;
      list.append(el("div", "", el("dt", "", label), el("dd", "", numberText(name, value))));
    }
    return list;
  }

  function show() {
    const number = matches.length;
    byId("previous").disabled = position === 0;
    byId("next").disabled = position >= number - 1;
    writeAddress();
    const article = byId("example");
    if (!number) {
      byId("count").textContent = `No example of ${examples.length} matches`;
      article.replaceChildren();
      return;
    }
    const e = examples[matches[position]];
    const all = number === examples.length ? "" : ` (${examples.length} in all)`;
    byId("count").textContent = `Example ${position + 1} of ${number}${all}`;
    const result = badge(resultText(e), { won: "good", lost: "bad" }[verdictOf(e)]);
    const title = el("h3", "", el("bdi", "", e.system), " against ", el("bdi", "", e.baseline), ...result);
    if (e.consistent === false) title.append(...badge("inconsistent", "bad"));
    const origin = el("p", "note", `run ${e.run}, `, el("code", "", e.id));
    const pair = el(
      "div",
      "pair",
      panel(e.system, e.response_a, e.ended_a, e.suspicions_a, e.prefix_a, e.score > 0.5),
      panel(e.baseline, e.response_b, e.ended_b, e.suspicions_b, 0, e.score !== null && e.score < 0.5),
    );
    const prompt = textBox(e.prompt);
    article.replaceChildren(title, origin, el("section", "panel prompt", el("h4", "", "Prompt"), prompt), pair);
    if (prompt.scrollHeight > prompt.clientHeight) prompt.tabIndex = 0; // so that keys can scroll it
    if (Object.keys(e.values).length) article.append(el("h4", "", "Values of ", el("bdi", "", e.system)), valuesOf(e));
    if (e.verdicts.length) {
      article.append(el("h4", "", "Verdicts"), el("div", "pair", ...e.verdicts.map((v) => verdictPanel(e, v))));
    }
  }

  function move(step) {
    const target = position + step;
    if (target < 0 || target >= matches.length) return;
    position = target;
    show();
  }

  // --- start -------------------------------------------------------------------------------------------

  function option(value, text) {
    const element = el("option", "", text);
    element.value = value;
    return element;
  }

  function optionGroup(label, kind, names) {
    const group = el("optgroup", "", ...names.map((name) => option(`${kind}:${name}`, name)));
    group.label = label;
    fields.system.append(group);
  }

  const systems = [...new Set(examples.map((e) => e.system))];
  const methods = [...new Set(systems.map((name) => methodOf.get(name)).filter((name) => name !== undefined))];
  if (methods.length < systems.length) optionGroup("Methods", "method", methods);
  optionGroup("Systems", "system", systems);
  const values = new Set(examples.flatMap((e) => Object.keys(e.values)));
  for (const name of values) fields.sort.append(option("value:" + name, measureOf.get(name)?.name ?? name));

  const search = later(SEARCH_DELAY, () => apply());
  form.addEventListener("input", (event) => (event.target === fields.search ? search() : apply()));
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("next").addEventListener("click", () => move(1));
  byId("previous").addEventListener("click", () => move(-1));
  byId("clear").addEventListener("click", () => {
    form.reset();
    apply();
  });
  byId("keys").addEventListener("click", () => byId("help").showModal());
  byId("help-close").addEventListener("click", () => byId("help").close());
  window.addEventListener("hashchange", readAddress);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
    const target = event.target;
    if (event.key === "Escape" && target === fields.search) return target.blur();
    if (target.matches("input:not([type=checkbox]), select, textarea")) return;
    const scrolls = target.matches(".scroll, pre"); // there the arrows scroll
    const step = { j: 1, k: -1, ArrowRight: scrolls ? 0 : 1, ArrowLeft: scrolls ? 0 : -1 }[event.key];
    if (step) {
      const top = byId("example").getBoundingClientRect().top;
      if (top < 0 || top > innerHeight * 0.6) byId("examples").scrollIntoView();
      move(step);
    } else if (event.key === "/") {
      fields.search.focus();
      fields.search.select();
    } else if (event.key === "?") {
      byId("help").showModal();
    } else {
      return;
    }
    event.preventDefault();
  });

  if (!readAddress()) apply();
  else byId("examples").scrollIntoView();
})();
