// The page: sends videos to the service and shows their timelines. No library, no build step.
"use strict";

const $ = (id) => document.getElementById(id);
const HUES = [221, 12, 142, 280, 38, 190, 330, 90, 250, 60];
const FINAL = ["done", "failed", "cancelled", "lost"];
const KEPT = "kgrc.results"; // in localStorage: results only
const MOST_KEPT = 20;
const THUMBS = 8; // pictures on a timeline
const PATIENCE = 60000; // ms for one of them, and for an answer about a job
const BACKENDS = { emulate: "its bit-exact emulation", native: "its bit-exact emulation in C", csim: "its C simulation",
  board: "the board" };

let programs = [];
let backend = "";
let examples = [];
let videos = []; // {name, kind, size, file, example, shows, runs: [run]}; a run is one program on it
let shown = null; // the video that is displayed
let whole = true; // labels of the whole video, or of the moment
let moment = 0; // ms
let working = false;
let fetching = false; // an example
let camera = null;
let colours = new Map();

// ---- small parts ------------------------------------------------------------------------------

function element(tag, text, parent, name) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (name) made.className = name;
  if (parent) parent.append(made);
  return made;
}

function button(text, parent, act) {
  const made = element("button", text, parent);
  made.addEventListener("click", act);
  return made;
}

/** A colour for each label, as light as white text on it can still be read (4.6 to 1). */
function colour(label) {
  if (!colours.has(label)) {
    const n = colours.size;
    const hue = HUES[n % HUES.length] + 7 * Math.floor(n / HUES.length);
    let light = 55;
    while (light > 10 && 1.05 / (luminance(hue, 0.65, light / 100) + 0.05) < 4.6) light -= 1;
    colours.set(label, `hsl(${hue} 65% ${light}%)`);
  }
  return colours.get(label);
}

function luminance(hue, saturation, light) {
  const channel = (n) => {
    const k = (n + hue / 30) % 12;
    const c = light - saturation * Math.min(light, 1 - light) * Math.max(-1, Math.min(k - 3, 9 - k, 1));
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  };
  return 0.2126 * channel(0) + 0.7152 * channel(8) + 0.0722 * channel(4);
}

const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const millis = (ms) => (ms < 10 ? `${ms.toFixed(2)} ms` : ms < 10000 ? `${ms.toFixed(0)} ms` : seconds(ms));
const clips = (count) => `${count} ${count === 1 ? "clip" : "clips"}`;
const pause = (ms, stop) => new Promise((done) => {
  setTimeout(done, ms);
  if (stop) stop.addEventListener("abort", done, { once: true });
});

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

// ---- requests ---------------------------------------------------------------------------------

