// From the arrays of a recorded block to the cells on a canvas. Pages share these functions; nothing here keeps a state.
//
// layer   one block: its facts `info` (packing.Layer.facts) and its decoded arrays; `prepare` makes it
// mode    "effective", "stage1" or "stage2"
// stream  "positive", "negative" or "differential"
// head    an index, or MEAN of all heads
// point   a point of the image, { x, y, prefix }: x and y from 0 to 1, or a prefix token's index. It means the same in
//         blocks of different grids, and in different models
// lattice the cells that queries or keys stand for: patches, or the coarser cells that contrast tokens were pooled from
//         or that keys were reduced to
// row     one value for each key: the prefix tokens, then the cells, row by row; NaN outside the query's window

export const MEAN = -1;
export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// ---- Values: from the server to arrays, from arrays to the rows of a query

const HALF = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
});

const TYPES = { float16: Uint16Array, float32: Float32Array, int32: Int32Array };

function decode({ shape, type, data }) {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return { shape, values: new TYPES[type](bytes.buffer), half: type === "float16" };
}

// A layer from the facts of a block and its arrays as the server sends them.
export function prepare(facts, arrays) {
  const maps = Object.fromEntries(Object.entries(arrays).map(([name, array]) => [name, decode(array)]));
  const info = maps.patches ? { ...facts, ...windowsOf(facts, maps) } : facts;
  return { info, maps, first: info.streams[1] ? firstStage(info, maps) : null };
}

// Of attention in windows: `slot`, where each patch stands in the maps, and `patches`, which patch stands in each slot.
function windowsOf(facts, { patches, positive1 }) {
  const slot = new Uint32Array(facts.grid[0] * facts.grid[1]);
  patches.values.forEach((patch, i) => patch >= 0 && (slot[patch] = i));
  return { slot, patches: patches.values, slots: positive1.shape[2] };
}

function row({ shape, values, half }, head, query) {
  const part = values.subarray((head * shape[1] + query) * shape[2], (head * shape[1] + query + 1) * shape[2]);
  return half ? Float32Array.from(part, (bits) => HALF[bits]) : part;
}

// D = A+ - lambda A-, or A+ of a stage with a single stream
function applied(info, maps, stage, head, query, lambda = info[`lambda${stage}`]) {
  const positive = row(maps[`positive${stage}`], head, query);
  if (info.streams[stage - 1] < 2) return positive;
  const negative = row(maps[`negative${stage}`], head, query);
  return positive.map((value, i) => value - lambda * negative[i]);
}

const scaled = (values, scale, head, query) => (scale ? values.map((value) => value * scale.values[head * scale.shape[1] + query]) : values);

// diag(r1) D1 of every head, computed when the maps arrive: the part of E that all queries share
function firstStage(info, maps) {
  const { shape } = maps.positive1;
  const values = new Float32Array(maps.positive1.values.length);
  for (let head = 0; head < shape[0]; head++) {
    for (let q = 0; q < shape[1]; q++) {
      values.set(scaled(applied(info, maps, 1, head, q), maps.scale1, head, q), (head * shape[1] + q) * shape[2]);
    }
  }
  return { shape, values };
}

// E[q, :] = r2[q] D2[q, :] diag(r1) D1, or r1[q] D1[q, :] of a single stage
function effectiveRow({ info, maps, first }, head, query) {
  if (!first) return scaled(applied(info, maps, 1, head, query), maps.scale1, head, query);
  const [, tokens, length] = first.shape;
  const weights = scaled(applied(info, maps, 2, head, query), maps.scale2, head, query);
  const result = new Float32Array(length);
  for (let token = 0; token < tokens; token++) {
    const from = (head * tokens + token) * length;
    for (let i = 0; i < length; i++) result[i] += weights[token] * first.values[from + i];
  }
  return result;
}

// A row over the slots of a window as one over all patches; NaN where the window does not reach.
function spread(info, slot, values) {
  if (!info.patches) return values;
  const result = new Float32Array(info.slot.length).fill(NaN);
  const start = slot - (slot % info.slots);
  values.forEach((value, i) => info.patches[start + i] >= 0 && (result[info.patches[start + i]] = value));
  return result;
}

function mean(rows) {
  const result = new Float32Array(rows[0].length);
  for (const values of rows) for (let i = 0; i < result.length; i++) result[i] += values[i] / rows.length;
  return result;
}

