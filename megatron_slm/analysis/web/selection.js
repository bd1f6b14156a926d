/* Text is drawn in blocks: plain text until a block comes near the window, then one element per token. */
const SHORT_BLOCK = 120, LONG_BLOCK = 300; // tokens
const LEVELS = 7; // colors q0 to q6; q3 has no color
const SHOWN_CHECKPOINTS = 8; // in the details of a token
const PART = "·"; // shown for a token whose character a later token completes

const data = JSON.parse(byId("data").textContent);

/** Return a typed array from base64. */
function decode(text, Type) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let place = 0; place < raw.length; place++) bytes[place] = raw.charCodeAt(place);
  return new Type(bytes.buffer);
}

const { starts, checkpoints } = data;
const shown = data.shown.map((each) => each || PART);
const ids = decode(data.ids, Int32Array);
const referenceLoss = data.reference && decode(data.reference.loss, Float32Array);
for (const each of checkpoints) {
  each.loss = decode(each.loss, Float32Array);
  each.score = decode(each.score, Float32Array);
  each.mask = decode(each.selected, Uint8Array);
  each.count = each.mask.reduce((sum, value) => sum + value, 0);
  each.order = null; // scores as the policy ranks them, from the highest on
}
const text = byId("text"), details = byId("details");
const state = { checkpoint: 0, share: null /* in thousandths */, mode: "selection", token: -1, matches: [], match: -1 };
let level = null; // color of each token
let limit = 0; // signed score of the last selected token, if the slider chooses it

const current = () => checkpoints[state.checkpoint];
const number = (value, digits = 3) => value.toFixed(digits).replace("-", "−");
const signed = (value) => (value > 0 ? "+" : "") + number(value);
const count = (value) => value.toLocaleString("en");
const isSelected = (token, of = current()) =>
  state.share === null || of !== current() ? of.mask[token] > 0 : of.sign * of.score[token] >= limit;

/** Return the signed scores of a checkpoint in descending order. */
function ranking(checkpoint) {
  checkpoint.order ??= checkpoint.score.map((value) => checkpoint.sign * value).sort().reverse();
  return checkpoint.order;
}

/* ---- blocks ---- */

const blocks = [], blockOf = new Uint32Array(shown.length);

/** Cut the texts into blocks at newlines, or at spaces of long lines. */
function makeBlocks() {
  for (let part = 0; part + 1 < starts.length; part++) {
    if (starts.length > 2) text.append(element("h2", "", `Text ${count(part + 1)}`));
    let start = starts[part];
    for (let token = start + 1; token <= starts[part + 1]; token++) {
      const size = token - start;
      const ends = shown[token - 1].endsWith("\n") && size >= SHORT_BLOCK;
      const isLong = size >= LONG_BLOCK && (shown[token]?.startsWith(" ") || size >= LONG_BLOCK + 100);
      if (token < starts[part + 1] && !ends && !isLong) continue;
      addBlock(start, token);
      start = token;
    }
  }
}

function addBlock(start, stop) {
  const box = element("div", "block"), line = element("p", "", shown.slice(start, stop).join(""));
  line.dir = "auto";
  box.append(element("span", "at", count(start)), line);
  box.index = blocks.length;
  blockOf.fill(blocks.length, start, stop);
  blocks.push({ box, line, start, stop, tokens: null });
  text.append(box);
}

/** Replace the plain text of a block by one element per token. */
function expand(block) {
  if (block.tokens) return;
  block.tokens = [];
  const parts = document.createDocumentFragment();
  for (let token = block.start; token < block.stop; token++) {
    const part = document.createElement("span");
    part.textContent = shown[token];
    part.token = token;
    block.tokens.push(part);
    parts.append(part);
  }
  block.line.replaceChildren(parts);
  paint(block);
}

function collapse(block) {
  if (!block.tokens || blockOf[state.token] === block.box.index) return;
  block.tokens = null;
  block.line.textContent = shown.slice(block.start, block.stop).join("");
}

