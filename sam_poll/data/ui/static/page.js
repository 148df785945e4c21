// What every page needs: messages, uploads, and events only while the page is visible.

const SILENT_MS = 20_000; // the server sends something every 5 s

let token = document.querySelector('meta[name="csrf"]').content;

/** Show a message to people, and read it to those who listen. */
export function say(text, isError = false) {
  const place = document.getElementById("message");
  place.textContent = text;
  place.classList.toggle("bad", isError);
  place.hidden = !text;
}

/** Return the reason and remedy of a refused request. */
function reasonOf(text, status) {
  try {
    const error = JSON.parse(text);
    const where = error.place ? `${error.place}: ` : "";
    return where + error.reason + (error.remedy ? ` → ${error.remedy}` : "");
  } catch {
    return `the server answered ${status}`;
  }
}

async function request(address, options) {
  try {
    return await fetch(address, options);
  } catch {
    throw Object.assign(new Error("the server cannot be reached"), { mayPass: true });
  }
}

/** Take the token of a server that was started again; return whether there is another one. */
async function renewToken() {
  const answer = await request(location.href, { headers: { Accept: "text/html" } });
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.querySelector('meta[name="csrf"]')?.content ?? token;
  const isOther = fresh !== token;
  token = fresh;
  return isOther;
}

/** Send a change to the server; return its JSON. Throws an Error with the reason. */
export async function post(address, body) {
  const send = () => request(address, { method: "POST", body, headers: { "X-CSRF-Token": token } });
  let answer = await send();
  if (answer.status === 403 && await renewToken()) answer = await send();
  if (answer.headers.get("HX-Redirect")) location.assign(answer.headers.get("HX-Redirect"));
  if (!answer.ok) throw new Error(reasonOf(await answer.text(), answer.status));
  return answer.json();
}

/** Say why a picture is not there. */
export async function explain(address) {
  try {
    const answer = await request(address);
    say(answer.ok ? "the picture cannot be shown: reload the page" : reasonOf(await answer.text(), answer.status), true);
  } catch (error) {
    say(error.message, true);
  }
}

// Not HX-Trigger: its event is lost where the button that was clicked has been replaced meanwhile.
document.body.addEventListener("htmx:afterRequest", (event) => {
  const message = event.detail.xhr?.getResponseHeader("X-Message");
  if (message) say(JSON.parse(message));
});
document.body.addEventListener("htmx:responseError", (event) => {
  const request = event.detail.xhr;
  say(reasonOf(request.responseText, request.status), true);
});
document.body.addEventListener("htmx:sendError", () => say("the server cannot be reached", true));
let heard = Date.now();
const hear = () => { heard = Date.now(); };
document.body.addEventListener("htmx:sseOpen", (event) => {
  document.body.classList.remove("offline");
  hear();
  for (const kind of ["changed", "ping"]) event.detail.source.addEventListener(kind, hear);
});
document.body.addEventListener("htmx:sseError", () => document.body.classList.add("offline"));

// A thumbnail that cannot be made shows the name only.
document.addEventListener("error", (event) => {
  if (event.target.tagName === "IMG") event.target.classList.add("broken");
}, true);

// A browser opens few connections to one server: hidden pages give theirs back.
let api;
htmx.defineExtension("sleep", { init: (given) => { api = given; } });
const live = () => [...document.querySelectorAll("[data-live]")];
const close = () => live().forEach((element) => api.getInternalData(element).sseEventSource?.close());
function open() {
  hear();
  for (const element of live()) {
    // Put in again, the element opens its connection, and hears at once what has changed.
    const copy = element.cloneNode(true);
    element.replaceWith(copy);
    htmx.process(copy);
  }
}
document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
// A network that is cut ends no connection: the page would go on showing what was.
setInterval(() => {
  if (document.hidden || !live().length || Date.now() - heard < SILENT_MS) return;
  document.body.classList.add("offline");
  close();
  open();
}, 1000);

const upload = document.getElementById("upload-file");
async function send(file) {
  say(`uploading ${file.name} …`);
  try {
    const answer = await post(`${upload.dataset.upload}?name=${encodeURIComponent(file.name)}`, file);
    location.assign(answer.next);
  } catch (error) {
    say(error.message, true);
  }
}
if (upload) {
  upload.addEventListener("change", () => upload.files[0] && send(upload.files[0]));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) send(event.dataTransfer.files[0]);
  });
}
