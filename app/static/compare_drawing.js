// What the comparison shows of each model: its maps, what it says or makes, its facts, and its lambdas.

import { drawMap, paint, theme } from "./map_drawing.js";
import { number, titlesOf } from "./map_words.js";
import { MEAN, indexAt, isSigned, latticeOf, nameOf } from "./maps.js";
import { make, press, writeFigure } from "./panel.js";

export function drawSide(side) {
  const { view, info, mode, root, run } = side;
  const titles = side.isFixed ? { positive: "Grad-CAM" } : titlesOf(info, mode);
  const queries = latticeOf(info, mode, "query");
  const query = nameOf(queries, indexAt(info, queries, side.point), run.prefixNames);
  const head = side.head === MEAN ? `mean of ${info.heads} heads` : `head ${side.head + 1}`;
  const where = run.fixed ?? `${titles[side.stream]}: block ${side.block + 1} of ${run.blocks.length}, ${head}; ${query}`;
  root.querySelector("figcaption").textContent = where;
  const large = root.querySelector(".vc-large canvas");
  large.setAttribute("aria-label", `${run.name}. ${where}. Arrow keys move the query${side.isFixed ? " of the other model" : ""}.`);
  drawCanvas(side, large, side.stream, true);
  for (const figure of root.querySelectorAll(".vv-panels figure")) {
    const { stream } = figure.dataset;
    figure.hidden = !isSigned(info, mode) && stream !== "positive";
    if (figure.hidden) continue;
    const label = `${run.name}. ${titles[stream]}: map.`;
    writeFigure(figure, { title: titles[stream], label, stream, limit: view.limitOf(side, stream), palette: view.props.palette });
    press(figure.querySelector("button"), stream === side.stream);
    drawCanvas(side, figure.querySelector("canvas"), stream, false);
  }
}

function drawCanvas(side, canvas, stream, isLarge) {
  const { view } = side;
  drawMap(canvas, {
    info: side.info,
    mode: side.mode,
    aspect: side.aspect,
    painted: paint(side.rows[stream], stream, view.limitOf(side, stream), view.colors[isLarge ? "veil" : theme()]),
    photo: isLarge ? side.photo : null,
    prefixNames: isLarge ? side.run.prefixNames : null,
    point: side.isFixed ? null : side.point,
    isSmooth: side.isFixed,
  });
}

// The large maps of both models one over the other: left of the slider the first, right of it the second. Not of models
// that see different parts of the photo.
export function drawWipe(view) {
  const { sides } = view;
  const section = view.find(".vc-over");
  const [first, second] = sides;
  section.hidden = String(first.run.box) !== String(second.run.box) || first.aspect.toFixed(3) !== second.aspect.toFixed(3);
  if (section.hidden) return;
  const [canvas, slider] = [section.querySelector("canvas"), section.querySelector("input")];
  const [width, height] = [960, Math.round(960 * first.aspect)];
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  const split = (width * slider.value) / 100;
  sides.forEach((side, i) => {
    const drawn = side.root.querySelector(".vc-large canvas");
    const tall = drawn.width * side.aspect; // without the squares of the prefix tokens
    context.save();
    context.beginPath();
    context.rect(i * split, 0, i ? width - split : split, height);
    context.clip();
    context.drawImage(drawn, 0, drawn.height - tall, drawn.width, tall, 0, 0, width, height);
    context.restore();
  });
  for (const [color, thickness] of [["#000", 6], ["#fff", 2]]) {
    Object.assign(context, { strokeStyle: color, lineWidth: thickness });
    context.strokeRect(split, -9, 0, height + 18);
  }
  section.querySelectorAll("span").forEach((span, i) => (span.textContent = sides[i].run.name));
  canvas.setAttribute("aria-label", `Left the map of ${first.run.name}, right of ${slider.value} % of the width that of ${second.run.name}.`);
}

// ---- What a model says or makes

export function writeSide(side) {
  const { view, run, root } = side;
  root.querySelector("h2").textContent = run.name;
  root.querySelector(".vc-top").hidden = Boolean(view.film);
  root.querySelector(".vc-pictures").hidden = !view.film;
  if (view.film) return drawPictures(side);
  const top = run.top.filter(([, part], i) => i === 0 || part >= 0.0005).map(([label, part]) => {
    const item = make("li");
    item.style.setProperty("--part", `${100 * part}%`);
    item.append(make("span", { textContent: label }), make("span", { textContent: `${(100 * part).toFixed(1)} %` }));
    return item;
  });
  root.querySelector(".vc-top").replaceChildren(...top);
}

// The pictures of a side, from a frame that holds them one below another.
async function drawPictures({ view, run, root }) {
  const { count, label } = view.pair.film;
  const pictures = root.querySelector(".vc-pictures");
  if (pictures.children.length !== count) {
    pictures.replaceChildren(...Array.from({ length: count }, (_, i) => {
      const button = make("button", { type: "button", onclick: () => view.look({ picture: i }) });
      button.append(make("canvas"));
      return button;
    }));
  }
  const frame = Object.assign(new Image(), { src: run.frame });
  await frame.decode();
  const [width, height] = [frame.naturalWidth, frame.naturalHeight / count];
  [...pictures.children].forEach((button, i) => {
    press(button, i === view.film?.picture);
    button.setAttribute("aria-label", `${run.name}: ${label}, picture ${i + 1}`);
    const canvas = Object.assign(button.firstChild, { width, height });
    canvas.getContext("2d").drawImage(frame, 0, i * height, width, height, 0, 0, width, height);
  });
}

