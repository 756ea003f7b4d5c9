// What is chosen: S. It lives in the address, so a link shows the same view.

import { D, LAST, LAYERS, WIDTH, TOKENS, best, headName, nearest } from "./data.js";

const scoreNames = (D.scores?.list ?? []).map(score => score.name);

/** Every method of attribution that some chart can draw. */
export const methods = Object.keys({ ...D.inputs, ...D.tables, ...D.pictures });
export const methodTitle = name => (D.inputs[name] ?? D.tables[name] ?? D.pictures[name]).title;

/** @type {State} */
export const S = {
  i: LAST, // index into D.steps
  head: D.scores ? best(D.scores.list[0], D.scores.list[0].at.length - 1) : 0,
  score: scoreNames[0],
  method: methods[0],
  token: -1, // position in the prompt, −1 for none
  log: 0,
  unit: "steps",
  all: 0,
  panel: {}, // of each measurement, the panel that is drawn
};

/** How one key of the address is read; it says nothing about a value that means nothing. */
const READ = {
  step: value => {
    if (value.trim() && Number.isFinite(+value)) S.i = nearest(D.steps, +value);
  },
  head: value => {
    const found = /^L(\d+)H(\d+)$/.exec(value);
    if (found && +found[1] < LAYERS && +found[2] < WIDTH) S.head = +found[1] * WIDTH + +found[2];
  },
  score: value => {
    if (scoreNames.includes(value)) S.score = value;
  },
  method: value => {
    if (methods.includes(value)) S.method = value;
  },
  token: value => {
    if (+value < TOKENS.length) S.token = +value;
  },
  log: value => {
    S.log = value === "1" ? 1 : 0;
  },
  all: value => {
    S.all = value === "1" ? 1 : 0;
  },
  unit: value => {
    if (value === "tokens" && D.tokens) S.unit = value;
  },
  theme: value => {
    document.documentElement.dataset.theme = value === "dark" ? "dark" : "light";
  },
};

/** Read the address; no step in it means the newest. */
export function readLink() {
  S.i = LAST;
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
    if (Object.hasOwn(READ, key)) READ[key](value);
    else if (key.startsWith("panel.")) S.panel[key.slice(6)] = value;
  }
}

let themed = /[#&]theme=/.test(location.hash);

/** The theme was chosen by hand: from now on it is part of the link. */
export function keepTheme() {
  themed = true;
  writeLink();
}

function writeLink() {
  const parts = {
    step: S.i === LAST ? null : D.steps[S.i],
    head: D.scores ? headName(S.head) : null,
    score: S.score,
    method: S.method === methods[0] ? null : S.method,
    token: S.token < 0 ? null : S.token,
    log: S.log || null,
    all: S.all || null,
    unit: S.unit === "tokens" ? S.unit : null,
    theme: themed ? document.documentElement.dataset.theme : null,
    ...Object.fromEntries(Object.entries(S.panel).map(([key, value]) => [`panel.${key}`, value])),
  };
  const kept = Object.entries(parts)
    .filter(([, value]) => value != null)
    .map(([key, value]) => [key, String(value)]);
  try {
    history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  } catch {
    /* a sandboxed frame has no history */
  }
}

export const step = () => D.steps[S.i];

/** The score that is chosen; only where heads were scored. */
export const chosenScore = () => /** @type {Score} */ (D.scores?.list.find(score => score.name === S.score));

/** Index, in a block's own steps, of the measurement nearest to the cursor. */
export const at = block => nearest(block.at, step());

/** "as of step …" where a block was not measured at the cursor's step. */
export const asOf = block =>
  block.at[at(block)] === step() ? "" : `as of step ${block.at[at(block)].toLocaleString("en")}`;

// ---------- changing it

/** @type {((changed: string[]) => void)[]} */
const listeners = [];

/** Be told, once a frame, which keys of S have changed. */
export const onChange = listener => listeners.push(listener);

/** @type {Partial<State> | null} */
let pending = null;

/** A value as it will be after the next frame, for keys that come faster than frames. */
export const soon = key => pending?.[key] ?? S[key];

/** Change what is chosen; charts are redrawn once, in the next frame. */
export function set(patch) {
  if (pending) {
    Object.assign(pending, patch);
    return;
  }
  pending = { ...patch };
  requestAnimationFrame(() => {
    const next = pending ?? {};
    const changed = Object.keys(next).filter(key => S[key] !== next[key]);
    Object.assign(S, next);
    pending = null;
    if (!changed.length) return;
    listeners.forEach(listener => listener(changed));
    writeLink();
  });
}