function withKey(more = {}) {
  const key = $("key").value.trim();
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

/** An answer that is an error, as a sentence for a person. */
function complaint(status, document) {
  if (status === 401) {
    $("key-box").hidden = false;
    return $("key").value.trim()
      ? "This service does not know that key. Check it above."
      : "This service asks for a key. Type it above.";
  }
  return (document && document.error) || `the service answered with status ${status}`;
}

async function request(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: withKey(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw Object.assign(new Error("The service cannot be reached."), { passing: true });
  }
  if (!answer.ok) {
    const text = complaint(answer.status, await answer.json().catch(() => null));
    throw Object.assign(new Error(text), { passing: [429, 502, 503, 504].includes(answer.status) });
  }
  return answer;
}

/** POST with progress, which fetch has not. Resolves to {status, document, retry in s}. */
function send(path, file, headers, progress, stop) {
  return new Promise((resolve, reject) => {
    const going = new XMLHttpRequest();
    going.open("POST", path);
    for (const [name, value] of Object.entries(withKey(headers))) going.setRequestHeader(name, value);
    going.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    going.onload = () => {
      let document = null;
      try {
        document = JSON.parse(going.responseText);
      } catch { /* no document */ }
      resolve({ status: going.status, document, retry: Number(going.getResponseHeader("Retry-After")) });
    };
    going.onerror = () => reject(new Error("The connection to the service was lost while the video was sent."));
    going.onabort = () => reject(new DOMException("", "AbortError"));
    stop.addEventListener("abort", () => going.abort());
    going.send(file);
  });
}

// ---- programs ---------------------------------------------------------------------------------

async function listPrograms() {
  try {
    const listed = await (await request("/v1/programs")).json();
    programs = listed.programs;
    backend = listed.backend;
    examples = await (await request("/page/examples")).json();
    $("key-box").hidden = true;
    for (const [select, first] of [[$("program"), null], [$("compare"), "no other program"]]) {
      const chosen = select.value;
      select.replaceChildren();
      if (first) element("option", first, select).value = "";
      for (const program of programs) element("option", program.name, select);
      if ([...select.options].some((option) => option.value === chosen)) select.value = chosen;
    }
    $("compare-box").hidden = programs.length < 2;
    $("backend").textContent = `; here it runs on ${BACKENDS[backend] || backend}`;
    showProgram();
    showError(programs.length ? "" : "No program is loaded.");
  } catch (error) {
    showError(error.message);
  }
}

const find = (name) => programs.find((program) => program.name === name);
const labelsOf = (program) =>
  program.labels.length ? program.labels : Array.from({ length: program.classes }, (_, i) => `class ${i}`);

function showProgram() {
  const program = find($("program").value);
  $("knows").hidden = !program;
  if (!program) return;
  $("about").textContent = program.about;
  $("always-sure").hidden = program.clip.threshold > 0;
  $("knows-title").textContent = `The ${program.classes} actions that ${program.name} knows`;
  searchActions();
  showExamples();
  showStale();
}

function searchActions() {
  const program = find($("program").value);
  const sought = $("search").value.trim().toLowerCase();
  const matching = labelsOf(program).filter((label) => label.toLowerCase().includes(sought));
  $("actions").replaceChildren();
  for (const label of matching) element("li", label, $("actions"));
  $("found").textContent = sought ? `${matching.length} found` : "";
}

function showExamples() {
  const program = find($("program").value);
  $("examples").replaceChildren();
  for (const example of examples) {
    const fit = knower(example);
    const made = button(null, $("examples"), () => tryExample(example));
    made.className = "example";
    const picture = element("img", null, made);
    picture.src = `/page/${example.picture}`;
    picture.alt = "";
    element("span", example.label, made);
    if (!fit) element("span", `not among the actions that ${program.name} knows`, made, "small");
    else if (fit !== program) element("span", `${fit.name} knows it`, made, "small");
  }
  $("examples-box").hidden = !examples.length || $("drop").hidden;
}

/** The program that knows the action of an example: the chosen one, or another. */
function knower(example) {
  const chosen = find($("program").value);
  return [chosen, ...programs].find((program) => program.labels.includes(example.label));
}

async function tryExample(example) {
  if (fetching) return;
  fetching = true;
  $("status").textContent = "Fetching the example…";
  try {
    const fit = knower(example);
    if (fit && !$("compare").value) $("program").value = fit.name;
    showProgram();
    const blob = await (await request(`/page/examples/${example.name}`)).blob();
    await add([new File([blob], example.name.split("/").pop(), { type: example.kind })], example);
  } catch (error) {
    $("status").textContent = "";
    showError(error.message);
  } finally {
    fetching = false;
  }
}

// ---- videos and their runs --------------------------------------------------------------------

const optionsNow = () => ({ sampling: $("sampling").value, stride: $("stride").value });

function runsNow() {
  const names = [$("program").value, $("compare").value].filter(Boolean);
  return [...new Set(names)].map((program) => ({ program, options: optionsNow(), state: "waiting", windows: [] }));
}

async function add(files, example) {
  await ready;
  if (!programs.length) await listPrograms();
  if (!programs.length) return; // the error says why
  stopCamera();
  for (const file of files) {
    const kind = file.type || "application/octet-stream";
    videos.push({ name: file.name, kind, size: file.size, file, example: example && example.name,
      shows: example && example.label, runs: runsNow() });
  }
  if (!working || !shown) show(videos[videos.length - files.length]);
  work();
  listVideos();
}

/** Classify the waiting videos, one after the other. */
async function work() {
  if (working) return;
  working = true;
  let next;
  while ((next = videos.find((video) => video.runs.some((run) => run.state === "waiting")))) {
    await Promise.all(next.runs.map((run) => classify(next, run)));
    keep();
  }
  working = false;
}

const queryOf = (run) => {
  const query = new URLSearchParams({ top_k: "5", program: run.program });
  for (const [name, value] of Object.entries(run.options)) if (value) query.set(name, value);
  return query;
};

async function classify(video, run) {
  run.stop = new AbortController();
  run.state = "sending";
  run.share = 0;
  changed(video);
  try {
    const headers = { "Content-Type": video.kind, Prefer: "respond-async" };
    for (let left = 3; ; left -= 1) {
      const answer = await send(`/v1/videos:classify?${queryOf(run)}`, video.file, headers, (share) => {
        run.share = share;
        changed(video);
      }, run.stop.signal);
      if (answer.status === 429 && left && answer.retry) {
        run.full = answer.retry;
        changed(video);
        await pause(1000 * answer.retry, run.stop.signal);
        run.full = 0;
        run.stop.signal.throwIfAborted();
        continue;
      }
      if (answer.status >= 400 || !answer.document) throw new Error(complaint(answer.status, answer.document));
      run.job = answer.document.id;
      break;
    }
    keep();
    await follow(video, run);
  } catch (error) {
    end(video, run, error);
  }
}

/** Ask for a job until it is final; a connection that is gone may come back. */
async function follow(video, run) {
  run.stop = run.stop || new AbortController();
  const { signal } = run.stop;
  let lost = 0;
  address();
  for (;;) {
    signal.throwIfAborted();
    let job;
    const once = new AbortController(); // this question, which may be given up without the job
    const give = () => once.abort();
    const late = setTimeout(give, PATIENCE);
    signal.addEventListener("abort", give);
    try {
      const place = `/v1/jobs/${run.job}?since=${run.windows.length}`;
      job = await (await request(place, { signal: once.signal })).json();
      lost = 0;
    } catch (error) {
      signal.throwIfAborted();
      if (!(error.passing || once.signal.aborted) || lost > 60) throw error;
      lost += 1;
      run.offline = true;
      changed(video);
      await pause(2000, signal);
      continue;
    } finally {
      clearTimeout(late);
      signal.removeEventListener("abort", give);
    }
    run.offline = false;
    run.state = job.state;
    run.ahead = job.ahead;
    run.share = job.progress.share;
    run.frames = job.progress.frames;
    run.windows.push(...job.windows);
    if (FINAL.includes(job.state)) {
      if (job.state !== "done") throw new Error(job.error || job.state);
      run.result = job.result;
      run.program = job.result.program.name;
      changed(video);
      return;
    }
    changed(video);
    await pause(job.state === "queued" ? 1000 : 300, signal);
  }
}

function end(video, run, error) {
  if (error.name === "AbortError") {
    run.state = "cancelled";
  } else {
    run.state = run.state === "lost" ? "lost" : "failed";
    run.error = error.message;
  }
  changed(video);
}

function cancel() {
  for (const run of shown ? shown.runs : []) {
    if (FINAL.includes(run.state)) continue;
    if (run.job) request(`/v1/jobs/${run.job}`, { method: "DELETE" }).catch(() => {});
    if (run.state === "waiting") run.state = "cancelled";
    else run.stop.abort();
  }
  changed(shown);
}

async function lookAgain() {
  const from = shown;
  if (from.file) {
    await add([from.file], from.example && { name: from.example, label: from.shows });
    if (working) show(videos[videos.length - 1]);
  } else {
    const example = examples.find((each) => each.name === from.example);
    if (example) await tryExample(example);
    else $("file").click();
  }
}

// ---- what this browser keeps ------------------------------------------------------------------

function keep() {
  const kept = videos.filter((video) => video.runs.some((run) => run.result || run.job)).slice(-MOST_KEPT)
    .map(({ name, kind, size, example, shows, runs }) => ({ name, kind, size, example, shows,
      runs: runs.map(({ program, options, job, state, error, result }) =>
        ({ program, options, job, state, error, result })) }));
  for (;;) {
    try {
      localStorage.setItem(KEPT, JSON.stringify(kept));
      return;
    } catch { // full, or not allowed
      if (!kept.length) return;
      kept.shift();
    }
  }
}

function recall() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT) || "[]");
    videos = kept.map((video) => ({ ...video, file: null, runs: video.runs.map((run) => ({ ...run, windows: [] })) }));
  } catch {
    videos = [];
  }
  const asked = new URLSearchParams(location.hash.slice(1)).get("job");
  const jobs = asked ? asked.split(",").slice(0, 2) : [];
  let wanted = videos.find((video) => video.runs.some((run) => jobs.includes(run.job)));
  if (!wanted && jobs.length) {
    wanted = { name: "a video from a link", kind: "", size: 0, file: null,
      runs: jobs.map((job) => ({ program: "", options: {}, job, state: "running", windows: [] })) };
    videos.push(wanted);
  }
  for (const video of videos) {
    for (const run of video.runs) {
      if (FINAL.includes(run.state)) continue;
      if (run.job) follow(video, run).then(keep, (error) => end(video, run, error));
      else run.state = "cancelled"; // it was not sent to its end
    }
  }
  listVideos();
  if (wanted) show(wanted);
}

