"use strict";

const part = (id) => document.getElementById(id);
const answers = { 1: "first", 2: "second", 0: "equal" };
// A tab is one person's, and another tab may be somebody else's; an address that ends in #name=NAME begins as NAME.
let person = new URLSearchParams(location.hash.slice(1)).get("name") || sessionStorage.getItem("person");
let question = null;
let answered = 0;
let busy = false;

function note(text) {
  part("note").textContent = text;
}

function enable() {
  for (const button of document.querySelectorAll("#ask button[data-answer]")) button.disabled = busy || !question;
  part("undo").disabled = busy || answered === 0;
}

function showPicture(id, name) {
  const button = part(id);
  const picture = button.querySelector("img");
  button.classList.remove("missing");
  picture.onerror = () => {
    button.classList.add("missing");
    note("A picture cannot be loaded. Load the page again for another question.");
    question = null;
    enable();
  };
  picture.onload = () => picture.classList.toggle("small", picture.naturalWidth < 256);
  picture.src = `pictures/${encodeURIComponent(name)}`;
}

function show(told) {
  question = told.question;
  answered = told.answered;
  part("who").hidden = true;
  part("ask").hidden = false;
  part("person").textContent = person;
  part("count").textContent = `${answered} of ${told.goal}`;
  part("bar").max = told.goal;
  part("bar").value = Math.min(answered, told.goal);
  part("agree").textContent = told.repeated
    ? `Asked again, you gave the same answer ${told.same} of ${told.repeated} times.` : "";
  part("pair").hidden = !question;
  part("equal").hidden = !question;
  if (question) {
    part("prompt").textContent = question.prompt;
    showPicture("first", question.first);
    showPicture("second", question.second);
  } else {
    part("prompt").textContent = "No more questions";
  }
  const done = answered >= told.goal ? "That is all that was asked for. You may go on, or close the page." : "";
  note(told.why || done);
}

async function send(path, body) {
  if (busy) return;
  busy = true;
  enable();
  try {
    const options = body && {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    };
    const response = await fetch(path, options || {});
    const told = await response.json();
    if (response.ok || response.status === 409) {
      show(told);
      if (response.status === 409) note("That question was answered already, maybe in another tab; this is the next one.");
    } else {
      note(told.detail || `The server answers ${response.status}.`);
    }
  } catch {
    note("The server does not answer, and your last answer may not be stored. Once it runs again, load the page anew.");
  } finally {
    busy = false;
    enable();
  }
}

function load() {
  if (person) {
    send(`question?person=${encodeURIComponent(person)}`);
  } else {
    part("ask").hidden = true;
    part("who").hidden = false;
    part("name").focus();
  }
}

function answer(choice) {
  if (question) send("answer", { person, number: question.number, answer: choice });
}

function undo() {
  if (answered) send("undo", { person, number: answered });
}

part("who").addEventListener("submit", (event) => {
  event.preventDefault();
  person = part("name").value.trim().replace(/\s+/g, " ");
  if (!person) return;
  sessionStorage.setItem("person", person);
  load();
});
part("leave").addEventListener("click", () => {
  sessionStorage.removeItem("person");
  history.replaceState(null, "", location.pathname);
  person = question = null;
  note("");
  load();
});
for (const button of document.querySelectorAll("[data-answer]")) {
  button.addEventListener("click", () => answer(button.dataset.answer));
}
part("undo").addEventListener("click", undo);
document.addEventListener("keydown", (event) => {
  if (part("ask").hidden || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key in answers) answer(answers[event.key]);
  else if (event.key === "u") undo();
  else return;
  event.preventDefault();
});
load();
