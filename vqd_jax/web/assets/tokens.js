// The picture and its tokens: the body of a function of (element, trigger, props, server, watch).
//
// props.value is what the server sent last: {phase, text, share, sides}. A side is one answer:
// {label, request, pictures, tokens, answers, trajectory}, the last four with one entry a picture.
// Everything that a visitor sees is kept here, in the browser; the server needs none of it.

const config = props.config;
const numTokens = config.rows * config.columns;
const part = (name) => element.querySelector('[data-part="' + name + '"]');
const canvas = part("canvas");
const pen = canvas.getContext("2d");
const cell = Math.max(8, Math.floor(512 / Math.max(config.rows, config.columns)));
canvas.width = cell * config.columns;
canvas.height = cell * config.rows;
element.classList.toggle("small", config.side <= 96);

let sides = [];
let chosen = { side: 0, index: 0 };
let step = 0;
let taken = new Set();
let cursor = null;
let running = false;
let wasShown = null;
let original = null;
const past = [];
const images = new Map();
const sheets = new Map();

// Numbers in texts.

function bytes(text) {
  const plain = atob(text.replace(/-/g, "+").replace(/_/g, "/"));
  return Uint8Array.from(plain, (letter) => letter.charCodeAt(0));
}

function numbers(text) {
  const read = new DataView(bytes(text).buffer);
  return Uint16Array.from({ length: read.byteLength / 2 }, (_, i) => read.getUint16(2 * i, true));
}

function written(array) {
  const data = new Uint8Array(2 * array.length);
  const view = new DataView(data.buffer);
  array.forEach((number, i) => view.setUint16(2 * i, number, true));
  const plain = btoa(String.fromCharCode(...data));
  return plain.replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
}

// What is shown.

function picture() {
  const side = sides[chosen.side];
  if (!side || !side.pictures[chosen.index]) return null;
  const at = (list) => (list ? list[chosen.index] : null);
  return {
    side,
    url: side.pictures[chosen.index],
    tokens: numbers(at(side.tokens)),
    trajectory: at(side.trajectory),
    answer: at(side.answers),
  };
}

function numSteps(shown) {
  return shown.trajectory ? numbers(shown.trajectory).length / numTokens : 0;
}

function tokensNow(shown) {
  const last = numSteps(shown);
  if (step >= last) return shown.tokens;
  if (step === 0) {
    const known = shown.side.request && shown.side.request.known;
    return known ? numbers(known) : new Uint16Array(numTokens).fill(config.numCodes);
  }
  return numbers(shown.trajectory).subarray((step - 1) * numTokens, step * numTokens);
}

// What the network said when it was last asked for a preview.
function answerNow(shown) {
  if (step >= numSteps(shown)) return shown.answer;
  const before = (shown.side.previews || []).filter((preview) => preview.share * numSteps(shown) <= step);
  return before.length ? before[before.length - 1].answers[chosen.index] : null;
}

function image(url) {
  if (!images.has(url)) {
    if (images.size > 64) images.delete(images.keys().next().value);
    const loaded = new Image();
    loaded.onload = draw;
    loaded.src = url;
    images.set(url, loaded);
  }
  return images.get(url);
}

function colour(name) {
  return getComputedStyle(element).getPropertyValue(name).trim() || "#888";
}

function place(token) {
  return [(token % config.columns) * cell, Math.floor(token / config.columns) * cell];
}

function draw() {
  const shown = picture();
  part("work").hidden = !shown;
  if (!shown) return;
  pen.imageSmoothingEnabled = config.side > 96;
  const sheet = step < numSteps(shown) ? sheets.get(shown.trajectory) : null;
  if (sheet) {
    const x = ((step - 1) % sheet.columns) * config.side;
    const y = Math.floor((step - 1) / sheet.columns) * config.side;
    const drawn = image(sheet.url);
    if (drawn.complete && step) {
      pen.drawImage(drawn, x, y, config.side, config.side, 0, 0, canvas.width, canvas.height);
    }
  } else if (image(shown.url).complete) {
    pen.drawImage(image(shown.url), 0, 0, canvas.width, canvas.height);
  }
  const tokens = tokensNow(shown);
  const answer = answerNow(shown);
  const sure = part("confidence").checked && answer ? bytes(answer.confidence) : null;
  for (let token = 0; token < numTokens; token++) {
    const [x, y] = place(token);
    if (tokens[token] === config.numCodes) cover(x, y, "#8a8f98");
    if (sure) {
      cover(x, y, "rgba(255,110,0," + 0.8 * (1 - sure[token] / 255) + ")");
    }
    if (taken.has(token)) hatch(x, y);
    if (part("grid").checked) {
      pen.strokeStyle = "rgba(127,127,127,0.35)";
      pen.lineWidth = 1;
      pen.strokeRect(x + 0.5, y + 0.5, cell, cell);
    }
  }
  if (cursor !== null) {
    const [x, y] = place(cursor);
    for (const [style, width] of [["#000", 5], ["#fff", 2]]) {
      pen.strokeStyle = style;
      pen.lineWidth = width;
      pen.strokeRect(x + 2, y + 2, cell - 4, cell - 4);
    }
  }
}