function forget() {
  videos = videos.filter((video) => video.runs.some((run) => !FINAL.includes(run.state)));
  keep();
  if (!videos.includes(shown)) start();
  listVideos();
}

/** Write the jobs of the displayed video into the page's address: it survives a reload. */
function address() {
  const jobs = shown ? shown.runs.map((run) => run.job).filter(Boolean) : [];
  history.replaceState(null, "", jobs.length ? `#job=${jobs.join(",")}` : location.pathname);
}

function stateOf(video) {
  const [first] = video.runs;
  if (first.result) {
    const [best] = first.result.labels;
    return `${best.label} ${percent(best.confidence)}${first.result.unsure ? ", unsure" : ""}`;
  }
  return first.state;
}

function listVideos() {
  const text = videos.map((video) => `${video.name} ${stateOf(video)} ${video === shown}`).join();
  if ($("videos").dataset.text === text) return; // so that the focus stays where it is
  $("videos").dataset.text = text;
  $("videos").replaceChildren();
  for (const video of [...videos].reverse()) {
    const made = button(`${video.name}: ${stateOf(video)}`, element("li", null, $("videos")), () => show(video));
    made.setAttribute("aria-current", String(video === shown));
  }
  $("history").hidden = !videos.length;
}

// ---- the displayed video ----------------------------------------------------------------------

function start() {
  stopCamera();
  shown = null;
  clearPlayer();
  $("drop").hidden = false;
  $("examples-box").hidden = !examples.length;
  $("another").hidden = $("cancel").hidden = true;
  $("results").hidden = $("progress").hidden = true;
  $("timelines").replaceChildren();
  $("legend").replaceChildren();
  $("status").textContent = "";
  showError("");
  showStale();
  listVideos();
  address();
}

function clearPlayer() {
  const player = $("player");
  player.pause();
  player.srcObject = null;
  if (player.src) URL.revokeObjectURL(player.src);
  player.removeAttribute("src");
  player.load();
  player.hidden = $("picture").hidden = $("no-preview").hidden = true;
}

function show(video) {
  stopCamera();
  clearPlayer();
  shown = video;
  whole = true;
  moment = 0;
  colours = new Map();
  $("drop").hidden = $("examples-box").hidden = true;
  if (video.file) {
    const picture = video.kind.startsWith("image/");
    const place = picture ? $("picture") : $("player");
    place.src = URL.createObjectURL(video.file);
    place.hidden = false;
    makeThumbs(video);
  }
  address();
  listVideos();
  changed(video);
}

