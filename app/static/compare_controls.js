// The controls of the comparison: buttons, keys, clicks and the steps of generators.

import { drawLambdas, drawWipe } from "./compare_drawing.js";
import { Address, linked } from "./links.js";
import { MEAN, STREAMS, clamp, latticeOf, layout, modesOf, pointUnder } from "./maps.js";
import { choices, listenToKeys, make, moved, press, redrawOnChange } from "./panel.js";

export function drawControls(view) {
  const { state, asked } = view;
  const infos = asked.map((side) => side.info);
  const isEqual = new Set(asked.map(({ run }) => run.blocks.length)).size === 1;
  const heads = Math.max(...infos.map((info) => info.heads));
  view.find(".vc-depth").textContent = isEqual ? "Block" : "Depth";
  choices(view.find(".vc-blocks"), Array.from({ length: view.depths }, (_, i) => i + 1), state.depth, (depth) => view.show({ depth }));
  choices(view.find(".vc-heads"), ["mean", ...Array.from({ length: heads }, (_, i) => i + 1)], state.head + 1, (i) => view.show({ head: i - 1 }));
  const isPossible = (mode) => infos.some((info) => modesOf(info).includes(mode));
  const chosen = isPossible(state.mode) ? state.mode : "effective";
  for (const button of view.find(".vc-modes").children) {
    button.disabled = !isPossible(button.dataset.mode);
    press(button, button.dataset.mode === chosen);
  }
  for (const button of view.find(".vc-scales").children) press(button, button.dataset.scale === state.scale);
  view.find(".vc-scales").parentElement.hidden = asked.length === 1;
  view.find(".vc-click").textContent = asked.length === 1
    ? `Click in either: the query of ${asked[0].run.name} moves there.`
    : "Click in either: the query moves in both, to the same place of the picture.";
}

export function listen(view) {
  const { range } = view;
  for (const button of view.find(".vc-modes").children) button.onclick = () => view.show({ mode: button.dataset.mode });
  for (const button of view.find(".vc-scales").children) button.onclick = () => view.show({ scale: button.dataset.scale });
  const over = view.find(".vc-over");
  over.querySelector("input").oninput = () => drawWipe(view);
  over.querySelector("canvas").onpointermove = ({ offsetX, target }) => {
    if (!view.sides.length) return;
    over.querySelector("input").value = Math.round((100 * offsetX) / target.clientWidth);
    drawWipe(view);
  };
  view.find(".vc-again").onclick = () => view.trigger("submit");
  view.find(".vc-stop").onclick = () => view.stop();
  range.oninput = () => view.look({ step: Number(range.value) });
  view.find(".vv-branch input").onchange = (event) => view.look({ withoutClass: event.target.checked });
  view.sections.forEach((section, i) => buildFigures(view, section, i));
  const sideOf = ({ target }) => view.asked.find(({ root }) => root.contains(target)) ?? view.asked[0];
  listenToKeys(view.root, {
    isReady: () => view.sides.length,
    query: (event, right, down) => {
      const side = sideOf(event);
      view.show({ query: side.queryAt(moved(side.info, latticeOf(side.info, side.mode, "query"), side.point, right, down)) });
    },
    block: (_, step) => view.show({ depth: view.state.depth + step }),
    head: (_, step) => view.show({ head: view.state.head + step }),
  });
  redrawOnChange(view.root, () => {
    view.address.note();
    if (view.isStale && view.root.clientWidth) return view.renew();
    if (!view.sides.length) return;
    view.draw();
    drawLambdas(view);
  });
  addEventListener("hashchange", () => {
    readLink(view);
    if (view.sides.length && view.root.clientWidth) view.show({});
  });
}

// ---- The link: #compare?model=...&image=...&with=...&map=...

const TAB = "compare";
const CHOICES = { map: ["effective", "stage1", "stage2"], stream: STREAMS, scale: ["shared", "own"] };

export function readLink({ state }) {
  const link = linked(TAB);
  const [map, stream, scale] = Object.entries(CHOICES).map(([key, values]) => values.find((value) => value === link.get(key)));
  Object.assign(state, map && { mode: map }, stream && { stream }, scale && { scale });
  const whole = (key) => (/^\d{1,4}$/.test(link.get(key) ?? "") ? Number(link.get(key)) - 1 : null);
  if (whole("block") !== null) state.depth = whole("block");
  if (link.get("head")) state.head = whole("head") ?? MEAN;
  const point = /^([01]\.?\d*),([01]\.?\d*)$/.exec(link.get("query") ?? "");
  if (point) state.query = { x: clamp(Number(point[1]), 0, 0.9999), y: clamp(Number(point[2]), 0, 0.9999), prefix: null };
}

export const addressOf = (root) => new Address(TAB, root);

export function writeLink({ state, pair, film, address }) {
  if (!pair) return;
  const { mode, stream, scale, depth, head, query: { x, y } } = state;
  const view = { map: mode, stream, scale, block: depth + 1, head: head === MEAN ? "mean" : head + 1, query: `${x.toFixed(4)},${y.toFixed(4)}` };
  address.write(film ? null : pair.base, view, pair.path);
}

// The small maps of a side, one for each stream.
function buildFigures(view, section, i) {
  listenToClicks(view, i, section.querySelector(".vc-large canvas"));
  section.querySelector(".vv-panels").replaceChildren(...STREAMS.map((stream) => {
    const figure = make("figure");
    figure.dataset.stream = stream;
    const canvas = make("canvas");
    canvas.setAttribute("role", "img");
    figure.append(make("button", { type: "button", onclick: () => view.show({ stream }) }), canvas, make("i"), make("p", { className: "vv-marks" }));
    listenToClicks(view, i, canvas);
    return figure;
  }));
}

function listenToClicks(view, i, canvas) {
  canvas.onclick = (event) => {
    const side = view.sides[i];
    if (!side?.rows) return;
    const named = canvas.parentElement.matches(".vc-large") ? side.run.prefixNames : null;
    const point = pointUnder(canvas, event, layout(canvas, side.info, side.aspect, named));
    const { prefix } = latticeOf(side.info, side.mode, "query");
    if (point && (point.prefix === null || point.prefix < prefix)) view.show({ query: side.queryAt(point) });
  };
}
