// What can be taken away from the explorer: the link of a view, and files.

import { Address, linked } from "./links.js";
import { drawingOf } from "./map_figure.js";
import { SCALES, hundredths, lambdasOf, marksOf, titlesOf } from "./map_words.js";
import { MEAN, STREAMS, clamp, indexAt, isSigned } from "./maps.js";
import { make, redrawOnChange } from "./panel.js";

// ---- The link of a view: #explore?model=...&image=...&map=...

const TAB = "explore";

export const addressOf = (root) => new Address(TAB, root);

export function viewOfLink() {
  const link = linked(TAB);
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

export function writeLink({ run, state, props, address }) {
  if (!run || props.offline) return;
  const { mode, stream, scale, block, head, query } = state;
  const point = query.prefix === null ? `${query.x.toFixed(4)},${query.y.toFixed(4)}` : `token${query.prefix + 1}`;
  const view = { map: mode, stream, block: block + 1, head: head === MEAN ? "mean" : head + 1, query: point, scale };
  address.write(run.base, view, run.path);
}

// Follows a link that is typed or clicked, and keeps the page's address up to date while the explorer is on show.
export function listenToLinks(view) {
  addEventListener("hashchange", () => {
    Object.assign(view.state, viewOfLink());
    if (view.run && view.root.clientWidth) view.show({});
  });
  redrawOnChange(view.root, () => {
    view.address.note();
    if (view.isStale && view.root.clientWidth) return view.renew();
    view.draw();
    writeLink(view);
  });
}

// ---- Files

function figure(view) {
  const { info, mode, state, run } = view;
  const titles = titlesOf(info, mode);
  const lambdas = lambdasOf(info);
  if (view.whatIf !== null) lambdas.push(`drawn with λ = ${hundredths(view.whatIf)} instead`);
  const [term, words] = run.caption;
  return drawingOf({
    info,
    mode,
    aspect: view.aspect,
    photo: run.image,
    point: state.query,
    palette: view.props.palette,
    title: [run.title ?? run.model, `block ${info.label}`, view.headName].filter(Boolean).join(" · "),
    lines: [`${term}: ${words}. Query: ${view.queryName}.`, [...lambdas, SCALES[state.scale]].join(", ").replace(/^[a-z]/, (first) => first.toUpperCase())],
    over: view.streamOf(state.block),
    maps: (isSigned(info, mode) ? STREAMS : ["positive"]).map((stream) => {
      const limit = view.limitOf(stream);
      return { stream, title: titles[stream], values: view.current[stream], limit, marks: marksOf(stream, limit), sum: view.sumOf(stream) };
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

// What the server needs to know of a view, and what the saved numbers should say of it.
function request(view) {
  const { info, mode, state, run, queryName } = view;
  const { block, head } = state;
  const query = indexAt(info, view.lattice("query"), state.query);
  const limits = Object.fromEntries(STREAMS.map((stream) => [stream, view.limitOf(stream)]));
  const shown = { ...state, mode, stream: view.streamOf(block), queryName, limits };
  return { token: run.token, block, head, mode, query, lambda: view.whatIf, view: shown, run: view.props.value };
}

async function fromServer(answer, type) {
  const { data, text, problem } = await answer;
  if (!data && !text) throw { problem };
  return new Blob([text ?? Uint8Array.from(atob(data), (character) => character.charCodeAt(0))], { type });
}

const FILES = {
  svg: (view) => new Blob([figure(view)], { type: "image/svg+xml" }),
  png: (view) => pictureOf(figure(view)),
  npz: (view) => fromServer(view.server.export_numbers(request(view)), "application/zip"),
  html: (view) => fromServer(view.server.export_page(request(view)), "text/html"),
};

export function listenToSaving(view) {
  for (const button of view.root.querySelectorAll("[data-save]")) {
    const form = button.dataset.save;
    button.hidden = view.props.offline && ["npz", "html"].includes(form);
    button.onclick = () => view.current && save(view, form);
  }
}

async function save(view, form) {
  const status = view.find(".vx-save [role=status]");
  status.textContent = "";
  try {
    const { run, state } = view;
    const head = state.head === MEAN ? "mean" : `head${state.head + 1}`;
    const name = [run.model ?? "maps", `block${run.blocks[state.block].block + 1}`, head, view.mode].join("-");
    const link = make("a", { href: URL.createObjectURL(await FILES[form](view)), download: `${name}.${form}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch ({ problem }) {
    status.textContent = problem ?? "The server no longer keeps these maps, or does not answer.";
  }
}