/** The windows, segments and labels of a run, of its result or as far as it is. */
function found(run) {
  if (run.result) return { ...run.result, duration: run.result.video.duration_ms };
  const { windows } = run;
  if (!windows.length) return null;
  const sums = new Map();
  const segments = [];
  for (const { labels, start_ms, end_ms } of windows) {
    for (const { label, confidence } of labels) sums.set(label, (sums.get(label) || 0) + confidence);
    const last = segments[segments.length - 1];
    if (last && last.label === labels[0].label) {
      last.end_ms = end_ms;
      last.sum += labels[0].confidence;
      last.count += 1;
    } else {
      segments.push({ label: labels[0].label, start_ms, end_ms, sum: labels[0].confidence, count: 1 });
    }
  }
  for (const segment of segments) segment.confidence = segment.sum / segment.count;
  const labels = [...sums].map(([label, sum]) => ({ label, confidence: sum / windows.length }));
  labels.sort((a, b) => b.confidence - a.confidence);
  const seen = windows[windows.length - 1].end_ms;
  const length = $("player").duration;
  const duration = Math.max(seen, Number.isFinite(length) ? 1000 * length : run.share ? seen / run.share : seen);
  return { windows, segments, labels: labels.slice(0, 5), unsure: false, duration };
}

/** Show a video again whose runs have changed, if it is the displayed one. */
function changed(video) {
  listVideos();
  if (video !== shown || !video) return;
  const busy = video.runs.filter((run) => !FINAL.includes(run.state));
  const failed = video.runs.filter((run) => run.error);
  showError([...new Set(failed.map((run) => run.error))].join("\n"));
  $("cancel").hidden = !busy.length;
  $("another").hidden = false;
  $("progress").hidden = !busy.length;
  const [first] = busy;
  if (first) {
    if (first.state !== "queued" && Number.isFinite(first.share)) $("progress").value = first.share;
    else $("progress").removeAttribute("value");
  }
  $("status").textContent = first ? working_on(video, first) : conclusion(video);
  $("no-preview").textContent = video.file
    ? "This browser cannot play this video." : "The video itself is not kept, only its result.";
  if (!video.file) $("no-preview").hidden = failed.length > 0;
  if (failed.length === video.runs.length) clearPlayer();
  drawTimelines(video);
  showLabels(video);
  showTimes(video);
  showStale();
}

function working_on(video, run) {
  if (run.offline) return "The service cannot be reached. Trying again…";
  if (run.full) return `The service is full. Trying again in ${run.full} s…`;
  if (run.state === "waiting") return "Waits for the videos before it…";
  if (run.state === "sending") {
    return run.share < 1
      ? `Sending ${video.name}: ${percent(run.share)} of ${(video.size / 1e6).toFixed(1)} MB…`
      : `Sent ${video.name}…`;
  }
  if (run.state === "queued") return `In the queue, ${run.ahead || "none"} before it…`;
  return `${clips(run.windows.length)} classified, ${run.frames || 0} frames seen…`;
}

function conclusion(video) {
  const done = video.runs.filter((run) => run.result);
  if (!done.length) return video.runs.some((run) => run.state === "cancelled") ? "Cancelled." : "";
  const parts = done.map(({ result }) => {
    return `${clips(result.windows.length)} in ${seconds(result.timings_ms.total)}`;
  });
  const shows = video.shows ? ` The example shows: ${video.shows}.` : "";
  return `Classified ${parts.join(" and ")}.${shows}`;
}

// ---- the timeline -----------------------------------------------------------------------------

function drawTimelines(video) {
  const focused = document.activeElement.dataset ? document.activeElement.dataset.at : undefined;
  $("timelines").replaceChildren();
  $("legend").replaceChildren();
  const names = new Set();
  for (const run of video.runs) {
    const it = found(run);
    if (!it) continue;
    if (video.runs.length > 1) element("div", run.program, $("timelines"), "small");
    const track = element("div", null, $("timelines"), "track");
    track.duration = it.duration;
    const thumbs = element("div", null, track, "thumbs");
    if (thumbs === document.querySelector(".thumbs")) drawThumbs(video, thumbs);
    drawCurve(it, thresholdOf(run), track);
    drawSegments(it, run, track);
    element("div", null, track, "head");
    track.addEventListener("click", (event) => {
      if (!event.detail) return; // a key: the segment seeks
      const box = track.getBoundingClientRect();
      seek(((event.clientX - box.left) / box.width) * it.duration);
    });
    for (const segment of it.segments) names.add(segment.label);
    for (const { label } of it.labels.slice(0, 3)) names.add(label);
  }
  for (const label of names) {
    const item = element("span", null, $("legend"));
    element("i", null, item).style.background = colour(label);
    item.append(label);
  }
  if (focused !== undefined) {
    const again = $("timelines").querySelector(`[data-at="${focused}"]`);
    if (again) again.focus();
  }
  moveHead();
}

const thresholdOf = (run) => (find(run.program) ? find(run.program).clip.threshold || 0 : 0);

