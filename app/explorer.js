// The explorer. `props.value` is the run that explore.py sent (JSON); the maps of each block come once, from
// `server.fetch_maps`. From then on every click is drawn here, by the functions of maps.js.

const root = element.querySelector(".vx");
const find = (selector) => root.querySelector(selector);
const large = find(".vx-large canvas");
const panels = [...root.querySelectorAll(".vx-panels figure")];

const state = { mode: "effective", stream: "differential", block: Infinity, head: MEAN, query: { x: 0.5, y: 0.5, prefix: null } };
let hover = null; // index of the key under the pointer
let run = null;
let layers = []; // of maps.js, of each block, once its maps are here
let photo = null;
let strip = []; // strip[block]: head -> button
let current = null; // the rows on show: { positive, negative, differential }

async function receive() {
  const received = props.value ? JSON.parse(props.value) : null;
  run = received?.token ? received : null;
  layers = [];
  current = null;
  root.dataset.state = run ? "loading" : "empty";
  find(".vx-body").hidden = !run;
  if (!run) return note(received?.problem ?? EMPTY, received ? "vx-problem" : "");
  note("");
  const mine = run;
  photo = new Image();
  photo.src = run.image;
  await photo.decode();
  if (run !== mine) return;
  state.block = Math.min(state.block, run.blocks.length - 1);
  state.head = Math.min(state.head, run.blocks[state.block].heads - 1);
  buildStrip();
  for (let left = run.blocks.length; left; left--) {
    const block = layers[state.block] ? run.blocks.findIndex((_, b) => !layers[b]) : state.block;
    const arrays = await server.fetch_maps({ token: run.token, block }).catch(() => ({ lost: true }));
    if (run !== mine) return;
    if (arrays.expired) return note("These maps are no longer kept on the server.", "vx-above", run.repeatable);
    if (arrays.lost) return note("The server does not answer.", "vx-above", run.repeatable);
    layers[block] = prepare(run.blocks[block], arrays);
    if (block === state.block) draw();
    else drawStrip([block]);
  }
  root.dataset.state = "complete";
}

const EMPTY = find(".vx-note span").textContent;
function note(text, style = "", again = false) {
  find(".vx-note").hidden = !text;
  find(".vx-note").className = `vx-note ${style}`;
  find(".vx-note span").textContent = text;
  find(".vx-note button").hidden = !again;
}

// ---- Drawing

const colours = colourTables(props.palette);
const aspect = () => photo.naturalHeight / photo.naturalWidth;
const info = () => run.blocks[state.block];
const mode = () => modeOf(info(), state.mode);
const lattice = (side) => latticeOf(info(), mode(), side);
const streamShown = (block) => (isSigned(run.blocks[block], modeOf(run.blocks[block], state.mode)) ? state.stream : "positive");

function drawCanvas(canvas, stream) {
  const isLarge = canvas === large;
  drawMap(canvas, {
    info: info(),
    mode: mode(),
    aspect: aspect(),
    painted: paint(current[stream], stream, limitOf(current, stream), colours[isLarge ? "veil" : theme()]),
    photo: isLarge ? photo : null,
    prefixNames: isLarge ? run.prefixNames : null,
    point: state.query,
    hover,
  });
}

function drawStrip(blocks) {
  for (const block of blocks) {
    const layer = layers[block];
    const stream = streamShown(block);
    const shown = modeOf(layer.info, state.mode);
    strip[block].forEach((button, head) => {
      const values = rowsOf(layer, shown, head - 1, state.query)[stream];
      raster(button.firstChild, layer.info, shown, paint(values, stream, largest(values), colours[theme()]));
    });
  }
}

