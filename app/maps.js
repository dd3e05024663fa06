// From the arrays of a recorded block to the cells on a canvas. Pages share these functions; nothing here keeps a state.
//
// layer   one block: its facts `info` (models.Layer.facts) and its decoded arrays; `prepare` makes it
// mode    "effective", "stage1" or "stage2"
// stream  "positive", "negative" or "differential"
// head    an index, or MEAN of all heads
// point   a place in the image, { x, y, prefix }: x and y from 0 to 1, or a prefix token's index. It means the same in
//         blocks of different grids, and in different models
// lattice the cells that queries or keys stand for: patches, or the coarser cells that contrast tokens were pooled from
//         or that keys were reduced to
// row     one value for each key: the prefix tokens, then the cells, row by row; NaN outside the query's window

const MEAN = -1;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

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
function prepare(facts, arrays) {
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
function rowsOfHeads(layer, mode, point, lambda) {
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

const STREAMS = ["positive", "negative", "differential"];
const signs = (row) => ({ positive: row.map((v) => Math.max(v, 0)), negative: row.map((v) => Math.max(-v, 0)), differential: row });
const rowsOf = (layer, mode, head, point) => rowsOfHeads(layer, mode, point)[head + 1];

const modesOf = (info) => (info.streams[1] ? ["effective", "stage1", "stage2"] : info.streams[0] === 2 ? ["effective", "stage1"] : ["effective"]);
const modeOf = (info, wanted) => (modesOf(info).includes(wanted) ? wanted : "effective");
// Has this map a negative part? If not, one picture says it all.
const isSigned = ({ streams }, mode) => ({ effective: Math.max(...streams), stage1: streams[0], stage2: streams[1] })[mode] === 2;
const largest = (values) => values.reduce((most, value) => (Math.abs(value) > most ? Math.abs(value) : most), 0);
const total = (values) => values.reduce((sum, value) => (Number.isNaN(value) ? sum : sum + value), 0);
const limitOf = (rows, stream) =>
  stream === "differential" ? largest(rows.differential) : Math.max(largest(rows.positive), largest(rows.negative));

// ---- Geometry

// What the queries or the keys (`side`) of a map stand for: the prefix tokens, then cells that share the image.
function latticeOf(info, mode, side) {
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
const cellAt = (info, { size }, { x, y }) => [tileAt(y * info.grid[0], size[0], info.grid[0]), tileAt(x * info.grid[1], size[1], info.grid[1])];

// The query or key at a point.
function indexAt(info, lattice, point) {
  if (point.prefix !== null && point.prefix < lattice.prefix) return point.prefix;
  const [r, c] = cellAt(info, lattice, point);
  return lattice.prefix + r * lattice.size[1] + c;
}

// The outline of a cell, in parts of the image: [left, top, right, bottom].
function outline(info, lattice, index) {
  const [rows, cols] = info.grid;
  const cell = index - lattice.prefix;
  const [top, bottom] = poolSpan(Math.floor(cell / lattice.size[1]), lattice.size[0], rows);
  const [left, right] = poolSpan(cell % lattice.size[1], lattice.size[1], cols);
  return [left / cols, top / rows, right / cols, bottom / rows];
}

function nameOf(lattice, index, prefixNames) {
  if (index < lattice.prefix) return `${prefixNames[index]} token`;
  const cell = index - lattice.prefix;
  return `${lattice.what}, row ${Math.floor(cell / lattice.size[1]) + 1}, column ${(cell % lattice.size[1]) + 1}`;
}

// Where things are on a canvas, in CSS pixels: the squares of the prefix tokens on top, the image below. `aspect` is
// the image's height by its width; squares with a name beside them stand further apart.
function layout(canvas, info, aspect, named) {
  const width = canvas.clientWidth;
  const side = info.prefix ? clamp(width / 14, 14, 24) : 0;
  const step = named ? 110 : side + 5;
  const prefix = [...Array(info.prefix).keys()].map((i) => [1 + i * step, 1, side, side]);
  const top = side ? side + 10 : 0;
  return { prefix, image: [0, top, width, width * aspect], height: top + width * aspect };
}

// The point under the pointer, or null. `place` is the canvas's layout.
function pointUnder(canvas, event, place) {
  const box = canvas.getBoundingClientRect();
  const [px, py] = [event.clientX - box.left, event.clientY - box.top];
  const prefix = place.prefix.findIndex(([x, y, w, h]) => px >= x - 2 && px <= x + w + 2 && py >= y - 2 && py <= y + h + 4);
  const [x, y, w, h] = place.image;
  const inside = { x: clamp((px - x) / w, 0, 0.9999), y: clamp((py - y) / h, 0, 0.9999) };
  if (prefix >= 0) return { ...inside, prefix };
  return py < y ? null : { ...inside, prefix: null };
}

// ---- Colour

const parse = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
const theme = () => (document.body.classList.contains("dark") ? "dark" : "light");

function shade(stops, part) {
  const at = clamp(part, 0, 1) * (stops.length - 1);
  const i = Math.min(Math.floor(at), stops.length - 2);
  return stops[i].map((from, channel) => from + (stops[i + 1][channel] - from) * (at - i));
}

// Colours of the values from -limit to +limit as 513 pixels, strongest negative first; then the colour of no value.
const STEPS = 256;
const NO_VALUE = 2 * STEPS + 1;
function pixels(colourOf, none) {
  const bytes = new Uint8ClampedArray(4 * (NO_VALUE + 1));
  for (let i = -STEPS; i <= STEPS; i++) bytes.set(colourOf(i < 0 ? "negative" : "positive", Math.abs(i) / STEPS), 4 * (i + STEPS));
  bytes.set(none, 4 * NO_VALUE);
  return new Uint32Array(bytes.buffer);
}

// The colours of draw.PALETTE: solid on a light or a dark page, and `veil`, to lay over an image.
function colourTables(palette) {
  const solid = (theme) => {
    const ramps = { positive: palette[theme].positive.map(parse), negative: palette[theme].negative.map(parse) };
    return pixels((side, part) => [...shade(ramps[side], part), 255], [0, 0, 0, 0]);
  };
  const over = { positive: parse(palette.overlay.positive), negative: parse(palette.overlay.negative) };
  return { light: solid("light"), dark: solid("dark"), veil: pixels((side, part) => [...over[side], 230 * part], [128, 128, 128, 150]) };
}

// The colour bar of a stream as a CSS background.
function barOf(palette, theme, stream) {
  const { positive, negative } = palette[theme];
  const stops = { positive, negative, differential: [...negative.slice(1).reverse(), ...positive] }[stream];
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

// The values of a stream as pixels; the negative stream is positive in number and blue in colour.
function paint(values, stream, limit, colours) {
  const scale = limit ? (stream === "negative" ? -STEPS : STEPS) / limit : 0;
  return Uint32Array.from(values, (value) => colours[Number.isNaN(value) ? NO_VALUE : STEPS + Math.round(clamp(value * scale, -STEPS, STEPS))]);
}

// ---- Drawing

// Which key each pixel of a map's picture shows. A pixel is a patch; of coarser cells, a quarter of one, because they
// may meet in a patch's middle.
const pixelKeys = new WeakMap();
function keyOfPixel(info, lattice) {
  const kept = pixelKeys.get(info) ?? pixelKeys.set(info, {}).get(info);
  if (kept[lattice.what]) return kept[lattice.what];
  const [rows, cols] = info.grid.map((count, i) => count * (count === lattice.size[i] ? 1 : 2));
  const keys = new Uint32Array(rows * cols);
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < cols; x++) {
      keys[y * cols + x] = indexAt(info, lattice, { x: (x + 0.5) / cols, y: (y + 0.5) / rows, prefix: null });
    }
  }
  return (kept[lattice.what] = { keys, rows, cols });
}

// A map without its prefix tokens as a small picture, the canvas's size.
function raster(canvas, info, mode, painted) {
  const { keys, rows, cols } = keyOfPixel(info, latticeOf(info, mode, "key"));
  canvas.width = cols;
  canvas.height = rows;
  const picture = new ImageData(new Uint8ClampedArray(keys.map((key) => painted[key]).buffer), cols, rows);
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

// Draws a map with its query as wide as the canvas is shown.
//   info, mode, aspect   of the map and of the image
//   painted              the colour of every key
//   photo                drawn below the map, if given
//   prefixNames          written beside the squares of the prefix tokens, if given
//   point, hover         the query's place, and the key under the pointer or null
function drawMap(canvas, { info, mode, aspect, painted, photo = null, prefixNames = null, point, hover = null }) {
  const [queries, keys] = [latticeOf(info, mode, "query"), latticeOf(info, mode, "key")];
  const place = layout(canvas, info, aspect, prefixNames);
  const scale = window.devicePixelRatio;
  canvas.style.height = `${place.height}px`;
  canvas.width = Math.round(place.image[2] * scale);
  canvas.height = Math.round(place.height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);

  if (photo) context.drawImage(photo, ...place.image);
  context.imageSmoothingEnabled = false;
  context.drawImage(raster(document.createElement("canvas"), info, mode, painted), ...place.image);

  if (info.patches) drawWindows(context, info, place.image, photo ? 1 : 0.5);

  const style = getComputedStyle(canvas);
  place.prefix.forEach((box, i) => {
    if (keys.prefix) {
      const [red, green, blue, opacity] = new Uint8ClampedArray(painted.buffer, 4 * i, 4);
      context.fillStyle = `rgb(${red} ${green} ${blue} / ${opacity / 255})`;
      context.fillRect(...box);
    }
    context.strokeStyle = style.getPropertyValue("--body-text-color-subdued");
    context.lineWidth = 0.5;
    context.strokeRect(...box);
    if (!prefixNames) return;
    context.fillStyle = style.color;
    context.font = `13px ${style.fontFamily}`;
    context.textBaseline = "middle";
    context.fillText(prefixNames[i], box[0] + box[2] + 7, box[1] + box[3] / 2 + 1);
  });

  const boxOf = (lattice, index) => {
    if (index < lattice.prefix) return place.prefix[index];
    const [left, top, right, bottom] = outline(info, lattice, index);
    const [x, y, w, h] = place.image;
    return [x + left * w, y + top * h, (right - left) * w, (bottom - top) * h];
  };
  if (hover !== null) frame(context, boxOf(keys, hover), photo ? 1.5 : 1);
  frame(context, boxOf(queries, indexAt(info, queries, point)), photo ? 2.5 : 2);
}

// Lines between patches that do not share a window: [[x, y, width, height], ...], one of the two 0.
function windowBorders({ grid: [rows, cols], slot, slots }, [left, top, width, height]) {
  const windowOf = (r, c) => Math.floor(slot[r * cols + c] / slots);
  const [w, h] = [width / cols, height / rows];
  const lines = [];
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < cols; c++) {
      if (c && windowOf(r, c) !== windowOf(r, c - 1)) lines.push([left + c * w, top + r * h, 0, h]);
      if (r && windowOf(r, c) !== windowOf(r - 1, c)) lines.push([left + c * w, top + r * h, w, 0]);
    }
  }
  return lines;
}

const BORDER = [["rgb(255,255,255)", 2], ["rgb(63,63,70)", 1]]; // light below dark: colour and width
function drawWindows(context, info, place, thickness) {
  const path = new Path2D();
  for (const line of windowBorders(info, place)) path.rect(...line);
  for (const [colour, width] of BORDER) {
    context.strokeStyle = colour;
    context.lineWidth = thickness * width;
    context.stroke(path);
  }
}

function windowLines(info, place, thickness) {
  const path = windowBorders(info, place).map(([x, y, w, h]) => `M${x} ${y}h${w}v${h}`).join("");
  const line = ([colour, width]) => `<path d="${path}" fill="none" stroke="${colour}" stroke-width="${thickness * width}"/>`;
  return BORDER.map(line).join("");
}

// A dark line beside a light one: it shows on any picture. Inside the box, so that nothing is cut off; a small box is
// left free and gets them around it: [colour, x, y, width, height] of both lines.
function frameLines([x, y, w, h], width) {
  const insets = Math.min(w, h) < 7 * width ? [-1.5 * width, -0.5 * width] : [0.5 * width, 1.5 * width];
  return insets.map((inset, i) => [["#000", "#fff"][i], x + inset, y + inset, w - 2 * inset, h - 2 * inset]);
}

function frame(context, box, width) {
  context.lineWidth = width;
  for (const [colour, ...line] of frameLines(box, width)) {
    context.strokeStyle = colour;
    context.strokeRect(...line);
  }
}

// ---- The same as a drawing (SVG), to keep: on white, with colour bars

const escaped = (text) => String(text).replace(/[&<>"]/g, (character) => `&#${character.charCodeAt(0)};`);
const bytesOf = (pixel) => new Uint8ClampedArray(Uint32Array.of(pixel).buffer);
const fillOf = (pixel) => {
  const [red, green, blue, opacity] = bytesOf(pixel);
  return `fill="rgb(${red},${green},${blue})"${opacity < 255 ? ` fill-opacity="${(opacity / 255).toFixed(3)}"` : ""}`;
};

// The cells of a map as one path for each colour, in a square of 1 by 1.
function cellsOf(info, mode, painted) {
  const { keys, rows, cols } = keyOfPixel(info, latticeOf(info, mode, "key"));
  const paths = new Map();
  for (let y = 0; y < rows; y++) {
    for (let x = 0, end; x < cols; x = end) {
      const colour = painted[keys[y * cols + x]];
      for (end = x + 1; end < cols && painted[keys[y * cols + end]] === colour; ) end++;
      if (bytesOf(colour)[3]) paths.set(colour, `${paths.get(colour) ?? ""}M${x} ${y}h${end - x}v1h${x - end}z`);
    }
  }
  const drawn = [...paths].map(([colour, path]) => `<path ${fillOf(colour)} d="${path}"/>`);
  return `<g transform="scale(${1 / cols} ${1 / rows})" shape-rendering="crispEdges">${drawn.join("")}</g>`;
}

function framed(box, width) {
  const line = ([colour, x, y, w, h]) =>
    `<rect x="${x}" y="${y}" width="${w}" height="${h}" fill="none" stroke="${colour}" stroke-width="${width}"/>`;
  return frameLines(box, width).map(line).join("");
}

// A picture of a view, as the text of an SVG file.
//   info, mode, aspect, point   as for `drawMap`
//   photo                       address of the image, as a data: URL
//   maps                        of every stream: { stream, title, values, limit, marks, sum }
//   over                        the stream to lay over the image
//   title, lines                written on top
function drawingOf({ info, mode, aspect, photo, point, palette, maps, over, title, lines }) {
  const tables = colourTables(palette);
  const [wide, narrow, gap] = [300, 200, 24];
  const squares = info.prefix ? 26 : 0;
  const [top, tall] = [98, 300 * aspect + squares];
  const queries = latticeOf(info, mode, "query");
  const parts = [];
  const text = (x, y, words, more = "") => parts.push(`<text x="${x}" y="${y}" ${more}>${escaped(words)}</text>`);

  const map = (left, width, values, stream, limit, table, picture) => {
    const painted = paint(values, stream, limit, table);
    const y = top + squares;
    const side = 18;
    if (picture) parts.push(`<image x="${left}" y="${y}" width="${width}" height="${width * aspect}" preserveAspectRatio="none" href="${picture}"/>`);
    parts.push(`<g transform="translate(${left} ${y}) scale(${width} ${width * aspect})">${cellsOf(info, mode, painted)}</g>`);
    if (info.patches) parts.push(windowLines(info, [left, y, width, width * aspect], picture ? 1 : 0.5));
    const square = (i) => [left + i * (side + 4), top, side, side];
    for (let i = 0; i < info.prefix; i++) {
      const [x, down, w, h] = square(i);
      const fill = latticeOf(info, mode, "key").prefix ? fillOf(painted[i]) : 'fill="none"';
      parts.push(`<rect x="${x}" y="${down}" width="${w}" height="${h}" ${fill} stroke="#71717a" stroke-width="0.5"/>`);
    }
    const index = indexAt(info, queries, point);
    if (index < queries.prefix) return parts.push(framed(square(index), 2));
    const [l, t, r, b] = outline(info, queries, index);
    parts.push(framed([left + l * width, y + t * width * aspect, (r - l) * width, (b - t) * width * aspect], 2));
  };

  const shown = maps.find(({ stream }) => stream === over);
  text(gap, 32, title, 'font-size="16" font-weight="bold"');
  lines.forEach((line, i) => text(gap, 52 + 18 * i, line));
  map(gap, wide, shown.values, over, shown.limit, tables.veil, photo);
  text(gap, top + tall + 20, `${shown.title} over the image`);
  maps.forEach(({ stream, title, values, limit, marks, sum }, i) => {
    const left = gap + wide + gap + i * (narrow + gap);
    const under = top + squares + narrow * aspect;
    text(left, top - 8, title, 'font-weight="bold"');
    map(left, narrow, values, stream, limit, tables.light, null);
    const { positive, negative } = palette.light;
    const stops = { positive, negative, differential: [...negative.slice(1).reverse(), ...positive] }[stream];
    const stop = (colour, k) => `<stop offset="${k / (stops.length - 1)}" stop-color="${colour}"/>`;
    parts.push(`<linearGradient id="bar-${stream}">${stops.map(stop).join("")}</linearGradient>`);
    parts.push(`<rect x="${left}" y="${under + 10}" width="${narrow}" height="10" fill="url(#bar-${stream})"/>`);
    marks.forEach((mark, k) => {
      const [part, anchor] = k === 0 ? [0, "start"] : k === marks.length - 1 ? [1, "end"] : [0.5, "middle"];
      text(left + part * narrow, under + 36, mark, `text-anchor="${anchor}"`);
    });
    text(left, under + 54, sum);
  });
  const width = gap + wide + maps.length * (gap + narrow) + gap;
  const height = Math.ceil(top + Math.max(tall + 20, squares + narrow * aspect + 54) + gap);
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#18181b">
<title>${escaped(title)}</title><rect width="${width}" height="${height}" fill="#fff"/>
${parts.join("\n")}
</svg>
`;
}

// ---- Words

const number = (value) => (value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : value.toPrecision(3)).replace("-", "−");
const ordinal = (n) => n + (n % 100 > 10 && n % 100 < 14 ? "th" : (["th", "st", "nd", "rd"][n % 10] ?? "th"));

// What the streams of a map are called; a map without a negative part has one name.
function titlesOf(info, mode) {
  if (isSigned(info, mode)) return TITLES[mode];
  return { positive: info.streams[1] ? { effective: "Effective E", stage1: "Attention A₁", stage2: "Attention A₂" }[mode] : "Attention A" };
}

const TITLES = {
  effective: { positive: "Draws in", negative: "Pushes away", differential: "Effective E" },
  stage1: { positive: "Positive A₁⁺", negative: "Negative A₁⁻", differential: "Differential D₁" },
  stage2: { positive: "Positive A₂⁺", negative: "Negative A₂⁻", differential: "Differential D₂" },
};

// What a map says, in a sentence or two.
function meaningOf({ kind, streams, tokens, grid, window }, mode) {
  const [first, second] = streams.map((count, i) => (count === 2 ? ["D₁", "D₂"] : ["A₁", "A₂"])[i]);
  if (mode === "effective" && Math.max(...streams) === 2) {
    const formula = streams[1] ? `diag(r₂) ${second} diag(r₁) ${first}` : `diag(r₁) ${first}`;
    return `What the boxed patch draws in (orange) or pushes away (blue)${streams[1] ? ", both stages in one" : ""}: E = ${formula}, exactly.`;
  }
  if (mode === "effective" && streams[1]) return `What the boxed patch draws in, both stages in one: E = ${second} ${first}, exactly.`;
  if (mode === "effective") return (String(window) !== String(grid) && PLAIN[kind]) || PLAIN.mhsa;
  if (mode === "stage2") {
    return `Which contrast tokens the boxed patch reads, each painted as its cell.${streams[1] === 2 ? " D₂ = A₂⁺ − λ₂ A₂⁻." : ""}`;
  }
  const whose = tokens
    ? "Where the boxed contrast token looks. The box is the cell of patches whose queries were averaged into it."
    : "Where the boxed patch looks.";
  return whose + (streams[0] === 2 ? " D₁ = A₁⁺ − λ₁ A₁⁻." : "");
}

const PLAIN = {
  mhsa: "Where the boxed patch looks. Plain self-attention has one map, never negative, and its rows sum to 1.",
  sr: "Where the boxed patch looks. A key is a cell of patches that a convolution reduced to one; the rows sum to 1.",
  window: "Where the boxed patch looks: nowhere but in its window, whose borders are drawn. A shifted window goes on at the opposite edge.",
  stripes: "Where the boxed patch looks: nowhere but in its stripe, whose borders are drawn. Half the heads look up and down, half sideways.",
};

// ---- The page

const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
const press = (button, pressed) => button.setAttribute("aria-pressed", pressed);

// A row of buttons; kept while their number stays, so that the focus does too.
function choices(container, labels, chosen, choose) {
  if (container.children.length !== labels.length) {
    container.replaceChildren(...labels.map(() => make("button", { type: "button" })));
  }
  labels.forEach((textContent, i) => {
    press(Object.assign(container.children[i], { textContent, onclick: () => choose(i) }), i === chosen);
  });
}
