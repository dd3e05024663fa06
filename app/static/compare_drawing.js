// ---- Drawing

function draw() {
  if (!sides.length || !root.clientWidth || !sides.every((side) => side.layers[blockOf(side)])) return;
  for (const side of sides) side.rows = rowsOf(side.layers[blockOf(side)], modeOn(side), headOf(side), pointOn(side));
  drawControls();
  sides.forEach(drawSide);
}

function limitsOf(stream) {
  const own = sides.map((side) => limitOf(side.rows, isSigned(infoOf(side), modeOn(side)) ? stream : "positive"));
  return state.scale === "own" ? own : own.map(() => Math.max(...own));
}

function drawSide(side, i) {
  const [info, mode] = [infoOf(side), modeOn(side)];
  const titles = titlesOf(info, mode);
  const signed = isSigned(info, mode);
  const queries = latticeOf(info, mode, "query");
  const query = nameOf(queries, indexAt(info, queries, pointOn(side)), side.run.prefixNames);
  const head = headOf(side) === MEAN ? `mean of ${info.heads} heads` : `head ${headOf(side) + 1}`;
  const title = titles[streamOn(side)];
  const where = `${title}: block ${blockOf(side) + 1} of ${side.run.blocks.length}, ${head}; ${query}`;
  side.root.querySelector("figcaption").textContent = where;
  const large = side.root.querySelector(".vc-large canvas");
  large.setAttribute("aria-label", `${side.run.name}. ${where}. Arrow keys move the query.`);
  drawCanvas(side, large, streamOn(side), limitsOf(streamOn(side))[i], true);
  for (const figure of side.root.querySelectorAll(".vv-panels figure")) {
    const { stream } = figure.dataset;
    figure.hidden = !signed && stream !== "positive";
    if (figure.hidden) continue;
    const limit = limitsOf(stream)[i];
    const button = figure.querySelector("button");
    button.textContent = titles[stream];
    press(button, stream === streamOn(side));
    figure.querySelector("canvas").setAttribute("aria-label", `${side.run.name}. ${titles[stream]}: map.`);
    figure.querySelector("i").style.background = barOf(props.palette, theme(), stream);
    const marks = stream === "differential" ? [`−${number(limit)}`, "0", `+${number(limit)}`] : ["0", number(limit)];
    figure.querySelector("p").replaceChildren(...marks.map((textContent) => make("span", { textContent })));
    drawCanvas(side, figure.querySelector("canvas"), stream, limit, false);
  }
}

function drawCanvas(side, canvas, stream, limit, isLarge) {
  drawMap(canvas, {
    info: infoOf(side),
    mode: modeOn(side),
    aspect: side.photo.naturalHeight / side.photo.naturalWidth,
    painted: paint(side.rows[stream], stream, limit, colors[isLarge ? "veil" : theme()]),
    photo: isLarge ? side.photo : null,
    prefixNames: isLarge ? side.run.prefixNames : null,
    point: pointOn(side),
  });
}

// ---- Words and numbers

function writeSide(side) {
  const { run } = side;
  side.root.querySelector("h2").textContent = run.name;
  side.root.querySelector(".vc-top").hidden = Boolean(film);
  side.root.querySelector(".vc-pictures").hidden = !film;
  if (film) return drawPictures(side);
  const top = run.top.map(([label, part]) => {
    const item = make("li");
    item.style.setProperty("--part", `${100 * part}%`);
    item.append(make("span", { textContent: label }), make("span", { textContent: `${(100 * part).toFixed(1)} %` }));
    return item;
  });
  side.root.querySelector(".vc-top").replaceChildren(...top);
}

function writeFacts() {
  const cells = (name, head, texts, scope) => {
    const line = make("tr");
    const first = make(head === null ? "td" : "th", { textContent: head ?? "" });
    if (head !== null) first.scope = "row";
    line.append(first, ...texts.map((textContent) => make(name, scope ? { textContent, scope } : { textContent })));
    return line;
  };
  find(".vc-facts thead").replaceChildren(cells("th", null, pair.sides.map(({ name }) => name), "col"));
  const rows = Object.keys(pair.sides[0].facts);
  find(".vc-facts tbody").replaceChildren(...rows.map((head) => cells("td", head, pair.sides.map(({ facts }) => facts[head]))));
  find(".vc-measured").textContent = "";
}

function writeLatency({ milliseconds, threads }) {
  const cells = [...find(".vc-facts tbody").lastChild.querySelectorAll("td")];
  cells.forEach((cell, i) => (cell.textContent = milliseconds ? `${milliseconds[i].toPrecision(3)} ms` : "not measured"));
  if (!milliseconds) return;
  find(".vc-measured").textContent =
    `Measured now on this server: medians of passes in turns, one image, float32, ${threads} ${threads === 1 ? "thread" : "threads"}. Other visitors' work slows both.`;
}

// λ by depth: circles and a solid line for stage I, squares and a dashed line for stage II.
const CHART = { height: 200, left: 44, right: 12, top: 12, bottom: 34 };
function drawLambdas() {
  const width = Math.min(find(".vc-chart").clientWidth || 640, 760);
  const series = pair.sides.flatMap(({ blocks }, side) =>
    [1, 2].map((stage) => ({ side, stage, values: blocks.map((info) => info[`lambda${stage}`]) })),
  ).filter(({ values }) => values.some((value) => value !== null));
  find(".vc-legend").replaceChildren(...pair.sides.map(({ name }, side) => {
    const item = make("span");
    const label = make("b", { textContent: name });
    label.dataset.side = side;
    const has = series.some((line) => line.side === side);
    item.append(label, has ? ": λ₁ ● solid, λ₂ ■ dashed" : ": no λ");
    return item;
  }));
  if (!series.length) return find(".vc-chart").replaceChildren();
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
  const style = [...root.querySelectorAll(".vc-side")].map((side) => getComputedStyle(side).getPropertyValue("--side"));
  for (const { side, stage, values } of series) {
    const points = values.flatMap((value, b) => (value === null ? [] : [{ b, value, at: at(values.length === 1 ? 0.5 : b / (values.length - 1), value) }]));
    parts.push(`<polyline fill="none" stroke="${style[side]}" stroke-width="2" ${stage === 2 ? 'stroke-dasharray="5 4"' : ""} points="${points.map((p) => p.at.join(",")).join(" ")}"/>`);
    for (const { b, value, at: [x, y] } of points) {
      const says = `<title>Block ${b + 1} of ${values.length}, λ${"₁₂"[stage - 1]} = ${value.toFixed(3)}</title>`;
      parts.push(stage === 1 ? `<circle cx="${x}" cy="${y}" r="4" fill="${style[side]}">${says}</circle>`
        : `<rect x="${x - 3.5}" y="${y - 3.5}" width="7" height="7" fill="${style[side]}">${says}</rect>`);
    }
  }
  parts.push(`<text x="${left}" y="${height - 8}">first block</text><text x="${width - right}" y="${height - 8}" text-anchor="end">last block</text>`);
  const words = series.map(({ side, stage, values }) => `${side ? "second" : "first"} model, lambda ${stage}: ${values.map((value) => value?.toFixed(3) ?? "none").join(", ")}`);
  const chart = make("div", { innerHTML: `<svg viewBox="0 0 ${width} ${height}" role="img">${parts.join("")}</svg>` }).firstChild;
  chart.setAttribute("aria-label", `Lambda by block. ${words.join(". ")}.`);
  find(".vc-chart").replaceChildren(chart);
}