function drawSegments(it, run, track) {
  const group = element("div", null, track, "segments");
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", `Timeline of ${run.program}: left and right go from action to action`);
  const buttons = it.segments.map((segment, i) => {
    const made = button(segment.label, group, (event) => event.detail || seek(segment.start_ms));
    const unsure = segment.confidence < thresholdOf(run);
    const text = `${segment.label}, ${seconds(segment.start_ms)} to ${seconds(segment.end_ms)}, ` +
      `${percent(segment.confidence)}${unsure ? ", unsure" : ""}`;
    made.setAttribute("aria-label", text);
    made.title = text;
    made.tabIndex = i ? -1 : 0;
    made.dataset.at = `${run.program} ${i}`;
    made.classList.toggle("unsure-here", unsure);
    made.style.left = `${(100 * segment.start_ms) / it.duration}%`;
    made.style.width = `${(100 * (segment.end_ms - segment.start_ms)) / it.duration}%`;
    made.style.background = colour(segment.label);
    return made;
  });
  group.addEventListener("keydown", (event) => {
    const at = buttons.indexOf(document.activeElement);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (to === undefined || !buttons[to]) return;
    event.preventDefault();
    buttons[at].tabIndex = -1;
    buttons[to].tabIndex = 0;
    buttons[to].focus();
    seek(it.segments[to].start_ms);
  });
}

/** The confidence of the best labels over time, and the program's threshold. */
function drawCurve(it, threshold, track) {
  const make = (tag, values, parent) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(values)) made.setAttribute(name, value);
    parent.append(made);
    return made;
  };
  const picture = make("svg", { class: "curve", viewBox: "0 0 1000 100", preserveAspectRatio: "none",
    "aria-hidden": "true" }, track);
  const y = (share) => 97 - 94 * share;
  if (threshold) make("line", { x1: 0, x2: 1000, y1: y(threshold), y2: y(threshold) }, picture);
  for (const { label } of it.labels.slice(0, 3)) {
    const points = [];
    for (const { start_ms, end_ms, labels } of it.windows) {
      const own = labels.find((each) => each.label === label);
      const height = y(own ? own.confidence : 0).toFixed(1);
      const ends = it.windows.length > 1 ? [(start_ms + end_ms) / 2] : [start_ms, end_ms];
      for (const ms of ends) points.push(`${((1000 * ms) / it.duration).toFixed(1)},${height}`);
    }
    make("polyline", { points: points.join(" ") }, picture).style.stroke = colour(label);
  }
}

/** Draw the pictures of a video that are there, each at its place in time. */
function drawThumbs(video, place) {
  place.replaceChildren();
  (video.thumbs || []).forEach((image, i) => {
    const canvas = element("canvas", null, place);
    canvas.style.gridColumn = i + 1;
    canvas.width = image.width;
    canvas.height = image.height;
    canvas.getContext("2d").drawImage(image, 0, 0);
  });
}

/** Make the pictures of a video that are not there yet, as far as this browser can decode it. */
async function makeThumbs(video) {
  if (video.thumbing) return;
  video.thumbing = true;
  video.thumbs = video.thumbs || [];
  try {
    await (video.kind.startsWith("image/") ? picturesOfImage(video) : picturesOfVideo(video));
  } catch { /* the timeline has the pictures that were made */ }
  video.thumbing = false;
}

async function keepThumb(video, i, source, width, height) {
  const resizeWidth = Math.max(1, Math.round((64 * width) / height));
  video.thumbs[i] = await createImageBitmap(source, { resizeHeight: 64, resizeWidth });
  const place = document.querySelector(".thumbs");
  if (video === shown && place) drawThumbs(video, place);
}

async function picturesOfImage(video) {
  if (!("ImageDecoder" in window)) return;
  const decoder = new ImageDecoder({ data: await video.file.arrayBuffer(), type: video.kind });
  try {
    await Promise.all([decoder.tracks.ready, decoder.completed]);
    const frames = decoder.tracks.selectedTrack.frameCount;
    for (let i = 0; i < THUMBS; i += 1) {
      if (video.thumbs[i]) continue;
      const { image } = await decoder.decode({ frameIndex: Math.floor(((i + 0.5) * frames) / THUMBS) });
      await keepThumb(video, i, image, image.displayWidth, image.displayHeight);
      image.close();
    }
  } finally {
    decoder.close();
  }
}

/** A picture that is not decoded within PATIENCE is left out; the next look at the video tries it again. */
async function picturesOfVideo(video) {
  const player = element("video");
  player.muted = true;
  player.preload = "auto";
  player.src = URL.createObjectURL(video.file);
  const happens = (name) => new Promise((done, fail) => {
    const late = setTimeout(() => done(false), PATIENCE);
    player.addEventListener(name, () => (clearTimeout(late), done(true)), { once: true });
    player.addEventListener("error", () => (clearTimeout(late), fail(new Error("not playable"))), { once: true });
  });
  try {
    if (!(await happens("loadeddata")) || !Number.isFinite(player.duration)) return;
    for (let i = 0; i < THUMBS && videos.includes(video); i += 1) {
      if (video.thumbs[i]) continue;
      player.currentTime = ((i + 0.5) * player.duration) / THUMBS;
      let came = await happens("seeked");
      while (came && player.seeking) came = await happens("seeked"); // that was the seek before this one
      if (came) await keepThumb(video, i, player, player.videoWidth, player.videoHeight);
    }
  } finally {
    URL.revokeObjectURL(player.src);
    player.removeAttribute("src");
    player.load();
  }
}

function seek(ms) {
  whole = false;
  moment = Math.max(0, ms);
  if ($("player").getAttribute("src")) $("player").currentTime = moment / 1000; // also before it is loaded
  atMoment();
}

function moveHead() {
  for (const track of document.querySelectorAll(".track")) {
    track.querySelector(".head").style.left = `${Math.min(100, (100 * moment) / track.duration)}%`;
  }
  $("moment").textContent = `At ${seconds(moment)}`;
}

