// While training goes on, the page reads itself again: only while it is seen and left alone.

import { D } from "./data.js";
import { tip } from "./dom.js";
import { isPlaying } from "./controls.js";

const EVERY = 10_000;
const ALONE = 20_000; // milliseconds
let touched = -ALONE;

for (const kind of ["pointerdown", "keydown", "wheel"]) {
  addEventListener(
    kind,
    () => {
      touched = Date.now();
    },
    { passive: true, capture: true },
  );
}

function mayReload() {
  const busy = document.activeElement?.matches("select") || tip.style.display === "block" || isPlaying();
  return !document.hidden && !busy && Date.now() - touched > ALONE;
}

/** Read the page again and again while the run goes on; what is chosen stands in the address. */
export function follow() {
  if (D.run.state !== "running") return;
  setInterval(() => {
    if (!mayReload()) return;
    try {
      sessionStorage.setItem("place", String(scrollY));
    } catch {
      /* no storage for files in some browsers */
    }
    location.reload();
  }, EVERY);
}

/** Go back to where the page was before it read itself again. */
export function restorePlace() {
  try {
    const place = sessionStorage.getItem("place");
    sessionStorage.removeItem("place");
    if (place !== null) scrollTo(0, +place);
  } catch {
    /* as above */
  }
}
