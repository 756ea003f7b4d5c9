// Controls, and the first drawing.

// ---------- what stands still

function drawHeader() {
  $("name").textContent = D.run.name;
  $("facts").textContent = D.run.facts;
  $("state").textContent = D.run.state === "running" ? `running, step ${whole(D.run.last)} of ${whole(END)}` : D.run.state;
  $("state").classList.add(D.run.state);
  $("headline").replaceChildren(D.headline.title, ...(D.headline.mark ? ["\u00a0", h("em", {}, D.headline.mark)] : []));
  $("headline").dataset.state = D.headline.state;
  $("because").textContent = D.headline.text;
  $("answers").style.setProperty("--answers", D.short.length);
  $("answers").replaceChildren(...D.short.map(one => h("a", { href: `#${one.at}`, "data-to": one.at },
    h("div", { class: "q" }, one.question), h("div", { class: "a" }, one.answer), h("div", { class: "n" }, one.note))));
  $("foot").textContent = D.run.foot;
  $("undrawn").textContent = D.undrawn.length ? `Also in the run folder: ${grouped(D.undrawn).join(", ")}` : "";
}

/** Names of records by measurement: "m/a, m/b" is "m (a, b)". */
function grouped(names) {
  const groups = new Map();
  for (const name of names) {
    const [first, ...rest] = name.split("/");
    groups.set(first, [...(groups.get(first) ?? []), rest.join("/")]);
  }
  return [...groups].map(([first, parts]) => (parts.length > 1 ? `${first} (${parts.join(", ")})` : `${first}/${parts[0]}`));
}

/** Where no head was scored but other things were measured, what only heads have leaves no gap. */
function hideEmpty() {
  if (D.headline.state !== "measured") return;
  const empty = { when: !D.behaviour, heads: !D.scores, "at-step": !D.scores, agree: !D.agreement, "prompt-card": !D.prompt && !pictures.length && !featured.length };
  for (const [id, hidden] of Object.entries(empty)) $(id).hidden = hidden;
  $("aside").hidden = empty["at-step"] && empty["prompt-card"];
  $("columns").classList.toggle("alone", $("aside").hidden && empty.when && empty.agree && !methods.length);
}

/** The answers lead to their charts without losing the view in the address. */
$("answers").addEventListener("click", event => {
  const link = event.target.closest("a");
  if (!link) return;
  event.preventDefault();
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  $(link.dataset.to).scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
});

function buildTabs() {
  const tab = (key, value, text) => h("button", { type: "button", "data-set": key, "data-on": value }, text);
  $("scores").replaceChildren(...(D.scores?.list ?? []).map(score => tab("score", score.name, score.title)));
  $("methods").replaceChildren(...methods.map(name => tab("method", name, methodTitle(name))));
  document.querySelectorAll("[data-set]").forEach(button => button.addEventListener("click", () => {
    const { set: key, on, off } = button.dataset, value = String(S[key]) === on ? off ?? on : on;
    set({ [key]: typeof S[key] === "number" ? +value : value });
  }));
  document.querySelectorAll("[data-set=unit]").forEach(button => { button.hidden = !D.tokens; });
  document.querySelectorAll("[data-set=all]").forEach(button => { button.hidden = !Object.values(lanes).some(block => rowNames(block).length > FEW_TOKENS); });
  const empty = { behaviour: !D.behaviour, scores: !D.scores, inputs: !Object.keys(lanes).length, agreement: !D.agreement, examples: !D.examples };
  document.querySelectorAll("[data-csv]").forEach(button => { button.hidden = empty[button.dataset.csv]; });
}

function pressTabs() {
  document.querySelectorAll("[data-set]").forEach(button => {
    button.setAttribute("aria-pressed", String(String(S[button.dataset.set]) === button.dataset.on));
  });
}

// ---------- the slider

const range = $("range");
let playing = 0;

range.addEventListener("input", () => set({ i: atX(fromLeft(range.value / 1000)) }));
range.addEventListener("keydown", event => move(event));

function stop() {
  clearInterval(playing);
  playing = 0;
  $("play").textContent = "▶ Play";
}

function play() {
  if (playing) return stop();
  if (S.i === LAST) set({ i: 0 });
  $("play").textContent = "❚❚ Pause";
  playing = setInterval(() => (S.i >= LAST ? stop() : set({ i: S.i + 1 })), 50);
}

function move(event) {
  const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const end = { Home: 0, End: LAST }[event.key];
  if (way === undefined && end === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  set({ i: end ?? Math.min(LAST, Math.max(0, soon("i") + way * (event.shiftKey ? 10 : 1))) });
}

document.addEventListener("keydown", event => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.matches("input, select")) return;
  if (event.key.startsWith("Arrow")) return move(event);
  if (event.key === " " && !event.target.matches("button, a")) { event.preventDefault(); play(); }
});
$("play").addEventListener("click", play);

onStep.push(() => {
  range.value = 1000 * share(along(step()));
  const seen = D.tokens?.[S.i] ? `${short(D.tokens[S.i])} tokens` : "";
  range.setAttribute("aria-valuetext", `step ${whole(step())}${seen ? `, ${seen}` : ""}`);
  $("now").replaceChildren(`Step ${whole(step())} `, h("small", {}, seen));
});

// ---------- drawing

function layout() {
  W = $("axis").clientWidth;
  onLayout.forEach(draw => draw());
  onStep.forEach(draw => draw());
}
onLayout.push(drawAxis, pressTabs);

$("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  drawExamples();
  layout();
});
addEventListener("hashchange", () => { readLink(); layout(); });

readLink();
drawHeader();
buildTabs();
hideEmpty();
buildPrompt();
drawExamples();
drawChecks();
layout();
restorePlace();
follow();
new ResizeObserver(() => {
  if ($("axis").clientWidth !== W) { buildPrompt(); layout(); }
}).observe($("axis"));
document.documentElement.dataset.drawn = Math.round(performance.now());
document.documentElement.dataset.ready = "yes";     // all is drawn: a screenshot may be taken
