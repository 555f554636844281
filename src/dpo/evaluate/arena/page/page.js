"use strict";

// What the server says is the truth: this page shows it, and says what was chosen.
// Texts of models go through textContent alone, so nothing in them is markup.

const KEYS = {
  ArrowLeft: "left", 1: "left",
  ArrowRight: "right", 2: "right",
  ArrowDown: "tie", 0: "tie",
  u: "undo", s: "skip",
};

const at = (id) => document.getElementById(id);
let pair = null;
let waiting = false;

function show(state) {
  pair = state.pair;
  const finished = pair === null;
  at("judging").hidden = finished;
  at("finished").hidden = !finished;
  at("choices").hidden = false;
  at("error").hidden = true;
  at("title").textContent = finished ? "All judged" : "Which answer is better?";
  at("count").textContent = count(state);
  at("bar").max = Math.max(1, state.total);
  at("bar").value = state.total ? state.done : 1;
  for (const button of document.querySelectorAll("button")) {
    const choice = button.dataset.choice;
    button.hidden = finished && choice !== "undo";
    button.setAttribute("aria-disabled", String(button.hidden || (choice === "undo" && !state.done)));
  }
  if (finished) {
    list(state.summary);
  } else {
    for (const part of ["prompt", "left", "right"]) at(part).textContent = readable(pair[part]);
  }
  window.scrollTo(0, 0);
  at("title").focus({ preventScroll: true }); // a screen reader goes on with the new pair
}

// Nothing but white space looks like nothing: the style sheet writes "(empty)" there.
function readable(text) {
  return text.trim() ? text : "";
}

function count(state) {
  const place = state.pair === null ? `${state.done} judged` : `${state.done + 1} of ${state.total}`;
  return state.identical ? `${place} · ${state.identical} identical, not shown` : place;
}

function list(summary) {
  at("summary").replaceChildren(...summary.flat().map((text, i) => {
    const item = document.createElement(i % 2 ? "dd" : "dt");
    item.textContent = text;
    return item;
  }));
}

async function ask(name, body) {
  if (waiting) return;
  waiting = true;
  try {
    const options = body && {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    };
    const response = await fetch(name, options);
    const answer = await response.json();
    if (response.ok) {
      show(answer);
    } else {
      const now = await fetch("state"); // another window may have gone on
      if (now.ok) show(await now.json());
      complain(answer.error);
    }
  } catch {
    complain("The arena does not answer: it was stopped. What was judged is in its file.");
  } finally {
    waiting = false;
  }
}

function complain(text) {
  at("error").textContent = text;
  at("error").hidden = false;
}

function choose(choice) {
  const button = document.querySelector(`button[data-choice="${choice}"]`);
  if (button.getAttribute("aria-disabled") === "true") return;
  if (choice === "undo") ask("undo", {});
  else ask("judge", { pair: pair.id, choice });
}

document.addEventListener("keydown", (event) => {
  const choice = KEYS[event.key];
  if (!choice || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  if (!event.repeat) choose(choice); // a key held down is one verdict
});

at("choices").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) choose(button.dataset.choice);
});

ask("state");
