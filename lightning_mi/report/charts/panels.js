// Whatever else was measured: a card for each measurement, its charts chosen by the names of axes.
// A chart for panels is an entry of KINDS: when it fits a panel, how it is drawn, and how it moves.

import { D } from "../core/data.js";
import { card } from "../core/card.js";
import { csvLines, csvSeries, overSteps } from "../core/csv.js";
import { h } from "../core/dom.js";
import { chosenPanel, choose, entryAt, entryName, panelScale, sizeOf, thinnedWords } from "../core/panels.js";
import { panelBars } from "./panel_bars.js";
import { panelCurves } from "./panel_curves.js";
import { panelGraph } from "./panel_graph.js";
import { panelMatrix } from "./panel_matrix.js";
import { panelRows } from "./panel_rows.js";

/** @type {PanelChart[]} */
const KINDS = [panelRows, panelBars, panelMatrix, panelGraph];
const MOST_LINES = 50_000; // of a copied table: a spreadsheet still opens it

function cardOf(group, order) {
  const places = new Map(); // the element of each kind of chart

  function build(host) {
    const curves = h("div", { class: "plot" });
    if (group.curves.length) host.append(curves);
    panelCurves.build(curves, group);
    places.set(panelCurves, curves);
    host.append(tabsFor(group), h("div", { class: "sub panel-words" }));
    for (const kind of KINDS) {
      const place = h("div", { class: `plot panel-${kind.name}` });
      places.set(kind, place);
      host.append(place);
      kind.build?.(place, group);
    }
  }

  function draw(host) {
    if (group.curves.length) panelCurves.draw(places.get(panelCurves), group);
    const block = chosenPanel(group);
    if (!block) return;
    host
      .querySelectorAll("[data-panel]")
      .forEach(button => button.setAttribute("aria-pressed", String(button.dataset.panel === block.what)));
    host.querySelector(".panel-words").textContent = panelSubtitle(block);
    for (const kind of KINDS) {
      const place = places.get(kind);
      place.hidden = !kind.fits(block);
      if (place.hidden) place.replaceChildren();
      else kind.draw?.(place, block);
    }
  }

  function move() {
    const block = chosenPanel(group);
    if (block) for (const kind of KINDS) if (kind.fits(block)) kind.step?.(places.get(kind), block);
  }

  card({
    id: `panel-${group.measurement}`,
    place: "left",
    order,
    kind: "panels",
    title: titleOf(group),
    uses: ["panel"],
    csv: () => csvOfGroup(group),
    build,
    draw,
    step: move,
  });
}

const titleOf = group => group.title.slice(0, 1).toUpperCase() + group.title.slice(1);

function tabsFor(group) {
  if (group.arrays.length < 2) return h("span");
  const tabs = group.arrays.map(one =>
    h(
      "button",
      { type: "button", "data-panel": one.what, onclick: () => choose(group.measurement, one.what) },
      one.title,
    ),
  );
  return h(
    "div",
    { class: "tools panel-tabs" },
    h("span", { role: "group", "aria-label": `Panel of ${group.title}` }, tabs),
  );
}

/** "3 classes"; the axes of a picture are letters, which have no plural. */
function countOf(count, axis) {
  if (count === 1 || axis.length === 1) return `${count} ${axis}`;
  if (axis.endsWith("y")) return `${count} ${axis.slice(0, -1)}ies`;
  return `${count} ${axis}${axis.endsWith("s") ? "es" : "s"}`;
}

/** What the panel says of itself, its axes, and its scale. */
function panelSubtitle(block) {
  const axes = block.axes.map((axis, a) => countOf(block.shape[a], axis.replaceAll("_", " ")));
  return `${block.title}: ${block.says ? `${block.says}; ` : ""}${axes.join(" × ")}, ${panelScale(block)}${thinnedWords(block)}${block.reason ? `; undefined: ${block.reason}` : ""}${D.runs ? "; run A" : ""}`;
}

/** The curves of a card; of several runs those of each. */
const curvesOf = group =>
  D.runs
    ? D.runs.flatMap(run =>
        group.curves.flatMap(({ what }) => {
          const found = run.panels[`${group.measurement}/${what}`];
          return found ? [{ ...found, name: `${run.label}: ${what}` }] : [];
        }),
      )
    : group.curves.map(one => ({ ...one, name: one.what }));

function csvOfGroup(group) {
  const block = chosenPanel(group);
  const curves = curvesOf(group);
  if (!block) return csvSeries(curves);
  const size = Math.min(sizeOf(block), Math.max(1, Math.floor(MOST_LINES / block.at.length)));
  return csvLines("step,panel,entry,value", [
    ...curves.flatMap(one => overSteps(one, k => [[one.name, "", one.values[k]]])),
    ...overSteps(block, k =>
      Array.from({ length: size }, (_, entry) => [
        block.what,
        entryName(block, entry),
        entryAt(block, k, entry),
      ]),
    ),
  ]);
}

D.panels.forEach((group, k) => cardOf(group, 60 + k / 100));
