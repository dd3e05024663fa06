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

const colours = colourTables(props.palette);
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
    painted: paint(current[stream], stream, limit, colours[isLarge ? "veil" : theme()]),
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
      const painted = paint(table[block][i][stream], stream, limitIn(block, i - 1, stream), colours[theme()]);
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

// ---- Lambda: a chart of all blocks, and a slider for the one on show

function buildChart() {
  const values = run.blocks.flatMap((block) => [block.lambda1, block.lambda2]).filter((value) => value !== null);
  find(".vx-lambda").hidden = !values.length;
  if (!values.length) return;
  const [low, high] = [Math.min(0, ...values), Math.max(1, ...values)];
  const part = (value) => (100 * (value - low)) / (high - low);
  const bars = run.blocks.map((block, index) => {
    const title = `Block ${block.label}: ${lambdasOf(block).join(", ") || "no λ"}`;
    const button = make("button", { type: "button", title, onclick: () => show({ block: index }) });
    button.setAttribute("aria-label", title);
    for (const stage of [1, 2]) {
      const value = block[`lambda${stage}`];
      if (value === null) continue;
      const bar = make("i", { className: value < 0 ? "vx-negative" : "" });
      bar.dataset.stage = stage;
      bar.style.bottom = `${part(Math.min(0, value))}%`;
      bar.style.height = `${Math.max(Math.abs(part(value) - part(0)), 1)}%`;
      button.append(bar);
    }
    button.append(make("span", { textContent: block.label }));
    return button;
  });
  find(".vx-bars").replaceChildren(...bars);
  find(".vx-bars").style.setProperty("--zero", `${part(0)}%`);
  find(".vx-below").hidden = low === 0;
  const ticks = [...new Set([high, ...(high > 1.2 ? [1] : []), 0, ...(low < -0.05 ? [low] : [])])];
  find(".vx-axis").replaceChildren(...ticks.map((value) => {
    const tick = make("span", { textContent: Number.isInteger(value) ? value : value.toFixed(1).replace("-", "−") });
    tick.style.bottom = `${part(value)}%`;
    return tick;
  }));
}

function drawWhatIf() {
  const own = info()[`lambda${stage()}`];
  const name = ["λ₁", "λ₂"][stage() - 1];
  const possible = mode() !== "effective" && own !== null;
  find(".vx-what-if").hidden = own === null && mode() !== "effective";
  slider.disabled = !possible;
  slider.value = whatIf ?? own ?? 0;
  find(".vx-what-if label span").textContent = possible ? `What if ${name} of block ${info().label} were` : "What if λ were different?";
  find(".vx-what-if output").textContent = possible ? hundredths(Number(slider.value)) : "";
  find(".vx-what-if button").disabled = whatIf === null;
  const differential = ["D₁", "D₂"][stage() - 1];
  find(".vx-what-if p").textContent = possible
    ? `This redraws the map ${differential} only. The model ran with ${name} = ${thousandths(own)}; its answer does not change.`
    : "Choose Stage I or Stage II. E also holds row factors that the model computed with its own λ, so it cannot be redrawn here.";
}

slider.oninput = () => show({ stream: "differential" }, Number(slider.value));
find(".vx-what-if button").onclick = () => show({}, null);

// ---- Controls

function drawControls() {
  const heads = ["mean", ...Array.from({ length: info().heads }, (_, head) => head + 1)];
  choices(find(".vx-blocks"), run.blocks.map(({ label }) => label), state.block, (block) => show({ block }));
  choices(find(".vx-heads"), heads, state.head + 1, (i) => show({ head: i - 1 }));
  for (const button of find(".vx-modes").children) {
    button.disabled = !modesOf(info()).includes(button.dataset.mode);
    press(button, button.dataset.mode === mode());
  }
  for (const button of find(".vx-scales").children) press(button, button.dataset.scale === state.scale);
  for (const panel of panels) press(panel.querySelector("button"), panel.dataset.stream === streamOf(state.block));
  strip.forEach((buttons, block) => buttons.forEach((button, i) => press(button, block === state.block && i - 1 === state.head)));
  [...find(".vx-bars").children].forEach((button, block) => press(button, block === state.block));
  drawWhatIf();
}

