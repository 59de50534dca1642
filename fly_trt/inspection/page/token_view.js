// Draws a list of traced tokens: each coloured and underlined by how it came to be, with a legend that counts them and a
// line that says all about the one that is pointed at. It knows nothing of servers: give it tokens, from wherever they
// come. token_view.css has its looks.
//
// A token is {token, token_id, kind, source, round, entropy, choice, choice_token}: its text and id; "matched",
// "loosened", "correction", "bonus" or "plain"; "model", "lookup", "corpus", "grammar" or null; the number of its round;
// nats or null; the target's own choice, an id and a text. `bytes` may be there too, the list of its bytes: without them
// a token that is a part of a character can only be shown as a replacement character. Of what else a trace may have it
// shows where it is there: `reason`, the rule's in words; `top`, the target's most probable tokens as {token, token_id,
// logprob}; `rejected`, the draft token that a correction took the place of, as {token, token_id}.

import { make, percent, quote } from "./elements.js";

const MATCHED = {
  model: "matched: draft model",
  lookup: "matched: n-gram lookup",
  corpus: "matched: earlier outputs",
  grammar: "matched: forced by the grammar",
};
const SOURCES = {
  model: "from the draft model",
  lookup: "from n-gram lookup",
  corpus: "from earlier outputs",
  grammar: "forced by the grammar",
};

/** What a token is shown as: the name in its class, `token-NAME`, and what the legend calls it. */
export const CATEGORIES = new Map([
  ...Object.entries(MATCHED),
  ["loosened", "loosened"],
  ["correction", "correction"],
  ["bonus", "bonus"],
  ["plain", "plain"],
]);

/** The category of a traced token. A source that is not known yet is shown as a draft model's. */
export function categoryOf(token) {
  if (token.kind !== "matched") return CATEGORIES.has(token.kind) ? token.kind : "plain";
  return token.source in MATCHED ? token.source : "model";
}

// Shown by CSS beside the character, so that text that is copied is the answer's.
const VISIBLE = new Map([[" ", "space"], ["\n", "newline"], ["\t", "tab"], ["\r", "return"]]);
const HAS_NO_LOOKS = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\ufffd]/u;
const MOST_REJECTED = 24; // characters of a draft token that is only shown beside
const STEPS = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity };

export class TokenView {
  /** Draws into `parent`, an empty element. `label` says to a screen reader whose tokens these are. */
  constructor(parent, label) {
    this.tokens = [];
    this.counts = new Map([...CATEGORIES.keys()].map((name) => [name, 0]));
    this._elements = [];
    this._rounds = new Map();
    this._part = null; // decodes characters of several tokens
    this._shown = null; // the round that is marked
    this._entry = 0; // where Tab enters the list
    this.onPoint = () => {}; // told the place of the token that is pointed at, or null
    parent.classList.add("token-view");
    this._parent = parent;
    this._text = parent.appendChild(make("div", "tokens"));
    this._text.setAttribute("role", "listbox");
    this._text.setAttribute("aria-label", label);
    this._text.dataset.hint = "Tokens appear here, each in the colour of how it came to be.";
    this._detail = parent.appendChild(make("p", "token-detail"));
    this._legend = parent.appendChild(this._makeLegend());
    this._listen();
    this.describe(null);
  }

  /** Adds tokens at the end. */
  append(tokens) {
    if (!tokens.length) return;
    const isAtEnd = this._text.scrollHeight - this._text.scrollTop - this._text.clientHeight < 40;
    const added = document.createDocumentFragment();
    for (const token of tokens) {
      // A line ends before a space, so that a token stays in one piece.
      if (token.token.startsWith(" ")) added.append(make("wbr"));
      added.append(this._draw(token));
    }
    this._text.append(added);
    for (const [name, cell] of this._cells) {
      cell.textContent = this.counts.get(name);
      cell.parentElement.classList.toggle("none", !this.counts.get(name));
    }
    if (isAtEnd) this._text.scrollTop = this._text.scrollHeight;
  }

  /** Marks the tokens at these places, a Set, as different from another answer's, and no others. */
  markDifferent(places) {
    this._elements.forEach((element, at) => element.classList.toggle("differs", places.has(at)));
  }

