// Maps of patches over a photo, as the Classify tab draws them.

import { raster } from "./map_drawing.js";
import { clamp } from "./maps.js";

// The facts of `maps.js` of a map over patches alone.
export const gridInfo = (grid, tokens = null) => ({ grid, tokens, keys: null, prefix: 0, streams: [1, 1] });

// Draws, as wide as the canvas is shown:
//   photo             the picture below
//   layers            maps over it: { info, mode, painted, isSmooth }
//   boxes             outlines [left, top, right, bottom] in parts of the picture, with a color and a width each
//   mark              where a line stands from top to bottom, from 0 to 1, or null
export function drawOver(canvas, { photo, layers = [], boxes = [], mark = null }) {
  const scale = window.devicePixelRatio;
  const width = Math.round(canvas.clientWidth * scale);
  const height = Math.round((width * photo.naturalHeight) / photo.naturalWidth);
  canvas.style.aspectRatio = `${photo.naturalWidth} / ${photo.naturalHeight}`;
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.drawImage(photo, 0, 0, width, height);
  for (const { info, mode = "effective", painted, isSmooth = false } of layers) {
    context.imageSmoothingEnabled = isSmooth;
    context.imageSmoothingQuality = "high";
    context.drawImage(raster(document.createElement("canvas"), info, mode, painted), 0, 0, width, height);
  }
  const line = mark === null ? [] : doubled([mark, -1, mark, 2], 2);
  for (const { box: [left, top, right, bottom], color, thickness } of [...boxes, ...line]) {
    context.lineWidth = thickness * scale;
    context.strokeStyle = color;
    context.strokeRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
  }
}

// A light line on a dark one, which shows on any picture.
export const doubled = (box, thickness) => [{ box, color: "rgb(0 0 0 / 0.7)", thickness: thickness + 2 }, { box, color: "#fff", thickness }];

// The outline of a patch.
export function outlined([rows, cols], patch, thickness = 1.5) {
  const [row, column] = [Math.floor(patch / cols), patch % cols];
  return doubled([column / cols, row / rows, (column + 1) / cols, (row + 1) / rows], thickness);
}

// The patch under the pointer.
export function patchUnder(canvas, event, [rows, cols]) {
  const box = canvas.getBoundingClientRect();
  const part = (at, from, size) => clamp((at - from) / size, 0, 0.9999);
  return Math.floor(part(event.clientY, box.top, box.height) * rows) * cols + Math.floor(part(event.clientX, box.left, box.width) * cols);
}

// A row of numbers as the server sends it.
export const decodeRow = (data) => new Float32Array(Uint8Array.from(atob(data), (character) => character.charCodeAt(0)).buffer);

// The blocks of an answer, their rows decoded: rows[head] is a value for each patch.
export function unpack(blocks) {
  return blocks.map((block) => {
    const values = decodeRow(block.rows);
    const size = block.grid[0] * block.grid[1];
    const rows = Array.from({ length: block.heads }, (_, head) => values.subarray(head * size, (head + 1) * size));
    return { ...block, rows, info: gridInfo(block.grid) };
  });
}
