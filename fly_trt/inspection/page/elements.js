// Elements and figures as all parts of a page make them.

/** An element with a class and a text, which is never read as HTML. */
export function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

/** A text in quotes, with what has no looks of its own as its code. */
export function quote(text) {
  return JSON.stringify(text).replace(/[\p{Cf}\p{Zl}\p{Zp}\u007f-\u009f]/gu, (letter) => `\\u{${letter.codePointAt(0).toString(16)}}`);
}

/** "97.1 %" */
export function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

/** "310 ms", "2.04 s" */
export function seconds(value) {
  if (value >= 1) return `${value.toFixed(2)} s`;
  return value >= 0.01 || value === 0 ? `${Math.round(1000 * value)} ms` : `${(1000 * value).toFixed(2)} ms`;
}
