// Sorts the table by a column, and shows of the chart's points what one points at, there and in the table.

const table = document.querySelector("#table");
const body = table.tBodies[0];
const headers = [...table.tHead.rows[0].cells];

function compare(column, one, other) {
  const [a, b] = [one, other].map((row) => row.cells[column]);
  if (a.dataset.value !== undefined) return Number(a.dataset.value) - Number(b.dataset.value);
  return a.textContent.localeCompare(b.textContent);
}

function sort(column) {
  const header = headers[column];
  const isNumber = body.rows[0]?.cells[column].dataset.value !== undefined;
  const first = isNumber ? "descending" : "ascending";
  const second = isNumber ? "ascending" : "descending";
  const order = header.getAttribute("aria-sort") === first ? second : first;
  for (const other of headers) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  body.append(...[...body.rows].sort((one, other) => sign * compare(column, one, other)));
}

headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => sort(column)));

const points = [...document.querySelectorAll(".point")];
const pointed = document.querySelector("#pointed");
const hint = pointed.textContent;

function point(number) {
  for (const each of points) each.classList.toggle("is-pointed", each.dataset.number === number);
  for (const row of body.rows) row.classList.toggle("is-pointed", row.id === `row-${number}`);
  const at = points.find((each) => each.dataset.number === number);
  pointed.textContent = at ? at.getAttribute("aria-label") : hint;
}

for (const each of points) {
  each.querySelector("title").remove(); // the same line below says it at once
  each.addEventListener("pointerenter", () => point(each.dataset.number));
  each.addEventListener("pointerleave", () => point(document.activeElement?.dataset?.number));
  each.addEventListener("focus", () => point(each.dataset.number));
  each.addEventListener("blur", () => point(undefined));
}
for (const row of body.rows) {
  row.addEventListener("pointerenter", () => point(row.id.slice("row-".length)));
  row.addEventListener("pointerleave", () => point(document.activeElement?.dataset?.number));
}