/** Set the classes of a block's tokens. */
function paint(block) {
  const match = state.match >= 0 ? state.matches[state.match] : null;
  for (const part of block.tokens) {
    const token = part.token;
    let name = isSelected(token) ? "s" : "";
    if (level) name += ` q${level[token]}`;
    if (match && token >= match[0] && token < match[1]) name += " match";
    if (token === state.token) name += " here";
    if (part.className !== name) part.className = name;
  }
}

const paintAll = () => blocks.forEach((block) => block.tokens && paint(block));

const observer = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) (entry.isIntersecting ? expand : collapse)(blocks[entry.target.index]);
  },
  { rootMargin: "600px" },
);

/* ---- selection and colors ---- */

const MODES = {
  selection: ["selection", null],
  excess: ["excess loss", (of, token) => of.loss[token] - referenceLoss[token]],
  loss: ["token loss", (of, token) => of.loss[token]],
  reference: ["reference loss", (_, token) => referenceLoss[token]],
};

/** Assign a color to each token: by sign and size, or from the middle up for losses. */
function computeLevels() {
  const value = MODES[state.mode][1];
  level = null;
  text.classList.toggle("values", value !== null);
  if (!value) return [];
  const values = Float32Array.from(shown, (_, token) => value(current(), token));
  const sizes = values.map(Math.abs).sort();
  const top = sizes[Math.floor(0.95 * (sizes.length - 1))] || 1;
  level = new Uint8Array(values.length);
  const middle = (LEVELS - 1) / 2;
  values.forEach((each, token) => {
    const step = Math.max(-middle, Math.min(middle, Math.round((middle * each) / top)));
    level[token] = middle + step;
  });
  const lowest = state.mode === "excess" ? -middle : 0;
  return Array.from({ length: middle - lowest + 1 }, (_, step) => [step + lowest + middle, ((step + lowest) * top) / middle]);
}

/** Recompute the selection, and draw it. */
function update() {
  const of = current(), total = shown.length;
  let selected = of.count, threshold = of.threshold;
  if (state.share !== null) {
    const order = ranking(of);
    const wanted = Math.max(1, Math.ceil((state.share * total) / 1000));
    limit = order[wanted - 1];
    threshold = of.sign * limit;
    selected = wanted;
    while (selected < total && order[selected] >= limit) selected++;
  }
  const sums = [0, 0, 0, 0]; // token and reference loss of selected, then of unselected tokens
  for (let token = 0; token < total; token++) {
    const place = isSelected(token) ? 0 : 2;
    sums[place] += of.loss[token];
    if (referenceLoss) sums[place + 1] += referenceLoss[token];
  }
  drawSummary(of, selected, threshold, sums);
  paintAll();
  if (state.token >= 0) showDetails(state.token);
}

function drawSummary(of, selected, threshold, sums) {
  const total = shown.length, rest = total - selected;
  const share = `${((100 * selected) / total).toFixed(1)} %`;
  const slider = byId("threshold");
  if (state.share === null) slider.value = Math.round(1000 * (1 - selected / total));
  byId("threshold-value").textContent = `${of.scoreName} ${of.sign > 0 ? "≥" : "≤"} ${number(threshold)}`;
  slider.setAttribute("aria-valuetext", `${byId("threshold-value").textContent}, ${share} selected`);
  byId("reset").disabled = state.share === null;
  byId("checkpoint-name").textContent = of.label;
  byId("checkpoint").setAttribute("aria-valuetext", of.label);
  const mean = (sum, size) => (size ? number(sum / size) : "–");
  const parts = [element("b", "", `${count(selected)} of ${count(total)} tokens selected (${share})`)];
  const ratio = of.ratio === null ? "" : ` with k = ${Number(of.ratio.toPrecision(6))}`;
  parts.push(state.share === null ? ` by ${of.policy}${ratio}. ` : ` by ${of.scoreName}. `);
  parts.push(`Mean token loss ${mean(sums[0], selected)} selected, ${mean(sums[2], rest)} unselected`);
  if (referenceLoss) parts.push(`; reference loss ${mean(sums[1], selected)} and ${mean(sums[3], rest)}`);
  parts.push(". Losses are in nats.");
  byId("summary").replaceChildren(...parts);
}

