// One answer as it comes: its tokens, and beside them what speculation did for it. It is told of chunks, of how the
// answer ended and of errors; it knows nothing of forms and asks no server.

import { make, percent, seconds } from "./elements.js";
import { Histogram } from "./histogram.js";
import { TokenView } from "./token_view.js";

const STATS = [
  ["length", "Acceptance length", "Tokens a round: accepted draft tokens, and the target's own"],
  ["rate", "Acceptance rate", "Share of the draft tokens that were accepted"],
  ["loosened", "Loosened", "Accepted draft tokens that are not the target's choice"],
  ["steps", "Steps", "Rounds, each of them verified by the target"],
  ["speed", "Tokens / s", "After the first that came, as this page sees them"],
  ["first", "First token", "Time until it came, as this page sees it"],
];
const BLANK = "–";

export class RunPanel {
  constructor(parent, title) {
    this._element = parent.appendChild(make("article", "card panel"));
    this._element.setAttribute("aria-label", `Answer, ${title}`);
    const head = this._element.appendChild(make("header", "panel-head"));
    this.title = title;
    this._heading = head.appendChild(make("h2", "", title));
    this._note = head.appendChild(make("p", "panel-note"));
    this._error = this._element.appendChild(make("p", "error"));
    this._error.setAttribute("role", "alert");
    const body = this._element.appendChild(make("div", "panel-body"));
    body.append(this._makeStats());
    this.view = new TokenView(body.appendChild(make("div")), `Tokens of the answer, ${title}`);
    const rounds = body.appendChild(make("div", "rounds"));
    rounds.append(make("h3", "", "Rounds by accepted tokens"));
    this._bars = new Histogram(rounds.appendChild(make("div")));
    this._histogram = [];
    this._round = null;
  }

  /** Marks the moment the request was sent. */
  begin() {
    this._began = performance.now();
    this.note("waiting for the first token …");
  }

  /** "1 token", "12 tokens". */
  get size() {
    const count = this.view.tokens.length;
    return count === 1 ? "1 token" : `${count} tokens`;
  }

  note(text) {
    this._note.textContent = text;
  }

  /** Draws the tokens of a chunk. */
  add(tokens) {
    if (!tokens.length) return;
    if (!this.view.tokens.length) {
      this._first = performance.now();
      this._numFirst = tokens.length;
      this._set("first", seconds((this._first - this._began) / 1000));
    }
    this._last = performance.now();
    this.view.append(tokens);
    for (const token of tokens) this._count(token);
    this._redrawSoon();
  }

  /** Replaces what was counted on the way by what the server says of the whole answer. */
  finish(metrics) {
    this._redraw();
    const { speculative_decoding: speculation, num_loosened_tokens: numLoosened, acceptance } = metrics;
    this._set("length", speculation.num_spec_steps ? speculation.mean_acceptance_length.toFixed(2) : BLANK);
    this._set("rate", speculation.num_draft_tokens ? percent(speculation.draft_acceptance_rate) : BLANK);
    this._set("loosened", numLoosened);
    this._set("steps", speculation.num_spec_steps);
    this._bars.draw(speculation.acceptance_histogram);
    if (acceptance && acceptance !== this.title) this._heading.textContent = `${this.title}: ${acceptance}`;
  }

  /** Marks the tokens that the other answer has not. */
  markDifferent(places) {
    this.view.markDifferent(places);
    this._note.textContent += places.size ? `, ${places.size} differ` : ", none differs";
  }

  fail(message) {
    this._error.textContent = message;
    this.note("failed");
  }

  // Rounds are counted as their tokens come, until the server says what is so.
  _count(token) {
    if (token.kind === "plain") return; // nothing was drafted
    if (token.round !== this._round) {
      this._round = token.round;
      this._accepted = 0;
      this._histogram[0] = (this._histogram[0] ?? 0) + 1;
    }
    if (token.kind !== "matched" && token.kind !== "loosened") return;
    this._histogram[this._accepted] -= 1;
    this._accepted += 1;
    this._histogram[this._accepted] = (this._histogram[this._accepted] ?? 0) + 1;
  }

  _redrawSoon() {
    this._frame ??= requestAnimationFrame(() => this._redraw());
  }

  _redraw() {
    cancelAnimationFrame(this._frame);
    this._frame = undefined;
    const numTokens = this.view.tokens.length;
    if (!numTokens) return;
    const rounds = this._histogram.reduce((sum, count) => sum + count, 0);
    const accepted = this._histogram.reduce((sum, count, number) => sum + count * number, 0);
    this._set("length", rounds ? (1 + accepted / rounds).toFixed(2) : BLANK);
    this._set("loosened", this.view.counts.get("loosened"));
    this._set("steps", rounds);
    const numLater = numTokens - this._numFirst;
    if (numLater) this._set("speed", ((1000 * numLater) / (this._last - this._first)).toFixed(1));
    this._bars.draw(this._histogram);
  }

  _makeStats() {
    const list = make("dl", "stats");
    this._stats = new Map();
    for (const [name, label, help] of STATS) {
      const item = list.appendChild(make("div"));
      item.title = help;
      item.append(make("dt", "", label));
      this._stats.set(name, item.appendChild(make("dd", "", BLANK)));
      item.dataset.stat = name;
    }
    return list;
  }

  _set(name, value) {
    this._stats.get(name).textContent = value;
  }
}
