// The explorer. `props.value` is the run that explore.py sent (JSON); the maps of each block come once, from
// `server.fetch_maps`. From then on every click is drawn here. A query is a point of the image, from 0 to 1 in both
// directions, or a prefix token, so that it means the same in blocks of different grids.

const root = element.querySelector(".vx");
const find = (selector) => root.querySelector(selector);
const large = find(".vx-large canvas");
const panels = [...root.querySelectorAll(".vx-panels figure")];
const MEAN = -1;

const state = { mode: "effective", stream: "differential", block: Infinity, head: MEAN, query: { x: 0.5, y: 0.5, prefix: null } };
let hover = null; // index of the key under the pointer
let run = null;
let layers = []; // the decoded arrays of each block, once they are here
let photo = null;
let strip = []; // strip[block]: head -> button
let current = null; // the rows on show: { positive, negative, differential }

// ---- Data: from the server to arrays, from arrays to the rows of a query

const HALF = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
});

function decode({ shape, data }) {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const isHalf = bytes.length === 2 * shape.reduce((a, b) => a * b);
  const values = isHalf ? Float32Array.from(new Uint16Array(bytes.buffer), (bits) => HALF[bits]) : new Float32Array(bytes.buffer);
  return { shape, values };
}

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
    if (arrays.expired) return note("These maps are no longer kept on the server.", "vx-above", true);
    if (arrays.lost) return note("The server does not answer.", "vx-above", true);
    const maps = Object.fromEntries(Object.entries(arrays).map(([name, array]) => [name, decode(array)]));
    layers[block] = { ...maps, first: firstStage(run.blocks[block], maps) };
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

const row = ({ shape, values }, head, query) =>
  values.subarray((head * shape[1] + query) * shape[2], (head * shape[1] + query + 1) * shape[2]);

// D = A+ - lambda A-, or A+ of a stage with a single stream
function applied(info, maps, stage, head, query) {
  const positive = row(maps[`positive${stage}`], head, query);
  if (info.streams[stage - 1] < 2) return positive;
  const negative = row(maps[`negative${stage}`], head, query);
  return positive.map((value, i) => value - info[`lambda${stage}`] * negative[i]);
}

const factor = (scale, head, query) => (scale ? scale.values[head * scale.shape[1] + query] : 1);

// diag(r1) D1 of every head, computed when the maps arrive: the part of E that all queries share
function firstStage(info, maps) {
  const { shape } = maps.positive1;
  const values = new Float32Array(maps.positive1.values.length);
  for (let head = 0; head < shape[0]; head++) {
    for (let q = 0; q < shape[1]; q++) {
      const scale = factor(maps.scale1, head, q);
      const scaled = applied(info, maps, 1, head, q).map((value) => value * scale);
      values.set(scaled, (head * shape[1] + q) * shape[2]);
    }
  }
  return { shape, values };
}

// E[q, :] = r2[q] D2[q, :] diag(r1) D1, or r1[q] D1[q, :] of a single stage
function effectiveRow(info, maps, head, query) {
  if (!info.streams[1]) return row(maps.first, head, query);
  const [, tokens, length] = maps.first.shape;
  const weights = applied(info, maps, 2, head, query);
  const scale = factor(maps.scale2, head, query);
  const result = new Float32Array(length);
  for (let token = 0; token < tokens; token++) {
    const weight = scale * weights[token];
    const from = (head * tokens + token) * length;
    for (let i = 0; i < length; i++) result[i] += weight * maps.first.values[from + i];
  }
  return result;
}

function mean(rows) {
  const result = new Float32Array(rows[0].length);
  for (const values of rows) for (let i = 0; i < result.length; i++) result[i] += values[i] / rows.length;
  return result;
}

function rowsOf(block, head) {
  const [info, maps, mode] = [run.blocks[block], layers[block], modeOf(block)];
  const heads = head === MEAN ? [...Array(info.heads).keys()] : [head];
  const query = queryIndex(block);
  if (mode === "effective") {
    const differential = mean(heads.map((h) => effectiveRow(info, maps, h, query)));
    return { positive: differential.map((v) => Math.max(v, 0)), negative: differential.map((v) => Math.max(-v, 0)), differential };
  }
  const stage = mode === "stage1" ? 1 : 2;
  const positive = mean(heads.map((h) => row(maps[`positive${stage}`], h, query)));
  if (info.streams[stage - 1] < 2) return { positive, negative: positive.map(() => 0), differential: positive };
  return {
    positive,
    negative: mean(heads.map((h) => row(maps[`negative${stage}`], h, query))),
    differential: mean(heads.map((h) => applied(info, maps, stage, h, query))),
  };
}

