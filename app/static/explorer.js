// The explorer. `props.value` is the run that explore.py sent (JSON); the maps of each block come once, from
// `server.fetch_maps`. From then on every click is drawn here, by the functions of maps.js. A saved web page runs this
// file too, on maps that it brings along.

const root = element.querySelector(".vx");
const find = (selector) => root.querySelector(selector);
const large = find(".vx-large canvas");
const panels = [...root.querySelectorAll(".vv-panels figure")];
const slider = find(".vx-what-if input");
const empty = find(".vv-note span").textContent;
const AWAITED = "The view of this link waits for its picture: drop it on the left.";

const state = {
  mode: "effective",
  stream: "differential",
  block: Infinity,
  head: MEAN,
  scale: "map",
  query: { x: 0.5, y: 0.5, prefix: null },
  ...props.view,
  ...viewOfLink(),
};
let hover = null; // index of the key under the pointer
let whatIf = null; // a lambda to draw the differential of this block with, instead of its own
let run = null;
let layers = []; // of maps.js, of each block, once its maps are here
let photo = null;
let strip = []; // strip[block]: head + 1 -> button
let table = []; // table[block]: head + 1 -> the rows of the query
let current = null; // the rows on show: { positive, negative, differential }

async function receive() {
  const received = props.value ? JSON.parse(props.value) : null;
  run = received?.token ? received : null;
  layers = [];
  table = [];
  current = whatIf = null;
  root.dataset.state = run ? "loading" : "empty";
  find(".vx-body").hidden = !run;
  if (!run) return note(received?.problem ?? (linked().get("model") && !linked().get("image") ? AWAITED : empty), received ? "vv-problem" : "");
  note("");
  const mine = run;
  photo = new Image();
  photo.src = run.image;
  await photo.decode();
  if (run !== mine) return;
  state.block = clamp(state.block, 0, run.blocks.length - 1);
  state.head = clamp(state.head, MEAN, run.blocks[state.block].heads - 1);
  buildStrip();
  buildChart();
  writeLink();
  for (let left = run.blocks.length; left; left--) {
    const block = layers[state.block] ? run.blocks.findIndex((_, b) => !layers[b]) : state.block;
    const arrays = await server.fetch_maps({ token: run.token, block }).catch(() => ({ lost: true }));
    if (run !== mine) return;
    if (arrays.expired) return note("These maps are no longer kept on the server.", "vv-above", run.repeatable);
    if (arrays.lost) return note("The server does not answer.", "vv-above", run.repeatable);
    layers[block] = prepare(run.blocks[block], arrays);
    if (block === state.block) draw();
    else if (table.length) {
      compute(block);
      drawStrip([block]);
    }
  }
  if (state.scale === "all") draw();
  root.dataset.state = "complete";
}

function note(text, style = "", again = false) {
  find(".vv-note").hidden = !text;
  find(".vv-note").className = `vv-note ${style}`;
  find(".vv-note span").textContent = text;
  find(".vv-note button").hidden = !again;
}

// ---- The block on show

const info = () => layers[state.block]?.info ?? run.blocks[state.block];
const mode = () => modeOf(run.blocks[state.block], state.mode);
const lattice = (side) => latticeOf(info(), mode(), side);
const streamOf = (block) => (isSigned(run.blocks[block], modeOf(run.blocks[block], state.mode)) ? state.stream : "positive");
const stage = () => (mode() === "stage2" ? 2 : 1);
const nameOfHead = (head) => (head === MEAN ? "mean of heads" : `head ${head + 1}`);
const queryName = () => nameOf(lattice("query"), indexAt(info(), lattice("query"), state.query), run.prefixNames);

function compute(block) {
  const layer = layers[block];
  const lambda = block === state.block ? (whatIf ?? undefined) : undefined;
  table[block] = rowsOfHeads(layer, modeOf(layer.info, state.mode), state.query, lambda);
}

// The value of the strongest colour of one map, on the scale chosen.
function limitIn(block, head, stream) {
  if (state.scale === "map") return limitOf(table[block][head + 1], stream);
  const sharing = state.scale === "block" ? [table[block]] : table.filter(Boolean);
  return sharing.flat().reduce((most, rows) => Math.max(most, limitOf(rows, stream)), 0);
}

// ---- Drawing

const colors = colorTables(props.palette);
const aspect = () => photo.naturalHeight / photo.naturalWidth;
const hundredths = (value) => value.toFixed(2).replace("-", "−");
const thousandths = (value) => value.toFixed(3).replace("-", "−");

function drawCanvas(canvas, stream) {
  const isLarge = canvas === large;
  const limit = limitIn(state.block, state.head, stream);
  drawMap(canvas, {
    info: info(),
    mode: mode(),
    aspect: aspect(),
    painted: paint(current[stream], stream, limit, colors[isLarge ? "veil" : theme()]),
    photo: isLarge ? photo : null,
    prefixNames: isLarge ? run.prefixNames : null,
    point: state.query,
    hover,
  });
}

function drawStrip(blocks) {
  for (const block of blocks) {
    const stream = streamOf(block);
    strip[block].forEach((button, i) => {
      const painted = paint(table[block][i][stream], stream, limitIn(block, i - 1, stream), colors[theme()]);
      raster(button.firstChild, layers[block].info, modeOf(layers[block].info, state.mode), painted);
    });
  }
}

const SCALES = {
  map: "each map on a scale of its own",
  block: "the maps of a block on one scale",
  all: "all maps on one scale",
};