// Shows another view. Another lambda is kept while block and map stay.
function show(change, lambda = whatIf) {
  const before = `${state.block} ${state.mode}`;
  Object.assign(state, change);
  state.block = clamp(state.block, 0, run.blocks.length - 1);
  state.head = clamp(state.head, MEAN, run.blocks[state.block].heads - 1);
  const moved = before !== `${state.block} ${state.mode}`;
  whatIf = moved ? null : lambda;
  if (moved) hover = null;
  draw();
  writeLink();
}

// Neighbouring blocks of one grid and number of heads stand together: the stages of a pyramid.
function buildStrip() {
  const groups = [];
  run.blocks.forEach((facts, block) => {
    const like = (other) => `${other.grid} ${other.heads}`;
    if (!groups.length || like(run.blocks[groups.at(-1)[0]]) !== like(facts)) groups.push([]);
    groups.at(-1).push(block);
  });
  strip = run.blocks.map(() => []);
  const label = (textContent) => make("span", { textContent });
  find(".vx-groups").replaceChildren(...groups.map((blocks) => {
    const facts = run.blocks[blocks[0]];
    const grid = make("div", { className: "vx-strip-grid" });
    const widest = groups.length === 1 ? 92 : facts.heads > 8 ? 44 : 64;
    grid.style.gridTemplateColumns = `2.8em repeat(${blocks.length}, minmax(40px, ${widest}px))`;
    grid.append(label(""), ...blocks.map((block) => label(run.blocks[block].label)));
    for (let head = MEAN; head < facts.heads; head++) {
      grid.append(label(head === MEAN ? "mean" : head + 1), ...blocks.map((block) => cell(block, head)));
    }
    if (groups.length === 1) return grid;
    const group = make("div");
    group.append(make("h3", { textContent: `${facts.grid.join(" × ")} patches` }), grid);
    return group;
  }));
}

function cell(block, head) {
  const button = make("button", { type: "button", title: `Block ${run.blocks[block].label}, ${nameOfHead(head)}` });
  const canvas = make("canvas");
  canvas.style.aspectRatio = photo.naturalWidth / photo.naturalHeight;
  button.append(canvas);
  button.setAttribute("aria-label", button.title);
  button.onclick = () => show({ block, head });
  strip[block].push(button);
  return button;
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
  if (event.target === slider && event.key.startsWith("Arrow")) return;
  event.preventDefault();
  KEYS[event.key]();
});

for (const button of find(".vx-modes").children) button.onclick = () => show({ mode: button.dataset.mode });
for (const button of find(".vx-scales").children) button.onclick = () => show({ scale: button.dataset.scale });
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

// ---- The link of a view: #explore?model=...&image=...&map=...

function linked() {
  return new URLSearchParams(location.hash.startsWith("#explore?") ? location.hash.slice("#explore?".length) : "");
}

function viewOfLink() {
  const link = linked();
  const view = {};
  const take = (key, pattern, read) => pattern.test(link.get(key) ?? "") && Object.assign(view, read(link.get(key)));
  take("map", /^(effective|stage1|stage2)$/, (mode) => ({ mode }));
  take("stream", /^(positive|negative|differential)$/, (stream) => ({ stream }));
  take("scale", /^(map|block|all)$/, (scale) => ({ scale }));
  take("block", /^\d{1,4}$/, (text) => ({ block: Number(text) - 1 }));
  take("head", /^(mean|\d{1,4})$/, (text) => ({ head: text === "mean" ? MEAN : Number(text) - 1 }));
  take("query", /^[01]\.?\d*,[01]\.?\d*$/, (text) => {
    const [x, y] = text.split(",").map((part) => clamp(Number(part), 0, 0.9999));
    return { query: { x, y, prefix: null } };
  });
  take("query", /^token\d{1,4}$/, (text) => ({ query: { x: 0.5, y: 0.5, prefix: Number(text.slice(5)) - 1 } }));
  return view;
}

