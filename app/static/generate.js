// The pictures of the Generate tab. `props.value` is what generate.py sends (JSON): the newest frame of a run, and, once
// it has ended, its timeline. `server.fetch_frame` gives the frames that did not stream by. A frame is one image with
// all pictures one below another.

const root = element.querySelector(".vg");
const find = (selector) => root.querySelector(selector);
const range = find(".vv-timeline input");
const EMPTY = find(".vv-note span").textContent;

let run = null; // what the server said last
let film = {}; // step -> the frame's image
let at = 0; // index in run.timeline
let picture = 0; // index of the chosen picture
let started = 0; // when the first frame came, in ms

const isRunning = () => run?.state === "running";
const isAwaited = () => isRunning() || run?.state === "waiting";
const ordinal = (i) => `picture ${i + 1}`;
const time = (t) => (Number.isInteger(t) ? `${t}` : t.toFixed(3));

function note(text, { isProblem = false, canCancel = false } = {}) {
  find(".vv-note").hidden = !text;
  find(".vv-note").classList.toggle("vv-problem", isProblem);
  find(".vv-note span").textContent = text;
  find(".vv-note button").hidden = !canCancel;
  find(".vg-body").hidden = Boolean(text);
}

async function receive() {
  const received = props.value ? JSON.parse(props.value) : {};
  if (received.state === "waiting") return isRunning() || wait();
  if (received.state === "failed") return isAwaited() && fail();
  const isNew = received.token !== run?.token;
  run = received;
  root.dataset.state = run.state ?? "empty";
  if (!run.token) return note(run.problem ?? EMPTY, { isProblem: Boolean(run.problem) });
  if (isNew) {
    film = {};
    started = performance.now();
    buildGrid();
  }
  note("");
  await keep(run.step, run.image);
  if (received !== run) return;
  drawProgress();
  find(".vg-ended").hidden = isRunning();
  if (isRunning()) return show(film[run.step]);
  range.max = run.timeline.length - 1;
  move(run.timeline.length - 1);
  for (const { step } of run.timeline) {
    if (film[step]) continue;
    const frame = await server.fetch_frame({ token: run.token, step }).catch(() => ({}));
    if (received !== run || !frame.image) return;
    await keep(step, frame.image);
  }
  root.dataset.film = "complete";
}

function wait() {
  run = { state: "waiting" };
  root.dataset.state = "waiting";
  note("Starting …");
  const mine = run;
  setTimeout(() => run === mine && note("Waiting for the pictures of other visitors …", { canCancel: true }), 2000);
}

// The server is full or gone. A request that the visitor gave up ends so, too, but is not awaited any more.
function fail() {
  run = null;
  root.dataset.state = "empty";
  note("The server did not answer. Please try again in a minute.", { isProblem: true });
}

async function keep(step, source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  film[step] = image;
}

// ---- Drawing

function buildGrid() {
  const columns = run.count <= 4 ? run.count : 4;
  find(".vg-grid").style.setProperty("--columns", columns);
  picture = Math.min(picture, run.count - 1);
  delete root.dataset.film;
  find(".vg-grid").replaceChildren(
    ...[...Array(run.count).keys()].map((i) => {
      const button = Object.assign(document.createElement("button"), { type: "button" });
      button.append(document.createElement("canvas"));
      button.setAttribute("aria-label", `${run.label}, ${ordinal(i)}`);
      button.onclick = () => choose(i);
      return button;
    }),
  );
  choose(picture);
}

function show(frame) {
  const height = frame.naturalHeight / run.count;
  [...root.querySelectorAll(".vg-grid canvas")].forEach((canvas, i) => {
    canvas.width = frame.naturalWidth;
    canvas.height = height;
    canvas.getContext("2d").drawImage(frame, 0, i * height, canvas.width, height, 0, 0, canvas.width, height);
  });
}

function drawProgress() {
  const { step, steps, state } = run;
  const left = ((performance.now() - started) / step) * (steps - step) / 1000;
  const rest = { running: step > 1 ? `, ${Math.ceil(left)} s left` : "", stopped: ", stopped", complete: "" }[state];
  find("progress").max = steps;
  find("progress").value = step;
  find(".vg-count").textContent = `${step} of ${steps} steps${rest}`;
  find(".vg-stop").hidden = !isRunning();
}

// Which state "Explore this step" looks into: the network never saw the finished pictures.
const seen = () => run.timeline[at].t === undefined ? run.timeline[at - 1] : run.timeline[at];

function drawWords() {
  const { step, t } = run.timeline[at];
  const where = t === undefined ? "finished" : `after ${step} of ${run.steps} steps, t = ${time(t)}`;
  find(".vv-says").textContent = `${run.label}, ${ordinal(picture)}: ${where}`;
  find(".vg-explore").textContent = t === undefined ? "Explore the last step" : "Explore this step";
  find(".vv-branch").hidden = !run.guided;
}

// ---- Controls

async function move(index) {
  at = index;
  range.value = index;
  range.setAttribute("aria-valuetext", `after ${run.timeline[at].step} of ${run.steps} steps`);
  drawWords();
  const { step } = run.timeline[at];
  if (!film[step]) {
    const { token } = run;
    const frame = await server.fetch_frame({ token, step }).catch(() => ({}));
    if (token !== run.token || !frame.image) return;
    await keep(step, frame.image);
  }
  if (run.timeline?.[at]?.step === step) show(film[step]);
}

function choose(index) {
  picture = index;
  [...find(".vg-grid").children].forEach((button, i) => button.setAttribute("aria-pressed", i === index));
  if (run.timeline) drawWords();
}

find(".vv-note button").onclick = () => {
  trigger("stop");
  run = null;
  root.dataset.state = "empty";
  note(EMPTY);
};
range.oninput = () => move(Number(range.value));
find(".vg-stop").onclick = () => server.stop_run({ token: run.token });
find(".vg-explore").onclick = () =>
  trigger("select", { token: run.token, step: seen().step, picture, withoutClass: run.guided && find(".vv-branch input").checked });
find(".vg-classify").onclick = () => trigger("submit", { token: run.token, step: run.timeline[at].step, picture });
watch("value", receive);
receive();
