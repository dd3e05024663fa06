// The pictures of the Generate tab. `props.value` is what generate.py sends (JSON): the newest frame of a run, and, once
// it has ended, its timeline. `server.fetch_frame` gives the frames that did not stream by. A frame is one image with
// all pictures one below another.

import { Panel, make, press } from "./panel.js";

const COLUMNS = 4;
const KEPT = "vca-generated"; // the token of the newest run: a reload brings its pictures back

class Pictures extends Panel {
  run = null; // what the server said last
  frames = {}; // step -> the frame's image
  expected = {}; // step -> an image of the pictures that the network expects there
  at = 0; // index in run.timeline
  picture = 0; // index of the chosen picture
  started = 0; // when the first frame came, in ms

  constructor(host) {
    super(host, ".vg");
    this.range = this.find(".vv-timeline input");
  }

  get isRunning() {
    return this.run?.state === "running";
  }

  async receive(kept = null) {
    const received = kept ?? (this.props.value ? JSON.parse(this.props.value) : {});
    if (received.state === "waiting") return this.isRunning || this.wait();
    if (received.state === "failed") return (this.isRunning || this.run?.state === "waiting") && this.fail();
    const isNew = received.token !== this.run?.token;
    this.run = received;
    this.root.dataset.state = received.state ?? "empty";
    if (!received.token) return this.say(received.problem ?? this.hint, { style: received.problem ? "vv-problem" : "" });
    if (isNew) {
      this.frames = {};
      this.expected = {};
      this.started = performance.now();
      this.buildGrid();
    }
    this.say("");
    await this.keep(received.step, received.image);
    if (this.run !== received) return;
    this.drawProgress();
    this.find(".vg-ended").hidden = this.isRunning;
    if (this.isRunning) return this.show(this.frames[received.step]);
    this.range.max = received.timeline.length - 1;
    this.move(received.timeline.length - 1);
    for (const { step } of received.timeline) {
      if (this.frames[step]) continue;
      const frame = await this.server.fetch_frame({ token: received.token, step }).catch(() => ({}));
      if (this.run !== received || !frame.image) return;
      await this.keep(step, frame.image);
    }
    this.root.dataset.film = "complete";
    sessionStorage.setItem(KEPT, received.token);
  }

  // Says something in the place of the pictures.
  say(text, options) {
    this.note(text, options);
    this.find(".vg-body").hidden = Boolean(text);
  }

  wait() {
    const mine = { state: "waiting" };
    this.run = mine;
    this.root.dataset.state = "waiting";
    this.say("Starting …");
    setTimeout(() => this.run === mine && this.say("Waiting for the pictures of other visitors …", { button: ".vg-cancel" }), 2000);
  }

  // The server is full or gone. A request that the visitor gave up ends so, too, but is not awaited any more.
  fail() {
    this.leave();
    this.say("The server did not answer. Please try again in a minute.", { style: "vv-problem" });
  }

  cancel() {
    this.trigger("stop");
    this.leave();
    this.say(this.hint);
  }

  leave() {
    this.run = null;
    this.root.dataset.state = "empty";
  }

  async keep(step, source, kept = this.frames) {
    const image = Object.assign(new Image(), { src: source });
    await image.decode();
    kept[step] = image;
  }

  // ---- Drawing

  buildGrid() {
    const { count } = this.run;
    this.find(".vg-grid").style.setProperty("--columns", Math.min(count, COLUMNS));
    delete this.root.dataset.film;
    this.find(".vg-grid").replaceChildren(...Array.from({ length: count }, (_, i) => {
      const button = make("button", { type: "button", onclick: () => this.choose(i) });
      button.append(make("canvas"));
      button.setAttribute("aria-label", this.nameOf(i));
      return button;
    }));
    this.choose(Math.min(this.picture, count - 1));
  }

  show(frame) {
    const height = frame.naturalHeight / this.run.count;
    const isLarge = frame.naturalWidth >= this.find(".vg-grid button").clientWidth;
    this.find(".vg-size").textContent = `${frame.naturalWidth} × ${height} pixels each${isLarge ? "" : ", smoothly enlarged here"}.`;
    [...this.root.querySelectorAll(".vg-grid canvas")].forEach((canvas, i) => {
      canvas.width = frame.naturalWidth;
      canvas.height = height;
      canvas.getContext("2d").drawImage(frame, 0, i * height, canvas.width, height, 0, 0, canvas.width, height);
    });
  }