function writeLink() {
  if (!run?.model) return clearLink();
  const { mode, stream, scale, block, head, query } = state;
  const link = new URLSearchParams({ model: run.model });
  if (run.example) link.set("image", run.example);
  const place = query.prefix === null ? `${query.x.toFixed(4)},${query.y.toFixed(4)}` : `token${query.prefix + 1}`;
  const view = { map: mode, stream, block: block + 1, head: head === MEAN ? "mean" : head + 1, query: place, scale };
  for (const [key, value] of Object.entries(view)) link.set(key, value);
  history.replaceState(history.state, "", `#explore?${link}`);
}

function clearLink() {
  if (run && location.hash.startsWith("#explore?")) history.replaceState(history.state, "", location.pathname + location.search);
}

addEventListener("hashchange", () => {
  const link = linked();
  if (!link.get("model")) return;
  Object.assign(state, viewOfLink());
  if (run && link.get("model") === run.model && (link.get("image") ?? run.example) === run.example) show({});
  else trigger("select");
});

// ---- Saving

const limits = () => Object.fromEntries(STREAMS.map((stream) => [stream, limitIn(state.block, state.head, stream)]));
const shownStreams = () => (isSigned(info(), mode()) ? STREAMS : ["positive"]);

function figure() {
  const titles = titlesOf(info(), mode());
  const lambdas = lambdasOf(info());
  if (whatIf !== null) lambdas.push(`drawn with λ = ${hundredths(whatIf)} instead`);
  const [term, words] = run.caption;
  return drawingOf({
    info: info(),
    mode: mode(),
    aspect: aspect(),
    photo: run.image,
    point: state.query,
    palette: props.palette,
    title: [run.model, `block ${info().label}`, nameOfHead(state.head)].filter(Boolean).join(" · "),
    lines: [`${term}: ${words}. Query: ${queryName()}.`, [...lambdas, SCALES[state.scale]].join(", ").replace(/^./, (first) => first.toUpperCase())],
    over: streamOf(state.block),
    maps: shownStreams().map((stream) => {
      const limit = limitIn(state.block, state.head, stream);
      return { stream, title: titles[stream], values: current[stream], limit, marks: marksOf(stream, limit), sum: sumOf(stream) };
    }),
  });
}

async function pictureOf(svg) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  await image.decode();
  const canvas = make("canvas", { width: 2 * image.naturalWidth, height: 2 * image.naturalHeight });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

// What the server needs to know of this view, and what the saved numbers should say of it.
function request() {
  const { block, head } = state;
  const query = indexAt(info(), lattice("query"), state.query);
  const view = { ...state, mode: mode(), stream: streamOf(block), queryName: queryName(), limits: limits() };
  return { token: run.token, block, head, mode: mode(), query, lambda: whatIf, view, run: props.value };
}

const fromServer = async (answer, type) => {
  const { data } = await answer;
  if (!data) throw new Error("expired");
  return new Blob([Uint8Array.from(atob(data), (character) => character.charCodeAt(0))], { type });
};
const FILES = {
  svg: () => new Blob([figure()], { type: "image/svg+xml" }),
  png: () => pictureOf(figure()),
  npz: () => fromServer(server.export_numbers(request()), "application/zip"),
  html: () => fromServer(server.export_page(request()), "text/html"),
};

for (const button of root.querySelectorAll("[data-save]")) {
  const form = button.dataset.save;
  button.hidden = props.offline && ["npz", "html"].includes(form);
  button.onclick = async () => {
    if (!current) return;
    const status = find(".vx-save [role=status]");
    status.textContent = "";
    try {
      const head = state.head === MEAN ? "mean" : `head${state.head + 1}`;
      const name = [run.model ?? "maps", `block${run.blocks[state.block].block + 1}`, head, mode()].join("-");
      const link = make("a", { href: URL.createObjectURL(await FILES[form]()), download: `${name}.${form}` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    } catch {
      status.textContent = "The server no longer keeps these maps, or does not answer.";
    }
  };
}

find(".vv-note button").onclick = () => trigger("submit");
new ResizeObserver(() => (root.clientWidth ? (draw(), writeLink()) : clearLink())).observe(root);
new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["class"] });
watch("value", receive);
root.explorer = { state, get rows() { return current; } };
receive();
