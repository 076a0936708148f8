// The page: uploads a video and shows its timeline. No library, no build step.
"use strict";

const $ = (id) => document.getElementById(id);
const HUES = [221, 12, 142, 280, 38, 190, 330, 90, 250, 60];

let programs = [];
let colours = new Map();
let segments = [];
let windows = [];
let duration = 0;
let running = null; // the request and job that can be cancelled
let camera = null;

function colour(label) {
  if (!colours.has(label)) {
    const n = colours.size;
    const light = 42 - 8 * (Math.floor(n / HUES.length) % 3);
    colours.set(label, `hsl(${HUES[n % HUES.length]} 65% ${light}%)`);
  }
  return colours.get(label);
}

function element(tag, text, parent, name) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (name) made.className = name;
  if (parent) parent.append(made);
  return made;
}

function showStatus(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function withKey(more = {}) {
  const key = $("key").value.trim();
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function request(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: withKey(options.headers) });
  if (answer.status === 401) $("key-box").hidden = false;
  let document = null;
  try {
    document = await answer.json();
  } catch {
    throw new Error(`the service answered ${answer.status} without a document`);
  }
  if (!answer.ok) throw new Error(document.error || `status ${answer.status}`);
  return { status: answer.status, document };
}

// ---- programs -------------------------------------------------------------------------------

async function listPrograms() {
  try {
    const { document: listed } = await request("/v1/programs");
    programs = listed.programs;
    const chosen = $("program").value;
    $("program").replaceChildren();
    for (const program of programs) element("option", program.name, $("program"));
    if (programs.some((program) => program.name === chosen)) $("program").value = chosen;
    $("backend").textContent = `on ${listed.backend}`;
    showLayers();
    showStatus(programs.length ? "" : "No program is loaded.", !programs.length);
  } catch (error) {
    showStatus(error.message, true);
  }
}

function current() {
  return programs.find((program) => program.name === $("program").value);
}

function showLayers(measured = []) {
  const program = current();
  $("rows").replaceChildren();
  if (!program) return;
  const host = new Map(measured.map((layer) => [layer.task, layer.ms]));
  for (const task of program.tasks) {
    const row = element("tr", null, $("rows"));
    const kept = task.macs_kept === undefined ? "" : (task.macs_kept / 1e6).toFixed(1);
    const share = task.macs_dense ? `${((100 * task.macs_kept) / task.macs_dense).toFixed(0)} %` : "";
    const ms = host.has(task.name) ? host.get(task.name).toFixed(2) : "";
    for (const text of [task.name, task.mode, task.out.join(" × "), kept, share, ms,
      task.modelled_ms.toFixed(3)]) element("td", text, row);
  }
}

// ---- a result -------------------------------------------------------------------------------

function showBars(labels, title) {
  $("bars-title").textContent = title;
  $("bars").replaceChildren();
  for (const { label, confidence } of labels) {
    const bar = element("div", null, $("bars"), "bar");
    element("span", `${(100 * confidence).toFixed(1)} %`, bar);
    const box = element("div", null, bar);
    const fill = element("i", null, box);
    fill.style.width = `${100 * confidence}%`;
    fill.style.background = colour(label);
    element("b", label, box);
  }
}

function showFacts(result) {
  const { timings_ms: times, video, board } = result;
  const facts = [
    ["Program", `${result.program.name} (${result.program.version})`],
    ["Video", `${(video.duration_ms / 1000).toFixed(1)} s, ${video.width} × ${video.height}, ${video.codec}`],
    ["Clips classified", result.windows.length],
    ["On the device", `${times.run.toFixed(0)} ms (${result.backend}, this host)`],
    ["Waiting for the device", `${times.wait_for_device.toFixed(0)} ms`],
    ["Decoding and the rest", `${times.decode_and_rest.toFixed(0)} ms`],
    ["Total", `${times.total.toFixed(0)} ms`],
    ["One clip on the board", `${board.latency_ms.toFixed(2)} ms at ${board.clock_mhz} MHz (${board.kind})`],
    ...video.notes.map((note) => ["Note", note]),
  ];
  $("facts").replaceChildren();
  for (const [name, value] of facts) {
    element("dt", name, $("facts"));
    element("dd", value, $("facts"));
  }
}