  drawProgress() {
    const { step, steps, state } = this.run;
    const left = (((performance.now() - this.started) / step) * (steps - step)) / 1000;
    const rest = { running: step > 1 ? `, ${Math.ceil(left)} s left` : "", stopped: ", stopped", complete: "" }[state];
    Object.assign(this.find(".vg-progress progress"), { max: steps, value: step });
    this.find(".vg-count").textContent = `${step} of ${steps} steps${rest}`;
    this.find(".vg-stop").hidden = !this.isRunning;
  }

  drawWords() {
    const { step, t } = this.run.timeline[this.at];
    const time = Number.isInteger(t) ? t : t?.toFixed(3);
    const where = t === undefined ? "finished" : `after ${step} of ${this.run.steps} steps, t = ${time}`;
    const what = this.isExpected(this.run.timeline[this.at]) ? ": the picture that the network then expects" : "";
    this.find(".vv-says").textContent = `${this.nameOf(this.picture)}: ${where}${what}`;
    this.find(".vg-explore").textContent = t === undefined ? "Explore the last step" : "Explore this step";
    this.find(".vv-branch").hidden = !this.run.guided;
  }

  nameOf(picture) {
    return `${this.run.label}, picture ${picture + 1}`;
  }

  // ---- Controls

  async move(index) {
    const { run, range, frames } = this;
    const { step } = run.timeline[index];
    this.at = index;
    range.value = index;
    range.setAttribute("aria-valuetext", `after ${step} of ${run.steps} steps`);
    this.drawWords();
    const isExpected = this.isExpected(run.timeline[index]);
    const [kept, fetch] = isExpected ? [this.expected, this.server.fetch_predicted] : [frames, this.server.fetch_frame];
    if (!kept[step]) {
      const frame = await fetch({ token: run.token, step }).catch(() => ({}));
      if (this.run?.token !== run.token || !frame.image) return;
      await this.keep(step, frame.image, kept);
    }
    if (this.run?.timeline?.[this.at]?.step === step && this.isExpected(run.timeline[index]) === isExpected) this.show(kept[step]);
  }

  // Whether at this place of the timeline the picture is shown that the network expects, and not the state; never where
  // the run has ended.
  isExpected({ step, t }) {
    return t !== undefined && step !== this.run.step && !this.find(".vg-noisy input").checked;
  }

  async save(form) {
    const { token, label } = this.run;
    const status = this.find(".vg-save [role=status]");
    status.textContent = "";
    const { url } = await this.server.save_run({ token, form }).catch(() => ({}));
    if (!url) return (status.textContent = "These pictures are no longer kept on the server.");
    make("a", { href: url, download: `${label}.${form}` }).click();
  }

  // After a reload: the pictures that the server still keeps.
  async restore() {
    const token = sessionStorage.getItem(KEPT);
    const kept = token ? await this.server.fetch_run({ token }).catch(() => ({})) : {};
    if (kept.token && !this.run?.token && !this.props.value) this.receive(kept);
  }

  choose(index) {
    this.picture = index;
    [...this.find(".vg-grid").children].forEach((button, i) => press(button, i === index));
    if (this.run.timeline) this.drawWords();
  }

  // Which state "Explore this step" looks into: the network never saw the finished pictures.
  get seen() {
    const { timeline } = this.run;
    return timeline[this.at].t === undefined ? timeline[this.at - 1] : timeline[this.at];
  }

  listen() {
    this.find(".vg-noisy input").onchange = () => this.move(this.at);
    for (const button of this.root.querySelectorAll("[data-save]")) button.onclick = () => this.save(button.dataset.save);
    this.range.oninput = () => this.move(Number(this.range.value));
    this.find(".vg-cancel").onclick = () => this.cancel();
    this.find(".vg-stop").onclick = () => this.server.stop_run({ token: this.run.token });
    this.find(".vg-explore").onclick = () => {
      const withoutClass = this.run.guided && this.find(".vv-branch input").checked;
      this.trigger("select", { token: this.run.token, step: this.seen.step, picture: this.picture, withoutClass });
    };
    this.find(".vg-classify").onclick = () =>
      this.trigger("submit", { token: this.run.token, step: this.run.timeline[this.at].step, picture: this.picture });
  }
}

export function mount(host) {
  const view = new Pictures(host);
  view.listen();
  host.watch("value", () => view.receive());
  view.receive();
  view.restore();
  view.root.pictures = view;
}
