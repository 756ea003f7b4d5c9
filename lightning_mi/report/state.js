// What is chosen: S. It lives in the address, so a link shows the same view.

const scoreNames = (D.scores?.list ?? []).map(score => score.name);
const methods = Object.keys({ ...D.inputs, ...D.tables, ...D.pictures });
const methodTitle = name => (D.inputs[name] ?? D.tables[name] ?? D.pictures[name]).title;

const S = {
  i: LAST,                                        // index into D.steps
  head: D.scores ? best(D.scores.list[0], D.scores.list[0].at.length - 1) : 0,
  score: scoreNames[0], method: methods[0],
  log: 0, unit: "steps", all: 0,
};

/** Read the address; no step in it means the newest. */
function readLink() {
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
    if (key === "step") S.i = nearest(D.steps, Number(value) || 0);
    if (key === "head") {
      const found = /^L(\d+)H(\d+)$/.exec(value);
      if (found && +found[1] < LAYERS && +found[2] < WIDTH) S.head = found[1] * WIDTH + +found[2];
    }
    if (key === "score" && scoreNames.includes(value)) S.score = value;
    if (key === "method" && methods.includes(value)) S.method = value;
    if (key === "log" || key === "all") S[key] = value === "1" ? 1 : 0;
    if (key === "unit" && value === "tokens" && D.tokens) S.unit = value;
    if (key === "theme") document.documentElement.dataset.theme = value === "dark" ? "dark" : "light";
  }
}

function writeLink() {
  const parts = [
    S.i === LAST ? "" : `step=${D.steps[S.i]}`,
    D.scores ? `head=${headName(S.head)}&score=${S.score}` : "",
    S.method && S.method !== methods[0] ? `method=${S.method}` : "",
    S.log ? "log=1" : "", S.all ? "all=1" : "", S.unit === "tokens" ? "unit=tokens" : "",
  ];
  try {
    history.replaceState(null, "", "#" + parts.filter(Boolean).join("&"));
  } catch { /* a sandboxed frame has no history */ }
}

const step = () => D.steps[S.i];
const chosenScore = () => D.scores.list.find(score => score.name === S.score);

/** Index, in a block's own steps, of the measurement nearest to the cursor. */
const at = block => nearest(block.at, step());

/** "as of step …" where a block was not measured at the cursor's step. */
const asOf = block => (block.at[at(block)] === step() ? "" : `as of step ${whole(block.at[at(block)])}`);

// ---------- changing it

const onLayout = [], onStep = [];                 // every chart adds what redraws it
let pending = null;

/** A value as it will be after the next frame, for keys that come faster than frames. */
const soon = key => pending?.[key] ?? S[key];

/** Change what is chosen; charts are redrawn once, in the next frame. */
function set(patch) {
  if (pending) { Object.assign(pending, patch); return; }
  pending = { ...patch };
  requestAnimationFrame(() => {
    const changed = Object.keys(pending).filter(key => S[key] !== pending[key]);
    Object.assign(S, pending);
    pending = null;
    if (changed.some(key => key !== "i")) onLayout.forEach(draw => draw());
    if (changed.length) onStep.forEach(draw => draw());
    if (changed.length) writeLink();
  });
}