// ---- Numbers

export function writeFacts(view) {
  const { sides } = view.pair;
  const cells = (name, head, texts, scope) => {
    const line = make("tr");
    const first = make(head === null ? "td" : "th", { textContent: head ?? "" });
    if (head !== null) first.scope = "row";
    line.append(first, ...texts.map((textContent) => make(name, scope ? { textContent, scope } : { textContent })));
    return line;
  };
  view.find(".vc-facts thead").replaceChildren(cells("th", null, sides.map(({ name }) => name), "col"));
  const rows = Object.keys(sides[0].facts);
  view.find(".vc-facts tbody").replaceChildren(...rows.map((head) => cells("td", head, sides.map(({ facts }) => facts[head]))));
  view.find(".vc-measured").textContent = "";
}

export function writeLatency(view, { milliseconds, threads }) {
  const cells = [...view.find(".vc-facts tbody").lastChild.querySelectorAll("td")];
  cells.forEach((cell, i) => (cell.textContent = milliseconds ? `${milliseconds[i].toPrecision(3)} ms` : "not measured"));
  if (!milliseconds) return;
  view.find(".vc-measured").textContent =
    `Measured now on this server: medians of passes in turns, one image, float32, ${threads} ${threads === 1 ? "thread" : "threads"}. Other visitors' work slows both.`;
}

// λ by depth: circles and a solid line for stage I, squares and a dashed line for stage II.
const CHART = { height: 214, left: 58, right: 14, top: 26, bottom: 34 };
export function drawLambdas(view) {
  const { sides } = view.pair;
  const width = Math.min(view.find(".vc-chart").clientWidth || 640, 760);
  const series = sides.flatMap(({ blocks }, side) =>
    [1, 2].map((stage) => ({ side, stage, values: blocks.map((info) => info[`lambda${stage}`]) })),
  ).filter(({ values }) => values.some((value) => value !== null));
  view.find(".vc-legend").replaceChildren(...sides.map(({ name }, side) => {
    const item = make("span");
    const label = make("b", { textContent: name });
    label.dataset.side = side;
    const has = series.some((line) => line.side === side);
    item.append(label, has ? ": λ₁ ● solid, λ₂ ■ dashed" : ": no λ");
    return item;
  }));
  if (!series.length) return view.find(".vc-chart").replaceChildren();
  const all = series.flatMap(({ values }) => values.filter((value) => value !== null));
  const [low, high] = [Math.min(0, ...all), Math.max(0, ...all)];
  const { height, left, right, top, bottom } = CHART;
  const at = (part, value) => [
    left + part * (width - left - right),
    top + ((high - value) / (high - low || 1)) * (height - top - bottom),
  ].map((position) => position.toFixed(1));
  const parts = [low, 0, high].filter((value, i, list) => list.indexOf(value) === i).map((value) => {
    const [x, y] = at(0, value);
    return `<line class="vc-axis" x1="${x}" x2="${width - right}" y1="${y}" y2="${y}" stroke-width="${value === 0 ? 1 : 0.4}"/>
      <text x="${left - 8}" y="${y}" text-anchor="end" dominant-baseline="middle">${value === 0 ? 0 : number(value)}</text>`;
  });
  const style = view.sections.map((section) => getComputedStyle(section).getPropertyValue("--side"));
  for (const { side, stage, values } of series) {
    const points = values.flatMap((value, b) => (value === null ? [] : [{ b, value, at: at(values.length === 1 ? 0.5 : b / (values.length - 1), value) }]));
    parts.push(`<polyline fill="none" stroke="${style[side]}" stroke-width="2" ${stage === 2 ? 'stroke-dasharray="5 4"' : ""} points="${points.map((p) => p.at.join(",")).join(" ")}"/>`);
    for (const { b, value, at: [x, y] } of points) {
      const says = `<title>Block ${b + 1} of ${values.length}, λ${"₁₂"[stage - 1]} = ${value.toFixed(3)}</title>`;
      parts.push(stage === 1 ? `<circle cx="${x}" cy="${y}" r="4" fill="${style[side]}">${says}</circle>`
        : `<rect x="${x - 3.5}" y="${y - 3.5}" width="7" height="7" fill="${style[side]}">${says}</rect>`);
    }
  }
  parts.push(`<text x="${left - 8}" y="12" text-anchor="end">λ</text><text x="${left}" y="${height - 8}">first block</text><text x="${width - right}" y="${height - 8}" text-anchor="end">last block</text>`);
  const words = series.map(({ side, stage, values }) => `${side ? "second" : "first"} model, lambda ${stage}: ${values.map((value) => value?.toFixed(3) ?? "none").join(", ")}`);
  const chart = make("div", { innerHTML: `<svg viewBox="0 0 ${width} ${height}" role="img">${parts.join("")}</svg>` }).firstChild;
  chart.setAttribute("aria-label", `Lambda by block. ${words.join(". ")}.`);
  view.find(".vc-chart").replaceChildren(chart);
}