function atMoment() {
  moveHead();
  if (shown) showLabels(shown);
}

// ---- the labels -------------------------------------------------------------------------------

function labelsAt(it) {
  if (whole) return it.labels;
  const before = it.windows.filter((window) => window.start_ms <= moment + 1);
  return (before[before.length - 1] || it.windows[0]).labels;
}

function bars(labels, place) {
  const box = element("div", null, place, "bars");
  const large = labels.filter(({ confidence }, i) => i === 0 || confidence >= 0.005);
  for (const { label, confidence } of large) {
    const bar = element("div", null, box, "bar");
    element("b", label, bar);
    element("span", percent(confidence), bar);
    const fill = element("i", null, element("div", null, bar));
    fill.style.width = `${100 * confidence}%`;
    fill.style.background = colour(label);
  }
  const less = labels.length - large.length;
  if (less) element("p", `${less} more, each below 0.5 %`, place, "small");
}

function caution(best, threshold, place) {
  element("p", `This may not be an action that the program knows: its best label has ${percent(best.confidence)}, ` +
    `and below ${percent(threshold)} it counts as unsure.`, place, "unsure");
}

function showLabels(video) {
  const runs = video.runs.filter(found);
  $("results").hidden = !runs.length;
  if (!runs.length) return;
  $("whole").setAttribute("aria-pressed", String(whole));
  $("moment").setAttribute("aria-pressed", String(!whole));
  $("whole").parentElement.hidden = false;
  const going = runs.some((run) => !run.result);
  $("bars-title").textContent = whole
    ? (going ? "Best labels so far" : "Best labels over the whole video") : `Best labels at ${seconds(moment)}`;
  $("columns").replaceChildren();
  for (const run of runs) {
    const it = found(run);
    const column = element("div", null, $("columns"));
    if (video.runs.length > 1) element("h3", run.program, column);
    const labels = labelsAt(it);
    const threshold = thresholdOf(run);
    const unsure = whole && run.result ? it.unsure : labels[0].confidence < threshold;
    if (unsure) caution(labels[0], threshold || 1, column);
    const program = find(run.program);
    if (program && video.shows && !labelsOf(program).includes(video.shows)) {
      element("p", `This video shows ${video.shows}, which is not an action that ${run.program} knows: its answer ` +
        "means nothing here.", column, "unsure");
    }
    bars(labels, column);
    for (const note of (run.result && run.result.video.notes) || []) element("p", note, column, "small");
    if (run.result) offer(video, run, column);
  }
  for (const made of document.querySelectorAll(".segments button")) made.classList.remove("now");
  if (whole) return;
  [...document.querySelectorAll(".segments")].forEach((group, n) => {
    const it = found(runs[n]);
    const now = it.segments.findIndex(({ start_ms, end_ms }) => start_ms <= moment + 1 && moment < end_ms);
    if (now >= 0) group.children[now].classList.add("now");
  });
}

// ---- what can be taken away -------------------------------------------------------------------

function offer(video, run, place) {
  const row = element("p", null, place, "row");
  const base = `${video.name.replace(/\.[^.]*$/, "")}.${run.program}`;
  button("JSON", row, () => download(`${base}.json`, "application/json", JSON.stringify(run.result, null, 1)));
  button("CSV", row, () => download(`${base}.csv`, "text/csv", csvOf(run.result)));
  button("SRT", row, () => download(`${base}.srt`, "application/x-subrip", srtOf(run.result)));
  const text = curlOf(video, run);
  const asText = button("Copy as curl", row, async () => {
    let box = place.querySelector("textarea");
    if (!box) {
      box = element("textarea", text, place);
      box.readOnly = true;
      box.rows = 4;
      box.setAttribute("aria-label", "Command for a terminal");
    }
    box.select();
    try {
      await navigator.clipboard.writeText(text);
      asText.textContent = "Copied";
    } catch { // a browser copies on https or localhost only
      asText.textContent = "Copy it from below";
    }
  });
  for (const made of row.children) made.title = { JSON: "The whole answer of the service",
    CSV: "A row for every clip", SRT: "Subtitles with the actions" }[made.textContent] || "";
}

function download(name, kind, text) {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), PATIENCE);
}

function csvOf(result) {
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const most = Math.max(...result.windows.map((window) => window.labels.length));
  const head = ["start_s", "end_s"];
  for (let i = 1; i <= most; i += 1) head.push(`label_${i}`, `confidence_${i}`);
  const rows = result.windows.map(({ start_ms, end_ms, labels }) =>
    [start_ms / 1000, end_ms / 1000, ...labels.flatMap(({ label, confidence }) => [quoted(label), confidence])]);
  return [head, ...rows].map((row) => row.join(",")).join("\r\n") + "\r\n";
}

function srtOf(result) {
  const time = (ms) => {
    const all = Math.round(ms);
    const two = (n) => String(Math.floor(n)).padStart(2, "0");
    return `${two(all / 3600000)}:${two((all / 60000) % 60)}:${two((all / 1000) % 60)},` +
      String(all % 1000).padStart(3, "0");
  };
  return result.segments.map(({ label, confidence, start_ms, end_ms }, i) =>
    `${i + 1}\n${time(start_ms)} --> ${time(end_ms)}\n${label} (${percent(confidence)})\n`).join("\n");
}

