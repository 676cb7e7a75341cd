// The page: two layers to draw on, black lines and colour hints, and the picture that the painter makes of them.

const SWATCHES = {
  "#e03131": "red", "#f08c00": "orange", "#ffd43b": "yellow", "#2f9e44": "green", "#1c7ed6": "blue", "#7048e8": "violet",
  "#f783ac": "pink", "#f7c8a0": "skin", "#8d5524": "brown", "#ffffff": "white",
};
const UNDO = 20; // strokes that can be taken back; each holds a copy of its layer
const MAX_BYTES = 30e6, MAX_PIXELS = 64e6; // of a file to open

const $ = (id) => document.getElementById(id);
const lines = $("lines").getContext("2d"), colours = $("colours").getContext("2d", { willReadFrequently: true });
const widths = { line: 2.5, colour: 5 }; // of strokes, in percent of the longer edge
const undo = [];
const about = await (await fetch("about")).json();
let name = "sketch", colour = "#e03131";

function say(text, error = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", error);
}

// Layers

function start(width, height, draw) {
  for (const layer of [lines, colours]) Object.assign(layer.canvas, { width, height }); // which empties it
  lines.fillStyle = "white";
  lines.fillRect(0, 0, width, height);
  draw?.(lines);
  for (const paper of document.querySelectorAll(".paper")) paper.style.setProperty("--ratio", width / height);
  undo.length = 0;
  $("undo").disabled = true;
}

function remember(layer) {
  undo.push([layer, layer.getImageData(0, 0, layer.canvas.width, layer.canvas.height)]);
  if (undo.length > UNDO) undo.shift();
  $("undo").disabled = false;
}

function takeBack() {
  const [layer, pixels] = undo.pop() ?? [];
  layer?.putImageData(pixels, 0, 0);
  $("undo").disabled = !undo.length;
  if (layer) changed();
}

async function open(url, title) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const { naturalWidth: width, naturalHeight: height } = image;
  if (!width || !height) throw new Error("a picture without a size");
  if (width * height > MAX_PIXELS) return say(`${title} has ${width} × ${height} pixels; at most 64 million are opened.`, true);
  // A small picture is enlarged by whole numbers, so that the painter's own scaling finds its very pixels again.
  const fit = about.edge / Math.max(width, height), scale = fit > 1 ? Math.floor(fit) : fit;
  start(Math.max(Math.round(width * scale), 1), Math.max(Math.round(height * scale), 1), (context) => {
    context.imageSmoothingEnabled = scale < 1;
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, context.canvas.width, context.canvas.height);
  });
  name = title.replace(/\.[^.]*$/, "");
  await paint();
}

async function openFile(file) {
  if (file.size > MAX_BYTES) return say(`${file.name} has ${Math.round(file.size / 1e6)} MB; at most 30 MB are opened.`, true);
  const url = URL.createObjectURL(file);
  try {
    await open(url, file.name);
  } catch {
    say(`${file.name} is no picture that this browser can read.`, true);
  } finally {
    URL.revokeObjectURL(url);
  }
}

// Strokes

const tool = () => document.querySelector("[name=tool]:checked").value;
const kind = () => tool().replace("erase-", "");

function begin(event) {
  if (!event.isPrimary || event.button) return;
  event.preventDefault();
  const layer = kind() === "line" ? lines : colours, { width, height } = layer.canvas, longer = Math.max(width, height);
  const erases = tool().startsWith("erase");
  remember(layer);
  layer.globalCompositeOperation = erases && layer === colours ? "destination-out" : "source-over";
  layer.strokeStyle = layer === colours ? colour : erases ? "white" : "black";
  // The painter sees the layer scaled to the size chosen, where a thinner stroke would have gaps.
  layer.lineWidth = Math.max((widths[kind()] / 100) * longer, (1.5 * longer) / $("size").value);
  layer.lineCap = layer.lineJoin = "round";
  const box = $("paper").getBoundingClientRect();
  const place = ({ clientX, clientY }) =>
    [((clientX - box.left) / box.width) * width, ((clientY - box.top) / box.height) * height];
  let last = place(event);
  const draw = (to) => {
    layer.beginPath();
    layer.moveTo(...last);
    layer.lineTo(...to);
    layer.stroke();
    last = to;
  };
  draw(last);
  const move = (later) => {
    if (later.pointerId !== event.pointerId) return; // another finger
    const steps = later.getCoalescedEvents?.() ?? [];
    for (const step of steps.length ? steps : [later]) draw(place(step));
  };
  const end = (later) => {
    if (later.pointerId !== event.pointerId) return;
    $("paper").removeEventListener("pointermove", move);
    $("paper").removeEventListener("lostpointercapture", end);
    layer.globalCompositeOperation = "source-over";
    changed();
  };
  $("paper").setPointerCapture(event.pointerId);
  $("paper").addEventListener("pointermove", move);
  $("paper").addEventListener("lostpointercapture", end);
}

