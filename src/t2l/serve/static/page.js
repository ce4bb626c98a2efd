// The page. Whatever comes from users or models is set as text, never as markup.

import { ServerError, blob, call, chat, useToken } from "./api.js";

const EXAMPLES = [
  ["Film reviews", "Say whether the film review is positive or negative. Answer with one word.",
    "I laughed, I cried, and I want to see it again tomorrow."],
  ["Topic of a headline", "Given a news headline, name its topic: world, sports, business or technology.",
    "Chip maker doubles its profit on demand for faster memory"],
  ["Same meaning?", "Decide whether the two sentences mean the same. Answer yes or no.",
    "The cat sat on the mat. On the mat there was a sitting cat."],
  ["Shorten", "Summarise the text in one short sentence.",
    "The committee met for six hours on Tuesday and, after a long debate about costs, put off the decision until spring."],
];

const OWN = "This adapter";

const at = (id) => document.getElementById(id);
const state = { adapter: null, tab: 0, snippets: [], asking: null };

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// ---------------------------------------------------------------------------------------------------- errors

function tell(error) {
  if (error.name === "AbortError") return;
  if (error instanceof ServerError && error.status === 401) {
    at("token-form").hidden = false;
    at("token").focus();
  }
  at("alert-text").textContent = error.message;
  at("alert").hidden = false;
  at("alert").scrollIntoView({ block: "nearest" });
}

at("alert-close").addEventListener("click", () => { at("alert").hidden = true; });

// Runs an action of the user: buttons wait, and whatever fails is told.
async function act(buttons, action) {
  at("alert").hidden = true;
  for (const button of buttons) button.disabled = true;
  try {
    return await action();
  } catch (error) {
    tell(error);
    return undefined;
  } finally {
    for (const button of buttons) button.disabled = false;
  }
}

for (const field of ["describe", "input"]) {
  at(field).addEventListener("keydown", (event) => {
    const button = event.target.form.querySelector(".primary");
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !button.disabled) button.click();
  });
}

at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(at("token").value);
  at("token-form").hidden = at("alert").hidden = true;
  begin();
});

// -------------------------------------------------------------------------------------------------- describe

for (const [name, description, input] of EXAMPLES) {
  const chip = make("button", { type: "button", textContent: name });
  chip.addEventListener("click", () => {
    at("describe").value = description;
    at("input").value = input;
    at("describe").focus();
  });
  at("examples").append(chip);
}

at("describe-form").addEventListener("submit", (event) => {
  event.preventDefault();
  act([at("describe-button")], async () => {
    at("describe-status").textContent = "Writing …";
    try {
      const body = { description: at("describe").value, strength: Number(at("strength").value) };
      const made = await call("POST", "/v1/adapters", body);
      await show(made.id);
      await list();
      if (matchMedia("(pointer: fine)").matches) at("input").focus();
    } finally {
      at("describe-status").textContent = "";
    }
  });
});

const sayStrength = () => { at("strength-value").textContent = at("strength").value; };
at("strength").addEventListener("input", sayStrength);

const bytes = (count) => count < 1e6 ? `${(count / 1e3).toFixed(0)} kB` : `${(count / 1e6).toFixed(1)} MB`;
const scaled = (strength) => strength === 1 ? "" : ` · strength\u00a0${strength}`;
const seconds = (count) => count < 1 ? `${Math.round(1000 * count)} ms` : `${count.toFixed(2)} s`;

async function show(id) {
  const adapter = await call("GET", `/v1/adapters/${encodeURIComponent(id)}`);
  if (adapter.id !== state.adapter?.id) name();
  state.adapter = adapter;
  at("describe").value = adapter.description;
  at("strength").value = adapter.strength;
  sayStrength();
  at("adapter-id").textContent = adapter.id;
  at("adapter-strength").textContent = adapter.strength;
  at("adapter-seconds").textContent = seconds(adapter.seconds);
  at("adapter-size").textContent = bytes(adapter.bytes);
  at("adapter-parameters").textContent = adapter.parameters.toLocaleString("en");
  at("adapter-rank").textContent = `${adapter.rank}, alpha ${adapter.alpha}`;
  at("adapter").hidden = false;
  for (const section of document.querySelectorAll(".needs-adapter")) section.hidden = false;
  plot(adapter);
  mark();
  await snippets();
}