function cover(x, y, style) {
  pen.fillStyle = style;
  pen.fillRect(x, y, cell, cell);
}

// A taken token is dimmed and struck through, so that it can be told without its colour.
function hatch(x, y) {
  cover(x, y, "rgba(255,255,255,0.55)");
  pen.strokeStyle = colour("--primary-600");
  pen.lineWidth = Math.max(1.5, cell / 20);
  pen.beginPath();
  for (let at = 0; at < 2 * cell; at += cell / 3) {
    pen.moveTo(x + Math.max(0, at - cell), y + Math.min(at, cell));
    pen.lineTo(x + Math.min(at, cell), y + Math.max(0, at - cell));
  }
  pen.stroke();
}

function describe() {
  const shown = picture();
  const list = part("candidates");
  list.replaceChildren();
  if (!shown || cursor === null) {
    part("token").textContent = shown ? "Point at a token to see what the network thinks of it." : "";
    return;
  }
  const row = Math.floor(cursor / config.columns) + 1;
  const masked = tokensNow(shown)[cursor] === config.numCodes;
  let text = "Row " + row + ", column " + ((cursor % config.columns) + 1);
  text += taken.has(cursor) ? ", taken back" : masked ? ", still masked" : "";
  const answer = answerNow(shown);
  if (answer) {
    text += ". Confidence " + percent(bytes(answer.confidence)[cursor]);
    const each = config.numCandidates;
    const codes = numbers(answer.candidates).subarray(cursor * each, (cursor + 1) * each);
    const shares = bytes(answer.probabilities).subarray(cursor * each, (cursor + 1) * each);
    codes.forEach((code, i) => list.append(swatch(code, shares[i])));
  }
  part("token").textContent = text + ".";
}

function percent(byte) {
  return Math.round((100 * byte) / 255) + " %";
}

function swatch(code, share) {
  const item = document.createElement("li");
  const square = document.createElement("span");
  const { url, columns, count } = config.codebook;
  const rows = Math.ceil(count / columns);
  square.style.backgroundImage = 'url("' + url + '")';
  square.style.backgroundSize = 36 * columns + "px " + 36 * rows + "px";
  square.style.backgroundPosition =
    -36 * (code % columns) + "px " + -36 * Math.floor(code / columns) + "px";
  square.title = "Code " + code;
  item.append(square, percent(share));
  return item;
}

function drawSides() {
  const rows = sides.map((side, number) => {
    const row = document.createElement("div");
    row.className = "side";
    const label = document.createElement("p");
    label.textContent = side.label || "";
    const strip = document.createElement("div");
    strip.className = "strip";
    strip.append(...side.pictures.map((url, index) => thumbnail(url, number, index)));
    row.append(label, strip);
    return row;
  });
  part("sides").replaceChildren(...rows);
}

function thumbnail(url, side, index) {
  const button = document.createElement("button");
  const small = document.createElement("img");
  small.src = url;
  small.alt = "Picture " + (index + 1) + (sides.length > 1 ? " of side " + (side + 1) : "");
  button.type = "button";
  button.setAttribute("aria-pressed", chosen.side === side && chosen.index === index);
  button.append(small);
  button.addEventListener("click", () => {
    chosen = { side, index };
    taken = new Set();
    showLast();
    const again = part("sides").querySelectorAll(".strip")[side];
    again.children[index].focus();
  });
  return button;
}

function showLast() {
  const shown = picture();
  step = shown ? numSteps(shown) : 0;
  part("step").max = step;
  part("step").value = step;
  part("step").parentElement.hidden = !step;
  refresh();
}

function refresh() {
  const shown = picture();
  drawSides();
  part("step-text").textContent = shown ? step + " of " + numSteps(shown) : "";
  const partial = taken.size > 0;
  part("again").disabled = running || !partial;
  part("vary").disabled = running;
  part("invert").disabled = part("clear").disabled = !partial;
  part("undo").disabled = running || !past.length;
  part("animate").disabled = !shown || !shown.trajectory;
  part("recipe").disabled = part("link").disabled = running || !shown || !shown.side.request;
  part("paste").hidden = !original;
  part("hint").textContent = partial
    ? taken.size + " of " + numTokens + " tokens are taken back; the others stay as they are."
    : "Drag over tokens to take them back, then paint them again.";
  describe();
  draw();
}

