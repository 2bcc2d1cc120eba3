"use strict";
(() => {
  const form = document.getElementById("filter");
  if (!form) return;
  const find = document.getElementById("find");
  const change = document.getElementById("change");
  const shown = document.getElementById("shown");
  const samples = [...document.querySelectorAll(".sample")].map((element) => ({
    element,
    text: [...element.querySelectorAll(".text")].map((part) => part.textContent.toLowerCase()).join("\n"),
  }));
  const update = () => {
    const words = find.value.trim().toLowerCase();
    let count = 0;
    for (const { element, text } of samples) {
      const keep = text.includes(words) && (!change.value || element.dataset.change === change.value);
      element.hidden = !keep;
      count += keep;
    }
    shown.value = `${count} of ${samples.length} shown`;
  };
  form.hidden = false;
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
})();
