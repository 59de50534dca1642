// Rounds by the draft tokens that they emitted, as bars. histogram.css has its looks.

import { make } from "./elements.js";

const MOST_NUMBERED = 18; // bars that have room for their count

export class Histogram {
  /** Draws into `parent`, an empty element. */
  constructor(parent) {
    this._bars = parent;
    parent.classList.add("histogram");
    parent.setAttribute("role", "img");
    this.draw([]);
  }

  /** counts[a]: the rounds that emitted `a` draft tokens; undefined is none. */
  draw(counts) {
    const most = Math.max(1, ...Array.from(counts, (count) => count ?? 0));
    const numBars = Math.max(counts.length, 8);
    const every = numBars > MOST_NUMBERED ? 4 : numBars > 10 ? 2 : 1;
    const bars = Array.from({ length: numBars }, (_, number) => {
      const bar = make("div", "bar");
      const count = counts[number] ?? 0;
      bar.title = `${number} accepted: ${count} rounds`;
      bar.append(make("span", "bar-count", count && numBars <= MOST_NUMBERED ? count : ""));
      const fill = bar.appendChild(make("div", "bar-fill"));
      fill.style.setProperty("--share", count / most);
      bar.append(make("span", "bar-number", number % every ? "" : number));
      return bar;
    });
    this._bars.replaceChildren(...bars);
    const said = Array.from(counts, (count, number) => `${number}: ${count ?? 0}`).join(", ");
    this._bars.setAttribute("aria-label", said ? `Rounds by accepted tokens. ${said}` : "No rounds yet");
  }
}
