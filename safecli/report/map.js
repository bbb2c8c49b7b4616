"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [canvas, chosen, words, rows, found, under] = ["map", "chosen", "words", "rows", "found", "under"]
  .map((id) => document.getElementById(id));
const SHOWN = 30, STEPS = 64, EDGE = 8;
const count = data.texts.length;
const lower = data.texts.map((text) => text.toLowerCase());
let marked = [];

data.costs.forEach(([text], index) => chosen.append(new Option(JSON.stringify(text), index)));

const costs = () => data.costs[Number(chosen.value)][1];
const cost = (token) => (costs()[token] / data.levels).toFixed(3);

function place(token) {
  const side = (value, length) => EDGE + (value / data.grid) * (length - 2 * EDGE);
  return [side(data.x[token], canvas.width), side(data.grid - data.y[token], canvas.height)];
}

function range() {
  const sorted = Int32Array.from(costs()).sort();
  const [near, high] = [0.001, 0.98].map((share) => sorted[Math.floor(share * (count - 1))]);
  return [near < high ? near : sorted[1], high];
}

function draw() {
  const scale = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * scale;
  canvas.height = canvas.clientHeight * scale;
  const pen = canvas.getContext("2d"), [low, high] = range(), dot = 1.6 * scale;
  const steps = Array.from({ length: STEPS + 1 }, () => []);
  costs().forEach((value, token) => {
    const share = Math.min(1, Math.max(0, (value - low) / Math.max(1, high - low)));
    steps[Math.round(share * STEPS)].push(token);
  });
  for (let step = STEPS; step >= 0; step--) {
    const near = 1 - step / STEPS, side = dot * (1 + 3 * near ** 3);
    pen.fillStyle = `hsl(${(240 * step) / STEPS} 80% 50%)`;
    for (const token of steps[step]) {
      const [x, y] = place(token);
      pen.fillRect(x - side / 2, y - side / 2, side, side);
    }
  }
  pen.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--mark");
  pen.lineWidth = 2 * scale;
  for (const token of marked) {
    pen.beginPath();
    pen.arc(...place(token), 5 * scale, 0, 2 * Math.PI);
    pen.stroke();
  }
  document.getElementById("low").textContent = `${(low / data.levels).toFixed(2)} near`;
  document.getElementById("high").textContent = `far ${(high / data.levels).toFixed(2)}`;
}

function list() {
  const wanted = words.value.toLowerCase();
  const all = [...lower.keys()].filter((token) => lower[token].includes(wanted));
  all.sort((one, other) => costs()[one] - costs()[other]);
  const shown = all.slice(0, SHOWN);
  marked = wanted ? shown : [];
  found.textContent = wanted ? `${all.length} found, ${shown.length} shown` : `The nearest ${shown.length}`;
  rows.replaceChildren(...shown.map((token) => {
    const row = document.createElement("tr");
    for (const text of [data.texts[token], data.ids[token], cost(token)]) {
      row.insertCell().textContent = text;
    }
    return row;
  }));
  draw();
}

function point(event) {
  const scale = canvas.width / canvas.clientWidth;
  let nearest = 0, best = Infinity;
  for (let token = 0; token < count; token++) {
    const [x, y] = place(token);
    const distance = (x - event.offsetX * scale) ** 2 + (y - event.offsetY * scale) ** 2;
    if (distance < best) [nearest, best] = [token, distance];
  }
  under.textContent = `${JSON.stringify(data.texts[nearest])} · id ${data.ids[nearest]} · cost ${cost(nearest)}`;
}

document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
chosen.addEventListener("change", list);
words.addEventListener("input", list);
canvas.addEventListener("mousemove", point);
window.addEventListener("resize", draw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
list();
