// The page of fly-inspect: one request of the document at a time. The document is data beside this script, checked by
// what has written it; every text of it goes into the page as text.

import { TokenView, make } from "./token_view.js";
import { differences } from "./difference.js";

const BLANK = "–";

function main() {
  const { requests } = JSON.parse(document.getElementById("document").textContent);
  const chooser = document.getElementById("request");
  chooser.append(...requests.map((request, at) => optionFor(request, at)));
  document.getElementById("request-label").hidden = requests.length < 2;
  const show = () => draw(requests, Number(chooser.value));
  chooser.addEventListener("change", show);
  show();
}

function draw(requests, at) {
  const request = requests[at];
  const parts = [card("Totals", totals(request))];
  const box = make("div");
  const view = new TokenView(box, "Tokens of the answer");
  view.append(request.tokens);
  parts.push(card("Tokens", box));
  document.getElementById("main").replaceChildren(...parts);
}

function totals(request) {
  const { metrics } = request;
  const list = make("dl", "stats");
  const add = (name, label, value) => {
    const item = list.appendChild(make("div"));
    item.dataset.stat = name;
    item.append(make("dt", "", label), make("dd", "", value));
  };
  add("tokens", "Tokens", request.tokens.length);
  add("length", "Acceptance length", metrics?.num_spec_steps ? metrics.mean_acceptance_length.toFixed(2) : BLANK);
  add("loosened", "Loosened", request.tokens.filter((token) => token.kind === "loosened").length);
  return list;
}

function card(title, content) {
  const element = make("section", "card");
  element.append(make("h2", "", title), content);
  return element;
}

function optionFor(request, at) {
  const option = make("option", "", request.name);
  option.value = at;
  return option;
}

main();