function say(text, failed = false) {
  part("status").textContent = text;
  part("status").classList.toggle("failed", failed);
}

// What the server sends.

function receive() {
  const value = JSON.parse(JSON.stringify(props.value || {}));
  if (value.run && value.run === stopped) return;
  run = value.run;
  say(value.text || "", value.phase === "failed");
  const begins = value.phase === "running" && !running;
  const ends = running && value.phase !== "running";
  running = value.phase === "running";
  part("progress").hidden = !running;
  part("progress").value = value.share || 0;
  if (begins) {
    previews = [];
    wasShown = { sides, chosen, taken };
    if (element.getBoundingClientRect().top > 0.7 * window.innerHeight) {
      element.scrollIntoView({ behavior: "smooth" });
    }
  }
  if (value.phase === "made" && wasShown) {
    if (wasShown.sides.length) past.push(wasShown);
    if (past.length > 20) past.shift();
    wasShown = null;
  }
  if (value.sides) {
    value.sides.forEach((side, number) => keep(side, number));
    sides = value.sides;
    const side = sides[chosen.side] || sides[0];
    if (!sides[chosen.side] || chosen.index >= side.pictures.length) {
      chosen = { side: 0, index: 0 };
    }
    if (!running) taken = new Set();
    showLast();
  } else if (ends) {
    goBack();
  } else {
    refresh();
  }
}

// What was shown before the run that failed or was stopped.
function goBack() {
  if (wasShown) ({ sides, chosen, taken } = wasShown);
  else sides = [];
  wasShown = null;
  showLast();
}

let run = null;
let stopped = null;
// The button may come into the page after this component.
document.addEventListener("click", (event) => {
  if (!running || !event.target.closest("#stop")) return;
  stopped = run;
  running = false;
  part("progress").hidden = true;
  say("Stopped.");
  goBack();
});

// The answers of all previews stay with the pictures that they lead to.
let previews = [];
function keep(side, number) {
  if (!previews[number] || side.share < previews[number].at(-1).share) previews[number] = [];
  if (side.answers) previews[number].push({ share: side.share, answers: side.answers });
  side.previews = previews[number];
}

async function ask(name, question) {
  const answer = await server[name](question);
  if (answer.failed) {
    say(answer.failed, true);
    return null;
  }
  return answer;
}

// Steps.

async function scrub() {
  step = Number(part("step").value);
  const shown = picture();
  refresh();
  const last = numSteps(shown);
  if (step >= last) return;
  const { trajectory } = shown;
  if (!sheets.has(trajectory)) {
    sheets.set(trajectory, null);
    const sheet = await ask("frames", { trajectory });
    if (sheets.size > 16) sheets.delete(sheets.keys().next().value);
    if (sheet) sheets.set(trajectory, sheet);
    else sheets.delete(trajectory);
    draw();
  }
}

// Taking tokens back.

function toggle(token, take) {
  if (running) return;
  if (take) taken.add(token);
  else taken.delete(token);
  refresh();
}

function under(event) {
  const box = canvas.getBoundingClientRect();
  const column = Math.floor(((event.clientX - box.left) / box.width) * config.columns);
  const row = Math.floor(((event.clientY - box.top) / box.height) * config.rows);
  const inside = column >= 0 && row >= 0 && column < config.columns && row < config.rows;
  return inside ? row * config.columns + column : null;
}

let taking = null;
canvas.addEventListener("pointerdown", (event) => {
  const token = under(event);
  if (token === null) return;
  canvas.setPointerCapture(event.pointerId);
  cursor = token;
  taking = !taken.has(token);
  toggle(token, taking);
});
canvas.addEventListener("pointermove", (event) => {
  const token = under(event);
  if (token === null || token === cursor) return;
  cursor = token;
  if (taking === null) refresh();
  else toggle(token, taking);
});
for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, () => (taking = null));
}
canvas.addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const now = cursor === null ? 0 : cursor;
  if (event.key in moves) {
    const [down, right] = moves[event.key];
    const row = Math.min(config.rows - 1, Math.max(0, Math.floor(now / config.columns) + down));
    const column = Math.min(config.columns - 1, Math.max(0, (now % config.columns) + right));
    cursor = row * config.columns + column;
    if (event.shiftKey) taken.add(now).add(cursor);
    refresh();
  } else if (event.key === " ") {
    cursor = now;
    toggle(now, !taken.has(now));
  } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) undo();
  else return;
  event.preventDefault();
});

function undo() {
  if (running || !past.length) return;
  ({ sides, chosen, taken } = past.pop());
  say("");
  showLast();
}

// Buttons.

function on(name, action) {
  part(name).addEventListener("click", action);
}

