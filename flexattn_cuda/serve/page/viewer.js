// Draws an image at any scale, with what the model looked at over it.

const OUTLINE = "rgb(0, 230, 255)"; // the colours of flexattn_cuda/analysis/overlay.py
const HEAT = [[255, 240, 60], [255, 140, 0], [225, 0, 50]]; // weak, medium, strong attention
const HEAT_OPACITY = 0.6;
const DIMMED = 0.4; // how much darker what is not selected is
const MAX_SCALE = 32; // screen pixels for one of the image

export class Viewer {
  // on_change(scale) is called when the scale has changed.
  constructor(canvas, onChange) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.onChange = onChange;
    this.image = null;
    this.lowres = null;
    this.looked = null;
    this.show = { attention: true, regions: true, lowres: false };
    this.scale = 1; // device pixels for one of the image
    this.left = this.top = 0; // where the image begins, in device pixels
    this.pointers = new Map();
    this.listen();
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  // bitmap: an ImageBitmap. lowresSize: side of the low-resolution view that the model sees, or null.
  setImage(bitmap, lowresSize) {
    this.image = bitmap;
    this.lowres = lowresSize ? shrunk(bitmap, lowresSize) : null;
    this.looked = null;
    this.fit();
  }

  // looked: {frame, map, selected} of one token and layer, as decoded by api.js, or null.
  setLooked(looked) {
    this.looked = looked && {
      frame: looked.frame,
      heat: heatCanvas(looked.map, looked.frame, this.image),
      dark: darkCanvas(looked.selected),
      outline: outlinePath(looked.selected),
      grid: looked.selected,
    };
    this.draw();
  }

  setShown(what, shown) {
    this.show[what] = shown;
    this.draw();
  }

  // ------------------------------------------------------------------------------------------------- scale and place

  resize() {
    const { clientWidth, clientHeight } = this.canvas;
    const width = Math.round(clientWidth * devicePixelRatio), height = Math.round(clientHeight * devicePixelRatio);
    if (width === this.canvas.width && height === this.canvas.height) return;
    const fitted = this.image && Math.abs(this.scale - this.fittingScale()) < 1e-6;
    this.canvas.width = width;
    this.canvas.height = height;
    if (fitted) this.fit();
    else this.draw();
  }

  fittingScale() {
    return Math.min(this.canvas.width / this.image.width, this.canvas.height / this.image.height);
  }

  fit() {
    if (!this.image) return;
    this.scale = this.fittingScale();
    this.left = (this.canvas.width - this.image.width * this.scale) / 2;
    this.top = (this.canvas.height - this.image.height * this.scale) / 2;
    this.changed();
  }

  // Multiply the scale, so that what is at (x, y), in device pixels, stays there.
  zoom(factor, x = this.canvas.width / 2, y = this.canvas.height / 2) {
    if (!this.image) return;
    const lowest = Math.min(this.fittingScale(), 1) / 2;
    const scale = Math.min(MAX_SCALE, Math.max(lowest, this.scale * factor));
    this.left = x - (x - this.left) * scale / this.scale;
    this.top = y - (y - this.top) * scale / this.scale;
    this.scale = scale;
    this.changed();
  }

  move(x, y) {
    this.left += x;
    this.top += y;
    this.changed();
  }

  // Keep a part of the image in sight, and draw.
  changed() {
    const { width, height } = this.canvas, kept = 60 * devicePixelRatio;
    this.left = clamp(this.left, kept - this.image.width * this.scale, width - kept);
    this.top = clamp(this.top, kept - this.image.height * this.scale, height - kept);
    this.onChange(this.scale);
    this.draw();
  }

  // ---------------------------------------------------------------------------------------------------------- drawing

