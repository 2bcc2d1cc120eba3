"use strict";
(() => {
  const form = document.getElementById("filter");
  if (!form) return;
  const [find, who, outcome, order, shown, list] = ["find", "who", "outcome", "order", "shown", "answers"].map((id) =>
    document.getElementById(id),
  );
  const samples = [...document.querySelectorAll(".sample")].map((element, place) => ({
    element,
    place,
    facts: JSON.parse(element.dataset.facts),
    text: [...element.querySelectorAll(".text")].map((part) => part.textContent.toLowerCase()).join("\n"),
  }));
  const OUTCOMES = {
    won: (facts, run) => facts.gains[run] !== null && facts.gains[run] > 0,
    lost: (facts, run) => facts.gains[run] !== null && facts.gains[run] < 0,
    even: (facts, run) => facts.gains[run] === 0,
    changed: (facts, run) => facts.changed[run],
  };
  const runs = (facts) => (who.value === "" ? facts.scores.map((_, run) => run) : [Number(who.value)]);
  const mean = (facts, column) => {
    const values = runs(facts).map((run) => facts[column][run]).filter((value) => value !== null);
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
  };
  const sorted = () => {
    const [, column, sign] = order.value.match(/^([a-z]+)(-?1)?$/);
    if (!sign) return samples;
    const keyed = samples.map((sample) => ({ sample, key: mean(sample.facts, column) }));
    keyed.sort((one, other) => {
      if (one.key === null || other.key === null) return (one.key === null) - (other.key === null);
      return Number(sign) * (one.key - other.key) || one.sample.place - other.sample.place;
    });
    return keyed.map(({ sample }) => sample);
  };
  const update = () => {
    const words = find.value.trim().toLowerCase();
    const fits = OUTCOMES[outcome.value];
    let count = 0;
    for (const { element, facts, text } of samples) {
      const keep = text.includes(words) && (!fits || runs(facts).some((run) => fits(facts, run)));
      element.hidden = !keep;
      count += keep;
    }
    shown.value = `${count} of ${samples.length} shown`;
  };
  form.hidden = false;
  form.addEventListener("input", (event) => {
    if (event.target === order || event.target === who) list.append(...sorted().map(({ element }) => element));
    update();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
})();
