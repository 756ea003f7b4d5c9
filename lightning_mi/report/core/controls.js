// The slider, play, and keys.

import { D, LAST } from "./data.js";
import { $, h } from "./dom.js";
import { short, whole } from "./numbers.js";
import { S, onChange, set, soon, step } from "./state.js";
import { along, atX, fromLeft, share } from "./time.js";

const FRAME = 50; // milliseconds a step while playing
const FINE = 1000; // positions of the slider

const range = $("range");
let playing = 0;

export const isPlaying = () => playing !== 0;

function stopPlaying() {
  clearInterval(playing);
  playing = 0;
  $("play").textContent = "▶ Play";
}

function togglePlay() {
  if (playing) return stopPlaying();
  if (S.i === LAST) set({ i: 0 });
  $("play").textContent = "❚❚ Pause";
  playing = setInterval(() => (S.i >= LAST ? stopPlaying() : set({ i: S.i + 1 })), FRAME);
}

/** Arrow keys go step by step, with Shift ten at once; Home and End to the ends. */
function moveByKey(event) {
  const way = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1 }[event.key];
  const end = { Home: 0, End: LAST }[event.key];
  if (way === undefined && end === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  set({ i: end ?? Math.min(LAST, Math.max(0, soon("i") + (way ?? 0) * (event.shiftKey ? 10 : 1))) });
}

/** On the page as a whole up and down scroll, as everywhere. */
function pressed(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.matches("input, select")) return;
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") moveByKey(event);
  if (event.key === " " && !event.target.matches("button, a")) {
    event.preventDefault();
    togglePlay();
  }
}

/** The slider and the words beside it, at the chosen step. */
export function showStep() {
  range.value = FINE * share(along(step()));
  const seen = D.tokens?.[S.i] ? `${short(D.tokens[S.i])} tokens` : "";
  range.setAttribute("aria-valuetext", `step ${whole(step())}${seen ? `, ${seen}` : ""}`);
  $("now").replaceChildren(`Step ${whole(step())} `, h("small", {}, seen));
}

function listenToButton(id, key, on, off) {
  const button = $(id);
  button.addEventListener("click", () => set({ [key]: S[key] === on ? off : on }));
  const press = () => button.setAttribute("aria-pressed", String(S[key] === on));
  onChange(press);
  return press;
}

/** Make the controls work. */
export function listenToControls() {
  range.addEventListener("input", () => set({ i: atX(fromLeft(range.value / FINE)) }));
  range.addEventListener("keydown", moveByKey);
  document.addEventListener("keydown", pressed);
  $("play").addEventListener("click", togglePlay);
  $("unit").hidden = !D.tokens;
  listenToButton("log", "log", 1, 0)();
  listenToButton("unit", "unit", "tokens", "steps")();
  onChange(showStep);
}