// Answers of an adapter that is left bear its description: it is “this adapter” no longer.
function name() {
  for (const title of document.querySelectorAll(".own h3")) {
    const { description, strength } = state.adapter;
    if (title.textContent === OWN) title.textContent = `Adapter of “${description}”${scaled(strength)}`;
  }
}

function forget() {
  name();
  state.adapter = null;
  at("adapter").hidden = true;
  for (const section of document.querySelectorAll(".needs-adapter")) section.hidden = true;
  mark();
}

for (const format of ["peft", "gguf"]) {
  at(`download-${format}`).addEventListener("click", (event) => act([event.target], async () => {
    const { id } = state.adapter;
    const data = await blob(`/v1/adapters/${encodeURIComponent(id)}/download?format=${format}`);
    const link = make("a", { href: URL.createObjectURL(data), download: `${id}.${format === "peft" ? "zip" : "gguf"}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }));
}

at("delete").addEventListener("click", () => act([at("delete")], async () => {
  await call("DELETE", `/v1/adapters/${encodeURIComponent(state.adapter.id)}`).catch((error) => {
    if (error.status !== 404) throw error; // another tab was faster
  });
  forget();
  await list();
  at("describe").focus();
}));

// --------------------------------------------------------------------------------------------------- history

async function list(after) {
  const query = after ? `&after=${encodeURIComponent(after)}` : "";
  const found = await call("GET", `/v1/adapters?limit=20${query}`);
  if (!after) at("history").replaceChildren();
  for (const adapter of found.data) {
    const button = make("button", { type: "button" },
      make("span", { textContent: adapter.description }),
      make("code", { textContent: adapter.id + scaled(adapter.strength) }));
    button.dataset.id = adapter.id;
    button.addEventListener("click", () => act([button], async () => {
      await show(adapter.id);
      at("adapter").scrollIntoView({ block: "nearest" }); // on a phone the list is below all else
    }));
    at("history").append(make("li", {}, button));
  }
  at("history-empty").hidden = at("history").children.length > 0;
  at("history-more").hidden = !found.has_more;
  at("history-more").dataset.after = found.data.length ? found.data[found.data.length - 1].id : "";
  mark();
}

function mark() {
  for (const button of at("history").querySelectorAll("button")) {
    button.setAttribute("aria-current", String(button.dataset.id === state.adapter?.id));
  }
}

at("history-more").addEventListener("click", (event) =>
  act([event.target], () => list(event.target.dataset.after)));

// ------------------------------------------------------------------------------------------------------- try

at("compare").addEventListener("change", () => { at("wrong-label").hidden = !at("compare").checked; });
at("input").addEventListener("change", () => { if (state.adapter) snippets().catch(tell); });
at("stop").addEventListener("click", () => state.asking?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.asking?.abort();
});

at("try-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.asking) return;
  const stop = new AbortController();
  state.asking = stop;
  at("stop").hidden = false;
  at("ask-status").textContent = "Answering … Escape stops it.";
  act([at("ask")], () => ask(at("input").value.trim(), stop.signal)).finally(() => {
    state.asking = null;
    at("stop").hidden = true;
    at("ask-status").textContent = stop.signal.aborted ? "Stopped." : "";
  });
});

async function ask(text, signal) {
  const { id } = state.adapter;
  snippets().catch(tell); // Control+Enter asks without leaving the field, which would have told the programs' input
  const columns = [["Base model", "base", ""], [OWN, id, "own"]];
  if (at("compare").checked) {
    const other = await call("POST", "/v1/adapters", { description: at("wrong").value });
    columns.push([`Adapter of “${at("wrong").value}”`, other.id, "other"]);
    await list();
  }
  const answers = make("div", { className: "answers" });
  const exchange = make("li", {}, make("p", { className: "question", textContent: text }), answers);
  at("exchanges").prepend(exchange);
  const options = {
    messages: [{ role: "user", content: text }],
    prompt_from: id,
    max_tokens: Number(at("max-tokens").value),
    temperature: Number(at("temperature").value),
  };
  const failed = [];
  await Promise.all(columns.map(([title, model, kind]) =>
    column(answers, title, kind, { model, ...options }, signal).catch((error) => failed.push(error))));
  const told = failed.find((error) => error.name !== "AbortError");
  if (told) throw told;
}

async function column(answers, title, kind, body, signal) {
  const text = make("p"), note = make("small");
  const box = make("article", { className: `answer busy ${kind}` }, make("h3", { textContent: title }), text, note);
  answers.append(box);
  const started = performance.now();
  let first = 0, end = "stopped", problem = "";
  try {
    end = await chat(body, {
      signal,
      onText(piece) {
        first ||= performance.now();
        text.append(piece);
      },
    });
  } catch (error) {
    if (error.name !== "AbortError") {
      end = "failed";
      problem = error.message;
    }
    throw error;
  } finally {
    box.classList.remove("busy");
    if (!text.textContent) {
      text.classList.add(problem ? "failed" : "nothing");
      text.textContent = problem || (end === "stopped" ? "stopped before the first word" : "an empty answer");
    }
    const spent = (performance.now() - started) / 1000;
    const begin = first ? `first word after ${seconds((first - started) / 1000)}, ` : "";
    const why = { length: ", cut at its longest", stopped: ", stopped", failed: ", failed" }[end] || "";
    note.textContent = `${begin}${seconds(spent)} in all${why}`;
  }
}

// ------------------------------------------------------------------------------------------------------ plot

function plot(adapter) {
  const all = Object.values(adapter.norms).flat();
  const most = Math.max(...all, 1e-30), least = Math.min(...all);
  const every = adapter.layers.length > 20 ? 5 : 1;
  const head = make("tr", {}, make("th", {}, make("span", { className: "hidden", textContent: "module" })));
  adapter.layers.forEach((layer, n) => {
    const cell = make("th", { scope: "col" });
    cell.append(n % every ? make("span", { className: "hidden", textContent: String(layer) }) : String(layer));
    head.append(cell);
  });
  const body = make("tbody");
  for (const [module, norms] of Object.entries(adapter.norms)) {
    const row = make("tr", {}, make("th", { scope: "row", textContent: module }));
    norms.forEach((norm, n) => {
      const bar = make("i");
      bar.style.opacity = String(Math.max(.04, norm / most));
      const said = make("span", { className: "hidden", textContent: norm.toPrecision(3) });
      row.append(make("td", { title: `${module}, layer ${adapter.layers[n]}: ${norm.toPrecision(3)}` }, bar, said));
    });
    body.append(row);
  }
  at("norms").replaceChildren(make("thead", {}, head), body);
  at("norm-least").textContent = `0 (least ${least.toPrecision(2)})`;
  at("norm-most").textContent = most.toPrecision(2);
}

// -------------------------------------------------------------------------------------------------- snippets

async function snippets() {
  const text = encodeURIComponent(at("input").value.trim() || "An input for the task");
  const id = encodeURIComponent(state.adapter.id);
  state.snippets = (await call("GET", `/v1/adapters/${id}/snippets?text=${text}`)).data;
  // New tabs would take the focus away from one that the user is on; only other titles are a reason for them.
  const shown = [...at("tabs").children].map((tab) => tab.textContent);
  if (shown.join("\n") !== state.snippets.map(({ title }) => title).join("\n")) {
    at("tabs").replaceChildren(...state.snippets.map(({ title }, n) => {
      const tab = make("button", { type: "button", role: "tab", textContent: title });
      tab.setAttribute("aria-controls", "snippet-panel");
      tab.addEventListener("click", () => choose(n));
      return tab;
    }));
  }
  choose(Math.min(state.tab, state.snippets.length - 1));
}

function choose(n, focus = false) {
  state.tab = n;
  [...at("tabs").children].forEach((tab, position) => {
    tab.setAttribute("aria-selected", String(position === n));
    tab.tabIndex = position === n ? 0 : -1;
  });
  at("snippet").textContent = state.snippets[n].code;
  if (focus) at("tabs").children[n].focus();
}

at("tabs").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step) choose((state.tab + step + state.snippets.length) % state.snippets.length, true);
});

at("copy").addEventListener("click", async () => {
  let done = "Copied";
  try {
    await navigator.clipboard.writeText(at("snippet").textContent);
  } catch {
    getSelection().selectAllChildren(at("snippet")); // where the browser does not let pages copy, the user can
    done = "Selected, to be copied";
  }
  at("copy").textContent = done;
  setTimeout(() => { at("copy").textContent = "Copy"; }, 1500);
});

// ----------------------------------------------------------------------------------------------------- begin

async function begin() {
  await act([], async () => {
    at("base-model").textContent = (await call("GET", "/v1/models")).data[0].root;
    await list();
  });
}

begin();
