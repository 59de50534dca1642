// The page of fly-inspect: one request of the document at a time. The document is data beside this script, checked by
// what has written it; every text of it goes into the page as text.

import { differences } from "./difference.js";
import { make, percent, seconds } from "./elements.js";
import { Histogram } from "./histogram.js";
import { Timeline, roundsOf } from "./timeline.js";
import { TokenView } from "./token_view.js";

const BLANK = "–";
const NOTHING_BESIDE = "-1";

function main() {
  const { requests } = JSON.parse(document.getElementById("document").textContent);
  const chooser = document.getElementById("request");
  const beside = document.getElementById("beside");
  chooser.append(...requests.map((request, at) => option(nameOf(request), at)));
  for (const name of ["request-label", "beside-label"]) document.getElementById(name).hidden = requests.length < 2;
  const show = () => draw(requests[chooser.value], requests[beside.value]);
  const choose = () => {
    const { group } = requests[chooser.value];
    const isOther = (at) => at !== Number(chooser.value);
    const others = [...requests.keys()].filter(isOther);
    const mates = others.filter((at) => group !== null && requests[at].group === group);
    const rest = others.filter((at) => !mates.includes(at));
    beside.replaceChildren(option("nothing", NOTHING_BESIDE), ...[...mates, ...rest].map((at) => option(nameOf(requests[at]), at)));
    beside.value = mates[0] ?? NOTHING_BESIDE;
    show();
  };
  chooser.addEventListener("change", choose);
  beside.addEventListener("change", show);
  choose();
}

/** Draws a request, and the tokens of another one beside its own. */
function draw(request, other) {
  const rounds = roundsOf(request);
  const texts = make("div", other ? "texts two" : "texts");
  const tokens = make("div");
  if ([request, other].some((each) => each?.tokens.some((token) => token.rejected))) tokens.append(rejectedSwitch(texts));
  tokens.append(texts);
  const view = answer(texts, request);
  if (other) {
    const marked = differences(ids(request), ids(other));
    const second = answer(texts, other);
    view.markDifferent(marked[0]);
    second.markDifferent(marked[1]);
    texts.querySelectorAll(".answer-note").forEach((note, at) => {
      note.textContent += marked[at].size ? `, ${marked[at].size} differ` : ", none differs";
    });
  }
  const timelineBox = make("div");
  const timeline = new Timeline(timelineBox, rounds);
  timeline.onRound = (round) => view.showRound(round);
  view.onPoint = (at) => timeline.mark(at === null ? null : request.tokens[at].round);

  const parts = [titled("Totals", totals(request, rounds)), titled("Tokens", tokens), titled("Rounds", timelineBox)];
  const pair = make("div", "pair");
  pair.append(titled("Rounds by accepted tokens", histogram(request, rounds)), titled("Draft against verification", costs(rounds)));
  parts.push(pair);
  if (request.prompt !== null) parts.push(prompt(request.prompt));
  document.getElementById("main").replaceChildren(...parts);
  document.title = `${request.name} · fly-inspect`;
}

function answer(parent, request) {
  const box = parent.appendChild(make("article", "answer"));
  const head = box.appendChild(make("header"));
  head.append(make("h3", "", request.acceptance ?? request.name), make("p", "answer-note", count(request.tokens.length, "token")));
  const view = new TokenView(box.appendChild(make("div")), `Tokens of ${request.name}`);
  view.append(request.tokens);
  return view;
}

function rejectedSwitch(texts) {
  const label = make("label", "switch");
  const box = label.appendChild(make("input"));
  box.type = "checkbox";
  label.append(make("span", "", "Show what the draft had wanted in place of corrections"));
  box.addEventListener("change", () => texts.classList.toggle("with-rejected", box.checked));
  return label;
}