function drawWords() {
  const block = info();
  const queries = lattice("query");
  const lambdas = [["λ₁", block.lambda1], ["λ₂", block.lambda2]].filter(([, value]) => value !== null);
  const titles = titlesOf(block, mode());
  const signed = isSigned(block, mode());
  find(".vx-says").textContent = meaningOf(block, mode());
  find(".vx-query").textContent = nameOf(queries, indexAt(block, queries, state.query), run.prefixNames);
  find(".vx-lambdas").textContent = lambdas.map(([name, value]) => `${name} = ${value.toFixed(3)}`).join(", ") || block.kind;
  find(".vx-grid").textContent = `${block.grid.join(" × ")} patches` + (block.tokens ? `, ${block.tokens.join(" × ")} contrast tokens` : "");
  [find(".vx-term").textContent, find(".vx-caption").textContent] = run.caption;
  for (const panel of panels) {
    const stream = panel.dataset.stream;
    const title = titles[stream];
    const limit = limitOf(current, stream);
    panel.hidden = !signed && stream !== "positive";
    if (panel.hidden) continue;
    panel.querySelector("button").textContent = title;
    panel.querySelector("button").title = `Show “${title}” over the image`;
    panel.querySelector("canvas").setAttribute("aria-label", `${title}: map. Arrow keys move the query.`);
    panel.querySelector("i").style.background = barOf(props.palette, theme(), stream);
    const marks = stream === "differential" ? [`−${number(limit)}`, "0", `+${number(limit)}`] : ["0", number(limit)];
    panel.querySelector(".vx-scale").replaceChildren(...marks.map((text) => Object.assign(document.createElement("span"), { textContent: text })));
    const sum = total(current[stream]);
    const [name, lambda] = mode() === "stage1" ? ["λ₁", block.lambda1] : ["λ₂", block.lambda2];
    const isRest = stream === "differential" && mode() !== "effective" && Math.abs(1 - lambda - sum) < 0.002;
    panel.querySelector(".vx-sum").textContent = `row sum ${sum.toFixed(3).replace("-", "−")}${isRest ? ` = 1 − ${name}` : ""}`;
  }
  const title = titles[signed ? state.stream : "positive"];
  find(".vx-large figcaption").textContent = `${title} over the image: the stronger the colour, the larger the value.`;
  large.setAttribute("aria-label", `${title} over the image. Arrow keys move the query.`);
  find(".vx-strip h2").textContent = `${title}, of the same query in every head`;
}

function drawHover() {
  find(".vx-pointer").textContent = hover === null ? "–" : nameOf(lattice("key"), hover, run.prefixNames);
  for (const panel of panels) {
    const values = current[panel.dataset.stream];
    const rank = hover === null ? 0 : 1 + values.reduce((above, v) => above + (Math.abs(v) > Math.abs(values[hover])), 0);
    panel.querySelector(".vx-value").textContent = hover === null ? "" : `${number(values[hover])} · ${ordinal(rank)} of ${values.length}`;
  }
}

function drawPanels() {
  drawCanvas(large, streamShown(state.block));
  for (const panel of panels) if (!panel.hidden) drawCanvas(panel.querySelector("canvas"), panel.dataset.stream);
  drawHover();
}

function draw() {
  if (!run || !layers[state.block] || !root.clientWidth) return;
  const start = performance.now();
  current = rowsOf(layers[state.block], mode(), state.head, state.query);
  if (hover !== null && hover >= current.positive.length) hover = null;
  drawControls();
  drawWords();
  drawPanels();
  drawStrip(run.blocks.map((_, b) => b).filter((b) => layers[b]));
  root.dataset.drawMs = (performance.now() - start).toFixed(2);
}

// ---- Controls

const press = (button, pressed) => button.setAttribute("aria-pressed", pressed);

// A row of buttons; kept while their number stays, so that the focus does too.
function choices(container, labels, chosen, choose) {
  if (container.children.length !== labels.length) {
    container.replaceChildren(...labels.map(() => Object.assign(document.createElement("button"), { type: "button" })));
  }
  labels.forEach((text, i) => {
    const button = container.children[i];
    button.textContent = text;
    button.onclick = () => choose(i);
    press(button, i === chosen);
  });
}

function drawControls() {
  const heads = ["mean", ...Array.from({ length: info().heads }, (_, head) => head + 1)];
  choices(find(".vx-blocks"), run.blocks.map(({ block }) => block + 1), state.block, (block) => show({ block }));
  choices(find(".vx-heads"), heads, state.head + 1, (i) => show({ head: i - 1 }));
  for (const button of find(".vx-modes").children) {
    button.disabled = !modesOf(info()).includes(button.dataset.mode);
    press(button, button.dataset.mode === mode());
  }
  for (const panel of panels) press(panel.querySelector("button"), panel.dataset.stream === streamShown(state.block));
  strip.forEach((buttons, block) => buttons.forEach((button, head) => press(button, block === state.block && head - 1 === state.head)));
}

