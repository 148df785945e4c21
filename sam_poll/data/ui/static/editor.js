// Click a prompt: points, boxes, several objects, with the mask of each after every click. Or name what to find in words,
// which replace the clicks.

import { PictureCanvas, drawObject, moveByPointer, pathOf } from "./canvas.js";
import { post, say } from "./page.js";

const COLOURS = ["#38bdf8", "#fb7185", "#facc15", "#c084fc", "#4ade80", "#fb923c", "#2dd4bf", "#f472b6", "#a3e635", "#818cf8"];
const DRAG = 5; // pixels of the screen; less is a click
const AGAIN_MS = 2000; // a server that could not be reached is asked again
const KEPT = "sam_poll labels";
const MOST_LABELS = 9; // one a number key

const given = JSON.parse(document.getElementById("data").dataset.json);
const canvas = document.getElementById("canvas");
const status = document.getElementById("status");
const labelInput = document.getElementById("label");
const wordsInput = document.getElementById("words");
const list = document.getElementById("objects");
const save = document.getElementById("save");
const version = `?version=${encodeURIComponent(canvas.dataset.version)}`; // of the picture that is shown

let state = { objects: given.objects.length ? given.objects : [{ label: "" }], current: 0, texts: given.texts };
let past = [];
let future = [];
let labels = read();
let cross = null; // the keyboard's place in the picture
let corner = null; // of a box that is being drawn
let saved = true;
const masks = new Map(); // by an object's content: its path and score
const found = new Map(); // by texts: the objects that they find

const tell = (text) => { status.textContent = text; };
const current = () => state.objects[state.current];
const colourOf = (index) => COLOURS[index % COLOURS.length];
// Rough shapes are not drawn here, but kept and shown.
const hasPrompt = (one) => Boolean(one.box || one.polygon || one.mask) || (one.points ?? []).some((point) => point.label === 1);
const keyOf = (one) => JSON.stringify([one.points ?? [], one.box ?? null, one.polygon ?? one.mask ?? null]);
const promptOf = (one) => ({
  label: one.label || "object",
  ...(one.points?.length ? { points: one.points } : {}),
  ...(one.box ? { box: one.box } : {}),
  ...(one.polygon ? { polygon: one.polygon } : {}),
  ...(one.mask ? { mask: one.mask } : {}),
});

function read() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT) ?? "[]");
    return [...new Set([...given.labels, ...kept])].filter((one) => typeof one === "string").slice(0, MOST_LABELS);
  } catch {
    return given.labels.slice(0, MOST_LABELS);
  }
}

function remember(label) {
  if (!label || labels.includes(label)) return;
  labels = [...labels, label].slice(-MOST_LABELS);
  try {
    localStorage.setItem(KEPT, JSON.stringify(labels));
  } catch { /* a private window */ }
}

/** Change the state; the one before can be had back. */
function change(edit) {
  past.push(JSON.stringify(state));
  future = [];
  edit();
  saved = false;
  refresh();
}

function restore(from, to) {
  if (!from.length) return;
  to.push(JSON.stringify(state));
  state = JSON.parse(from.pop());
  refresh();
}

function addPoint(place, label) {
  change(() => { state.texts = []; current().points = [...(current().points ?? []), { ...place, label }]; });
}

function addBox(a, b) {
  const box = { x0: Math.min(a.x, b.x), y0: Math.min(a.y, b.y), x1: Math.max(a.x, b.x), y1: Math.max(a.y, b.y) };
  if (box.x0 < box.x1 && box.y0 < box.y1) change(() => { state.texts = []; current().box = box; });
}

function addObject() {
  change(() => {
    state.texts = [];
    state.objects.push({ label: current().label });
    state.current = state.objects.length - 1;
  });
}

function removeObject() {
  change(() => {
    state.objects.splice(state.current, 1);
    if (!state.objects.length) state.objects.push({ label: "" });
    state.current = Math.min(state.current, state.objects.length - 1);
  });
}

function choose(index) {
  state.current = (index + state.objects.length) % state.objects.length;
  refresh();
}

/** Take words, separated by commas, in place of what was clicked; none: the clicks count again. */
function setTexts(words) {
  const texts = [...new Set(words.split(",").map((text) => text.trim()).filter(Boolean))];
  if (String(texts) !== String(state.texts)) change(() => { state.texts = texts; });
}

