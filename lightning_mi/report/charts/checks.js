// Can I trust it: what was compared and the result, in words and never by colour alone.

import { D } from "../core/data.js";
import { card } from "../core/card.js";
import { csvLines } from "../core/csv.js";
import { h } from "../core/dom.js";

const STATUS = { pass: "✓ pass", open: "○ open", fail: "✗ fail" };

function drawChecks(host) {
  const several = Boolean(D.runs);
  const names = ["Status", ...(several ? ["Run"] : []), "Check", "What was compared", "Result"];
  const head = h(
    "tr",
    {},
    names.map(text => h("th", { scope: "col" }, text)),
  );
  const rows = D.checks.map(check =>
    h(
      "tr",
      {},
      h("td", { class: check.status }, STATUS[check.status]),
      several ? h("td", {}, check.run) : null,
      h("td", {}, check.check),
      h("td", { class: "compared" }, check.compared),
      h("td", {}, check.result),
    ),
  );
  host.replaceChildren(h("table", { class: "checks" }, h("thead", {}, head), h("tbody", {}, rows)));
}

card({
  id: "trust",
  place: "wide",
  order: 90,
  kind: "still",
  title: "Can I trust it?",
  has: () => D.checks.length > 0,
  missing: () => "No checks were recorded.",
  csv: () =>
    csvLines(
      "status,check,compared,result",
      D.checks.map(c => [c.status, c.check, c.compared, c.result]),
    ),
  draw: drawChecks,
});
