"use strict";
const form = document.getElementById("filter");
const shown = document.getElementById("shown");
const items = [...document.querySelectorAll("#prompts > li")];
const texts = new Map();
const textOf = (item) => texts.get(item) ?? texts.set(item, item.textContent.toLowerCase()).get(item);

function filter() {
  const { set, outcome, changed, words } = form.elements;
  const wanted = words.value.trim().toLowerCase();
  let count = 0;
  for (const item of items) {
    const { set: ofSet, outcomes, changed: hasChanged } = item.dataset;
    const show =
      (!set.value || ofSet === set.value) &&
      (!outcome.value || outcomes.split(" ").includes(outcome.value)) &&
      (!changed.checked || hasChanged === "yes") &&
      (!wanted || textOf(item).includes(wanted));
    item.hidden = !show;
    count += show;
  }
  shown.textContent = `${count} of ${items.length} prompts`;
}

if (form) {
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
}