const foundNow = () => found.get(String(state.texts)) ?? [];

function setLabel(label) {
  if (label !== current().label) change(() => { current().label = label; });
}

// ── previews ──

let running = false;
let refused = ""; // what the server has refused; it is not asked again

/** Ask for the masks that are not known; one request at a time, so that fast clicks do not pile up. */
async function preview() {
  const texts = state.texts;
  const wanted = texts.length ? [] : state.objects.filter((one) => hasPrompt(one) && !masks.has(keyOf(one)));
  const body = JSON.stringify(texts.length ? { text: texts } : { objects: wanted.map(promptOf) });
  const isKnown = texts.length ? found.has(String(texts)) : !wanted.length;
  if (isKnown || running || body === refused) return;
  running = true;
  canvas.dataset.preview = "running";
  tell(texts.length ? "Finding objects …" : "Making the mask …");
  try {
    const answer = await post(`${canvas.dataset.post}/preview${version}`, body);
    const drawn = answer.objects.map((mask) => ({ ...mask, path: pathOf(mask.parts) }));
    if (texts.length) found.set(String(texts), drawn);
    else drawn.forEach((mask, index) => masks.set(keyOf(wanted[index]), mask));
    running = false;
    canvas.dataset.preview = "done";
    refresh(); // asks again if there were clicks meanwhile
  } catch (error) {
    running = false;
    refused = body;
    canvas.dataset.preview = "failed";
    refresh();
    tell(`No preview: ${error.message}`);
    if (error.mayPass) setTimeout(() => { refused = ""; preview(); }, AGAIN_MS);
  }
}

// ── display ──

function scoreOf(one) {
  if (!hasPrompt(one)) return "no prompt";
  const mask = masks.get(keyOf(one));
  if (mask?.score != null) return mask.score.toFixed(2);
  return canvas.dataset.preview === "failed" ? "–" : "…";
}

function row(one, index) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.className = "object";
  button.setAttribute("aria-pressed", String(index === state.current));
  const swatch = document.createElement("span");
  swatch.className = `swatch colour-${index % COLOURS.length}`;
  const name = document.createElement("span");
  name.className = "grow";
  name.textContent = one.label || "object";
  const score = document.createElement("span");
  score.className = "num";
  score.textContent = scoreOf(one);
  button.append(swatch, name, score);
  button.addEventListener("click", () => choose(index));
  item.append(button);
  return item;
}

function foundRow(one, index) {
  const item = row({ label: one.label }, index);
  const button = item.firstElementChild;
  button.disabled = true;
  button.setAttribute("aria-pressed", "false");
  button.lastElementChild.textContent = one.score.toFixed(2);
  return item;
}

function labelRow(label, index) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  const key = document.createElement("kbd");
  key.textContent = String(index + 1);
  button.append(key, ` ${label}`);
  button.addEventListener("click", () => setLabel(label));
  item.append(button);
  return item;
}

function refresh() {
  const byWords = state.texts.length > 0;
  list.replaceChildren(...(byWords ? foundNow().map(foundRow) : state.objects.map(row)));
  if (document.activeElement !== wordsInput) wordsInput.value = state.texts.join(", ");
  document.getElementById("labels").replaceChildren(...labels.map(labelRow));
  if (document.activeElement !== labelInput) labelInput.value = current().label;
  document.getElementById("undo").disabled = !past.length;
  document.getElementById("redo").disabled = !future.length;
  const mask = masks.get(keyOf(current()));
  if (byWords) {
    const count = foundNow().length;
    if (found.has(String(state.texts))) tell(count === 1 ? "1 object found." : `${count} objects found.`);
  } else if (mask) {
    const text = mask.area ? `predicted IoU ${mask.score.toFixed(2)}, ${mask.area} pixels` : "the mask is empty";
    tell(`${current().label || "object"}: ${text}`);
  } else if (!hasPrompt(current())) {
    tell("Click the object, or drag a box around it.");
  }
  picture.draw();
  preview();
}

