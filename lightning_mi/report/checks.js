// Can I trust it: what was compared and the result, in words and never by colour alone.

const STATUS = { pass: "✓ pass", open: "○ open", fail: "✗ fail" };

function drawChecks() {
  if (!D.checks.length) return notMeasured($("checks"), "No checks were recorded.");
  const head = h("tr", {}, ["Status", "Check", "What was compared", "Result"].map(text => h("th", { scope: "col" }, text)));
  const rows = D.checks.map(check => h("tr", {},
    h("td", { class: check.status }, STATUS[check.status]),
    h("td", {}, check.check), h("td", {}, check.compared), h("td", {}, check.result)));
  $("checks").replaceChildren(h("table", { class: "checks" }, h("tbody", {}, head, rows)));
}