// Painting

const png = (layer) => layer.canvas.toDataURL("image/png").split(",")[1];
let busy = false, again = false;

function changed() {
  if ($("auto").checked) paint();
}

async function paint() {
  again = busy; // one request at a time; what changes meanwhile is painted after it
  if (busy) return;
  busy = true;
  do {
    again = false;
    await request();
  } while (again);
  busy = false;
}

async function request() {
  const began = performance.now();
  let answer;
  try {
    answer = await fetch("paint", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ size: Number($("size").value), sketch: png(lines), hints: png(colours) }),
    });
    if (!answer.ok) return say(answer.status === 500 ? "The painter failed; its terminal says why." : await answer.text(), true);
    const picture = await answer.blob();
    URL.revokeObjectURL($("painted").src);
    $("painted").src = $("download").href = URL.createObjectURL(picture);
    await $("painted").decode();
  } catch {
    return say("The painter does not answer: is autopainter serve still running?", true);
  }
  $("download").download = `${name}-painted.png`;
  $("painted").hidden = $("download").hidden = false;
  const { naturalWidth: width, naturalHeight: height } = $("painted");
  say(`Painted at ${width} × ${height} in ${((performance.now() - began) / 1000).toFixed(2)} s.`);
}

// Controls

function choose(value) {
  colour = value;
  for (const swatch of $("swatches").children) swatch.ariaPressed = swatch.value === colour;
  document.querySelector("[name=tool][value=colour]").checked = true;
  $("width").value = widths.colour;
}

for (const [value, title] of Object.entries(SWATCHES)) {
  const swatch = Object.assign(document.createElement("button"), { value, title, ariaLabel: title });
  swatch.style.background = value;
  swatch.addEventListener("click", () => choose(value));
  $("swatches").append(swatch);
}
for (const size of about.sizes) {
  $("size").add(new Option(size === about.size ? `${size}, as trained` : size, size, false, size === about.size));
}
for (const button of document.querySelectorAll("[data-example]")) {
  const { example } = button.dataset;
  button.addEventListener("click", () => open(`page/${example}.svg`, example));
}
for (const button of document.querySelectorAll("[name=tool]")) {
  button.addEventListener("change", () => ($("width").value = widths[kind()]));
}
$("width").addEventListener("input", () => (widths[kind()] = Number($("width").value)));
$("colour").addEventListener("input", () => choose($("colour").value));
$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  if (file) await openFile(file);
  $("file").value = ""; // so that the same file can be opened again
});
$("blank").addEventListener("click", () => {
  start(about.edge, about.edge);
  name = "sketch";
  document.querySelector("[name=tool][value=line]").click();
  say("Draw black lines, then colours.");
});
$("clear").addEventListener("click", () => {
  remember(colours);
  colours.clearRect(0, 0, colours.canvas.width, colours.canvas.height);
  changed();
});
$("undo").addEventListener("click", takeBack);
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key === "z") takeBack();
});
$("paint").addEventListener("click", paint);
$("size").addEventListener("change", changed);
$("paper").addEventListener("pointerdown", begin);

$("about").textContent = `paints with step ${about.step} of ${about.run}`;
choose(colour);
await open("page/fish.svg", "fish");
