// One answer large: its objects can be switched on and off.

import { PictureCanvas, drawObject, moveByPointer, pathOf } from "./canvas.js";
import "./page.js";

const { objects } = JSON.parse(document.getElementById("data").dataset.json);
const canvas = document.getElementById("canvas");
const boxes = [...document.querySelectorAll("#objects input")];
const hidden = () => new Set(boxes.filter((box) => !box.checked).map((box) => Number(box.dataset.number)));
// Large objects first, so that small ones are on top.
const area = (parts) => parts.reduce((sum, [outer]) => sum + Math.abs(outer.reduce((total, [x, y], index) => {
  const [u, v] = outer[(index + 1) % outer.length];
  return total + x * v - u * y;
}, 0)), 0);
const shapes = objects
  .map((one) => ({ ...one, area: area(one.parts), path: pathOf(one.parts) }))
  .sort((a, b) => b.area - a.area);

if (canvas) {
  const contours = document.getElementById("contours");
  const fills = document.getElementById("fills");
  const picture = new PictureCanvas(canvas, (context, scale) => {
    const off = hidden();
    for (const one of shapes) {
      if (!off.has(one.number)) {
        drawObject(context, scale, one.path, one.colour, { fill: fills.checked, line: contours.checked });
      }
    }
  });
  moveByPointer(picture, (event) => event.buttons === 1);
  canvas.addEventListener("keydown", (event) => picture.key(event, true));
  for (const input of [...boxes, contours, fills]) input.addEventListener("change", () => picture.draw());
  for (const button of document.querySelectorAll("[data-all]")) {
    button.addEventListener("click", () => {
      for (const box of boxes) box.checked = button.dataset.all === "on";
      picture.draw();
    });
  }
}
