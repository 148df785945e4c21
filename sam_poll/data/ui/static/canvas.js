// A picture on a canvas: zoom, pan, and drawing in coordinates of the full picture.

import { explain } from "./page.js";

const MOST = 40; // largest zoom, canvas pixels a picture pixel

export class PictureCanvas {
  /** `paint(context, scale)` draws over the picture; the context is in picture coordinates. */
  constructor(canvas, paint) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.paint = paint;
    this.width = Number(canvas.dataset.width);
    this.height = Number(canvas.dataset.height);
    this.scale = 1;
    this.left = 0;
    this.top = 0;
    this.fitted = true;
    this.image = new Image();
    this.image.addEventListener("load", () => { canvas.dataset.loaded = "yes"; this.draw(); });
    this.image.addEventListener("error", () => { canvas.dataset.loaded = "no"; explain(this.image.src); });
    this.image.src = canvas.dataset.picture;
    new ResizeObserver(() => this.resize()).observe(canvas);
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
    }, { passive: false });
    for (const button of document.querySelectorAll("[data-zoom]")) {
      button.addEventListener("click", () => this.button(button.dataset.zoom));
    }
    this.resize();
  }

  /** Take the element's size in pixels of the screen. */
  resize() {
    const ratio = window.devicePixelRatio || 1;
    this.ratio = ratio;
    this.canvas.width = Math.round(this.canvas.clientWidth * ratio);
    this.canvas.height = Math.round(this.canvas.clientHeight * ratio);
    if (this.fitted) this.fit();
    else this.draw();
  }

  fit() {
    const { clientWidth, clientHeight } = this.canvas;
    this.scale = Math.min(clientWidth / this.width, clientHeight / this.height);
    this.left = (clientWidth - this.width * this.scale) / 2;
    this.top = (clientHeight - this.height * this.scale) / 2;
    this.fitted = true;
    this.draw();
  }

  button(what) {
    if (what === "fit") this.fit();
    else this.zoom(what === "in" ? 1.4 : 1 / 1.4);
  }

  /** Zoom by a factor around a point of the element. */
  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const least = 0.5 * Math.min(this.canvas.clientWidth / this.width, this.canvas.clientHeight / this.height);
    const scale = Math.min(Math.max(this.scale * factor, least), MOST);
    this.left = x - (x - this.left) * (scale / this.scale);
    this.top = y - (y - this.top) * (scale / this.scale);
    this.scale = scale;
    this.fitted = false;
    this.draw();
  }

  pan(x, y) {
    this.left += x;
    this.top += y;
    this.fitted = false;
    this.draw();
  }

  /** Return the picture's coordinates of a point of the element, within the picture. */
  at(x, y) {
    const inside = (value, most) => Math.min(Math.max(value, 0), most);
    const round = (value) => Math.round(value * 10) / 10;
    return {
      x: inside(round((x - this.left) / this.scale), this.width),
      y: inside(round((y - this.top) / this.scale), this.height),
    };
  }

  draw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = 0;
      const { context } = this;
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, this.canvas.width, this.canvas.height);
      const scale = this.scale * this.ratio;
      context.setTransform(scale, 0, 0, scale, this.left * this.ratio, this.top * this.ratio);
      if (this.image.complete && this.image.naturalWidth) {
        context.imageSmoothingEnabled = scale < 4;
        context.drawImage(this.image, 0, 0, this.width, this.height);
      }
      this.paint(context, this.scale);
    });
  }

  /** Keys that work in every picture: plus, minus, zero, and arrows where the page has no use for them. */
  key(event, arrows) {
    const step = event.shiftKey ? 200 : 50;
    const moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    if (event.key === "+" || event.key === "=") this.button("in");
    else if (event.key === "-") this.button("out");
    else if (event.key === "0") this.fit();
    else if (arrows && moves[event.key]) this.pan(...moves[event.key]);
    else return false;
    event.preventDefault();
    return true;
  }
}

/** Return the path of an object's parts; a part is its outer polygon, then its holes. */
export function pathOf(parts) {
  const path = new Path2D();
  for (const polygon of parts.flat()) {
    // Contours run through the centres of pixels.
    polygon.forEach(([x, y], index) => (index ? path.lineTo(x + 0.5, y + 0.5) : path.moveTo(x + 0.5, y + 0.5)));
    path.closePath();
  }
  return path;
}

/** Draw an object: its area, and its outline over a dark seam. */
export function drawObject(context, scale, path, colour, { fill = true, line = true, strong = false } = {}) {
  if (fill) {
    context.globalAlpha = strong ? 0.5 : 0.38;
    context.fillStyle = colour;
    context.fill(path, "evenodd");
    context.globalAlpha = 1;
  }
  if (line) {
    context.lineJoin = "round";
    context.lineWidth = 4 / scale;
    context.strokeStyle = "rgba(0, 0, 0, 0.55)";
    context.stroke(path);
    context.lineWidth = 2 / scale;
    context.strokeStyle = colour;
    context.stroke(path);
  }
}

/** Let one finger or button move the picture, and two fingers zoom it, while `when()` is true. */
export function moveByPointer(picture, when) {
  const { canvas } = picture;
  const down = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    down.set(event.pointerId, event);
    if (when(event) || event.button === 1) canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = down.get(event.pointerId);
    if (!before) return;
    if (down.size === 2) {
      const [other] = [...down.values()].filter((one) => one.pointerId !== event.pointerId);
      const gap = (one) => Math.hypot(one.offsetX - other.offsetX, one.offsetY - other.offsetY);
      picture.zoom(gap(event) / Math.max(gap(before), 1), other.offsetX, other.offsetY);
    } else if (when(event) || event.buttons === 4) {
      picture.pan(event.offsetX - before.offsetX, event.offsetY - before.offsetY);
    }
    down.set(event.pointerId, event);
  });
  for (const name of ["pointerup", "pointercancel", "pointerleave"]) {
    canvas.addEventListener(name, (event) => down.delete(event.pointerId));
  }
  return () => down.size;
}