function drawLegend() {
  const steps = computeLevels();
  const legend = byId("legend");
  legend.className = level ? "values" : "";
  legend.replaceChildren(element("span", "s", "selected"), element("span", level ? "" : "off", "not selected"));
  for (const [step, value] of steps) legend.append(element("span", `q${step}`, number(value, 1)));
}

/* ---- details of a token ---- */

function showDetails(token) {
  const of = current();
  const name = shown[token].replace("\n", "");
  const head = element("div");
  head.append(element("span", "token", `“${name}”`), ` token ${count(token)}, id ${ids[token]}, `);
  head.append(element("b", "", isSelected(token) ? "selected" : "not selected"));
  const table = element("table");
  const rank = of.score.reduce((sum, value) => sum + (of.sign * value > of.sign * of.score[token]), 1);
  const figures = [["token loss", number(of.loss[token])]];
  if (referenceLoss) {
    figures.push(["reference loss", number(referenceLoss[token])]);
    figures.push(["excess loss", signed(of.loss[token] - referenceLoss[token])]);
  }
  if (of.scoreName !== "excess") figures.push([of.scoreName, signed(of.score[token])]);
  figures.push(["rank", `${count(rank)} of ${count(shown.length)}`]);
  for (const [title, value] of figures) addRow(table, title, value);
  details.replaceChildren(head, table);
  if (checkpoints.length > 1 && checkpoints.length <= SHOWN_CHECKPOINTS) details.append(history(token));
  details.hidden = false;
  place(token);
}

/** Return the losses of a token under every checkpoint. */
function history(token) {
  const table = element("table");
  for (const each of checkpoints) {
    const excess = referenceLoss ? `  ${signed(each.loss[token] - referenceLoss[token])}` : "";
    const row = addRow(table, each.label, `${number(each.loss[token])}${excess}`);
    row.append(element("td", "", isSelected(token, each) ? "selected" : "–"));
    if (each === current()) row.className = "current";
  }
  return table;
}

function addRow(table, title, value) {
  const row = table.insertRow();
  row.append(element("th", "", title), element("td", "", value));
  return row;
}