function showTimeline() {
  const line = $("timeline");
  for (const old of [...line.querySelectorAll(".segment")]) old.remove();
  $("legend").replaceChildren();
  for (const segment of segments) {
    const box = element("div", segment.label, line, "segment");
    box.style.left = `${(100 * segment.start_ms) / duration}%`;
    box.style.width = `${(100 * (segment.end_ms - segment.start_ms)) / duration}%`;
    box.style.background = colour(segment.label);
    const seconds = (ms) => (ms / 1000).toFixed(1);
    box.title = `${segment.label}: ${seconds(segment.start_ms)} to ${seconds(segment.end_ms)} s, ` +
      `${(100 * segment.confidence).toFixed(0)} %`;
  }
  for (const label of new Set(segments.map((segment) => segment.label))) {
    const item = element("span", null, $("legend"));
    element("i", null, item).style.background = colour(label);
    item.append(label);
  }
  line.hidden = !segments.length;
}

function follow() {
  const ms = 1000 * $("player").currentTime;
  $("head").style.left = duration ? `${Math.min(100, (100 * ms) / duration)}%` : "0";
  if (!windows.length || $("player").hidden) return;
  const boxes = $("timeline").querySelectorAll(".segment");
  segments.forEach((segment, i) =>
    boxes[i].classList.toggle("now", segment.start_ms <= ms && ms < segment.end_ms));
  if ($("player").currentTime === 0 || $("player").ended) return;
  let seen = windows[0];
  for (const window of windows) if (window.start_ms <= ms) seen = window;
  showBars(seen.labels, `At ${(ms / 1000).toFixed(1)} s`);
}

function showResult(result) {
  ({ segments, windows } = result);
  duration = result.video.duration_ms || 1;
  showTimeline();
  const title = "Best labels over the whole video";
  showBars(result.labels, result.unsure ? `${title} (unsure)` : title);
  showFacts(result);
  showLayers(result.layers);
  showStatus(`Classified ${result.windows.length} clips in ${(result.timings_ms.total / 1000).toFixed(1)} s.`);
}

// ---- a video --------------------------------------------------------------------------------

function clear() {
  segments = [];
  windows = [];
  colours = new Map();
  duration = 0;
  showTimeline();
  $("facts").replaceChildren();
}

async function classify(file) {
  stopCamera();
  clear();
  $("drop").hidden = true;
  $("no-preview").hidden = true;
  const player = $("player");
  if (player.src) URL.revokeObjectURL(player.src);
  player.srcObject = null;
  player.controls = true;
  player.src = URL.createObjectURL(file);
  player.hidden = false;
  showStatus(`Sending ${file.name} (${(file.size / 1e6).toFixed(1)} MB)…`);
  $("progress").hidden = false;
  $("progress").removeAttribute("value");
  $("cancel").hidden = false;
  $("another").hidden = true;
  const stop = new AbortController();
  running = { stop, place: null };
  const query = new URLSearchParams({ top_k: "5" });
  if ($("sampling").value) query.set("sampling", $("sampling").value);
  if ($("program").value) query.set("program", $("program").value);
  if ($("stride").value) query.set("stride", $("stride").value);
  try {
    const { status, document: answer } = await request(`/v1/videos:classify?${query}`, {
      method: "POST",
      body: file,
      signal: stop.signal,
      headers: { "Content-Type": file.type || "application/octet-stream", Prefer: "wait=1" },
    });
    showResult(status === 202 ? await wait(answer) : answer);
  } catch (error) {
    showStatus(error.name === "AbortError" ? "Cancelled." : error.message, error.name !== "AbortError");
  } finally {
    running = null;
    $("progress").hidden = true;
    $("cancel").hidden = true;
    $("another").hidden = false;
  }
}

async function wait(job) {
  const place = `/v1/jobs/${job.id}`;
  running.place = place;
  while (!["done", "failed", "cancelled", "lost"].includes(job.state)) {
    const { windows: seen, frames, share } = job.progress;
    showStatus(job.state === "queued" ? "Waiting in the queue…" : `${seen} clips, ${frames} frames…`);
    if (share !== null) $("progress").value = share;
    await new Promise((done) => setTimeout(done, 300));
    job = (await request(place, { signal: running.stop.signal })).document;
  }
  if (job.state !== "done") throw new Error(job.error || job.state);
  return job.result;
}