function drawWords() {
  const facts = info();
  const titles = titlesOf(facts, mode());
  const signed = isSigned(facts, mode());
  find(".vx-says").textContent = meaningOf(facts, mode());
  find(".vx-query").textContent = queryName();
  find(".vx-kind").textContent = describe(facts);
  find(".vx-lambdas").textContent = `block ${facts.label}: ${lambdasOf(facts).join(", ") || "none"}`;
  [find(".vx-term").textContent, find(".vx-caption").textContent] = run.caption;
  for (const panel of panels) {
    const stream = panel.dataset.stream;
    panel.hidden = !signed && stream !== "positive";
    if (panel.hidden) continue;
    const title = titles[stream];
    const limit = limitIn(state.block, state.head, stream);
    panel.querySelector("button").textContent = title;
    panel.querySelector("button").title = `Show “${title}” over the image`;
    panel.querySelector("canvas").setAttribute("aria-label", `${title}: ${summary(stream)} Arrow keys move the query.`);
    panel.querySelector("i").style.background = barOf(props.palette, theme(), stream);
    panel.querySelector(".vv-marks").replaceChildren(...marksOf(stream, limit).map((textContent) => make("span", { textContent })));
    panel.querySelector(".vx-sum").textContent = sumOf(stream);
  }
  const title = titles[signed ? state.stream : "positive"];
  const shown = `${title}${whatIf === null || state.stream !== "differential" ? "" : ` with λ = ${hundredths(whatIf)}`}`;
  find(".vx-large figcaption").textContent = `${shown} over the image: the stronger the colour, the larger the value.`;
  large.setAttribute("aria-label", `${shown} over the image: ${summary(streamOf(state.block))} Arrow keys move the query.`);
  find(".vx-strip h2").textContent = `${title}, of the same query in every head`;
  find(".vx-strip > p").textContent = `Heads (rows) by blocks (columns), ${SCALES[state.scale]}. Click one to see it above.`;
}

const lambdasOf = ({ lambda1, lambda2 }) =>
  [["λ₁", lambda1], ["λ₂", lambda2]].filter(([, value]) => value !== null).map(([name, value]) => `${name} = ${thousandths(value)}`);
const marksOf = (stream, limit) => (stream === "differential" ? [`−${number(limit)}`, "0", `+${number(limit)}`] : ["0", number(limit)]);

function sumOf(stream) {
  const sum = total(current[stream]);
  const lambda = whatIf ?? info()[`lambda${stage()}`];
  if (info().patches && info().slots > current[stream].reduce((seen, v) => seen + !Number.isNaN(v), 0)) {
    return `row sum ${sum.toFixed(3)}, the rest on padding`;
  }
  const isRest = stream === "differential" && mode() !== "effective" && Math.abs(1 - lambda - sum) < 0.002;
  return `row sum ${thousandths(sum)}${isRest ? ` = 1 − ${whatIf === null ? ["λ₁", "λ₂"][stage() - 1] : "λ"}` : ""}`;
}

// A map in words, for those who do not see it.
function summary(stream) {
  const values = current[stream];
  const strongest = values.reduce((best, v, i) => (Number.isNaN(values[best]) || Math.abs(v) > Math.abs(values[best]) ? i : best), 0);
  const where = nameOf(lattice("key"), strongest, run.prefixNames);
  return `block ${info().label}, ${nameOfHead(state.head)}, query ${queryName()}; strongest at ${where}, ${number(values[strongest])}.`;
}

const KINDS = {
  vca: "Visual-Contrast Attention", vca_stage1: "Contrast in Stage I only", vca_stage2: "Contrast in Stage II only",
  mhsa: "Self-attention", mhsa_dwc: "Self-attention and a depthwise convolution", diff: "Differential attention",
  agent: "Agent attention", sr: "Spatial-reduction attention", window: "Window attention", stripes: "Stripe attention",
};

function describe({ kind, grid, tokens, keys, window }) {
  const parts = [`${grid.join(" × ")} patches`];
  if (tokens) parts.push(`${tokens.join(" × ")} contrast tokens`);
  if (keys) parts.push(`${keys.join(" × ")} reduced keys`);
  if (window && String(window) !== String(grid)) parts.push(`${kind === "stripes" ? "stripes" : "windows"} of ${window.join(" × ")}`);
  return `${KINDS[kind] ?? kind}: ${parts.join(", ")}`;
}

function drawHover() {
  find(".vx-pointer").textContent = hover === null ? "–" : nameOf(lattice("key"), hover, run.prefixNames);
  for (const panel of panels) {
    const values = current[panel.dataset.stream];
    const rank = hover === null ? 0 : 1 + values.reduce((above, v) => above + (Math.abs(v) > Math.abs(values[hover])), 0);
    const seen = values.reduce((count, v) => count + !Number.isNaN(v), 0);
    const words = () => (Number.isNaN(values[hover]) ? "outside the window" : `${number(values[hover])} · ${ordinal(rank)} of ${seen}`);
    panel.querySelector(".vx-value").textContent = hover === null ? "" : words();
  }
}

function drawPanels() {
  drawCanvas(large, streamOf(state.block));
  for (const panel of panels) if (!panel.hidden) drawCanvas(panel.querySelector("canvas"), panel.dataset.stream);
  drawHover();
}

function draw() {
  if (!run || !layers[state.block] || !root.clientWidth) return;
  const start = performance.now();
  const ready = run.blocks.map((_, block) => block).filter((block) => layers[block]);
  ready.forEach(compute);
  current = table[state.block][state.head + 1];
  if (hover !== null && hover >= current.positive.length) hover = null;
  drawControls();
  drawWords();
  drawPanels();
  drawStrip(ready);
  root.dataset.drawMs = (performance.now() - start).toFixed(2);
}