function show(change) {
  Object.assign(state, change);
  state.block = clamp(state.block, 0, run.blocks.length - 1);
  state.head = clamp(state.head, MEAN, run.blocks[state.block].heads - 1);
  if ("mode" in change || "block" in change) hover = null;
  draw();
}

function buildStrip() {
  const heads = Math.max(...run.blocks.map((info) => info.heads));
  const grid = find(".vx-strip-grid");
  const label = (text) => Object.assign(document.createElement("span"), { textContent: text });
  grid.style.gridTemplateColumns = `2.8em repeat(${run.blocks.length}, minmax(0, 92px))`;
  grid.replaceChildren(label(""), ...run.blocks.map((info) => label(info.block + 1)));
  strip = run.blocks.map(() => []);
  for (let head = MEAN; head < heads; head++) {
    grid.append(label(head === MEAN ? "mean" : head + 1));
    run.blocks.forEach((info, block) => {
      if (head >= info.heads) return grid.append(label(""));
      const button = Object.assign(document.createElement("button"), { type: "button" });
      const canvas = document.createElement("canvas");
      canvas.style.aspectRatio = photo.naturalWidth / photo.naturalHeight;
      button.append(canvas);
      button.title = `Block ${info.block + 1}, ${head === MEAN ? "mean of heads" : `head ${head + 1}`}`;
      button.setAttribute("aria-label", button.title);
      button.onclick = () => show({ block, head });
      strip[block].push(button);
      grid.append(button);
    });
  }
}

function moveQuery(right, down) {
  const queries = lattice("query");
  const { x, y, prefix } = state.query;
  const [rows, cols] = queries.size;
  if (prefix !== null && prefix < queries.prefix) {
    return show({ query: { x, y: down > 0 ? 0 : y, prefix: down > 0 ? null : clamp(prefix + right, 0, queries.prefix - 1) } });
  }
  let [r, c] = cellAt(info(), queries, state.query);
  if (down < 0 && r === 0 && queries.prefix) return show({ query: { x, y, prefix: 0 } });
  r = clamp(r + down, 0, rows - 1);
  c = clamp(c + right, 0, cols - 1);
  const [left, top, rightEdge, bottom] = outline(info(), queries, queries.prefix + r * cols + c);
  show({ query: { x: (left + rightEdge) / 2, y: (top + bottom) / 2, prefix: null } });
}

const KEYS = {
  ArrowLeft: () => moveQuery(-1, 0),
  ArrowRight: () => moveQuery(1, 0),
  ArrowUp: () => moveQuery(0, -1),
  ArrowDown: () => moveQuery(0, 1),
  "[": () => show({ block: state.block - 1 }),
  "]": () => show({ block: state.block + 1 }),
  ",": () => show({ head: state.head - 1 }),
  ".": () => show({ head: state.head + 1 }),
};

root.addEventListener("keydown", (event) => {
  if (!current || !KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  KEYS[event.key]();
});

for (const button of find(".vx-modes").children) button.onclick = () => show({ mode: button.dataset.mode });
for (const panel of panels) panel.querySelector("button").onclick = () => show({ stream: panel.dataset.stream });
for (const canvas of [large, ...panels.map((panel) => panel.querySelector("canvas"))]) {
  const under = (event) => pointUnder(canvas, event, layout(canvas, info(), aspect(), canvas === large));
  canvas.addEventListener("click", (event) => {
    const point = current && under(event);
    if (!point || (point.prefix !== null && !lattice("query").prefix)) return;
    show({ query: point.prefix === null ? point : { ...state.query, prefix: point.prefix } });
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!current) return;
    const point = under(event);
    const outside = !point || (point.prefix !== null && !lattice("key").prefix);
    const key = outside ? null : indexAt(info(), lattice("key"), point);
    if (key === hover) return;
    hover = key;
    drawPanels();
  });
  canvas.addEventListener("pointerleave", () => {
    hover = null;
    if (current) drawPanels();
  });
}
find(".vx-note button").onclick = () => trigger("submit");
new ResizeObserver(draw).observe(root);
new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["class"] });
watch("value", receive);
root.explorer = { state, get rows() { return current; } };
receive();