// ---- Geometry: patches, and contrast tokens as the cells they were pooled from

const modesOf = (info) => (info.streams[1] ? ["effective", "stage1", "stage2"] : info.streams[0] === 2 ? ["effective", "stage1"] : ["effective"]);
const modeOf = (block) => (modesOf(run.blocks[block]).includes(state.mode) ? state.mode : "effective");
const queriesAreTokens = (block) => modeOf(block) === "stage1" && run.blocks[block].tokens !== null;
const keysAreTokens = (block) => modeOf(block) === "stage2";
// Has this map a negative part? If not, one panel says it all.
const isSigned = (block) => {
  const { streams } = run.blocks[block];
  return { effective: Math.max(...streams), stage1: streams[0], stage2: streams[1] }[modeOf(block)] === 2;
};
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// The patches [start, end) that adaptive pooling of `size` patches to `count` cells averages into cell i.
const poolSpan = (i, count, size) => [Math.floor((i * size) / count), Math.ceil(((i + 1) * size) / count)];

// The cell i as it is painted: where neighbours overlap, they meet in the middle.
function tileSpan(i, count, size) {
  const [start, end] = poolSpan(i, count, size);
  return [i ? (start + poolSpan(i - 1, count, size)[1]) / 2 : 0, i < count - 1 ? (end + poolSpan(i + 1, count, size)[0]) / 2 : size];
}

function tileAt(position, count, size) {
  for (let i = 0; i < count - 1; i++) if (position < tileSpan(i, count, size)[1]) return i;
  return count - 1;
}

function cellAt(info, ofTokens, x, y) {
  const [rows, cols] = info.grid;
  if (!ofTokens) return [clamp(Math.floor(y * rows), 0, rows - 1), clamp(Math.floor(x * cols), 0, cols - 1)];
  return [tileAt(y * rows, info.tokens[0], rows), tileAt(x * cols, info.tokens[1], cols)];
}

function queryIndex(block) {
  const info = run.blocks[block];
  const ofTokens = queriesAreTokens(block);
  const { x, y, prefix } = state.query;
  if (!ofTokens && prefix !== null && prefix < info.prefix) return prefix;
  const [r, c] = cellAt(info, ofTokens, x, y);
  return ofTokens ? r * info.tokens[1] + c : info.prefix + r * info.grid[1] + c;
}

// The outline of a token's or a patch's cell, in parts of the image: [left, top, right, bottom].
function outline(info, ofTokens, index) {
  const [rows, cols] = info.grid;
  const width = ofTokens ? info.tokens[1] : cols;
  const [r, c] = [Math.floor(index / width), index % width];
  const [[top, bottom], [left, right]] = ofTokens
    ? [poolSpan(r, info.tokens[0], rows), poolSpan(c, info.tokens[1], cols)]
    : [[r, r + 1], [c, c + 1]];
  return [left / cols, top / rows, right / cols, bottom / rows];
}

// Where things are on a canvas, in CSS pixels: the squares of the prefix tokens on top, the image below.
function layout(canvas, info) {
  const width = canvas.clientWidth;
  const side = info.prefix ? clamp(width / 14, 14, 24) : 0;
  const step = canvas === large ? 110 : side + 5;
  const prefix = [...Array(info.prefix).keys()].map((i) => [1 + i * step, 1, side, side]);
  const top = side ? side + 10 : 0;
  return { prefix, image: [0, top, width, (width * photo.naturalHeight) / photo.naturalWidth], height: top + (width * photo.naturalHeight) / photo.naturalWidth };
}

function pointed(canvas, event) {
  const info = run.blocks[state.block];
  const box = canvas.getBoundingClientRect();
  const [px, py] = [event.clientX - box.left, event.clientY - box.top];
  const place = layout(canvas, info);
  const prefix = place.prefix.findIndex(([x, y, w, h]) => px >= x - 2 && px <= x + w + 2 && py >= y - 2 && py <= y + h + 4);
  if (prefix >= 0) return { ...state.query, prefix };
  const [x, y, w, h] = place.image;
  return py < y ? null : { x: clamp((px - x) / w, 0, 0.9999), y: clamp((py - y) / h, 0, 0.9999), prefix: null };
}

// ---- Colour