function drawPoint(context, scale, point) {
  const radius = 6 / scale;
  context.beginPath();
  context.arc(point.x, point.y, radius, 0, 7);
  context.fillStyle = point.label ? "#22c55e" : "#ef4444";
  context.fill();
  context.lineWidth = 2.5 / scale;
  context.strokeStyle = "#fff";
  context.stroke();
  context.beginPath();
  context.moveTo(point.x - radius / 2, point.y);
  context.lineTo(point.x + radius / 2, point.y);
  if (point.label) {
    context.moveTo(point.x, point.y - radius / 2);
    context.lineTo(point.x, point.y + radius / 2);
  }
  context.lineWidth = 2 / scale;
  context.stroke();
}

function drawBox(context, scale, box, colour) {
  for (const [width, style] of [[4, "rgba(0, 0, 0, 0.55)"], [2, colour]]) {
    context.lineWidth = width / scale;
    context.strokeStyle = style;
    context.strokeRect(box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0);
  }
}

function drawPolygon(context, scale, corners, colour) {
  context.beginPath();
  for (const [x, y] of corners) context.lineTo(x, y);
  context.closePath();
  for (const [width, style] of [[4, "rgba(0, 0, 0, 0.55)"], [2, colour]]) {
    context.lineWidth = width / scale;
    context.strokeStyle = style;
    context.stroke();
  }
}

function drawCross(context, scale) {
  const arm = 12 / scale;
  for (const [width, style] of [[4, "#000"], [1.5, "#fff"]]) {
    context.beginPath();
    context.moveTo(cross.x - arm, cross.y);
    context.lineTo(cross.x + arm, cross.y);
    context.moveTo(cross.x, cross.y - arm);
    context.lineTo(cross.x, cross.y + arm);
    context.lineWidth = width / scale;
    context.strokeStyle = style;
    context.stroke();
  }
}

const picture = new PictureCanvas(canvas, (context, scale) => {
  if (state.texts.length) {
    foundNow().forEach((mask, index) => drawObject(context, scale, mask.path, colourOf(index), { strong: false }));
    if (cross) drawCross(context, scale);
    return;
  }
  state.objects.forEach((one, index) => {
    const mask = hasPrompt(one) && masks.get(keyOf(one));
    const strong = index === state.current;
    if (mask) drawObject(context, scale, mask.path, colourOf(index), { strong });
  });
  state.objects.forEach((one, index) => {
    if (one.box) drawBox(context, scale, one.box, colourOf(index));
    if (one.polygon) drawPolygon(context, scale, one.polygon, colourOf(index));
    for (const point of one.points ?? []) drawPoint(context, scale, point);
  });
  if (dragged) drawBox(context, scale, dragged, colourOf(state.current));
  if (cross) drawCross(context, scale);
});

// ── mouse, pen, fingers ──

let start = null;
let dragged = null;
const tool = () => document.querySelector('input[name="tool"]:checked').value;
const fingers = moveByPointer(picture, (event) => tool() === "move" && event.buttons === 1);

canvas.addEventListener("contextmenu", (event) => event.preventDefault());
canvas.addEventListener("pointerdown", (event) => {
  cross = null;
  start = null;
  if (tool() !== "move" && event.button !== 1 && fingers() < 2) {
    start = { x: event.offsetX, y: event.offsetY, button: event.button };
    canvas.setPointerCapture(event.pointerId);
  }
});
canvas.addEventListener("pointermove", (event) => {
  if (fingers() > 1) start = dragged = null;
  if (!start || start.button !== 0) return;
  const far = Math.hypot(event.offsetX - start.x, event.offsetY - start.y) > DRAG;
  if (!far && !dragged) return;
  const a = picture.at(start.x, start.y);
  const b = picture.at(event.offsetX, event.offsetY);
  dragged = { x0: Math.min(a.x, b.x), y0: Math.min(a.y, b.y), x1: Math.max(a.x, b.x), y1: Math.max(a.y, b.y) };
  picture.draw();
});
canvas.addEventListener("pointerup", (event) => {
  if (!start) return;
  const from = start;
  const box = dragged;
  start = dragged = null;
  if (box) addBox({ x: box.x0, y: box.y0 }, { x: box.x1, y: box.y1 });
  else if (tool() !== "box") {
    const isBackground = from.button === 2 || tool() === "background";
    addPoint(picture.at(event.offsetX, event.offsetY), isBackground ? 0 : 1);
  }
});
canvas.addEventListener("pointercancel", () => { start = dragged = null; });