  draw() {
    const { context, canvas, image } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!image) return;
    context.setTransform(this.scale, 0, 0, this.scale, this.left, this.top);
    context.save();
    context.beginPath();
    context.rect(0, 0, image.width, image.height);
    context.clip();
    const pixelated = this.show.lowres && this.lowres;
    context.imageSmoothingEnabled = !pixelated && this.scale < 3;
    context.imageSmoothingQuality = "high";
    context.drawImage(pixelated ? this.lowres : image, 0, 0, image.width, image.height);
    if (this.looked) this.drawLooked(this.looked);
    context.restore();
  }

  drawLooked({ frame: [left, top, width, height], heat, dark, outline, grid }) {
    const { context } = this;
    if (this.show.regions) {
      context.imageSmoothingEnabled = false;
      context.drawImage(dark, left, top, width, height);
    }
    if (this.show.attention) {
      context.imageSmoothingEnabled = true;
      context.drawImage(heat, left, top, width, height);
    }
    if (this.show.regions) {
      context.translate(left, top);
      context.scale(width / grid.columns, height / grid.rows);
      context.lineWidth = 2.5 * devicePixelRatio / (this.scale * width / grid.columns);
      context.lineCap = "square";
      context.strokeStyle = OUTLINE;
      context.stroke(outline);
    }
  }

  // --------------------------------------------------------------------------------------------------- mouse and touch

  listen() {
    const { canvas, pointers } = this;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / (event.ctrlKey ? 100 : 400)), ...this.position(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, this.position(event));
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
    }
    canvas.addEventListener("pointermove", (event) => this.drag(event));
    canvas.addEventListener("dblclick", (event) => {
      const fitted = this.image && this.scale <= this.fittingScale() * 1.01;
      if (fitted) this.zoom(4, ...this.position(event));
      else this.fit();
    });
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  drag(event) {
    if (!this.image || !this.pointers.has(event.pointerId)) return;
    const before = [...this.pointers.values()];
    const [oldX, oldY] = this.pointers.get(event.pointerId);
    const [x, y] = this.position(event);
    this.pointers.set(event.pointerId, [x, y]);
    if (before.length === 1) {
      this.move(x - oldX, y - oldY);
    } else if (before.length === 2) {
      const after = [...this.pointers.values()], [middleX, middleY] = middle(after), [wasX, wasY] = middle(before);
      this.move(middleX - wasX, middleY - wasY);
      this.zoom(distance(after) / Math.max(1, distance(before)), middleX, middleY);
    }
  }

  key(event) {
    const step = 60 * devicePixelRatio;
    const does = {
      "+": () => this.zoom(1.25), "=": () => this.zoom(1.25), "-": () => this.zoom(0.8), 0: () => this.fit(),
      ArrowLeft: () => this.move(step, 0), ArrowRight: () => this.move(-step, 0),
      ArrowUp: () => this.move(0, step), ArrowDown: () => this.move(0, -step),
    }[event.key];
    if (!does || !this.image || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    does();
  }

  position(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * devicePixelRatio, (event.clientY - box.top) * devicePixelRatio];
  }
}

// ------------------------------------------------------------------------------------------------------------- layers

function newCanvas(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

function shrunk(bitmap, size) {
  const scale = Math.min(1, size / Math.max(bitmap.width, bitmap.height));
  const canvas = newCanvas(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}

// Attention from its minimum to its maximum on the image, the weakest transparent.
function heatCanvas({ rows, columns, values }, [left, top, width, height], image) {
  const onImage = values.filter((_, cell) => {
    const x = left + (cell % columns + 0.5) * width / columns, y = top + (Math.floor(cell / columns) + 0.5) * height / rows;
    return x >= 0 && x < image.width && y >= 0 && y < image.height;
  });
  const low = Math.min(...onImage), range = Math.max(...onImage) - low;
  return painted(rows, columns, (cell) => {
    const heat = range > 0 ? clamp((values[cell] - low) / range, 0, 1) : 0;
    return [...heatColour(heat), 255 * HEAT_OPACITY * heat];
  });
}

function darkCanvas({ rows, columns, values }) {
  return painted(rows, columns, (cell) => [0, 0, 0, values[cell] ? 0 : 255 * DIMMED]);
}

function painted(rows, columns, colourOf) {
  const canvas = newCanvas(columns, rows), context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  for (let cell = 0; cell < rows * columns; cell++) pixels.data.set(colourOf(cell), 4 * cell);
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function heatColour(heat) {
  const at = heat * (HEAT.length - 1), below = Math.min(Math.floor(at), HEAT.length - 2), part = at - below;
  return HEAT[below].map((channel, index) => channel + (HEAT[below + 1][index] - channel) * part);
}

// The edges between what is selected and what is not, in cells.
function outlinePath({ rows, columns, values }) {
  const path = new Path2D();
  const selected = (row, column) =>
    row >= 0 && row < rows && column >= 0 && column < columns && values[row * columns + column] === 1;
  for (let row = 0; row <= rows; row++) {
    for (let column = 0; column <= columns; column++) {
      if (selected(row, column) !== selected(row - 1, column) && column < columns) {
        path.moveTo(column, row);
        path.lineTo(column + 1, row);
      }
      if (selected(row, column) !== selected(row, column - 1) && row < rows) {
        path.moveTo(column, row);
        path.lineTo(column, row + 1);
      }
    }
  }
  return path;
}

const clamp = (value, low, high) => Math.min(Math.max(value, Math.min(low, high)), Math.max(low, high));
const middle = ([[x, y], [otherX, otherY]]) => [(x + otherX) / 2, (y + otherY) / 2];
const distance = ([[x, y], [otherX, otherY]]) => Math.hypot(x - otherX, y - otherY);
