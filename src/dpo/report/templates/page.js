"use strict";
// Samples: filtered by words, model, temperature and verdict. Texts of models become text nodes,
// never markup.
const data = document.getElementById("samples-data");
if (data) browse(JSON.parse(data.textContent));

function browse(samples) {
  const atOnce = 10;
  const list = document.getElementById("samples-list");
  const more = document.getElementById("more");
  const inputs = ["query", "model-filter", "temperature-filter", "verdict-filter"]
    .map((id) => document.getElementById(id));
  let found = [];
  let numShown = 0;

  function valueOf(input) {
    return input ? input.value : "";
  }

  function update() {
    const [query, model, temperature, verdict] = inputs.map(valueOf);
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    found = [];
    for (const sample of samples) {
      const answers = sample.responses.filter((r) => !r.given
        && (!model || r.name === model)
        && (!temperature || r.temperature === temperature));
      if (verdict && !answers.some((r) => r.verdict === verdict)) continue;
      const given = sample.responses.filter((r) => r.given);
      if (!answers.length) continue;
      const responses = [...given, ...answers];
      const text = [sample.prompt, ...responses.map((r) => r.text)].join("\n").toLowerCase();
      if (words.every((word) => text.includes(word))) found.push({ prompt: sample.prompt, responses });
    }
    list.replaceChildren();
    numShown = 0;
    showMore();
  }

  function showMore() {
    for (const sample of found.slice(numShown, numShown + atOnce)) list.append(article(sample));
    numShown = Math.min(numShown + atOnce, found.length);
    more.hidden = numShown >= found.length;
    document.getElementById("count").textContent =
      `${numShown} of ${found.length} prompts shown` +
      (found.length < samples.length ? `, of ${samples.length} in the page.` : ".");
  }

  function article(sample) {
    const grid = element("div", "responses");
    for (const response of sample.responses) grid.append(card(response));
    const prompt = element("p", "prompt", sample.prompt);
    prompt.dir = "auto";
    const whole = element("article", "sample");
    whole.append(prompt, grid);
    return whole;
  }

  function card(response) {
    const head = element("h3", "", response.name);
    if (response.temperature) head.append(element("span", "temperature", ` at ${response.temperature}`));
    if (response.verdict) head.append(element("span", `verdict-${response.verdict}`, response.verdict));
    const text = element("p", "text", response.text || "(empty)");
    text.dir = "auto";
    if (!response.text) text.className = "text empty";
    const whole = element("div", response.given ? "response given" : "response");
    whole.append(head, text);
    if (response.note) whole.append(element("p", "note", response.note));
    return whole;
  }

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  for (const input of inputs) if (input) input.addEventListener("input", update);
  more.addEventListener("click", showMore);
  const form = document.querySelector(".filters");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  update();
}
