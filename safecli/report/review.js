"use strict";
const at = (id) => document.getElementById(id);
let rows = [];
let current = 0;

function show(index) {
  current = Math.max(0, Math.min(index, rows.length - 1));
  const row = rows[current];
  at("kind").textContent = { toxic: "Toxic prompt", lookalike: "Look-alike prompt", harmless: "Harmless prompt" }[row.kind];
  at("prompt").textContent = row.prompt;
  at("answer").textContent = row.answer || "(empty)";
  at("labels").replaceChildren(...row.labels.map((label, number) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = `${number + 1} ${label}`;
    button.setAttribute("aria-pressed", String(row.label === label));
    button.addEventListener("click", () => save(label));
    item.append(button);
    return item;
  }));
  const done = rows.filter((one) => one.label).length;
  at("progress").textContent = `${current + 1} of ${rows.length}, ${done} labelled`;
}

async function save(label) {
  const row = rows[current];
  const answer = await fetch("label", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ row: row.row, label }),
  }).catch(() => null);
  at("problem").textContent = answer?.ok ? "" : "Not saved: is the command still running?";
  if (!answer?.ok) return;
  row.label = label;
  show(current + 1);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !rows.length) return;
  const label = rows[current].labels[Number(event.key) - 1];
  if (label) save(label);
  else if (event.key === "ArrowRight") show(current + 1);
  else if (event.key === "ArrowLeft") show(current - 1);
});

fetch("rows").then((answer) => answer.json()).then((found) => {
  rows = found;
  const first = rows.findIndex((row) => !row.label);
  show(first < 0 ? 0 : first);
});
