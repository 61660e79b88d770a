// A mask painted on a canvas in the picture's size: white where the LoRA acts. Halves are there for the keyboard.
function MASK(use) {
  const behind = document.querySelector("#ml-picture img");
  // The size's fields are not in the page while they are folded away; the mask is fitted to the picture when it is drawn.
  const wide = numberOf("ml-width", behind?.naturalWidth || 512), high = numberOf("ml-height", behind?.naturalHeight || 512);
  const canvas = make("canvas", { width: wide, height: high, class: "ml-canvas", "aria-label": `mask of ${use.name}` });
  const pen = canvas.getContext("2d");
  const frame = make("div", { class: "ml-frame" }, canvas);
  frame.style.aspectRatio = `${wide} / ${high}`;
  if (behind) frame.style.backgroundImage = `url("${behind.src}")`;
  const state = make("small", {}, use.mask ? "It acts where it is painted." : "No mask: it acts everywhere. Paint to limit it.");
  const size = make("input", { type: "range", min: 2, max: 60, value: 18, "aria-label": "size of the brush" });
  const erase = make("input", { type: "checkbox" });
  const colour = () => { pen.globalCompositeOperation = erase.checked ? "destination-out" : "source-over"; pen.strokeStyle = pen.fillStyle = "#fff"; };
  const save = () => {
    const { data } = pen.getImageData(0, 0, wide, high);
    let some = false;
    const out = make("canvas", { width: wide, height: high });
    const ink = out.getContext("2d");
    const grey = ink.createImageData(wide, high);
    for (let i = 0; i < data.length; i += 4) {
      grey.data[i] = grey.data[i + 1] = grey.data[i + 2] = data[i + 3];
      grey.data[i + 3] = 255;
      some ||= data[i + 3] > 0;
    }
    ink.putImageData(grey, 0, 0);
    state.textContent = some ? "It acts where it is painted." : "No mask: it acts everywhere. Paint to limit it.";
    say(use, { mask: some ? out.toDataURL("image/png") : "" });
  };
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * wide / box.width, (event.clientY - box.top) * high / box.height];
  };
  let last = null;
  const stroke = (event) => {
    const [x, y] = at(event);
    colour();
    pen.lineWidth = size.value / 100 * Math.max(wide, high);
    pen.lineCap = "round";
    pen.beginPath();
    pen.moveTo(...(last || [x, y]));
    pen.lineTo(x, y + 0.01);
    pen.stroke();
    last = [x, y];
  };
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); last = null; stroke(event); });
  canvas.addEventListener("pointermove", (event) => { if (event.buttons) stroke(event); });
  canvas.addEventListener("pointerup", () => { last = null; save(); });
  canvas.addEventListener("pointercancel", () => { last = null; save(); });
  const fill = (x, y, w, h) => () => {
    pen.globalCompositeOperation = "source-over";
    pen.clearRect(0, 0, wide, high);
    pen.fillStyle = "#fff";
    pen.fillRect(x * wide, y * high, w * wide, h * high);
    save();
  };
  const button = (words, act) => make("button", { type: "button", class: "ml-chip", onclick: act }, words);
  if (use.mask) {
    const image = new Image();
    image.onload = () => {
      pen.drawImage(image, 0, 0, wide, high);
      const seen = pen.getImageData(0, 0, wide, high);
      for (let i = 0; i < seen.data.length; i += 4) {
        seen.data[i + 3] = seen.data[i];
        seen.data[i] = seen.data[i + 1] = seen.data[i + 2] = 255;
      }
      pen.putImageData(seen, 0, 0);
    };
    image.src = use.mask;
  }
  return make("div", { class: "ml-part ml-mask" }, make("b", {}, "Mask"), state, frame,
    make("div", { class: "ml-line-of" }, labelled("brush", "", size), make("label", { class: "ml-check" }, erase, "erase")),
    make("div", { class: "ml-chips" }, button("left half", fill(0, 0, 0.5, 1)), button("right half", fill(0.5, 0, 0.5, 1)),
      button("top half", fill(0, 0, 1, 0.5)), button("bottom half", fill(0, 0.5, 1, 0.5)), button("no mask", fill(0, 0, 0, 0))));
}
