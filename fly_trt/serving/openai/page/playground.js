// The page: reads the form, asks the server for one answer or for two side by side, and hands what comes to the panels.

import { Api, ApiError } from "./api.js";
import { differences } from "./difference.js";
import { RunPanel } from "./run_panel.js";
import { AcceptanceForm } from "./settings_form.js";

const $ = (id) => document.getElementById(id);
const api = new Api();
const numberFields = ["max_tokens", "temperature", "num_speculative_tokens", "seed"];
const ENDINGS = { stop: "ended by the model", length: "as many as asked for", abort: "ended by the server" };
let running = null; // the AbortController of the answers that are on their way

async function start() {
  const form = new AcceptanceForm(await api.acceptance(), {
    select: $("acceptance"),
    group: $("policy-group"),
    legend: $("policy-legend"),
    fields: $("policy-fields"),
    guards: $("guards"),
    guardFields: $("guard-fields"),
  });
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) run(form);
  });
  $("stop").addEventListener("click", stop);
  $("key-form").addEventListener("submit", useKey);
  for (const radio of document.getElementsByName("mode")) radio.addEventListener("change", followMode);
  document.addEventListener("keydown", followKeys);
  if (/Mac|iPhone|iPad/.test(navigator.platform)) $("run").querySelector("kbd").textContent = "⌘ ↵";
  followMode();
  showPanels(["Answer"]);
  await connect();
}

function followKeys(event) {
  if (event.key === "Escape" && running) stop();
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
}

function followMode() {
  const isChat = mode() === "chat";
  $("system-field").hidden = !isChat;
  $("prompt").placeholder = isChat ? "A message to the model …" : "What the model shall go on with …";
}

function mode() {
  return document.querySelector("[name=mode]:checked").value;
}

async function connect() {
  try {
    const models = await api.models();
    $("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    $("model").disabled = false;
    $("max_tokens").max = models[0].max_model_len;
    $("setting").textContent = `Server default: ${models[0].setting.line}`;
    allowChat(models[0].has_chat_template);
    $("page-error").textContent = "";
    $("key-form").hidden = true;
    $("prompt").focus();
  } catch (error) {
    showError(error);
  }
}

function allowChat(isAllowed) {
  const chat = document.querySelector("[value=chat]");
  chat.disabled = !isAllowed;
  chat.parentElement.title = isAllowed ? "" : "This model has no chat template";
}

async function useKey(event) {
  event.preventDefault();
  api.key = $("api-key").value;
  $("api-key").value = "";
  await connect();
}

function showError(error) {
  if (error.status === 401) {
    $("key-form").hidden = false;
    $("api-key").focus();
  }
  $("page-error").textContent = error.status === 401 && !api.key ? "" : error.message;
}

function showPanels(titles) {
  $("panels").classList.toggle("two", titles.length > 1);
  $("panels").replaceChildren();
  return titles.map((title) => new RunPanel($("panels"), title));
}

/** What each panel asks for: its title, and the fields of acceptance. */
function asked(form) {
  const chosen = { title: form.policy || "server default", fields: form.values() };
  if (!$("compare").checked) return [chosen];
  const loose = form.policy === "exact" ? { title: "fly", fields: { acceptance: "fly" } } : chosen;
  return [{ title: "exact", fields: { acceptance: "exact" } }, loose];
}

function requestBody(fields) {
  const body = {
    model: $("model").value,
    ...fields,
    stream: true,
    stream_options: { include_usage: true },
    speculation_trace: true,
  };
  for (const name of numberFields) if ($(name).value !== "") body[name] = Number($(name).value);
  if (mode() === "completion") return { ...body, prompt: $("prompt").value };
  const system = $("system").value;
  const messages = system ? [{ role: "system", content: system }] : [];
  return { ...body, messages: [...messages, { role: "user", content: $("prompt").value }] };
}

async function run(form) {
  running = new AbortController();
  const { signal } = running;
  const requests = asked(form);
  const panels = showPanels(requests.map((request) => request.title));
  swapButtons($("run"), $("stop"));
  $("page-error").textContent = "";
  $("status").textContent = "Running …";
  const endings = await Promise.all(panels.map((panel, at) => answer(panel, requests[at].fields, signal)));
  running = null;
  swapButtons($("stop"), $("run"));
  if (panels.length > 1 && !endings.includes("Failed")) compare(panels);
  const said = panels.map((panel) => `${panels.length > 1 ? `${panel.title} ` : ""}${panel.size}`);
  $("status").textContent = `${endings.includes("Failed") ? "Failed" : endings[0]}: ${said.join(", ")}`;
}

/** Of Run and Stop one can be used. The focus goes along, so that it is not lost. */
function swapButtons(off, on) {
  const hasFocus = document.activeElement === off;
  on.disabled = false;
  if (hasFocus) on.focus();
  off.disabled = true;
}

/** Streams one answer into a panel; how it ended. */
async function answer(panel, fields, signal) {
  const path = mode() === "chat" ? "v1/chat/completions" : "v1/completions";
  let finish = null;
  panel.begin();
  try {
    for await (const chunk of api.stream(path, requestBody(fields), signal)) {
      const choice = chunk.choices[0];
      panel.add(choice?.speculation_trace ?? []);
      finish = choice?.finish_reason ?? finish;
      if (choice) panel.note("streaming …");
      if (chunk.metrics) panel.finish(chunk.metrics);
    }
  } catch (error) {
    return ended(panel, error);
  }
  panel.note(`${panel.size}, ${ENDINGS[finish] ?? finish}`);
  return "Done";
}

function ended(panel, error) {
  if (error.name === "AbortError") {
    panel.note(`stopped after ${panel.size}`);
    return "Stopped";
  }
  if (!(error instanceof ApiError)) console.error(error);
  panel.fail(error.message);
  if (error.status === 401) showError(error);
  return "Failed";
}

function compare(panels) {
  const places = differences(...panels.map((panel) => panel.view.tokens.map((token) => token.token_id)));
  panels.forEach((panel, at) => panel.markDifferent(places[at]));
}

function stop() {
  running?.abort();
}

start().catch(showError);
