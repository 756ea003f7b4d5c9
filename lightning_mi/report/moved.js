// How much the attributions moved: the chosen method in colour, the others in grey.

const MOVED = 130;

function drawMoved() {
  $("moved-card").hidden = !D.moved;
  if (!D.moved) return;
  const all = D.moved.series.flatMap(one => [...one.values].filter(Number.isFinite));
  const bottom = Math.min(0, Math.floor(Math.min(...all) * 4) / 4), Y = v => MOVED - 6 - (MOVED - 14) * (v - bottom) / (1 - bottom);
  $("moved-sub").textContent = `rank correlation with ${D.moved.against}, mean of the examples`;
  lane("moved", MOVED, `Likeness of attributions to ${D.moved.against} over training steps`, svg => {
    yAxis(svg, [-1, -.5, 0, .5, 1].filter(v => v >= bottom), Y);
    const labels = D.moved.series.map(one => {
      const chosen = one.key === S.method, stroke = chosen ? "var(--plus)" : "var(--soft)", value = k => one.values[k];
      curve(svg, one, value, Y, { stroke, "stroke-width": chosen ? 2.2 : 1.1, opacity: chosen ? 1 : .6 });
      // Where all end at 1 a label stands beside its curve's middle, not its end.
      const middle = value(Math.floor(one.at.length / 2));
      const y = Y(Number.isFinite(middle) ? middle : lastDefined(one.at.length, value));
      return { y, text: one.name, fill: stroke, plain: !chosen, pick: () => methods.includes(one.key) && set({ method: one.key }) };
    });
    endLabels(svg, labels.sort((a, b) => a.plain - b.plain), MOVED);
  });
}

function sayMoved(event, i) {
  if (!D.moved) return;
  const words = D.moved.series.map(one => `${one.name} ${fmt(one.values[nearest(one.at, D.steps[i])])}`).join(", ");
  say(event, `step ${whole(D.steps[i])}`, words, `Spearman correlation of the scores of an example's inputs with ${D.moved.against}.`);
}

onLayout.push(drawMoved);
listen("moved", sayMoved);
