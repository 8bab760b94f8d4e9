"use strict";
// The page is complete without this: it sorts and filters the rows, and lights up groups.
const table = document.querySelector("table.rows");
const rows = table ? [...table.tBodies] : [];
const groups = [...document.querySelectorAll(".mesh .group")];
const buttons = [...document.querySelectorAll(".mesh button")];
let pressed = buttons.find((button) => button.ariaPressed === "true")?.dataset.g;

function show(group) {
  if (!groups.some((shape) => shape.dataset.g === group)) return;
  for (const shape of groups) shape.classList.toggle("on", shape.dataset.g === group);
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    pressed = button.dataset.g;
    for (const other of buttons) other.ariaPressed = String(other === button);
    show(pressed);
  });
  button.addEventListener("pointerenter", () => show(button.dataset.g));
  button.addEventListener("pointerleave", () => show(pressed));
}

for (const row of rows) {
  for (const event of ["pointerenter", "focusin"]) row.addEventListener(event, () => show(row.dataset.g));
  for (const event of ["pointerleave", "focusout"]) row.addEventListener(event, () => show(pressed));
}

function value(row, column) {
  const cell = row.rows[0].cells[column];
  return cell.querySelector("data")?.value ?? cell.textContent;
}

function compare(a, b) {
  const difference = Number(a) - Number(b);
  return Number.isNaN(difference) ? (a < b ? -1 : Number(a > b)) : difference;
}

function sort(header, column) {
  const keyed = rows.map((row) => [value(row, column), row]);
  const largestFirst = column > 0 && keyed.some(([key]) => !Number.isNaN(Number(key)));
  const [first, second] = largestFirst ? ["descending", "ascending"] : ["ascending", "descending"];
  const order = header.ariaSort === first ? second : first;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.ariaSort = order;
  const sign = order === "ascending" ? 1 : -1;
  keyed.sort(([a], [b]) => sign * compare(a, b));
  table.append(...keyed.map(([, row]) => row));
}

[...(table?.tHead.rows[0].cells ?? [])].forEach((header, column) => {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...header.childNodes);
  header.append(button);
  button.addEventListener("click", () => sort(header, column));
});

document.addEventListener("pointerover", (event) => {
  const figure = event.target.closest("data");
  if (figure) figure.title = Number(figure.value).toLocaleString("en");
});

const form = document.querySelector(".filters");

function filter() {
  const { origin, axes, find } = form.elements;
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const unasked = row.classList.contains("bad");
    const text = words.length ? row.textContent.toLowerCase() : "";
    row.hidden = !(
      (!origin.value || origin.value === row.dataset.o || (origin.value === "!" && unasked)) &&
      (!axes.value || axes.value === row.dataset.g) &&
      words.every((word) => text.includes(word))
    );
    shown += !row.hidden;
  }
  form.querySelector("output").textContent = shown === rows.length ? "" : `${shown} of ${rows.length} shown`;
}

if (form) {
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  // A link to a row that the filter hides would lead nowhere.
  window.addEventListener("hashchange", () => {
    const row = document.getElementById(location.hash.slice(1));
    if (!row?.hidden) return;
    form.reset();
    filter();
    row.scrollIntoView();
  });
}