// ── keys ──

function moveCross(event) {
  const step = (event.shiftKey ? 40 : 4) / picture.scale;
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const move = moves[event.key];
  if (!move) return false;
  cross = cross ?? { x: given.width / 2, y: given.height / 2 };
  const inside = (value, most) => Math.round(Math.min(Math.max(value, 0), most) * 10) / 10;
  cross = { x: inside(cross.x + move[0] * step, given.width), y: inside(cross.y + move[1] * step, given.height) };
  if (corner) dragged = { x0: Math.min(corner.x, cross.x), y0: Math.min(corner.y, cross.y), x1: Math.max(corner.x, cross.x), y1: Math.max(corner.y, cross.y) };
  tell(`x ${Math.round(cross.x)}, y ${Math.round(cross.y)}`);
  picture.draw();
  return true;
}

function setCorner() {
  const place = cross ?? { x: given.width / 2, y: given.height / 2 };
  if (!corner) {
    corner = place;
    cross = place;
    tell("First corner. Move, then press X again.");
    picture.draw();
    return;
  }
  const first = corner;
  corner = dragged = null;
  addBox(first, place);
}

const point = (label) => addPoint(cross ?? { x: given.width / 2, y: given.height / 2 }, label);
const ofCanvas = {
  Enter: () => point(1), b: () => point(0), x: setCorner, Delete: removeObject, Backspace: removeObject,
  Escape: () => { corner = dragged = cross = null; picture.draw(); },
};
const ofPage = {
  n: addObject, s: () => keep(), "[": () => choose(state.current - 1), "]": () => choose(state.current + 1),
};

document.addEventListener("keydown", (event) => {
  const inText = event.target.matches("input:not([type=radio]), textarea, select");
  if ((event.ctrlKey || event.metaKey) && !inText) {
    const key = event.key.toLowerCase();
    if (key === "z" && !event.shiftKey) restore(past, future);
    else if (key === "y" || (key === "z" && event.shiftKey)) restore(future, past);
    else return;
    event.preventDefault();
    return;
  }
  if (inText || event.ctrlKey || event.metaKey || event.altKey) return;
  const onCanvas = event.target === canvas;
  const action = (onCanvas && (ofCanvas[event.key] ?? ofCanvas[event.key.toLowerCase()])) || ofPage[event.key.toLowerCase()];
  if (/^[1-9]$/.test(event.key) && labels[Number(event.key) - 1]) setLabel(labels[Number(event.key) - 1]);
  else if (action) action();
  else if (!(onCanvas && (moveCross(event) || picture.key(event, false)))) return;
  event.preventDefault();
});

labelInput.addEventListener("change", () => { setLabel(labelInput.value.trim()); remember(labelInput.value.trim()); refresh(); });
labelInput.addEventListener("keydown", (event) => { if (event.key === "Enter") canvas.focus(); });
wordsInput.addEventListener("change", () => setTexts(wordsInput.value));
wordsInput.addEventListener("keydown", (event) => { if (event.key === "Enter") canvas.focus(); });
document.getElementById("add").addEventListener("click", addObject);
document.getElementById("remove").addEventListener("click", removeObject);
document.getElementById("undo").addEventListener("click", () => restore(past, future));
document.getElementById("redo").addEventListener("click", () => restore(future, past));

// ── saving ──

async function keep() {
  if (!save || save.disabled) return;
  const objects = state.objects.filter((one) => hasPrompt(one) || one.points?.length);
  if (!objects.length && !state.texts.length) {
    say("there is nothing to save: click an object first", true);
    return;
  }
  const prompt = state.texts.length ? { text: state.texts } : { objects: objects.map(promptOf) };
  if (prompt.objects) for (const one of objects) remember(one.label);
  save.disabled = true;
  try {
    const answer = await post(`${canvas.dataset.post}${version}`, JSON.stringify(prompt));
    saved = true;
    location.assign(answer.next);
  } catch (error) {
    say(error.message, true);
    save.disabled = false;
  }
}
save?.addEventListener("click", keep);
window.addEventListener("beforeunload", (event) => { if (!saved && save) event.preventDefault(); });

refresh();