const parse = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
const ramps = Object.fromEntries(
  ["light", "dark"].map((theme) => [theme, { positive: props.palette[theme].positive.map(parse), negative: props.palette[theme].negative.map(parse) }]),
);
const over = { positive: parse(props.palette.overlay.positive), negative: parse(props.palette.overlay.negative) };
const theme = () => (document.body.classList.contains("dark") ? "dark" : "light");

function shade(stops, part) {
  const at = clamp(part, 0, 1) * (stops.length - 1);
  const i = Math.min(Math.floor(at), stops.length - 2);
  return stops[i].map((from, channel) => from + (stops[i + 1][channel] - from) * (at - i));
}

// Colours of the values from -limit to +limit as 513 pixels, strongest negative first: solid, or a veil over an image.
const STEPS = 256;
function pixels(colourOf) {
  const bytes = new Uint8ClampedArray(4 * (2 * STEPS + 1));
  for (let i = -STEPS; i <= STEPS; i++) bytes.set(colourOf(i < 0 ? "negative" : "positive", Math.abs(i) / STEPS), 4 * (i + STEPS));
  return new Uint32Array(bytes.buffer);
}
const solid = {
  light: pixels((side, part) => [...shade(ramps.light[side], part), 255]),
  dark: pixels((side, part) => [...shade(ramps.dark[side], part), 255]),
};
const veil = pixels((side, part) => [...over[side], 230 * part]);

// The values of a stream as pixels; the negative stream is positive in number and blue in colour.
function paint(values, stream, limit, colours) {
  const scale = limit ? (stream === "negative" ? -STEPS : STEPS) / limit : 0;
  return Uint32Array.from(values, (value) => colours[STEPS + Math.round(value * scale)]);
}

const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
const limitOf = (rows, stream) =>
  stream === "differential" ? largest(rows.differential) : Math.max(largest(rows.positive), largest(rows.negative));

// ---- Drawing

// Which key each pixel of a map's picture shows. A pixel is a patch; of contrast tokens, a quarter of one, because tiles
// may meet in a patch's middle.
function keyOfPixel(block) {
  const info = run.blocks[block];
  const ofTokens = keysAreTokens(block);
  const cache = ofTokens ? "tokenOfPixel" : "patchOfPixel";
  if (info[cache]) return info[cache];
  const [rows, cols] = info.grid.map((size) => size * (ofTokens ? 2 : 1));
  const keys = new Uint32Array(rows * cols);
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < cols; x++) {
      const [r, c] = cellAt(info, ofTokens, (x + 0.5) / cols, (y + 0.5) / rows);
      keys[y * cols + x] = ofTokens ? r * info.tokens[1] + c : info.prefix + r * info.grid[1] + c;
    }
  }
  return (info[cache] = { keys, rows, cols });
}

