import { colorTables, frameLines, keyOfPixel, paint, windowLines } from "./map_drawing.js";
import { indexAt, latticeOf, outline } from "./maps.js";

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
      const color = painted[keys[y * cols + x]];
      for (end = x + 1; end < cols && painted[keys[y * cols + end]] === color; ) end++;
      if (bytesOf(color)[3]) paths.set(color, `${paths.get(color) ?? ""}M${x} ${y}h${end - x}v1h${x - end}z`);
    }
  }
  const drawn = [...paths].map(([color, path]) => `<path ${fillOf(color)} d="${path}"/>`);
  return `<g transform="scale(${1 / cols} ${1 / rows})" shape-rendering="crispEdges">${drawn.join("")}</g>`;
}

function framed(box, width) {
  const line = ([color, x, y, w, h]) =>
    `<rect x="${x}" y="${y}" width="${w}" height="${h}" fill="none" stroke="${color}" stroke-width="${width}"/>`;
  return frameLines(box, width).map(line).join("");
}

// A picture of a view, as the text of an SVG file.
//   info, mode, aspect, point   as for `drawMap`
//   photo                       address of the image, as a data: URL
//   maps                        of every stream: { stream, title, values, limit, marks, sum }
//   over                        the stream to lay over the image
//   title, lines                written on top
export function drawingOf({ info, mode, aspect, photo, point, palette, maps, over, title, lines }) {
  const tables = colorTables(palette);
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
  maps.forEach(({ stream, title: name, values, limit, marks, sum }, i) => {
    const left = gap + wide + gap + i * (narrow + gap);
    const under = top + squares + narrow * aspect;
    text(left, top - 8, name, 'font-weight="bold"');
    map(left, narrow, values, stream, limit, tables.light, null);
    const { positive, negative } = palette.light;
    const stops = { positive, negative, differential: [...negative.slice(1).toReversed(), ...positive] }[stream];
    const stop = (color, k) => `<stop offset="${k / (stops.length - 1)}" stop-color="${color}"/>`;
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