// The rows of the query at a point, { positive, negative, differential }, a value for each key: of the mean of all
// heads, then of each head. `lambda` is another one than the layer's, for a stage's differential row.
export function rowsOfHeads(layer, mode, point, lambda) {
  const { info, maps } = layer;
  const at = indexAt(info, latticeOf(info, mode, "query"), point);
  const query = info.patches ? info.slot[at] : at;
  const stage = mode === "stage2" ? 2 : 1;
  const heads = Array.from({ length: info.heads }, (_, head) => {
    if (mode === "effective") return signs(spread(info, query, effectiveRow(layer, head, query)));
    const positive = row(maps[`positive${stage}`], head, query);
    if (info.streams[stage - 1] < 2) return { positive, negative: positive.map(() => 0), differential: positive };
    const differential = applied(info, maps, stage, head, query, lambda);
    return { positive, negative: row(maps[`negative${stage}`], head, query), differential };
  });
  const averaged = (stream) => mean(heads.map((rows) => rows[stream]));
  const all = mode === "effective" ? signs(averaged("differential")) : Object.fromEntries(STREAMS.map((s) => [s, averaged(s)]));
  return [all, ...heads];
}

export const STREAMS = ["positive", "negative", "differential"];
const signs = (values) => ({ positive: values.map((v) => Math.max(v, 0)), negative: values.map((v) => Math.max(-v, 0)), differential: values });
export const rowsOf = (layer, mode, head, point) => rowsOfHeads(layer, mode, point)[head + 1];

export const modesOf = (info) => (info.streams[1] ? ["effective", "stage1", "stage2"] : info.streams[0] === 2 ? ["effective", "stage1"] : ["effective"]);
export const modeOf = (info, wanted) => (modesOf(info).includes(wanted) ? wanted : "effective");
// Has this map a negative part? If not, one picture says it all.
export const isSigned = ({ streams }, mode) => ({ effective: Math.max(...streams), stage1: streams[0], stage2: streams[1] })[mode] === 2;
const largest = (values) => values.reduce((most, value) => (Math.abs(value) > most ? Math.abs(value) : most), 0);
export const total = (values) => values.reduce((sum, value) => (Number.isNaN(value) ? sum : sum + value), 0);
export const limitOf = (rows, stream) =>
  stream === "differential" ? largest(rows.differential) : Math.max(largest(rows.positive), largest(rows.negative));

// ---- Geometry

// What the queries or the keys (`side`) of a map stand for: the prefix tokens, then cells that share the image.
export function latticeOf(info, mode, side) {
  const ofTokens = side === "query" ? mode === "stage1" && info.tokens : mode === "stage2";
  if (ofTokens) return { what: "contrast token", size: info.tokens, prefix: 0 };
  if (side === "key" && info.keys) return { what: "reduced key", size: info.keys, prefix: 0 };
  return { what: "patch", size: info.grid, prefix: info.prefix };
}

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

// Row and column of the cell at a point.
export const cellAt = (info, { size }, { x, y }) => [tileAt(y * info.grid[0], size[0], info.grid[0]), tileAt(x * info.grid[1], size[1], info.grid[1])];

// The query or key at a point.
export function indexAt(info, lattice, point) {
  if (point.prefix !== null && point.prefix < lattice.prefix) return point.prefix;
  const [r, c] = cellAt(info, lattice, point);
  return lattice.prefix + r * lattice.size[1] + c;
}

// The outline of a cell, in parts of the image: [left, top, right, bottom].
export function outline(info, lattice, index) {
  const [rows, cols] = info.grid;
  const cell = index - lattice.prefix;
  const [top, bottom] = poolSpan(Math.floor(cell / lattice.size[1]), lattice.size[0], rows);
  const [left, right] = poolSpan(cell % lattice.size[1], lattice.size[1], cols);
  return [left / cols, top / rows, right / cols, bottom / rows];
}

export function nameOf(lattice, index, prefixNames) {
  if (index < lattice.prefix) return `${prefixNames[index]} token`;
  const cell = index - lattice.prefix;
  return `${lattice.what}, row ${Math.floor(cell / lattice.size[1]) + 1}, column ${(cell % lattice.size[1]) + 1}`;
}

// Where things are on a canvas, in CSS pixels: the squares of the prefix tokens on top, the image below. `aspect` is
// the image's height by its width; squares with a name beside them stand further apart.
export function layout(canvas, info, aspect, named) {
  const width = canvas.clientWidth;
  const side = info.prefix ? clamp(width / 14, 14, 24) : 0;
  const step = named ? 110 : side + 5;
  const prefix = [...Array(info.prefix).keys()].map((i) => [1 + i * step, 1, side, side]);
  const top = side ? side + 10 : 0;
  return { prefix, image: [0, top, width, width * aspect], height: top + width * aspect };
}

// The point under the pointer, or null. `boxes` is the canvas's layout.
export function pointUnder(canvas, event, boxes) {
  const box = canvas.getBoundingClientRect();
  const [px, py] = [event.clientX - box.left, event.clientY - box.top];
  const prefix = boxes.prefix.findIndex(([x, y, w, h]) => px >= x - 2 && px <= x + w + 2 && py >= y - 2 && py <= y + h + 4);
  const [x, y, w, h] = boxes.image;
  const inside = { x: clamp((px - x) / w, 0, 0.9999), y: clamp((py - y) / h, 0, 0.9999) };
  if (prefix >= 0) return { ...inside, prefix };
  return py < y ? null : { ...inside, prefix: null };
}
