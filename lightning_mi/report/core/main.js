// The first drawing: everything that is on the page is begun here. The charts have come before.

import { D } from "./data.js";
import { $, h } from "./dom.js";
import { isDark } from "./colour.js";
import { buildCards, drawAll, movesAxis } from "./card.js";
import { comparing } from "./compare.js";
import { listenToControls, showStep } from "./controls.js";
import { listenForCopies } from "./csv.js";
import { follow, restorePlace } from "./live.js";
import { moveCursors } from "./lane.js";
import { whole } from "./numbers.js";
import { keepTheme, onChange, readLink } from "./state.js";
import { END, LEFT, drawAxis, measureWidth } from "./time.js";

// ---------- what stands still

function drawHeader() {
  $("name").textContent = D.run.name;
  $("facts").textContent = D.run.facts;
  $("state").textContent =
    D.run.state === "running" ? `running, step ${whole(D.run.last)} of ${whole(END)}` : D.run.state;
  $("state").classList.add(D.run.state);
  $("foot").textContent = D.run.foot;
  $("undrawn").textContent = D.undrawn.length
    ? `Also in the run folder: ${grouped(D.undrawn).join(", ")}`
    : "";
  $("runs").hidden = !comparing;
  $("runs").replaceChildren(
    ...(D.runs ?? []).map(run => h("li", {}, h("b", {}, run.letter), ` ${run.label}`)),
  );
}

function drawVerdict() {
  const mark = D.headline.mark ? [" ", h("em", {}, D.headline.mark)] : [];
  $("headline").replaceChildren(D.headline.title, ...mark);
  $("headline").dataset.state = D.headline.state;
  $("because").textContent = D.headline.text;
  $("answers").style.setProperty("--answers", D.short.length);
  $("answers").replaceChildren(
    ...D.short.map(one =>
      h(
        "a",
        { href: `#${one.at}`, "data-to": one.at },
        h("div", { class: "q" }, one.question),
        h("div", { class: "a" }, one.answer),
        h("div", { class: "n" }, one.note),
      ),
    ),
  );
}

/** Names of records by measurement: "m/a, m/b" is "m (a, b)". */
function grouped(names) {
  const groups = new Map();
  for (const name of names) {
    const [first, ...rest] = name.split("/");
    groups.set(first, [...(groups.get(first) ?? []), rest.join("/")]);
  }
  return [...groups].map(([first, parts]) =>
    parts.length > 1 ? `${first} (${parts.join(", ")})` : `${first}/${parts[0]}`,
  );
}

/** The answers lead to their charts without losing the view in the address. */
function follows(event) {
  const link = event.target.closest("a");
  if (!link) return;
  event.preventDefault();
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const target = $(link.dataset.to);
  target.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
  target.setAttribute("tabindex", "-1");
  target.focus({ preventScroll: true });
}

/** Columns that hold nothing leave no gap. */
function closeGaps() {
  const empty = id => [...$(id).children].every(child => child.hidden);
  $("aside").hidden = empty("aside");
  $("columns").classList.toggle("alone", $("aside").hidden);
  $("columns").hidden = $("aside").hidden && empty("left");
}

// ---------- drawing

function redraw() {
  measureWidth();
  document.documentElement.style.setProperty("--left", `${LEFT}px`);
  drawAxis();
  drawAll();
  moveCursors();
  showStep();
}

function switchTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  keepTheme();
  redraw();
}

/** Paper is white and as wide as the page's own paper size; afterwards all is as before. */
function listenToPrinter() {
  const root = document.documentElement;
  let before = "";
  addEventListener("beforeprint", () => {
    before = root.dataset.theme ?? "light";
    root.dataset.theme = "light";
    root.classList.add("printing");
    redraw();
  });
  addEventListener("afterprint", () => {
    root.dataset.theme = before;
    root.classList.remove("printing");
    redraw();
  });
}

readLink();
drawHeader();
drawVerdict();
buildCards();
listenToControls();
listenForCopies();
listenToPrinter();
onChange(changed => {
  if (movesAxis(changed)) redraw();
  else moveCursors();
});
$("answers").addEventListener("click", follows);
$("theme").addEventListener("click", switchTheme);
addEventListener("hashchange", () => {
  readLink();
  redraw();
});
redraw();
closeGaps();
if (measureWidth()) redraw();
restorePlace();
follow();
new ResizeObserver(() => {
  if (measureWidth()) redraw();
}).observe($("axis"));
document.documentElement.dataset.drawn = String(Math.round(performance.now()));
document.documentElement.dataset.ready = "yes"; // all is drawn: a screenshot may be taken
