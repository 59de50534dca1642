// The rounds of a request, one after another: what each drafted and what stood, above what it took. A click or the arrow
// keys choose one. A few paths draw all of them, however many there are.

import { make, quote, seconds } from "./elements.js";

const STEPS = { few: 20, many: 10 }; // pixels from one round to the next
const FEW = 50;
const TALL = 72; // of the drafts' bars
const LOW = 40; // of the times' bars
const GAP = 10;
const PATHS = ["matched", "loosened", "rejected", "own", "draft", "verification"];
const LEGEND = [
  ["matched", "matched"],
  ["loosened", "loosened"],
  ["rejected", "rejected"],
  ["own", "the target’s own"],
  ["draft", "drafting time"],
  ["verification", "verification time"],
];

/** The rounds that a request's tokens are of, with what the trace says of each as a whole where it does. */
export function roundsOf(request) {
  const rounds = [];
  for (const token of request.tokens) {
    const round = (rounds[token.round] ??= { number: token.round, numTokens: 0, num_accepted: 0, num_loosened: 0, rejected: [], isDrafted: token.kind !== "plain" });
    round.numTokens += 1;
    round.num_accepted += token.kind === "matched" || token.kind === "loosened";
    round.num_loosened += token.kind === "loosened";
    if (token.rejected) round.rejected = [token.rejected];
    round.end = token.kind;
  }
  for (const round of rounds) Object.assign(round, request.rounds[round.number] ?? { num_draft: round.num_accepted + round.rejected.length });
  return rounds;
}

export class Timeline {
  /** Draws into `parent`, an empty element. */
  constructor(parent, rounds) {
    this.onRound = () => {}; // told the number of a round that was chosen
    this._rounds = rounds;
    this._at = 0;
    this._step = rounds.length <= FEW ? STEPS.few : STEPS.many;
    parent.classList.add("timeline");
    this._strip = parent.appendChild(make("div", "strip"));
    this._strip.tabIndex = 0;
    this._strip.setAttribute("role", "slider");
    this._strip.setAttribute("aria-label", "Round");
    this._strip.setAttribute("aria-valuemin", 0);
    this._strip.setAttribute("aria-valuemax", rounds.length - 1);
    this._strip.dataset.step = this._step;
    this._strip.append(this._draw());
    this._detail = parent.appendChild(make("p", "round-detail"));
    parent.append(legend(rounds));
    this._listen();
    this.mark(null);
    this._say(0);
  }

  /** Marks a round, or none, and says what is known of it. */
  mark(number) {
    this._mark.setAttribute("visibility", number === null ? "hidden" : "visible");
    if (number === null) {
      this._detail.textContent = `${this._rounds.length} rounds. Click one, or go through them with the arrow keys.`;
      return;
    }
    this._at = number;
    this._mark.setAttribute("x", number * this._step - 1);
    this._detail.textContent = this._say(number);
  }

  _choose(number) {
    this.mark(number);
    this.onRound(number);
    const left = number * this._step;
    const { scrollLeft, clientWidth } = this._strip;
    if (left < scrollLeft || left + this._step > scrollLeft + clientWidth) this._strip.scrollLeft = left - clientWidth / 3;
  }

  _say(number) {
    const said = describe(this._rounds[number]);
    this._strip.setAttribute("aria-valuenow", number);
    this._strip.setAttribute("aria-valuetext", said);
    return said;
  }

  _listen() {
    const last = this._rounds.length - 1;
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity };
    this._strip.addEventListener("click", (event) => {
      const { left } = this._strip.getBoundingClientRect();
      const number = Math.floor((event.clientX - left + this._strip.scrollLeft) / this._step);
      if (number >= 0 && number <= last) this._choose(number);
    });
    this._strip.addEventListener("keydown", (event) => {
      if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
      this._choose(Math.min(Math.max(this._at + steps[event.key], 0), last));
      event.preventDefault();
    });
  }

  _draw() {
    const rounds = this._rounds;
    const step = this._step;
    const isTimed = rounds.some((round) => round.draft_seconds !== undefined);
    const width = rounds.length * step;
    const height = TALL + (isTimed ? GAP + LOW : 0);
    const drawing = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    const tall = TALL / Math.max(...rounds.map((round) => round.num_draft + 1), 1);
    const low = LOW / usualMost(rounds.map((round) => (round.draft_seconds ?? 0) + (round.verification_seconds ?? 0)));
    const parts = Object.fromEntries(PATHS.map((name) => [name, []]));
    rounds.forEach((round, at) => {
      let y = TALL;
      const stack = (name, size, scale, least = 0, inset = 0) => {
        const top = Math.max(y - size * scale, least);
        if (!(top < y)) return;
        const width = step - 2 - 2 * inset;
        parts[name].push(`M${at * step + inset} ${round2(y)}h${width}V${round2(top)}h${-width}z`);
        y = top;
      };
      stack("matched", round.num_accepted - round.num_loosened, tall);
      stack("loosened", round.num_loosened, tall);
      stack("own", round.numTokens - round.num_accepted, tall, 0, step / 5); // narrower, so that not colour alone tells
      stack("rejected", Math.max(0, round.num_draft - round.num_accepted), tall);
      y = height;
      stack("verification", round.verification_seconds, low, height - LOW);
      stack("draft", round.draft_seconds, low, height - LOW);
    });
    this._mark = drawing.appendChild(svg("rect", { y: 0, width: step, height, class: "mark" }));
    for (const name of PATHS) drawing.append(svg("path", { d: parts[name].join(""), class: `part-${name}` }));
    return drawing;
  }
}

function describe(round) {
  const parts = [`Round ${round.number}`];
  if (!round.isDrafted) parts.push("nothing drafted");
  else parts.push(`${round.num_draft} drafted`, `${round.num_accepted} accepted, ${round.num_loosened} of them loosened`);
  parts.push(`ended by ${{ correction: "a correction", bonus: "a bonus token", plain: "the target’s token" }[round.end] ?? "the answer’s end"}`);
  if (round.policy) parts.push(`rule: ${round.policy}${round.policy === round.asked ? "" : ` instead of ${round.asked}`}`);
  if (round.draft_seconds !== undefined) parts.push(`drafting ${seconds(round.draft_seconds)}, verification ${seconds(round.verification_seconds)}${round.num_rows > 1 ? `, its share of ${round.num_rows} requests' steps` : ""}`);
  if (round.rejected.length) parts.push(`rejected ${round.rejected.map((token) => quote(token.token)).join(" ")}`);
  return parts.join(" · ");
}

function legend(rounds) {
  const isTimed = rounds.some((round) => round.draft_seconds !== undefined);
  const list = make("ul", "timeline-legend");
  for (const [name, label] of LEGEND.slice(0, isTimed ? LEGEND.length : 4)) {
    const item = list.appendChild(make("li"));
    const swatch = item.appendChild(svg("svg", { width: 14, height: 12, "aria-hidden": "true" }));
    swatch.append(svg("path", { d: "M1 1h12v10h-12z", class: `part-${name}` }));
    item.append(label);
  }
  return list;
}

function svg(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** What all but a fiftieth of the values are up to: one slow step leaves the others to be seen. */
function usualMost(values) {
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.floor(0.98 * (sorted.length - 1))] || 1e-9;
}

function round2(value) {
  return Math.round(100 * value) / 100;
}
