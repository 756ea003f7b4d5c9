// While training goes on, the page reads itself again: only while it is seen and left alone.

const EVERY = 10_000, ALONE = 20_000;             // milliseconds
let touched = 0;

for (const kind of ["pointerdown", "keydown", "wheel"]) {
  addEventListener(kind, () => { touched = Date.now(); }, { passive: true });
}

function mayReload() {
  const busy = document.activeElement?.matches("select") || tip.style.display === "block" || playing;
  return !document.hidden && !busy && Date.now() - touched > ALONE;
}

function follow() {
  if (D.run.state !== "running") return;
  setInterval(() => {
    if (!mayReload()) return;
    try { sessionStorage.setItem("place", scrollY); } catch { /* no storage for files in some browsers */ }
    location.reload();
  }, EVERY);
}

/** Go back to where the page was before it read itself again. */
function restorePlace() {
  try {
    const place = sessionStorage.getItem("place");
    sessionStorage.removeItem("place");
    if (place !== null) scrollTo(0, +place);
  } catch { /* as above */ }
}
