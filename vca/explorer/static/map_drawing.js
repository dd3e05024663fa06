import { clamp, indexAt, latticeOf, layout, outline } from "./maps.js";

// ---- Colour

const parse = (color) => [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
export const theme = () => (document.body.classList.contains("dark") ? "dark" : "light");

function shade(stops, part) {
  const at = clamp(part, 0, 1) * (stops.length - 1);
  const i = Math.min(Math.floor(at), stops.length - 2);
  return stops[i].map((from, channel) => from + (stops[i + 1][channel] - from) * (at - i));
}

// Colours of the values from -limit to +limit as 513 pixels, strongest negative first; then the colour of no value.
const STEPS = 256;
const NO_VALUE = 2 * STEPS + 1;
function pixels(colorOf, none) {
  const bytes = new Uint8ClampedArray(4 * (NO_VALUE + 1));
  for (let i = -STEPS; i <= STEPS; i++) bytes.set(colorOf(i < 0 ? "negative" : "positive", Math.abs(i) / STEPS), 4 * (i + STEPS));
  bytes.set(none, 4 * NO_VALUE);
  return new Uint32Array(bytes.buffer);
}

// The colours of drawing.PALETTE: solid on a light or a dark page, and `veil`, to lay over an image.
export function colorTables(palette) {
  const solid = (scheme) => {
    const ramps = { positive: palette[scheme].positive.map(parse), negative: palette[scheme].negative.map(parse) };
    return pixels((side, part) => [...shade(ramps[side], part), 255], [0, 0, 0, 0]);
  };
  const over = { positive: parse(palette.overlay.positive), negative: parse(palette.overlay.negative) };
  return { light: solid("light"), dark: solid("dark"), veil: pixels((side, part) => [...over[side], 230 * part], [128, 128, 128, 150]) };
}

// The colour bar of a stream as a CSS background.
export function barOf(palette, scheme, stream) {
  const { positive, negative } = palette[scheme];
  const stops = { positive, negative, differential: [...negative.slice(1).reverse(), ...positive] }[stream];
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

// The colour bar of what is laid over a photo.
export function overlayBar({ overlay: { positive, negative } }, isSigned, isNegative = false) {
  return `linear-gradient(to right, ${isSigned ? `${negative}, ` : ""}#b9b9bd, ${isNegative ? negative : positive})`;
}

// The values of a stream as pixels; the negative stream is positive in number and blue in colour.
export function paint(values, stream, limit, colors) {
  const scale = limit ? (stream === "negative" ? -STEPS : STEPS) / limit : 0;
  return Uint32Array.from(values, (value) => colors[Number.isNaN(value) ? NO_VALUE : STEPS + Math.round(clamp(value * scale, -STEPS, STEPS))]);
}

// ---- Drawing

// Which key each pixel of a map's picture shows. A pixel is a patch; of coarser cells, a quarter of one, because they
// may meet in a patch's middle.
const pixelKeys = new WeakMap();
export function keyOfPixel(info, lattice) {
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
export function raster(canvas, info, mode, painted) {
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
//   isSmooth             blend the cells into each other
//   point, hover         the query's point, null for a map without one, and the key under the pointer or null
export function drawMap(canvas, { info, mode, aspect, painted, photo = null, prefixNames = null, point, hover = null, isSmooth = false }) {
  const [queries, keys] = [latticeOf(info, mode, "query"), latticeOf(info, mode, "key")];
  const boxes = layout(canvas, info, aspect, prefixNames);
  const scale = window.devicePixelRatio;
  canvas.style.height = `${boxes.height}px`;
  canvas.width = Math.round(boxes.image[2] * scale);
  canvas.height = Math.round(boxes.height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);

  if (photo) context.drawImage(photo, ...boxes.image);
  context.imageSmoothingEnabled = isSmooth;
  context.imageSmoothingQuality = "high";
  context.drawImage(raster(document.createElement("canvas"), info, mode, painted), ...boxes.image);

  if (info.patches) drawWindows(context, info, boxes.image, photo ? 1 : 0.5);

  const style = getComputedStyle(canvas);
  boxes.prefix.forEach((box, i) => {
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
    if (index < lattice.prefix) return boxes.prefix[index];
    const [left, top, right, bottom] = outline(info, lattice, index);
    const [x, y, w, h] = boxes.image;
    return [x + left * w, y + top * h, (right - left) * w, (bottom - top) * h];
  };
  if (hover !== null) frame(context, boxOf(keys, hover), photo ? 1.5 : 1);
  if (point) frame(context, boxOf(queries, indexAt(info, queries, point)), photo ? 2.5 : 2);
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

const BORDER = [["rgb(255,255,255)", 2], ["rgb(63,63,70)", 1]]; // light below dark: color and width
function drawWindows(context, info, box, thickness) {
  const path = new Path2D();
  for (const line of windowBorders(info, box)) path.rect(...line);
  for (const [color, width] of BORDER) {
    context.strokeStyle = color;
    context.lineWidth = thickness * width;
    context.stroke(path);
  }
}

export function windowLines(info, box, thickness) {
  const path = windowBorders(info, box).map(([x, y, w, h]) => `M${x} ${y}h${w}v${h}`).join("");
  const line = ([color, width]) => `<path d="${path}" fill="none" stroke="${color}" stroke-width="${thickness * width}"/>`;
  return BORDER.map(line).join("");
}

// A dark line beside a light one: it shows on any picture. Inside the box, so that nothing is cut off; a small box is
// left free and gets them around it: [colour, x, y, width, height] of both lines.
export function frameLines([x, y, w, h], width) {
  const insets = Math.min(w, h) < 7 * width ? [-1.5 * width, -0.5 * width] : [0.5 * width, 1.5 * width];
  return insets.map((inset, i) => [["#000", "#fff"][i], x + inset, y + inset, w - 2 * inset, h - 2 * inset]);
}

function frame(context, box, width) {
  context.lineWidth = width;
  for (const [color, ...line] of frameLines(box, width)) {
    context.strokeStyle = color;
    context.strokeRect(...line);
  }
}