async function cancel() {
  if (!running) return;
  const { place, stop } = running;
  stop.abort();
  if (place) await request(place, { method: "DELETE" }).catch(() => {});
}

function again() {
  stopCamera();
  $("player").pause();
  $("player").hidden = true;
  $("no-preview").hidden = true;
  $("drop").hidden = false;
  $("another").hidden = true;
  clear();
  showStatus("");
}

// ---- the webcam -----------------------------------------------------------------------------

async function startCamera() {
  if (camera) {
    again();
    return;
  }
  clear();
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { width: 320, height: 240 } });
    camera = { stream, socket: null, timer: null };
  } catch (error) {
    showStatus(`The webcam cannot be used: ${error.message}`, true);
    return;
  }
  const player = $("player");
  player.src = "";
  player.srcObject = camera.stream;
  player.controls = false;
  player.hidden = false;
  $("drop").hidden = true;
  $("no-preview").hidden = true;
  $("another").hidden = true;
  $("webcam").textContent = "Stop the webcam";
  await player.play();
  const key = $("key").value.trim();
  const coded = btoa(key).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  const query = new URLSearchParams({ program: $("program").value });
  const place = `${location.origin.replace("http", "ws")}/v1/live?${query}`;
  const socket = key ? new WebSocket(place, [`kgrc.key.${coded}`]) : new WebSocket(place);
  camera.socket = socket;
  const canvas = document.createElement("canvas");
  canvas.width = player.videoWidth || 320;
  canvas.height = player.videoHeight || 240;
  socket.onopen = () => {
    camera.timer = setInterval(() => {
      if (socket.bufferedAmount > 200000) return; // back-pressure: skip a frame
      canvas.getContext("2d").drawImage(player, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((image) => image && socket.readyState === 1 && socket.send(image),
        "image/jpeg", 0.85);
    }, 66);
  };
  socket.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.type === "filling") showStatus(`Frames for the first clip: ${message.have} of ${message.need}`);
    if (message.type === "prediction") {
      showBars(message.labels, message.unsure ? "Now (unsure)" : "Now");
      showStatus(`${message.run_ms.toFixed(0)} ms a clip; ${message.received} frames, ` +
        `${message.dropped} dropped`);
    }
    if (message.type === "error") {
      stopCamera();
      showStatus(message.error, true);
    }
  };
  socket.onclose = () => {
    if (camera && camera.socket === socket) {
      stopCamera();
      showStatus("The live session ended.", true);
    }
  };
}

function stopCamera() {
  if (!camera) return;
  const { stream, socket, timer } = camera;
  camera = null;
  clearInterval(timer);
  if (socket) socket.close();
  for (const track of stream.getTracks()) track.stop();
  $("player").srcObject = null;
  $("player").hidden = true;
  $("drop").hidden = false;
  $("webcam").textContent = "Use the webcam";
}

// ---- events of the page ---------------------------------------------------------------------

$("drop").addEventListener("click", () => $("file").click());
$("drop").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") $("file").click();
});
$("file").addEventListener("change", () => {
  if ($("file").files.length) classify($("file").files[0]);
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
  if (event.dataTransfer.files.length && !running) classify(event.dataTransfer.files[0]);
});
$("timeline").addEventListener("click", (event) => {
  const box = $("timeline").getBoundingClientRect();
  $("player").currentTime = ((event.clientX - box.left) / box.width) * (duration / 1000);
});
$("player").addEventListener("timeupdate", follow);
$("player").addEventListener("error", () => {
  if (camera || !$("player").getAttribute("src")) return;
  $("player").hidden = true;
  $("no-preview").hidden = false;
});
$("another").addEventListener("click", again);
$("cancel").addEventListener("click", cancel);
$("webcam").addEventListener("click", startCamera);
$("program").addEventListener("change", () => showLayers());
$("key").addEventListener("change", listPrograms);
listPrograms();