  /** Marks the tokens of a round, and scrolls to them. */
  showRound(round) {
    this._markRound(round);
    const first = this._rounds.get(round)?.[0];
    if (!first) return;
    const box = this._text.getBoundingClientRect();
    const { top, bottom } = first.getBoundingClientRect();
    if (top < box.top || bottom > box.bottom) this._text.scrollTop += top - box.top - box.height / 3;
  }

  /** The detail line for the token at a place; null for a hint. */
  describe(at) {
    this._markRound(at === null ? null : this.tokens[at].round);
    this.onPoint(at);
    if (at === null) {
      this._detail.replaceChildren(make("span", "token-hint", "Point at a token, or go through them with the arrow keys."));
      return;
    }
    const token = this.tokens[at];
    const parts = [make("code", `token-name token-${categoryOf(token)}`, quoted(token)), make("span", "", `id ${token.token_id}`)];
    parts.push(...facts(token).map(([name, value]) => {
      const part = make("span", "", `${name} `);
      part.append(make("b", "", value));
      return part;
    }));
    if (token.reason) parts.splice(1, 0, make("span", "token-reason", token.reason));
    if (token.top?.length) parts.push(topTokens(token));
    this._detail.replaceChildren(...parts);
  }

  _draw(token) {
    const at = this.tokens.push(token) - 1;
    const category = categoryOf(token);
    this.counts.set(category, this.counts.get(category) + 1);
    const element = make("span", `token token-${category}`);
    element.setAttribute("role", "option");
    element.dataset.at = at;
    element.tabIndex = at === 0 ? 0 : -1;
    if (token.rejected) element.dataset.rejected = cut(token.rejected.token) || `#${token.rejected.token_id}`;
    this._write(element, token);
    this._elements.push(element);
    if (!this._rounds.has(token.round)) this._rounds.set(token.round, []);
    this._rounds.get(token.round).push(element);
    return element;
  }

  _write(element, token) {
    if (isPart(token)) {
      this._writePart(element, token.bytes);
      return;
    }
    this._part = null;
    if (token.token === "") element.dataset.code = `#${token.token_id}`;
    for (const run of token.token.split(/([ \n\t\r]|[^\P{C}\u200d]|[\p{Zl}\p{Zp}\ufffd])/u)) {
      if (VISIBLE.has(run)) element.append(make("span", VISIBLE.get(run), run));
      else if (run.length <= 2 && HAS_NO_LOOKS.test(run)) element.append(code(run));
      else if (run) element.append(run);
    }
  }

  // Bytes of a character that is not whole yet are shown as such; the token that ends it has the character.
  _writePart(element, bytes) {
    this._part ??= new TextDecoder("utf-8", { ignoreBOM: true });
    element.dataset.code = hex(bytes);
    element.append(this._part.decode(new Uint8Array(bytes), { stream: true }));
  }

  _makeLegend() {
    const legend = make("ul", "token-legend");
    this._cells = new Map();
    this._only = new Set(); // the categories that are shown alone; none means all
    for (const [name, label] of CATEGORIES) {
      const button = legend.appendChild(make("li")).appendChild(make("button", "none"));
      button.type = "button";
      button.title = "Shows these tokens alone, or all again";
      button.setAttribute("aria-pressed", "false");
      button.append(make("span", `token token-${name}`, label), " ");
      this._cells.set(name, button.appendChild(make("b", "", "0")));
      button.addEventListener("click", () => this._filter(button, name));
    }
    return legend;
  }

  _filter(button, name) {
    if (!this._only.delete(name)) this._only.add(name);
    button.setAttribute("aria-pressed", this._only.has(name));
    if (this._only.size) this._parent.dataset.only = [...this._only].join(" ");
    else delete this._parent.dataset.only;
  }