// What the runtime counted, where the file says it, and otherwise what the trace shows.
function totals(request, rounds) {
  const { metrics, tokens } = request;
  const kinds = (...wanted) => tokens.filter((token) => wanted.includes(token.kind)).length;
  const drafted = rounds.filter((round) => round.isDrafted);
  const accepted = metrics?.num_accepted_tokens ?? kinds("matched", "loosened");
  const loosened = metrics?.num_loosened_tokens ?? kinds("loosened");
  const steps = metrics?.num_spec_steps ?? drafted.length;
  const numDraft = metrics?.num_draft_tokens ?? sum(drafted.map((round) => round.num_draft));
  const list = make("dl", "stats");
  const add = (name, label, value, help) => {
    const item = list.appendChild(make("div"));
    item.dataset.stat = name;
    item.title = help;
    item.append(make("dt", "", label), make("dd", "", value));
  };
  add("tokens", "Output tokens", metrics?.num_output_tokens ?? tokens.length, "Tokens of the answer");
  add("steps", "Rounds", steps, "Rounds with a draft, each of them verified by the target");
  add("length", "Acceptance length", steps ? (1 + accepted / steps).toFixed(2) : BLANK, "Tokens a round: accepted draft tokens, and the target's own");
  add("rate", "Acceptance rate", numDraft ? percent(accepted / numDraft) : BLANK, "Share of the draft tokens that were accepted");
  add("accepted", "Accepted", accepted, "Draft tokens that are part of the answer");
  add("loosened", "Loosened", loosened, "Accepted draft tokens that are not the target's choice");
  if (metrics?.num_saved_tokens != null) add("saved", "Saved", metrics.num_saved_tokens, "Accepted draft tokens from a round's first loosened one on: exact verification would have rejected them");
  const refused = Object.entries(metrics?.num_refused_loosenings_by_guard ?? {});
  if (refused.length) add("refused", "Turned down", sum(refused.map(([, number]) => number)), refused.map(([guard, number]) => `${guard}: ${number}`).join(", "));
  add("corrections", "Corrections", kinds("correction"), "The target's tokens in place of rejected draft tokens");
  if (tokens.length) add("share", "Loosened of all", percent(loosened / tokens.length), "Share of the answer's tokens");
  add("policy", "Acceptance", request.acceptance ?? BLANK, "The rule that was asked for");
  if (metrics?.exact_because != null) add("exact", "Exact because of", metrics.exact_because, "Why a loose request was decoded exactly");
  add("end", "Ended by", request.finish_reason ?? BLANK, "The finish reason");
  if (metrics?.time_to_first_token != null) add("first", "First token", seconds(metrics.time_to_first_token), "From the request's arrival");
  if (metrics?.latency != null) add("latency", "Latency", seconds(metrics.latency), "From the request's arrival to its end");
  return list;
}

function histogram(request, rounds) {
  const counts = [];
  for (const round of rounds) if (round.isDrafted) counts[round.num_accepted] = (counts[round.num_accepted] ?? 0) + 1;
  const bars = make("div");
  new Histogram(bars).draw(request.metrics?.acceptance_histogram ?? counts);
  return bars;
}

// Seconds of the request's rounds: its share of every step that it was in.
function costs(rounds) {
  const timed = rounds.filter((round) => round.draft_seconds !== undefined);
  const box = make("div", "costs");
  if (!timed.length) {
    box.append(make("p", "note", "The trace has no times of rounds."));
    return box;
  }
  const spent = { draft: sum(timed.map((round) => round.draft_seconds)), verification: sum(timed.map((round) => round.verification_seconds)) };
  const all = spent.draft + spent.verification;
  for (const [name, label] of [["draft", "Drafting"], ["verification", "Verification"]]) {
    const row = box.appendChild(make("div", "cost"));
    row.dataset.cost = name;
    const share = all ? spent[name] / all : 0;
    row.append(make("span", "cost-name", label));
    const track = row.appendChild(make("div", "cost-track"));
    const fill = track.appendChild(make("div", `cost-fill cost-${name}`));
    fill.style.width = `${100 * share}%`;
    row.append(make("b", "", seconds(spent[name])), make("span", "cost-share", percent(share)));
  }
  const numTokens = sum(timed.map((round) => round.numTokens));
  const most = Math.max(...timed.map((round) => round.num_rows));
  const notes = [`${seconds(all / numTokens)} a token over ${count(numTokens, "token")}.`];
  notes.push(most > 1 ? `Shares of steps that up to ${most} requests were in.` : "No other request was in its steps.");
  notes.push("The first round's steps also read the end of the prompt.");
  box.append(make("p", "note", notes.join(" ")));
  return box;
}

function prompt(text) {
  const section = make("details", "card");
  section.append(make("summary", "", "Prompt"), make("pre", "prompt", text));
  return section;
}

function titled(title, content) {
  const element = make("section", "card");
  element.setAttribute("aria-label", title);
  element.append(make("h2", "", title), content);
  return element;
}

function nameOf({ name, acceptance }) {
  return acceptance === null || name.includes(acceptance) ? name : `${name}, ${acceptance}`;
}

function option(name, value) {
  const element = make("option", "", name);
  element.value = value;
  return element;
}

function ids(request) {
  return request.tokens.map((token) => token.token_id);
}

function count(number, noun) {
  return number === 1 ? `1 ${noun}` : `${number} ${noun}s`;
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

main();