/** The command that gives the same answer; the key stays out of it. */
function curlOf(video, run) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const key = $("key").value.trim() ? ` -H "Authorization: Bearer $KEY"` : "";
  return `curl --data-binary ${quoted(`@${video.name}`)} -H ${quoted(`Content-Type: ${video.kind || "video/mp4"}`)}` +
    `${key} ${quoted(`${location.origin}/v1/videos:classify?${queryOf(run)}`)}`;
}

// ---- where the time goes ----------------------------------------------------------------------

function timeBar(name, ms, most, place, kind = "") {
  const bar = element("div", null, place, "bar");
  element("span", name, bar).style.textAlign = "left";
  element("span", millis(ms), bar);
  element("i", null, element("div", null, bar), kind).style.width = `${(100 * ms) / most}%`;
}

function showTimes(video) {
  const open = [...document.querySelectorAll("#times details")].map((each) => each.open);
  $("times-columns").replaceChildren();
  const done = video.runs.filter((run) => run.result);
  $("times").hidden = !done.length;
  for (const run of done) {
    const { result } = run;
    const { timings_ms: times, board, layers } = result;
    const column = element("div", null, $("times-columns"));
    if (video.runs.length > 1) element("h3", run.program, column);
    const host = BACKENDS[result.backend] || result.backend;
    const clip = times.run / result.windows.length;
    const most = Math.max(clip, board.latency_ms);
    element("h3", "One clip", column);
    const here = result.backend === "board" ? "on the board, measured" : `on ${host}, measured on this host`;
    timeBar(here, clip, most, column);
    timeBar(`on the board at ${board.clock_mhz} MHz, modelled`, board.latency_ms, most, column, "board");
    element("h3", `The whole video, on this host: ${millis(times.total)}`, column);
    timeBar(clips(result.windows.length), times.run, times.total, column);
    timeBar("waiting for a free worker", times.wait_for_device, times.total, column, "rest");
    timeBar("decoding and the rest", times.decode_and_rest, times.total, column, "rest");
    showLayers(result, layers, column);
    const facts = element("dl", null, column);
    const { video: seen } = result;
    for (const [name, value] of [
      ["Video", `${seconds(seen.duration_ms)}, ${seen.width} × ${seen.height}, ${seen.codec}`],
      ["Program", `${result.program.name}, version ${result.program.version}`],
    ]) {
      element("dt", name, facts);
      element("dd", value, facts);
    }
  }
  [...document.querySelectorAll("#times details")].forEach((each, i) => (each.open = Boolean(open[i])));
}

/** The layers that take longest, each as its share of a clip here and on the board; then all of them. */
function showLayers(result, layers, column) {
  const sum = (name) => layers.reduce((total, layer) => total + layer[name], 0) || 1;
  const [host, board] = [sum("ms"), sum("modelled_ms")];
  const share = (layer) => Math.max(layer.ms / host, layer.modelled_ms / board);
  const longest = [...layers].sort((a, b) => share(b) - share(a)).slice(0, 6);
  const most = share(longest[0]);
  element("h3", "Layers that take longest, as a share of their clip", column);
  for (const layer of longest) {
    const box = element("div", null, column, "layer");
    element("div", layer.task, box, "small").style.overflowWrap = "anywhere";
    for (const [name, part, kind] of [["here", layer.ms / host, ""], ["board, modelled", layer.modelled_ms / board, "board"]]) {
      const bar = element("div", null, box, "bar");
      element("span", name, bar, "small").style.textAlign = "left";
      element("span", percent(part), bar);
      element("i", null, element("div", null, bar), kind).style.width = `${(100 * part) / most}%`;
    }
  }
  const details = element("details", null, column);
  element("summary", `All ${layers.length} layers`, details);
  const wide = element("div", null, details, "wide");
  wide.tabIndex = 0;
  wide.setAttribute("role", "region");
  wide.setAttribute("aria-label", `Layers of ${result.program.name}`);
  const table = element("table", null, wide);
  const head = element("tr", null, element("thead", null, table));
  for (const name of ["Layer", "Board, ms (modelled)", "Here, ms", "Millions of MACs"]) element("th", name, head);
  const body = element("tbody", null, table);
  for (const layer of layers) {
    const row = element("tr", null, body);
    for (const text of [layer.task, layer.modelled_ms.toFixed(3), layer.ms.toFixed(2), (layer.macs / 1e6).toFixed(1)]) {
      element("td", text, row);
    }
  }
}

// ---- a result of other settings ---------------------------------------------------------------

function showStale() {
  const now = runsNow();
  const same = (run, other) => other && run.program === other.program &&
    (run.options.sampling || "") === other.options.sampling && (run.options.stride || "") === other.options.stride;
  const other = shown && shown.runs.every((run) => run.result) && programs.length &&
    (now.length !== shown.runs.length || shown.runs.some((run, i) => !same(run, now[i])));
  $("stale").hidden = !other;
  if (!other) return;
  const names = shown.runs.map((run) => run.program).join(" and ");
  const can = shown.file || examples.some((example) => example.name === shown.example);
  $("stale").firstElementChild.textContent =
    `This is the result of ${names} with the settings that it had, not of those chosen now.`;
  $("look").textContent = can ? "Look again" : "Choose the video again";
}

// ---- the webcam -------------------------------------------------------------------------------

