// Cards: each file in charts/ makes one with card({…}); the page is built from them.

import { D } from "./data.js";
import { $, h, notMeasured } from "./dom.js";
import { S, onChange, set } from "./state.js";

/** @type {Chart[]} */
const made = [];

/**
 * Put a chart on the page. What it may hold is written at `Chart` in ../types.d.ts.
 * @param {Chart} chart
 */
export function card(chart) {
  made.push(chart);
}

/** Changing one of these moves the axis, so that everything is drawn anew. */
const EVERYWHERE = ["log", "unit"];

const PLACES = { left: "left", side: "aside", wide: "wide" };

/** The element in which a chart draws. */
const plotOf = id => $(`${id}-plot`);

/** Build all cards, in order, each at its place; a chart with `into` stands in another one's card. */
export function buildCards() {
  made.sort((a, b) => a.order - b.order);
  for (const chart of made) {
    const host = h("div", { class: `plot ${chart.kind ?? ""}`, id: `${chart.id}-plot` });
    if (chart.into) $(chart.into).append(...(chart.head ? [subtitle(chart)] : []), host);
    else $(PLACES[chart.place ?? "left"]).append(frame(chart, host));
    chart.build?.(host);
  }
}

/** A line over a chart that stands in the card of another. */
const subtitle = chart =>
  h(
    "div",
    { class: "sub split" },
    h("span", { id: `${chart.id}-sub` }),
    h("span", { id: `${chart.id}-scale` }),
  );

function frame(chart, host) {
  const tools = h("span", { class: "tools" }, tabsOf(chart), chart.csv && csvButton(chart));
  const title = h("h2", { id: `${chart.id}-title` }, chart.title);
  const words = h("span", { class: "sub", id: `${chart.id}-sub` });
  const head = chart.tabs
    ? [h("div", { class: "head" }, title, tools), h("div", { class: "below" }, words)]
    : h("div", { class: "head" }, title, words, tools);
  return h("section", { class: "card", id: chart.id, "aria-labelledby": `${chart.id}-title` }, head, host);
}

const csvButton = chart =>
  h(
    "button",
    { type: "button", class: "csv", "data-csv": chart.id, hidden: chart.has?.() === false ? "" : null },
    "copy CSV",
  );

/** Buttons that choose one of several: [key of S, value, text]; a fourth entry is the value of "off". */
function tabsOf(chart) {
  const tabs = chart.tabs?.() ?? [];
  if (!tabs.length) return null;
  const made = tabs.map(([key, value, text, off]) =>
    h(
      "button",
      {
        type: "button",
        "data-set": key,
        "data-on": value,
        onclick: () => set({ [key]: off !== undefined && S[key] === value ? off : value }),
      },
      text,
    ),
  );
  return h("span", { role: "group", "aria-label": chart.tabsName ?? "choose" }, made);
}

/** Say which buttons are pressed. */
function pressTabs() {
  document.querySelectorAll("[data-set]").forEach(found => {
    const button = /** @type {HTMLElement} */ (found);
    const { set: key, on } = button.dataset;
    button.setAttribute("aria-pressed", String(String(S[key ?? ""]) === on));
  });
}

/** Draw one chart, or say what would measure it; a card with nothing to say is hidden. */
function draw(chart) {
  const host = plotOf(chart.id);
  const shown = chart.shown?.() ?? true;
  if (chart.into) host.hidden = !shown;
  else $(chart.id).hidden = !shown;
  if (!shown) return;
  if (chart.has && !chart.has()) return notMeasured(host, chart.missing?.() ?? "Not measured.");
  const words = chart.sub?.();
  if (words != null) $(`${chart.id}-sub`).textContent = words;
  chart.draw?.(host);
}

const isDrawn = chart => (chart.shown?.() ?? true) && (chart.has?.() ?? true);
const moved = chart => {
  if (chart.step && isDrawn(chart)) chart.step(plotOf(chart.id));
};

/** Draw everything. */
export function drawAll() {
  pressTabs();
  made.forEach(draw);
  made.forEach(moved);
}

onChange(changed => {
  if (movesAxis(changed)) return; // main.js draws all
  if (changed.some(key => key !== "i")) pressTabs();
  const due = made.filter(chart => chart.uses?.some(key => changed.includes(key)));
  due.forEach(draw);
  (changed.includes("i") ? made : due).forEach(moved);
});

/** Whether a change asks for all to be drawn. */
export const movesAxis = changed => changed.some(key => EVERYWHERE.includes(key));

/** The text that a chart's "copy CSV" copies. */
export const csvOf = id => made.find(chart => chart.id === id)?.csv?.() ?? "";

/** Where no head was scored but other things were measured, what only heads have leaves no gap. */
export const withoutHeads = () => D.headline.state === "measured";