  // One set of listeners, however many tokens there are.
  _listen() {
    const placeOf = (event) => {
      const token = event.target.closest?.(".token");
      return token ? Number(token.dataset.at) : null;
    };
    this._text.addEventListener("pointerover", (event) => {
      const at = placeOf(event);
      if (at !== null) this.describe(at);
    });
    this._text.addEventListener("pointerleave", () => this.describe(this._focused()));
    this._text.addEventListener("click", (event) => {
      const at = placeOf(event);
      if (at !== null && getSelection().isCollapsed) this._focus(at);
    });
    this._text.addEventListener("focusin", (event) => {
      const at = placeOf(event);
      if (at === null) return;
      const token = this.tokens[at];
      const all = [quoted(token), `id ${token.token_id}`, ...(token.reason ? [token.reason] : []), ...facts(token).map((fact) => fact.join(" "))];
      event.target.setAttribute("aria-label", all.join(", "));
      this.describe(at);
    });
    this._text.addEventListener("focusout", () => this.describe(null));
    this._text.addEventListener("keydown", (event) => {
      const at = placeOf(event);
      if (at === null || event.ctrlKey || event.metaKey || event.altKey) return;
      const last = this._elements.length - 1;
      if (event.key in STEPS) this._focus(Math.min(Math.max(at + STEPS[event.key], 0), last));
      else if (event.key === "ArrowUp" || event.key === "ArrowDown") this._focus(this._lineFrom(at, event.key === "ArrowDown" ? 1 : -1));
      else return;
      event.preventDefault();
    });
  }

  _focused() {
    const element = document.activeElement;
    return this._text.contains(element) && element.dataset.at !== undefined ? Number(element.dataset.at) : null;
  }

  // Roving tabindex: Tab enters the list at the token that had the focus last.
  _focus(at) {
    const before = this._elements[this._entry];
    before.tabIndex = -1;
    before.removeAttribute("aria-selected");
    this._entry = at;
    const element = this._elements[at];
    element.tabIndex = 0;
    element.setAttribute("aria-selected", "true");
    element.focus();
  }

  // The token of the line above or below that is nearest sideways.
  _lineFrom(at, step) {
    const here = this._elements[at].getClientRects()[0];
    let best = at;
    let line = null;
    let distance = Infinity;
    for (let other = at + step; other >= 0 && other < this._elements.length; other += step) {
      const there = this._elements[other].getClientRects()[0];
      if (!there || Math.abs(there.top - here.top) < here.height / 2) continue;
      line ??= there.top;
      if (Math.abs(there.top - line) > here.height / 2) break;
      if (Math.abs(there.left - here.left) < distance) {
        distance = Math.abs(there.left - here.left);
        best = other;
      }
    }
    return best;
  }

  _markRound(round) {
    if (round === this._shown) return;
    for (const element of this._rounds.get(this._shown) ?? []) element.classList.remove("in-round");
    for (const element of this._rounds.get(round) ?? []) element.classList.add("in-round");
    this._shown = round;
  }
}

/** What is to be said of a token, as [name, value]. */
function facts(token) {
  const from = token.source ? `, ${SOURCES[token.source] ?? token.source}` : "";
  const found = [["", `${token.kind}${from}`], ["round", String(token.round)]];
  found.push(["entropy", token.entropy === null ? "not known" : `${token.entropy.toFixed(3)} nats`]);
  if (token.rejected) found.push(["in place of", `${quote(token.rejected.token)} (id ${token.rejected.token_id})`]);
  const isOwn = token.choice === token.token_id;
  found.push(["target’s choice", isOwn ? "this token" : `${quote(token.choice_token)} (id ${token.choice})`]);
  return found;
}

/** The most probable tokens, each with its probability. */
function topTokens(token) {
  const list = make("span", "token-top", "most probable ");
  for (const { token: text, token_id: id, logprob } of token.top) {
    list.append(make("b", id === token.token_id ? "own" : "", quote(text)), ` ${percent(Math.exp(logprob))} `);
  }
  return list;
}

function isPart(token) {
  return Boolean(token.bytes?.length) && token.token.includes("\ufffd");
}

function cut(text) {
  return text.length > MOST_REJECTED ? `${text.slice(0, MOST_REJECTED)}…` : text;
}

function quoted(token) {
  return isPart(token) ? `bytes ${hex(token.bytes)}` : quote(token.token);
}

function hex(bytes) {
  return bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
}

function code(character) {
  const element = make("span", "code", character);
  element.dataset.code = `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  return element;
}