function raster(canvas, block, painted) {
  const { keys, rows, cols } = keyOfPixel(block);
  canvas.width = cols;
  canvas.height = rows;
  const picture = new ImageData(new Uint8ClampedArray(keys.map((key) => painted[key]).buffer), cols, rows);
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

function drawCanvas(canvas, stream) {
  const info = run.blocks[state.block];
  const place = layout(canvas, info);
  const scale = window.devicePixelRatio;
  canvas.style.height = `${place.height}px`;
  canvas.width = Math.round(place.image[2] * scale);
  canvas.height = Math.round(place.height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);

  const painted = paint(current[stream], stream, limitOf(current, stream), canvas === large ? veil : solid[theme()]);
  if (canvas === large) context.drawImage(photo, ...place.image);
  context.imageSmoothingEnabled = false;
  context.drawImage(raster(document.createElement("canvas"), state.block, painted), ...place.image);

  const colours = getComputedStyle(root);
  place.prefix.forEach((box, i) => {
    if (!keysAreTokens(state.block)) {
      const [red, green, blue, opacity] = new Uint8ClampedArray(painted.buffer, 4 * i, 4);
      context.fillStyle = `rgb(${red} ${green} ${blue} / ${opacity / 255})`;
      context.fillRect(...box);
    }
    context.strokeStyle = colours.getPropertyValue("--body-text-color-subdued");
    context.lineWidth = 0.5;
    context.strokeRect(...box);
    if (canvas !== large) return;
    context.fillStyle = colours.color;
    context.font = `13px ${colours.fontFamily}`;
    context.textBaseline = "middle";
    context.fillText(run.prefixNames[i], box[0] + box[2] + 7, box[1] + box[3] / 2 + 1);
  });

  const boxOf = (ofTokens, index) => {
    if (!ofTokens && index < info.prefix) return place.prefix[index];
    const [left, top, right, bottom] = outline(info, ofTokens, ofTokens ? index : index - info.prefix);
    const [x, y, w, h] = place.image;
    return [x + left * w, y + top * h, (right - left) * w, (bottom - top) * h];
  };
  if (hover !== null) stroke(context, boxOf(keysAreTokens(state.block), hover), canvas === large ? 1.5 : 1);
  stroke(context, boxOf(queriesAreTokens(state.block), queryIndex(state.block)), canvas === large ? 2.5 : 2);
}

// A dark line beside a light one: it shows on any picture. Drawn just inside the box, so that nothing is cut off.
function stroke(context, [x, y, w, h], width) {
  context.lineWidth = width;
  for (const [colour, inset] of [["#000", width / 2], ["#fff", 1.5 * width]]) {
    context.strokeStyle = colour;
    context.strokeRect(x + inset, y + inset, w - 2 * inset, h - 2 * inset);
  }
}

function drawStrip(blocks) {
  for (const block of blocks) {
    strip[block].forEach((button, head) => {
      const rows = rowsOf(block, head - 1);
      const stream = isSigned(block) ? state.stream : "positive";
      raster(button.firstChild, block, paint(rows[stream], stream, largest(rows[stream]), solid[theme()]));
    });
  }
}

const number = (value) => (value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : value.toPrecision(3)).replace("-", "−");
const ordinal = (n) => n + (n % 100 > 10 && n % 100 < 14 ? "th" : (["th", "st", "nd", "rd"][n % 10] ?? "th"));

function nameOf(info, ofTokens, index) {
  if (!ofTokens && index < info.prefix) return `${run.prefixNames[index]} token`;
  const width = ofTokens ? info.tokens[1] : info.grid[1];
  const cell = ofTokens ? index : index - info.prefix;
  return `${ofTokens ? "contrast token" : "patch"}, row ${Math.floor(cell / width) + 1}, column ${(cell % width) + 1}`;
}

const TITLES = {
  effective: { positive: "Draws in", negative: "Pushes away", differential: "Effective E" },
  stage1: { positive: "Positive A₁⁺", negative: "Negative A₁⁻", differential: "Differential D₁" },
  stage2: { positive: "Positive A₂⁺", negative: "Negative A₂⁻", differential: "Differential D₂" },
};
const SAYS = {
  effective: "What the boxed patch draws in (orange) or pushes away (blue), both stages in one: E = diag(r₂) D₂ diag(r₁) D₁, exactly.",
  stage1: "Where the boxed contrast token looks. The box is the cell of patches whose queries were averaged into it. D₁ = A₁⁺ − λ₁ A₁⁻.",
  stage2: "Which contrast tokens the boxed patch reads, each painted as its cell. D₂ = A₂⁺ − λ₂ A₂⁻.",
  plain: "Where the boxed patch looks. Plain self-attention has one map, never negative, and its rows sum to 1.",
};

function drawWords() {
  const info = run.blocks[state.block];
  const mode = modeOf(state.block);
  const lambdas = [["λ₁", info.lambda1], ["λ₂", info.lambda2]].filter(([, value]) => value !== null);
  const plain = Math.max(...info.streams) < 2 && !info.streams[1];
  const titles = plain ? { positive: "Attention A" } : TITLES[mode];
  const signed = isSigned(state.block);
  find(".vx-says").textContent = plain ? SAYS.plain : SAYS[mode];
  find(".vx-query").textContent = nameOf(info, queriesAreTokens(state.block), queryIndex(state.block));
  find(".vx-lambdas").textContent = lambdas.map(([name, value]) => `${name} = ${value.toFixed(3)}`).join(", ") || info.kind;
  find(".vx-grid").textContent = `${info.grid.join(" × ")} patches` + (info.tokens ? `, ${info.tokens.join(" × ")} contrast tokens` : "");
  find(".vx-answer").textContent = run.answer;
  for (const panel of panels) {
    const stream = panel.dataset.stream;
    const title = titles[stream];
    const limit = limitOf(current, stream);
    panel.hidden = !signed && stream !== "positive";
    if (panel.hidden) continue;
    panel.querySelector("button").textContent = title;
    panel.querySelector("button").title = `Show “${title}” over the image`;
    panel.querySelector("canvas").setAttribute("aria-label", `${title}: map. Arrow keys move the query.`);
    const ramp = (side) => props.palette[theme()][side];
    const stops = stream === "differential" ? [...ramp("negative").slice(1).reverse(), ...ramp("positive")] : ramp(stream);
    panel.querySelector("i").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    const marks = stream === "differential" ? [`−${number(limit)}`, "0", `+${number(limit)}`] : ["0", number(limit)];
    panel.querySelector(".vx-scale").replaceChildren(...marks.map((text) => Object.assign(document.createElement("span"), { textContent: text })));
    const sum = current[stream].reduce((a, b) => a + b, 0);
    const [name, lambda] = mode === "stage1" ? ["λ₁", info.lambda1] : ["λ₂", info.lambda2];
    const isRest = stream === "differential" && mode !== "effective" && Math.abs(1 - lambda - sum) < 0.002;
    panel.querySelector(".vx-sum").textContent = `row sum ${sum.toFixed(3).replace("-", "−")}${isRest ? ` = 1 − ${name}` : ""}`;
  }
  const title = titles[signed ? state.stream : "positive"];
  find(".vx-large figcaption").textContent = `${title} over the image: the stronger the colour, the larger the value.`;
  large.setAttribute("aria-label", `${title} over the image. Arrow keys move the query.`);
  find(".vx-strip h2").textContent = `${title}, of the same query in every head`;
}

function drawHover() {
  const info = run.blocks[state.block];
  find(".vx-pointer").textContent = hover === null ? "–" : nameOf(info, keysAreTokens(state.block), hover);
  for (const panel of panels) {
    const values = current[panel.dataset.stream];
    const rank = hover === null ? 0 : 1 + values.reduce((above, v) => above + (Math.abs(v) > Math.abs(values[hover])), 0);
    panel.querySelector(".vx-value").textContent = hover === null ? "" : `${number(values[hover])} · ${ordinal(rank)} of ${values.length}`;
  }
}

function drawPanels() {
  drawCanvas(large, isSigned(state.block) ? state.stream : "positive");
  for (const panel of panels) if (!panel.hidden) drawCanvas(panel.querySelector("canvas"), panel.dataset.stream);
  drawHover();
}

function draw() {
  if (!run || !layers[state.block] || !root.clientWidth) return;
  const start = performance.now();
  const { block, head } = state;
  current = rowsOf(block, head);
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
  const info = run.blocks[state.block];
  const heads = ["mean", ...Array(info.heads).keys()].map((head) => (head === "mean" ? head : head + 1));
  choices(find(".vx-blocks"), run.blocks.map(({ block }) => block + 1), state.block, (block) => show({ block }));
  choices(find(".vx-heads"), heads, state.head + 1, (i) => show({ head: i - 1 }));
  for (const button of find(".vx-modes").children) {
    button.disabled = !modesOf(info).includes(button.dataset.mode);
    press(button, button.dataset.mode === modeOf(state.block));
  }
  for (const panel of panels) press(panel.querySelector("button"), !isSigned(state.block) || panel.dataset.stream === state.stream);
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
  const info = run.blocks[state.block];
  const ofTokens = queriesAreTokens(state.block);
  const { x, y, prefix } = state.query;
  const [rows, cols] = ofTokens ? info.tokens : info.grid;
  if (!ofTokens && prefix !== null && prefix < info.prefix) {
    return show({ query: { x, y: down > 0 ? 0 : y, prefix: down > 0 ? null : clamp(prefix + right, 0, info.prefix - 1) } });
  }
  let [r, c] = cellAt(info, ofTokens, x, y);
  if (down < 0 && r === 0 && info.prefix && !ofTokens) return show({ query: { x, y, prefix: 0 } });
  r = clamp(r + down, 0, rows - 1);
  c = clamp(c + right, 0, cols - 1);
  const [left, top, rightEdge, bottom] = outline(info, ofTokens, r * cols + c);
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
  canvas.addEventListener("click", (event) => {
    if (!current) return;
    const query = pointed(canvas, event);
    if (query && !(query.prefix !== null && queriesAreTokens(state.block))) show({ query });
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!current) return;
    const at = pointed(canvas, event);
    const info = run.blocks[state.block];
    const ofTokens = keysAreTokens(state.block);
    let key = null;
    if (at && at.prefix === null) {
      const [r, c] = cellAt(info, ofTokens, at.x, at.y);
      key = ofTokens ? r * info.tokens[1] + c : info.prefix + r * info.grid[1] + c;
    } else if (at && !ofTokens) key = at.prefix;
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
