// The prompt at this step: under each token its saliency, integrated gradients and the attention
// that the selected head pays it from the last token; then what the model says.

const MOST_TOKENS = 160, NAMES = 34;

/** Short names of the rows under the prompt. */
const BRIEF = { saliency: "sal", integrated_gradients: "IG", input_x_gradient: "i×g", attn_lrp: "LRP" };

const promptRows = [
  ...Object.entries(D.inputs).map(([name, block]) => ({
    name: BRIEF[name] ?? name.slice(0, 4), block, value: (k, q) => inputAt(block, k, q), shade: inputShade(block),
  })),
  D.attention && { name: "attn", block: D.attention, value: attentionAt, shade: v => colour("induction", v) },
].filter(Boolean);

/** Attention of the selected head; undefined where that head's row was not kept. */
function attentionAt(k, q) {
  const A = D.attention, row = A.heads.indexOf(D.scores ? headName(S.head) : A.heads[0]);
  return row < 0 || q >= A.width ? NaN : A.values[(k * A.heads.length + row) * A.width + q];
}

let cells = [];                                   // [position, its coloured cells]
const letters = text => 7.55 * [...text].length + 4;

/** Break the tokens into lines by hand, so that each line has the names of its rows. */
function buildPrompt() {
  const host = $("prompt");
  cells = [];
  if (!D.prompt && (pictures.length || featured.length)) return;
  if (!D.prompt) return notMeasured(host, "No prompt was recorded. HeadMonitor() and the attribution monitors record one.");
  host.replaceChildren();
  const room = host.clientWidth - NAMES, first = Math.max(0, TOKENS.length - MOST_TOKENS);
  $("prompt-sub").textContent = first ? `its last ${MOST_TOKENS} of ${TOKENS.length} tokens` : "";
  let line = null, used = Infinity;
  const place = (element, width, names = promptRows) => {
    if (used + width > room) { line = promptLine(host, names); used = 0; }
    used += width;
    line.append(element);
  };
  for (let q = first; q < TOKENS.length; q++) {
    const text = show(TOKENS[q]), width = Math.min(room, Math.max(17, letters(text)));
    place(tokenCell(q, text, width), width);
  }
  const next = answerText();
  if (next != null) place(h("div", { class: "token next" }, h("span", {}, `→ ${show(next)}`)), letters(show(next)) + 26, []);
}

const answerText = () => D.answers?.right ?? Object.values(D.inputs).find(block => block.target)?.target ?? null;

function promptLine(host, names) {
  const column = h("div", { class: "names" }, h("span", {}, "\u00a0"), names.map(row => h("i", {}, row.name)));
  const line = h("div", { class: "row" }, column);
  host.append(line);
  return line;
}

function tokenCell(q, text, width) {
  const spaces = /^·+/.exec(text)?.[0] ?? "";
  const word = h("span", {}, h("u", {}, spaces), text.slice(spaces.length)), bars = promptRows.map(() => h("i"));
  const cell = h("div", { class: q === D.prompt.source ? "token source" : "token", style: `width:${width}px` }, word, bars);
  cells.push([q, bars]);
  return hint(cell, () => [`“${text}” at position ${q}`, "", promptRows.map(row => promptWords(row, q)).join(" · ")]);
}

function promptWords(row, q) {
  const k = at(row.block);
  if (row.name === "attn") return `${D.scores ? headName(S.head) : "the head"} attends ${fmt(row.value(k, q))}`;
  return `${row.block.title} ${inputWords(row.block, k, q)}`;
}

function paintPrompt() {
  for (const [q, bars] of cells) {
    promptRows.forEach((row, place) => {
      const v = row.value(at(row.block), q);
      bars[place].style.background = Number.isFinite(v) ? rgb(row.shade(v)) : HATCH;
    });
  }
}

/** What the colours mean, with their scales. */
function drawKey() {
  if (!D.prompt) return;
  $("key").replaceChildren(...promptRows.flatMap(({ name, block }) => {
    const attends = name === "attn", gradient = block.signed ? ramp(plusMinus, -1) : ramp(t => colour(attends ? "induction" : "ink", t));
    const words = attends ? attentionWords() : `${block.title}${block.signed ? ": opposes, supports" : ", share of the total"}`;
    return [h("span", { class: "ramp", style: `background:${gradient}` }), h("span", {}, words), h("span", {}, attends ? "0 to 1" : inputScale(block))];
  }));
}

function attentionWords() {
  if (!D.attention || !D.scores) return "attention from the last token";
  const kept = Number.isFinite(attentionAt(at(D.attention), 0)), name = headName(S.head);
  return kept ? `attention of ${name} from the last token` : `attention of ${name} was not kept (the top ${D.attention.heads.length} heads are)`;
}

function drawAnswers() {
  const A = D.answers;
  if (!A) return;
  const k = at(A), quoted = text => h("b", {}, `“${show(text)}”`);
  const right = A.right == null ? [] : [h("span", {}, "answer ", quoted(A.right), A.probability[k] == null ? "" : ` ${fmt(A.probability[k])}`)];
  $("says").replaceChildren(h("span", {}, "model says"), ...A.top[k].map(([text, p]) => h("span", {}, quoted(text), ` ${fmt(p)}`)), ...right,
    ...(asOf(A) ? [h("span", {}, asOf(A))] : []));
}

onLayout.push(drawKey);
onStep.push(paintPrompt, drawAnswers, () => { if (D.attention) drawKey(); });