on("again", () => {
  const known = picture().tokens.map((code, token) => (taken.has(token) ? config.numCodes : code));
  trigger("paint", { known: written(known) });
});
on("vary", () => trigger("paint", { initial: written(picture().tokens) }));
on("invert", () => {
  taken = new Set(Array.from({ length: numTokens }, (_, i) => i).filter((i) => !taken.has(i)));
  refresh();
});
on("clear", () => ((taken = new Set()), refresh()));
on("undo", undo);
for (const name of ["grid", "confidence"]) part(name).addEventListener("change", draw);
part("step").addEventListener("input", scrub);

function download(name, url) {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
}

function fileName(ending) {
  const request = picture().side.request || {};
  const words = (request.prompt || "picture").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-");
  return words.slice(0, 40) + "_" + (request.seed ?? 0) + "_" + (chosen.index + 1) + ending;
}

on("save", () => {
  const source = image(picture().url);
  const exact = document.createElement("canvas");
  exact.width = source.naturalWidth;
  exact.height = source.naturalHeight;
  exact.getContext("2d").drawImage(source, 0, 0);
  download(fileName(".png"), exact.toDataURL("image/png"));
});
on("animate", async () => {
  const made = await ask("animation", { trajectory: picture().trajectory });
  if (made) download(fileName(".gif"), made.url);
});
on("recipe", () => {
  const { side, tokens } = picture();
  const recipe = { model: config.model, request: side.request, index: chosen.index, codes: written(tokens) };
  const text = JSON.stringify(recipe, null, 2);
  download(fileName(".json"), "data:application/json," + encodeURIComponent(text));
});
on("link", async () => {
  const filled = Object.entries(picture().side.request).filter(([, value]) => value !== "");
  const url = location.origin + location.pathname + "?" + new URLSearchParams(filled);
  history.replaceState(null, "", url);
  try {
    await navigator.clipboard.writeText(url);
    say("The link is in the clipboard and in the address bar.");
  } catch {
    say("The link is in the address bar.");
  }
});
on("paste", async () => {
  const known = picture().side.request ? picture().side.request.known : "";
  const question = { picture: original, tokens: written(picture().tokens), known };
  const made = await ask("paste", question);
  if (made) download(fileName("_in_mine.png"), made.url);
});

// Pictures and recipes of one's own.

async function open(file) {
  if (!file) return;
  if (file.size > config.maxBytes) {
    say("The file is larger than " + config.maxBytes / 1e6 + " MB.", true);
    return;
  }
  const url = await new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(file);
  });
  await openUrl(url);
}

async function openUrl(url) {
  say("The picture becomes tokens.");
  const made = await ask("encode", { picture: url });
  if (!made) return;
  if (sides.length) past.push({ sides, chosen, taken });
  original = url;
  sides = [made];
  chosen = { side: 0, index: 0 };
  taken = new Set();
  say("Your picture, as the model's tokens show it.");
  showLast();
}

part("file").addEventListener("change", async (event) => {
  await open(event.target.files[0]);
  event.target.value = "";
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  if (files.length) open(files[0]);
});
const space = element.querySelector(".open");
for (const name of ["dragover", "dragleave", "drop"]) {
  element.addEventListener(name, (event) => {
    event.preventDefault();
    space.classList.toggle("over", name === "dragover");
    if (name === "drop") open(event.dataTransfer.files[0]);
  });
}

let stream = null;
function closeCamera() {
  if (stream) stream.getTracks().forEach((track) => track.stop());
  stream = null;
  part("viewfinder").hidden = true;
}
on("camera", async () => {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640 } });
    part("video").srcObject = stream;
    part("viewfinder").hidden = false;
  } catch (error) {
    say("There is no camera that this page may use (" + error.name + ").", true);
  }
});
on("take", () => {
  const video = part("video");
  const taken = document.createElement("canvas");
  taken.width = video.videoWidth;
  taken.height = video.videoHeight;
  taken.getContext("2d").drawImage(video, 0, 0);
  closeCamera();
  openUrl(taken.toDataURL("image/jpeg", 0.92));
});
on("close", closeCamera);

function follow(fields) {
  trigger("fill", fields);
  trigger("paint", { fields });
}
part("recipe-file").addEventListener("change", async (event) => {
  try {
    const recipe = JSON.parse(await event.target.files[0].text());
    follow(recipe.request);
    if (recipe.model !== config.model) say("The recipe was made with another model.", true);
  } catch {
    say("The file is no recipe of this page.", true);
  }
  event.target.value = "";
});

watch("value", receive);
receive();
const query = Object.fromEntries(new URLSearchParams(location.search));
delete query.__theme;
if (Object.keys(query).length) {
  // Gradio hears no event before the whole page is there.
  const begin = () => (document.querySelector("#generate") ? follow(query) : setTimeout(begin, 100));
  setTimeout(begin, 300);
}
