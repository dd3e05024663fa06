// ---- The link of a view: #explore?model=...&image=...&map=...

function linked() {
  return new URLSearchParams(location.hash.startsWith("#explore?") ? location.hash.slice("#explore?".length) : "");
}

function viewOfLink() {
  const link = linked();
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

function writeLink() {
  if (!run?.model) return clearLink();
  const { mode, stream, scale, block, head, query } = state;
  const link = new URLSearchParams({ model: run.model });
  if (run.example) link.set("image", run.example);
  const place = query.prefix === null ? `${query.x.toFixed(4)},${query.y.toFixed(4)}` : `token${query.prefix + 1}`;
  const view = { map: mode, stream, block: block + 1, head: head === MEAN ? "mean" : head + 1, query: place, scale };
  for (const [key, value] of Object.entries(view)) link.set(key, value);
  history.replaceState(history.state, "", `#explore?${link}`);
}

function clearLink() {
  if (run && location.hash.startsWith("#explore?")) history.replaceState(history.state, "", location.pathname + location.search);
}

addEventListener("hashchange", () => {
  const link = linked();
  if (!link.get("model")) return;
  Object.assign(state, viewOfLink());
  if (run && link.get("model") === run.model && (link.get("image") ?? run.example) === run.example) show({});
  else trigger("select");
});

// ---- Saving

const limits = () => Object.fromEntries(STREAMS.map((stream) => [stream, limitIn(state.block, state.head, stream)]));
const shownStreams = () => (isSigned(info(), mode()) ? STREAMS : ["positive"]);

function figure() {
  const titles = titlesOf(info(), mode());
  const lambdas = lambdasOf(info());
  if (whatIf !== null) lambdas.push(`drawn with λ = ${hundredths(whatIf)} instead`);
  const [term, words] = run.caption;
  return drawingOf({
    info: info(),
    mode: mode(),
    aspect: aspect(),
    photo: run.image,
    point: state.query,
    palette: props.palette,
    title: [run.model, `block ${info().label}`, nameOfHead(state.head)].filter(Boolean).join(" · "),
    lines: [`${term}: ${words}. Query: ${queryName()}.`, [...lambdas, SCALES[state.scale]].join(", ").replace(/^./, (first) => first.toUpperCase())],
    over: streamOf(state.block),
    maps: shownStreams().map((stream) => {
      const limit = limitIn(state.block, state.head, stream);
      return { stream, title: titles[stream], values: current[stream], limit, marks: marksOf(stream, limit), sum: sumOf(stream) };
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

// What the server needs to know of this view, and what the saved numbers should say of it.
function request() {
  const { block, head } = state;
  const query = indexAt(info(), lattice("query"), state.query);
  const view = { ...state, mode: mode(), stream: streamOf(block), queryName: queryName(), limits: limits() };
  return { token: run.token, block, head, mode: mode(), query, lambda: whatIf, view, run: props.value };
}

const fromServer = async (answer, type) => {
  const { data } = await answer;
  if (!data) throw new Error("expired");
  return new Blob([Uint8Array.from(atob(data), (character) => character.charCodeAt(0))], { type });
};
const FILES = {
  svg: () => new Blob([figure()], { type: "image/svg+xml" }),
  png: () => pictureOf(figure()),
  npz: () => fromServer(server.export_numbers(request()), "application/zip"),
  html: () => fromServer(server.export_page(request()), "text/html"),
};

for (const button of root.querySelectorAll("[data-save]")) {
  const form = button.dataset.save;
  button.hidden = props.offline && ["npz", "html"].includes(form);
  button.onclick = async () => {
    if (!current) return;
    const status = find(".vx-save [role=status]");
    status.textContent = "";
    try {
      const head = state.head === MEAN ? "mean" : `head${state.head + 1}`;
      const name = [run.model ?? "maps", `block${run.blocks[state.block].block + 1}`, head, mode()].join("-");
      const link = make("a", { href: URL.createObjectURL(await FILES[form]()), download: `${name}.${form}` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    } catch {
      status.textContent = "The server no longer keeps these maps, or does not answer.";
    }
  };
}

find(".vv-note button").onclick = () => trigger("submit");
new ResizeObserver(() => (root.clientWidth ? (draw(), writeLink()) : clearLink())).observe(root);
new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["class"] });
watch("value", receive);
root.explorer = { state, get rows() { return current; } };
receive();