/** Move the details below or above their token. */
function place(token) {
  const part = blocks[blockOf[token]].tokens?.[token - blocks[blockOf[token]].start];
  if (!part) return;
  const box = part.getClientRects()[0] ?? part.getBoundingClientRect();
  const size = details.getBoundingClientRect(), view = document.documentElement;
  const below = box.bottom + 6 + size.height <= view.clientHeight;
  details.style.left = `${Math.max(8, Math.min(box.left, view.clientWidth - size.width - 8))}px`;
  details.style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - size.height - 6)}px`;
}

/** Choose a token; -1 hides the details. */
function choose(token, scrolls = false) {
  const before = state.token;
  state.token = token;
  if (before >= 0 && blocks[blockOf[before]].tokens) paint(blocks[blockOf[before]]);
  if (token < 0) {
    details.hidden = true;
    return;
  }
  const block = blocks[blockOf[token]];
  expand(block);
  paint(block);
  if (scrolls) reveal(block.tokens[token - block.start]);
  showDetails(token);
}

/** Scroll a token into the part of the window that the header leaves free. */
function reveal(part) {
  part.scrollIntoView({ block: "nearest" });
  const header = document.querySelector("header");
  const free = getComputedStyle(header).position === "sticky" ? header.getBoundingClientRect().bottom : 0;
  const box = part.getBoundingClientRect();
  if (box.top < free + 8 || box.bottom > innerHeight - 8) scrollBy(0, box.top - free - (innerHeight - free) / 3);
}

/** Return the token in the line above or below. */
function neighbor(token, direction) {
  const block = blocks[blockOf[token]], part = block.tokens[token - block.start];
  const box = part.getClientRects()[0];
  if (!box) return token + direction;
  for (let lines = 1; lines <= 3; lines++) {
    const y = box.top + box.height / 2 + direction * lines * parseFloat(getComputedStyle(block.line).lineHeight);
    const found = document.elementFromPoint(box.left + 2, y)?.token;
    if (found !== undefined && found !== token) return found;
  }
  return token + direction;
}

function nextSelected(token, direction) {
  for (let at = token + direction; at >= 0 && at < shown.length; at += direction) if (isSelected(at)) return at;
  return token;
}

const KEYS = {
  ArrowRight: (token) => token + 1,
  ArrowLeft: (token) => token - 1,
  ArrowDown: (token) => neighbor(token, 1),
  ArrowUp: (token) => neighbor(token, -1),
  Home: () => 0,
  End: () => shown.length - 1,
  n: (token) => nextSelected(token, 1),
  p: (token) => nextSelected(token, -1),
};

text.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "Escape") choose(-1);
  const move = KEYS[event.key];
  if (!move) return;
  event.preventDefault();
  const from = state.token < 0 ? firstVisible() - (event.key === "n" ? 1 : 0) : state.token;
  const target = state.token < 0 && event.key.startsWith("Arrow") ? from : move(from);
  choose(Math.max(0, Math.min(shown.length - 1, target)), true);
});

/** Return the first token in the window. */
function firstVisible() {
  const header = document.querySelector("header").getBoundingClientRect();
  return blocks.find((block) => block.box.getBoundingClientRect().bottom > Math.max(0, header.bottom))?.start ?? 0;
}

text.addEventListener("pointerover", (event) => {
  if (event.target.token !== undefined && event.pointerType === "mouse") choose(event.target.token);
});
text.addEventListener("click", (event) => choose(event.target.token ?? -1));
text.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && !text.matches(":focus") && choose(-1));
addEventListener("scroll", () => state.token >= 0 && place(state.token), { passive: true });

/* ---- controls ---- */

let scheduled = false;

/** Update before the next frame; several events of a slider become one update. */
function schedule(change) {
  change();
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    update();
  });
}

byId("threshold").addEventListener("input", (event) =>
  schedule(() => (state.share = 1000 - event.target.value)),
);
byId("checkpoint").addEventListener("input", (event) =>
  schedule(() => {
    state.checkpoint = Number(event.target.value);
    drawLegend();
  }),
);
byId("mode").addEventListener("change", (event) =>
  schedule(() => {
    state.mode = event.target.value;
    drawLegend();
  }),
);
byId("reset").addEventListener("click", () => schedule(() => (state.share = null)));
byId("search").addEventListener("input", search);
byId("search").addEventListener("keydown", (event) => event.key === "Enter" && go(event.shiftKey ? -1 : 1));
byId("next").addEventListener("click", () => go(1));
byId("previous").addEventListener("click", () => go(-1));

for (const [name, [title]] of Object.entries(MODES)) {
  if (referenceLoss || name === "selection" || name === "loss") byId("mode").append(new Option(title, name));
}
byId("checkpoint").max = checkpoints.length - 1;
byId("checkpoint-control").hidden = checkpoints.length === 1 && !checkpoints[0].label;
byId("checkpoint").hidden = checkpoints.length === 1;
byId("origin").textContent =
  `Tokenizer ${data.tokenizer}. Losses in windows of ${count(data.window)} tokens every ${count(data.stride)} tokens` +
  (data.reference ? `; reference model ${data.reference.label}.` : ".") +
  " A selection of the run ranks all tokens of this page together.";
makeBlocks();
drawLegend();
update();
blocks.forEach((block) => observer.observe(block.box));