async function startCamera() {
  if (camera) {
    start();
    return;
  }
  start();
  const mine = { stream: null, socket: null, timer: null };
  camera = mine;
  $("webcam").textContent = "Stop the webcam";
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: 320, height: 240 } });
  } catch (error) {
    if (camera !== mine) return;
    start();
    showError(`The webcam cannot be used: ${error.message}`);
    return;
  }
  if (camera !== mine) { // stopped while the browser asked for permission
    for (const track of stream.getTracks()) track.stop();
    return;
  }
  camera.stream = stream;
  const player = $("player");
  player.srcObject = stream;
  player.controls = false;
  player.hidden = false;
  $("drop").hidden = $("examples-box").hidden = true;
  await player.play().catch(() => {}); // it was stopped before its first frame
  if (camera === mine) goLive();
}

/** Send the frames of the webcam to the chosen program. */
function goLive() {
  const player = $("player");
  const key = $("key").value.trim();
  const coded = btoa(key).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  const program = $("program").value;
  const place = `${location.origin.replace("http", "ws")}/v1/live?${new URLSearchParams({ program })}`;
  const socket = key ? new WebSocket(place, [`kgrc.key.${coded}`]) : new WebSocket(place);
  camera.socket = socket;
  const canvas = element("canvas");
  canvas.width = player.videoWidth || 320;
  canvas.height = player.videoHeight || 240;
  let coding = false;
  socket.onopen = () => {
    if (!camera || camera.socket !== socket) return;
    camera.timer = setInterval(() => {
      if (coding || socket.bufferedAmount > 200000) return; // back-pressure: skip a frame
      coding = true;
      canvas.getContext("2d").drawImage(player, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((image) => {
        coding = false;
        if (image && socket.readyState === 1) socket.send(image);
      }, "image/jpeg", 0.85);
    }, 66);
  };
  socket.onmessage = (event) => {
    if (!camera || camera.socket !== socket) return;
    const message = JSON.parse(event.data);
    if (message.type === "filling") $("status").textContent = `Frames for the first clip: ${message.have} of ${message.need}`;
    if (message.type === "prediction") showNow(message, program);
    if (message.type === "error") {
      start();
      showError(message.error);
    }
  };
  socket.onclose = () => {
    if (camera && camera.socket === socket) {
      start();
      showError("The live session ended.");
    }
  };
}

function showNow(message, program) {
  $("results").hidden = false;
  $("whole").parentElement.hidden = $("times").hidden = true;
  $("bars-title").textContent = `Now, says ${program}`;
  $("columns").replaceChildren();
  const column = element("div", null, $("columns"));
  if (message.unsure) caution(message.labels[0], thresholdOf({ program }), column);
  bars(message.labels, column);
  $("status").textContent = `${message.run_ms.toFixed(0)} ms a clip; ${message.received} frames, ` +
    `${message.dropped} of them dropped`;
}

function closeLive() {
  const { socket, timer } = camera;
  clearInterval(timer);
  camera.socket = null;
  if (socket) socket.close();
}

function stopCamera() {
  if (!camera) return;
  closeLive();
  for (const track of camera.stream ? camera.stream.getTracks() : []) track.stop();
  camera = null;
  $("player").srcObject = null;
  $("player").controls = true;
  $("webcam").textContent = "Use the webcam";
}

// ---- events of the page -----------------------------------------------------------------------

$("drop").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) add([...$("file").files]);
  $("file").value = "";
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  if (event.dataTransfer.files.length) add([...event.dataTransfer.files]);
});
$("player").addEventListener("timeupdate", () => {
  if (camera || !shown || !shown.file) return;
  moment = 1000 * $("player").currentTime;
  if (whole) moveHead();
  else atMoment();
});
$("player").addEventListener("play", () => {
  if (camera || !shown) return;
  whole = false;
  atMoment();
});
$("player").addEventListener("error", () => {
  if (camera || !$("player").getAttribute("src")) return;
  $("player").hidden = true;
  $("no-preview").hidden = false;
});
$("whole").addEventListener("click", () => {
  whole = true;
  if (shown) showLabels(shown);
});
$("moment").addEventListener("click", () => {
  whole = false;
  atMoment();
});
$("another").addEventListener("click", start);
$("cancel").addEventListener("click", cancel);
$("look").addEventListener("click", lookAgain);
$("forget").addEventListener("click", forget);
$("webcam").addEventListener("click", startCamera);
$("search").addEventListener("input", searchActions);
$("program").addEventListener("change", () => {
  showProgram();
  if (camera && camera.socket) {
    closeLive();
    goLive();
  }
});
for (const name of ["compare", "sampling", "stride"]) $(name).addEventListener("change", showStale);
$("key-open").addEventListener("click", () => {
  $("key-box").hidden = !$("key-box").hidden;
  if (!$("key-box").hidden) $("key").focus();
});
const useKey = () => {
  try {
    sessionStorage.setItem("kgrc.key", $("key").value.trim());
  } catch { /* it is kept until the page is left */ }
  listPrograms();
};
$("key-use").addEventListener("click", useKey);
$("key").addEventListener("keydown", (event) => event.key === "Enter" && useKey());

try {
  $("key").value = sessionStorage.getItem("kgrc.key") || "";
} catch { /* not allowed */ }
if (!navigator.mediaDevices) {
  const port = location.port || "80";
  $("webcam").hidden = true;
  $("no-webcam").hidden = false;
  $("tunnel").textContent = `ssh -L 8000:127.0.0.1:${port} ${location.hostname}`;
  $("tunnelled").textContent = "http://127.0.0.1:8000";
}
const ready = listPrograms().then(recall);

